# SPDX-License-Identifier: Apache-2.0
"""Files of arrays, HDF5 and those of PyTorch and NumPy, opened without reading their numbers."""

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import torch
from torch import Tensor

from ..weights.archive import Stored, open_archive

__all__ = ['SUFFIXES', 'Array', 'Attributes', 'Content', 'number', 'open_content']

Attributes = Mapping[str, Any]

_NUMBERS = 'iuf'  # NumPy's kinds of dtypes that are read
_DEPTH = 4  # of groups in a file, whose links may go in circles
_PART = 1 << 18  # numbers that are converted at a time, or all of them would be there twice


@dataclass(frozen=True)
class Array:
    """An array of numbers in a file that is open.

    Args:
        shape: Its shape.
        load: Function that reads the numbers, as float32 or int64.
        attributes: What is noted of it.
    """

    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    attributes: Attributes = field(default_factory=dict)


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Args:
        path: The file.
        arrays: Its arrays by name, those of a group in HDF5 as GROUP/NAME; '' for one without a name.
        attributes: Texts and single numbers by name.
        others: What else there is, in words, by name.
    """

    path: Path
    arrays: dict[str, Array] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """Names and shapes of all that there is, or of the first ten."""
        said = [f'{name or "an array"} {array.shape}' for name, array in self.arrays.items()]
        said += [f'{name} ({other})' if name else other for name, other in self.others.items()]
        return ', '.join(said[:10]) + (f' and {len(said) - 10} more' if len(said) > 10 else '') or 'nothing'


@contextmanager
def open_content(path: Path) -> Iterator[Content]:
    """Open a file whose suffix is one of SUFFIXES; its arrays can be loaded while it is open.

    Raises:
        ValueError: The file, or later an array, cannot be read.
    """
    if path.suffix.lower() not in _READERS:
        raise ValueError(f'{path.name} must be a file of {", ".join(SUFFIXES)}, got {path.suffix or "no suffix"}.')
    read, kind = _READERS[path.suffix.lower()]
    with ExitStack() as stack:
        with _reading(path, kind):
            content = read(path, stack)
        yield content


def number(attributes: Attributes, key: str) -> float | None:
    """A positive number among the attributes, the first one of an array; None where there is none."""
    try:
        value = float(np.ravel(attributes[key])[0])
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return value if 0 < value < math.inf else None


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # of many kinds, as a file may be damaged anywhere
        why = f': {error}' if isinstance(error, OSError) else f' ({type(error).__name__}).'
        raise ValueError(f'{path.name} cannot be read as {kind}{why}') from error


def _array(path: Path, kind: str, shape: Sequence[int], load: Callable[[], Tensor], attributes: Attributes) -> Array:
    def load_or_say() -> Tensor:
        with _reading(path, kind):
            return load()

    return Array(tuple(shape), load_or_say, attributes)


def _read_h5(path: Path, stack: ExitStack) -> Content:
    file = stack.enter_context(h5py.File(path))
    content = Content(path, attributes=dict(file.attrs))

    def load(data: h5py.Dataset) -> Tensor:
        array = np.empty(data.shape, _kept(data.dtype))
        if data.size:
            data.read_direct(array)  # which converts on the way, without a second array
        return torch.from_numpy(array)

    def walk(group: h5py.Group, prefix: str, depth: int) -> None:
        for key in group:
            item, name = group.get(key), f'{prefix}{key}'
            if isinstance(item, h5py.Group):
                if depth < _DEPTH and len(item):
                    walk(item, f'{name}/', depth + 1)
                else:
                    content.others[name] = 'a group'
            elif not isinstance(item, h5py.Dataset) or item.shape is None:
                content.others[name] = 'a link to nothing' if item is None else 'empty'
            elif not item.shape:
                content.attributes[name] = item[()]
                content.others[name] = f'a single {item.dtype}'
            elif item.dtype.kind not in _NUMBERS:
                content.others[name] = f'an array {item.shape} of {item.dtype}'
            else:
                content.arrays[name] = _array(path, 'HDF5', item.shape, partial(load, item), dict(item.attrs))

    walk(file, '', 0)
    return content


def _read_pt(path: Path, stack: ExitStack) -> Content:
    value, load, _ = open_archive(stack.enter_context(open(path, 'rb')))
    content = Content(path)

    def load_rows(rows: Sequence[Stored], shape: tuple[int, int]) -> Tensor:
        tensor, start = torch.empty(shape), 0
        for stored in rows:
            part = load(stored).reshape(-1, shape[1])
            tensor[start : start + len(part)] = part
            start += len(part)
        return tensor

    def load_one(stored: Stored) -> Tensor:
        tensor = load(stored)
        return tensor.float() if tensor.is_floating_point() else tensor.long()

    def add(name: str, value: Any) -> None:
        if isinstance(value, Stored):  # which is a tuple, too
            content.arrays[name] = _array(path, 'tensors', value.size, partial(load_one, value), {})
        elif isinstance(value, str | int | float):
            content.attributes[name] = value
        elif isinstance(value, list | tuple) and value and all(isinstance(row, Stored) for row in value):
            widths = {row.size[-1] if row.size else 0 for row in value}
            if len(widths) > 1 or not all(row.dtype.is_floating_point for row in value):
                content.others[name] = f'a list of {len(value)} tensors of several widths, or of whole numbers'
                return
            shape = (sum(math.prod(row.size[:-1]) for row in value), widths.pop())
            content.arrays[name] = _array(path, 'tensors', shape, partial(load_rows, value, shape), {})
        else:
            content.others[name] = 'a list' if isinstance(value, list | tuple) else 'an object'

    if isinstance(value, dict):
        for key, entry in dict.items(value):
            add(str(key), entry)
    else:
        add('', value)
    return content


def _read_npy(path: Path, stack: ExitStack) -> Content:
    content = Content(path)
    _add_numpy(content, '', partial(open, path, 'rb'))
    return content


def _read_npz(path: Path, stack: ExitStack) -> Content:
    content, archive = Content(path), stack.enter_context(zipfile.ZipFile(path))
    for name in archive.namelist():
        _add_numpy(content, name.removesuffix('.npy'), partial(archive.open, name))
    return content


def _add_numpy(content: Content, name: str, open_stream: Callable[[], Any]) -> None:
    """Add what a stream in NumPy's format holds; objects, which would be pickled, are not read."""

    def read_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = np.lib.format.read_magic(stream)
        headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        return headers[version](stream)

    with open_stream() as stream:
        shape, by_column, dtype = read_header(stream)
    if dtype.kind not in _NUMBERS:
        content.others[name] = f'an array {shape} of {dtype}'
        return

    def load() -> Tensor:
        array: np.ndarray = np.empty(shape[::-1] if by_column else shape, _kept(dtype))
        numbers = array.reshape(-1)
        with open_stream() as stream:
            read_header(stream)
            for start in range(0, len(numbers), _PART):
                part = numbers[start : start + _PART]
                part[:] = np.frombuffer(stream.read(part.size * dtype.itemsize), dtype)
        return torch.from_numpy(array.T if by_column else array)

    content.arrays[name] = _array(content.path, 'an array of NumPy', shape, load, {})


def _read_json(path: Path, stack: ExitStack) -> Content:
    array = np.asarray(json.loads(path.read_text()))
    content = Content(path)
    if array.dtype.kind in _NUMBERS:
        content.arrays[''] = Array(array.shape, lambda: torch.from_numpy(array.astype(_kept(array.dtype))))
    else:
        content.others[''] = 'no list of numbers'
    return content


def _kept(dtype: np.dtype) -> type:
    return np.float32 if dtype.kind == 'f' else np.int64


_READERS: dict[str, tuple[Callable[[Path, ExitStack], Content], str]] = {
    '.h5': (_read_h5, 'HDF5'),
    '.hdf5': (_read_h5, 'HDF5'),
    '.h5ad': (_read_h5, 'HDF5'),
    '.pt': (_read_pt, 'tensors'),
    '.pth': (_read_pt, 'tensors'),
    '.npy': (_read_npy, 'an array of NumPy'),
    '.npz': (_read_npz, 'arrays of NumPy'),
    '.json': (_read_json, 'JSON'),
}
SUFFIXES = tuple(suffix for suffix in _READERS if suffix != '.json')  # of files that may hold features
