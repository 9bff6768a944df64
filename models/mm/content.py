# SPDX-License-Identifier: Apache-2.0
"""All that a checkpoint holds, made anew from what the file says, without running what it may hold."""

import functools
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor

from ..files import printable
from ..weights.archive import Refused, Stored, open_archive
from ..weights.checksum import read_safetensors
from ..weights.read import check_names, is_safetensors, refusing

__all__ = ['read_content', 'read_entries']


class _Noted:
    """What a file notes of an object of NumPy's or mmengine's, of which `_Plain` makes a new one."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dtype(_Noted):
    def make(self) -> np.dtype:
        code = self.args[0]
        if not re.fullmatch(r'[biuf]\d+|U\d+', code):
            raise Refused('one with an array of what are neither numbers nor texts')
        return np.dtype(code).newbyteorder(self.state[1] if self.state else '=')


class _Array(_Noted):
    def make(self) -> np.ndarray:
        _, shape, dtype, by_columns, data = self.state
        numbers = np.frombuffer(data, dtype.make()) if data else np.empty(0, dtype.make())
        return numbers.reshape(shape, order='F' if by_columns else 'C')


class _Counter(_Noted):
    pass


class _History(_Noted):
    pass


def _known() -> dict[str, Any]:
    """What a training checkpoint may hold beside tensors and plain containers; none does harm, however it is called."""

    @functools.cache  # so that a text which is encoded again and again takes no more memory than once
    def encode(text: str, encoding: str) -> bytes:
        return text.encode(encoding)

    def scalar(dtype: _Dtype, data: bytes) -> np.generic:
        return np.frombuffer(data, dtype.make(), 1)[0]

    return {
        '_codecs.encode': encode,
        'builtins.bytes': lambda: b'',  # as which nothing else is written
        'builtins.complex': complex,
        'builtins.frozenset': frozenset,
        'builtins.set': set,
        'collections.Counter': _Counter,  # of a schedule's milestones
        'mmengine.logging.history_buffer.HistoryBuffer': _History,
        'numpy.dtype': _Dtype,
        'numpy.ndarray': None,  # an argument of _reconstruct, of which there is but one
        **{f'numpy.{core}.multiarray._reconstruct': _Array for core in ('core', '_core')},
        **{f'numpy.{core}.multiarray.scalar': scalar for core in ('core', '_core')},
        'torch.device': torch.device,
        'torch.Size': torch.Size,
    }


class _Unknown(Refused):
    """A file holds an object of a class that is none of ours."""


class _Plain:
    """Makes anew what a file holds, without its classes and attributes; what is shared stays so.

    Args:
        load: Function that makes the tensor of a `Stored`.
        device: Device of the tensors.
    """

    _ATOMS = (str, bytes, int, float, complex, type(None), np.generic, torch.dtype, torch.device, torch.Size)

    def __init__(self, load: Callable[[Stored], Tensor], device: str | torch.device) -> None:
        self.load, self.device = load, device
        self.made: dict[int, Any] = {}
        self.under_way: set[int] = set()

    def __call__(self, value: Any, where: str) -> Any:
        if isinstance(value, self._ATOMS):
            return value
        if id(value) in self.under_way:
            raise Refused(f'one in which {printable(where)} holds itself')
        if id(value) not in self.made:
            self.under_way.add(id(value))
            try:
                self.made[id(value)] = self._make(value, where)
            finally:
                self.under_way.remove(id(value))
        return self.made[id(value)]

    def _make(self, value: Any, where: str) -> Any:
        if isinstance(value, Stored):
            return self.load(value).to(self.device)
        if isinstance(value, _Array):
            return value.make()
        if isinstance(value, _Counter):
            return Counter(self(dict(*value.args), where))
        if isinstance(value, _History):
            return self._history(value.state, where)
        if isinstance(value, dict):
            return self._dict(value, where)
        if isinstance(value, (list, tuple, set, frozenset)):
            return type(value)([self(item, where) for item in value])
        raise _Unknown(f'one that holds {type(value).__name__} as {printable(where) or "its content"}')

    def _dict(self, value: dict[Any, Any], where: str) -> dict[Any, Any]:
        made: dict[Any, Any] = OrderedDict() if isinstance(value, OrderedDict) else {}
        for key, item in dict.items(value):  # its own methods could be anything
            if isinstance(key, str) and not key.isprintable():
                raise Refused(f'one with the key {printable(key[:40])!r}')
            made[self(key, f'a key of {where}')] = self(item, f'{where}.{key}' if where else str(key))
        versions = getattr(value, '_metadata', None)  # of the modules, which load_state_dict reads
        if isinstance(versions, dict):
            made._metadata = self(versions, f'{where}._metadata')  # type: ignore[attr-defined]  # torch's own
        return made

    def _history(self, state: dict[str, Any], where: str) -> HistoryBuffer:
        values, counts = (self(state[key], where) for key in ('_log_history', '_count_history'))
        if not all(isinstance(array, np.ndarray) and array.dtype.kind in 'iuf' for array in (values, counts)):
            raise Refused(f'one in which {printable(where)} is no history of numbers')
        history = HistoryBuffer(max_length=int(state['max_length']))
        history.__setstate__(dict(_log_history=values, _count_history=counts))
        return history


def read_content(path: Path) -> Any:
    """The content of a .pth file of a training: plain values, tensors on the CPU, arrays and mmengine's histories.

    All of it is checked by the archive's checksums.

    Raises:
        ValueError: The file is damaged, is something else, or holds objects of other classes.
    """
    with refusing(path, 'cannot be read: it must be a .pth file of a training'), open(path, 'rb') as file:
        content, load, checked = open_archive(file, _known())
        if not checked:
            raise Refused('one without checksums, as PyTorch before 1.6 wrote it')
        return _Plain(load, 'cpu')(content, '')


def read_entries(path: Path, device: str | torch.device = 'cpu') -> tuple[Any, list[str]]:
    """The content of a file as `read_content` gives it, but for the entries that hold objects of other classes.

    Args:
        path: A .safetensors file, whose tensors become the entry state_dict, or one that `torch.save` wrote.
        device: Device of the tensors.

    Returns:
        The content; and the keys of the entries that were left out, which is none in the checkpoint of a training by
        mmengine, as it could not be resumed without them.

    Raises:
        ValueError: The file cannot be read safely.
    """
    with refusing(path):
        if is_safetensors(path):
            tensors, _ = read_safetensors(path)
            check_names(tensors)
            return dict(state_dict={name: value.to(device) for name, value in tensors.items()}, meta={}), []
        with open(path, 'rb') as file:
            content, load, _ = open_archive(file, _known())
            plain = _Plain(load, device)
            if not isinstance(content, dict) or 'message_hub' in content:
                return plain(content, ''), []
            left_out = []
            for key, value in list(dict.items(content)):
                try:
                    plain(value, str(key))
                except _Unknown:
                    dict.pop(content, key)
                    left_out.append(printable(str(key)))
            return plain(content, ''), left_out
