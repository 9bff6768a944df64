# SPDX-License-Identifier: Apache-2.0
"""What several adapters share."""

import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce_params
from mmengine.model import BaseTTAModel, is_model_wrapper
from safetensors import SafetensorError
from torch import nn

__all__ = [
    'RunError',
    'check_finite',
    'check_init',
    'mix_seeds',
    'replacing',
    'seed_everything',
    'share_buffers',
    'unwrap',
]


class RunError(RuntimeError):
    """What stops a run, in a sentence for whom it stops."""

    def __init__(self, message: str) -> None:
        # A DataLoader puts a worker's traceback before it, and mmengine's registries the name of what they build.
        super().__init__(re.sub(r'^class `\w+` in \S+: ', '', message.rpartition('RunError: ')[2].strip()))


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside what distributes it or merges its predictions."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def mix_seeds(*numbers: int) -> int:
    """One seed of 32 bits that depends on each of several non-negative numbers and on their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and PyTorch's global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def check_init(name: str, pretrained: bool, init_cfg: dict[str, Any] | None) -> None:
    """Refuse what a model cannot start from.

    Raises:
        ValueError: With the name of what was asked for it.
    """
    if init_cfg is not None and (init_cfg.get('type') != 'Pretrained' or 'checkpoint' not in init_cfg):
        raise ValueError(f"{name}: init_cfg must be dict(type='Pretrained', checkpoint=FILE), got {init_cfg}.")
    if not isinstance(pretrained, bool) or pretrained and init_cfg is not None:
        raise ValueError(
            f'{name}: pretrained must be True or False, and False where init_cfg names a file, got {pretrained!r}.'
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, whose file takes the place of another as a whole or, at an error, not at all.

    Raises:
        RunError: The file cannot be written.
    """
    temporary = path.with_name(f'{path.name}.tmp')
    try:
        yield temporary
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        os.umask(umask := os.umask(0))
        os.chmod(temporary, 0o666 & ~umask)  # safetensors writes for the owner alone
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # by who writes
        temporary.unlink(missing_ok=True)
        raise RunError(f'{path} cannot be written: {error}') from error


def check_finite(model: nn.Module, path: Path) -> None:
    """Refuse to write parameters that are not finite, as a gradient makes them that is not, at a loss that still is.

    Raises:
        RunError: With the first of them.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise RunError(f'{name} is not finite: {path} is not written')


def share_buffers(*models: nn.Module) -> None:
    """Average the statistics of batch norms over all processes, so that each has what the first will save."""
    for model in models:
        all_reduce_params([buffer for buffer in model.buffers() if buffer.is_floating_point()], op='mean')
