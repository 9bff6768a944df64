# SPDX-License-Identifier: Apache-2.0
"""Small tools that several files of this folder share."""

import ipaddress
import os
import random
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from mmengine.dist import all_gather_object, all_reduce_params, broadcast_object_list, is_main_process
from mmengine.model import BaseTTAModel, is_model_wrapper
from safetensors import SafetensorError
from torch import nn

from .. import files

__all__ = [
    'RunError',
    'check_finite',
    'check_init',
    'check_interface',
    'count_cores',
    'in_all_processes',
    'in_first_process',
    'init_file',
    'mix_seeds',
    'replacing',
    'seed_everything',
    'share_buffers',
    'unwrap',
]


_T = TypeVar('_T')


class RunError(RuntimeError):
    """The reason why a run stops, in a sentence for its user."""

    def __init__(self, message: str) -> None:
        # A DataLoader puts a worker's traceback before it, and mmengine's registries the name of what they build.
        super().__init__(re.sub(r'^class `\w+` in \S+: ', '', message.rpartition('RunError: ')[2].strip()))


def unwrap(model: Any) -> Any:
    """The model inside the wrappers that distribute it or merge its predictions."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def count_cores() -> int:
    """The number of cores for this process, where torchrun started several on this machine its share of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))


def in_first_process(call: Callable[[], _T]) -> _T:
    """The result, in every process, of a call that the first one makes. Where it fails, it fails in every process.

    Raises:
        RunError: The call raised one, or an OSError or ValueError.
    """
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if is_main_process():
        try:
            outcome[0] = call()
        except Exception as error:
            failure, outcome[1] = error, str(error)
    broadcast_object_list(outcome)
    if failure is not None and not isinstance(failure, (OSError, RunError, ValueError)):
        raise failure
    if outcome[1] is not None:
        raise RunError(outcome[1]) from failure
    return outcome[0]


def in_all_processes(call: Callable[[], _T]) -> _T:
    """The result of a call that every process makes. Where it fails in one, it fails in every process.

    Raises:
        RunError: The call raised one, or an OSError or ValueError.
    """
    result, failure = None, None
    try:
        result = call()
    except (OSError, RunError, ValueError) as error:
        failure = error
    messages = all_gather_object(None if failure is None else str(failure))
    for message in messages:
        if message is not None:
            raise RunError(message) from failure
    return cast(_T, result)


def mix_seeds(*numbers: int) -> int:
    """One seed of 32 bits that depends on each of several non-negative numbers and on their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed the global random generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def check_init(name: str, pretrained: bool, init_cfg: dict[str, Any] | list[dict[str, Any]] | None) -> None:
    """Refuse weights that a model cannot start from.

    Args:
        name: Name of the model, for the error.
        pretrained: Whether it starts from timm's pretrained weights.
        init_cfg: Config of the file that it starts from, perhaps in a list.

    Raises:
        ValueError: init_cfg or pretrained is of another form, or both are given.
    """
    cfgs = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    if init_cfg is not None and not (
        len(cfgs) == 1 and isinstance(cfgs[0], dict) and cfgs[0].get('type') == 'Pretrained' and 'checkpoint' in cfgs[0]
    ):
        raise ValueError(
            f"{name}: init_cfg must be dict(type='Pretrained', checkpoint=FILE) or a list of one, got {init_cfg}."
        )
    if not isinstance(pretrained, bool) or pretrained and init_cfg is not None:
        raise ValueError(
            f'{name}: pretrained must be True or False, and False where init_cfg names a file, got {pretrained!r}.'
        )


def init_file(init_cfg: dict[str, Any] | list[dict[str, Any]]) -> str:
    """The file that an init_cfg names which `check_init` let pass."""
    return (init_cfg if isinstance(init_cfg, dict) else init_cfg[0])['checkpoint']


def check_interface() -> None:
    """Refuse to wait for other machines at an address that they cannot reach, as gloo would do for half an hour.

    Raises:
        RunError: The processes are on several machines, and the name of this one leads to no address for the others.
    """
    if os.environ.get('LOCAL_WORLD_SIZE') == os.environ.get('WORLD_SIZE') or 'GLOO_SOCKET_IFNAME' in os.environ:
        return
    name = socket.gethostname()
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except socket.gaierror:
        found = []
    for family, *_, address in found:
        with socket.socket(family) as listener:
            try:
                listener.bind(address)
            except OSError:  # an address of another machine
                continue
        if not ipaddress.ip_address(address[0]).is_loopback:
            return
        break
    raise RunError(
        f'GLOO_SOCKET_IFNAME must name the network interface that the other machines reach, as {name}, the name of '
        'this one, leads to no address of that kind.'
    )


@contextmanager
def replacing(path: Path, owner: str = '') -> Iterator[Path]:
    """A path to write to, as of `vssm.models.files.replacing`; a failure is a RunError, whose sentence is for the user.

    Args:
        path: The file that is to be there in the end.
        owner: Name of the run that writes it.

    Raises:
        RunError: The file cannot be written; one of that name stays as it was.
    """
    try:
        with files.replacing(path, owner=owner) as temporary:
            yield temporary
    except (OSError, RuntimeError, SafetensorError) as error:  # as Python, PyTorch and safetensors report it
        raise RunError(f'{path} cannot be written: {error}') from error


def check_finite(model: nn.Module, path: Path) -> None:
    """Refuse to write parameters that are not finite: a gradient may overflow while the loss is still finite.

    Raises:
        RunError: A parameter is not finite.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise RunError(f'{name} is not finite: {path} is not written')


def share_buffers(*models: nn.Module) -> None:
    """Average the statistics of batch norms over all processes, so that all have those which the first one saves."""
    for model in models:
        all_reduce_params([buffer for buffer in model.buffers() if buffer.is_floating_point()], op='mean')
