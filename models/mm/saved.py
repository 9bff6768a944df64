# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints, found, and read without running what they may hold."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from numpy._core import multiarray
from torch import Tensor

from ..files import state_of
from ..weights import read_structure, unfit_numbers
from .content import read_content

__all__ = ['allow_histories', 'numbered_checkpoints', 'read_notes', 'read_run', 'weights_in']


def _history_method(owner: Any, name: str) -> Any:
    """A stand-in for `getattr`, which gives a file nothing but the methods that mmengine's histories note."""
    if owner is not HistoryBuffer or name.startswith('_'):
        raise pickle.UnpicklingError(f'getattr of {owner!r}, {name!r}')
    return getattr(HistoryBuffer, name)


def allow_histories() -> None:
    """Let PyTorch's weights-only reader take training checkpoints of mmengine, for the whole process.

    Beside tensors and plain values they hold histories of what was logged, and NumPy's numbers. The scripts of mmdet
    and mmseg read these files themselves, so that only a setting of the process can let them pass.
    """
    numbers = [type(np.dtype(kind)) for kind in ('f8', 'f4', 'i8', 'i4', 'b1')]
    allowed = [HistoryBuffer, (_history_method, 'builtins.getattr'), np.ndarray, np.dtype, *numbers]
    for module in ('numpy._core.multiarray', 'numpy.core.multiarray'):  # the latter is that of NumPy 1
        allowed += [(multiarray._reconstruct, f'{module}._reconstruct'), (multiarray.scalar, f'{module}.scalar')]
    torch.serialization.add_safe_globals(allowed)


def read_run(path: str | Path) -> dict[str, Any]:
    """The training checkpoint that `save_checkpoint` of this or of mmengine's Runner wrote.

    Nothing that the file brings along is run or imported, and all that it holds is checked by its checksums.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, is no training checkpoint, would run code, or has weights that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'checkpoint {path} {state_of(path)}.')
    run = read_content(path)
    if not isinstance(run, dict) or not isinstance(run.get('meta', {}), dict):
        raise ValueError(f'checkpoint {path} must be one of a training, got one without entries.')
    missing = [key for key in ('meta', 'state_dict', 'message_hub', 'optimizer') if key not in run]
    missing += [f'meta.{key}' for key in ('epoch', 'iter', 'seed') if key not in run.get('meta', ())]
    if missing:
        raise ValueError(f'checkpoint {path} must be one of a training, with {", ".join(missing)}.')
    _check_weights(path, run)
    run['meta'].pop('config', None)  # Python that older Runners noted, which mmengine would run
    return run


def _check_weights(path: Path, run: dict[str, Any]) -> None:
    weights, averaged = run['state_dict'], run.get('ema_state_dict', {})
    for key, tensors in dict(state_dict=weights, ema_state_dict=averaged).items():
        if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise ValueError(f'checkpoint {path} must be one of a training, got one whose {key} are no tensors.')
    problems = unfit_numbers(averaged, {f'module.{name}': value for name, value in weights.items()})
    if problems:
        raise ValueError(f'checkpoint {path} must hold averages like its weights as ema_state_dict, got {problems}.')


def read_notes(path: str | Path) -> dict[str, Any]:
    """The texts and numbers that a training checkpoint notes under `meta`; empty where it has none.

    The numbers of its tensors are not read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read safely.
    """
    checkpoint = read_structure(path)
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    return {key: value for key, value in meta.items() if isinstance(value, str | int)} if type(meta) is dict else {}


def numbered_checkpoints(folder: str | Path, template: str) -> list[Path]:
    """The checkpoints in a folder, ordered by number.

    Args:
        folder: Where checkpoints are written.
        template: Name of their files, such as 'epoch_{}.pth'.
    """
    pattern = re.escape(template).replace(re.escape('{}'), r'(\d+)')
    found = [(re.fullmatch(pattern, path.name), path) for path in Path(folder).glob('*') if path.is_file()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def weights_in(folder: str | Path) -> list[str]:
    """The names of the files in a folder that hold weights."""
    return sorted(path.name for path in Path(folder).iterdir() if path.suffix in ('.pth', '.safetensors'))
