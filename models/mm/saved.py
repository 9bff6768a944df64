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

__all__ = ['allow_histories', 'numbered_checkpoints', 'read_run']


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

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, is no training checkpoint, or would run code.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist.')
    try:
        run = torch.load(path, map_location='cpu', weights_only=True)
        missing = [key for key in ('meta', 'state_dict', 'message_hub', 'optimizer') if key not in run]
        missing += [f'meta.{key}' for key in ('epoch', 'iter', 'seed') if key not in run.get('meta', ())]
    except Exception as error:  # of many kinds, as a file may be damaged anywhere
        raise ValueError(f'checkpoint {path} cannot be read: {str(error).splitlines()[0]}') from error
    if missing:
        raise ValueError(f'checkpoint {path} must be one of a training, with {", ".join(missing)}.')
    run['meta'].pop('config', None)  # Python that older Runners noted, which mmengine would run
    return run


def numbered_checkpoints(work_dir: str | Path) -> list[Path]:
    """The files epoch_N.pth and iter_N.pth of a work dir, ordered by N."""
    found = [(re.fullmatch(r'(epoch|iter)_(\d+)\.pth', path.name), path) for path in Path(work_dir).glob('*.pth')]
    return [path for _, path in sorted((int(match[2]), path) for match, path in found if match)]
