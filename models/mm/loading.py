# SPDX-License-Identifier: Apache-2.0
"""Weights into whole detectors and segmentors; and our reader in the place of mmengine's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import PretrainedInit
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as loaders
from torch import Tensor, nn

from ..files import state_of
from ..weights import unfit_numbers
from .content import read_entries
from .features import TimmFeatures, take_other_names
from .sources import local_file, log_changes, naming, read_weights

__all__ = ['install', 'load_whole', 'without_pretrained']


def load_whole(model: nn.Module, source: str | Path, start: bool = False) -> None:
    """Load the weights of a whole detector or segmentor, and name what does not fit.

    Args:
        model: The model.
        source: What `local_file` takes.
        start: Whether a training starts from the weights: then tensors that another number of classes has given
            another shape stay as they are in the model, which the log says of each, and a backbone for images of other
            channels is fitted to weights for three.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read safely, or belongs to another model.
    """
    tensors, _ = read_weights(source)
    parts = {f'{name}.': part for name, part in model.named_modules() if isinstance(part, TimmFeatures)}
    with naming(source):
        fitted = [take_other_names(part, tensors, prefix, adapt=start) for prefix, part in parts.items()]
    own = model.state_dict()
    if start:
        changed = _changed_heads(tensors, own, (*parts, 'backbone.', 'neck.'))
        log_changes(source, ', '.join(filter(None, fitted)), changed, tensors, own)
        tensors.update({name: own[name] for name in changed})
    problems = unfit_numbers(tensors, own, 3)
    if problems:
        raise ValueError(f'checkpoint {source} must hold the weights of this model, got {problems}.')
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        more = f' and {len(lines) - 3} more' if len(lines) > 3 else ''
        raise ValueError(
            f'checkpoint {source} must hold the weights of this model, got {" ".join(lines[:3])}{more}.'
        ) from error


def _changed_heads(tensors: dict[str, Tensor], own: dict[str, Tensor], kept: tuple[str, ...]) -> list[str]:
    """Names of heads' tensors whose first size differs, as by the number of classes, unless they are most of all."""
    changed = [
        name
        for name, value in tensors.items()
        if name in own
        and not name.startswith(kept)
        and value.shape != own[name].shape
        and value.ndim == own[name].ndim
        and value.shape[1:] == own[name].shape[1:]
    ]
    if 2 * sum(own[name].numel() for name in changed) > sum(value.numel() for value in own.values()):
        return []  # the strict load refuses the file
    return changed


@contextmanager
def without_pretrained(model: nn.Module, given: bool = True) -> Iterator[None]:
    """Let the parts of a model initialise themselves without files, for as long as the context lasts.

    Args:
        model: The model.
        given: Whether this is asked for, as a file for the whole model is loaded afterwards.
    """
    before: list[tuple[nn.Module, str, Any]] = []
    for part in model.modules() if given else ():
        cfgs = getattr(part, 'init_cfg', None) or ()
        others = [cfg for cfg in ([cfgs] if isinstance(cfgs, dict) else cfgs) if not _is_pretrained(cfg)]
        for name, value in dict(pretrained=False, init_cfg=others or None).items():
            if getattr(part, name, None):
                before.append((part, name, getattr(part, name)))
                setattr(part, name, value)
    try:
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


def _is_pretrained(init_cfg: dict[str, Any]) -> bool:
    return init_cfg.get('type') in ('Pretrained', PretrainedInit)


# ---- in the place of mmengine's --------------------------------------------------------------------------------------


def install() -> None:
    """Let mmengine, and whoever loads by it, read checkpoints by our reader, for the whole process.

    Some releases of mmengine run the code of a file that PyTorch's weights-only reader refuses. Loaders that others
    have registered for prefixes of their own stay.
    """
    for prefix, loader in list(CheckpointLoader._schemes.items()):
        if loader.__module__ == loaders.__name__:
            CheckpointLoader.register_scheme(prefix, load_from_file, force=True)
    if loaders.load_state_dict.__module__ == loaders.__name__:
        loaders.load_state_dict = _checked(loaders.load_state_dict)
    if hasattr(loaders, '_safe_torch_load'):  # of onedl-mmengine, whose loaders can still be called by their names
        loaders._safe_torch_load = _load_weights


def load_from_file(
    filename: str, map_location: str | torch.device | Callable | None = None, **kwargs: Any
) -> Any:  # mmengine logs the last part of its name
    """The content of a checkpoint, as mmengine's loaders give it.

    Python that it notes, the config, is left out, as mmengine would run it; so are entries of unknown classes.

    Args:
        filename: What `local_file` takes.
        map_location: Device of the tensors, the CPU unless given by its name.
        kwargs: Options of mmengine's own loaders, which ours need not.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be fetched, or cannot be read safely.
    """
    device = map_location if isinstance(map_location, (str, torch.device)) else 'cpu'
    with local_file(filename) as path:
        if not path.is_file():
            raise FileNotFoundError(f'checkpoint {filename} {state_of(path)}.')
        content, left_out = read_entries(path, device)
    if not isinstance(content, dict):
        return content
    for entries in (content.get('meta'), (content.get('message_hub') or {}).get('runtime_info')):
        for key in ('cfg', 'config'):
            if isinstance(entries, dict) and entries.pop(key, None) is not None:
                left_out.append(f'its {key}')
    if left_out:
        print_log(f'Of {filename} {", ".join(left_out)} was left out.', logger='current')
    if filename.startswith('mmcls://'):
        return loaders._process_mmcls_checkpoint(content)
    return content


def _load_weights(file: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """torch.load, not tried again in a way that runs code where the weights-only reader refuses a file."""
    return torch.load(file, map_location=map_location, weights_only=weights_only is not False)


def _checked(load_state_dict: Callable[..., None]) -> Callable[..., None]:
    def checked(module: nn.Module, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        problems = unfit_numbers(state_dict, module.state_dict())
        if problems:
            raise ValueError(f'checkpoint must hold the weights of {type(module).__name__}, got {problems}.')
        load_state_dict(module, state_dict, *args, **kwargs)

    checked.__doc__ = load_state_dict.__doc__
    return checked
