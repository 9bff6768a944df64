# SPDX-License-Identifier: Apache-2.0
"""Opens what `torch.save` wrote, without running what such a file may hold.

A pickle is a program, and training files carry optimizer states and configuration objects along with the weights. So a
file is read in two steps. The first unpickles its structure, in which a tensor is only a note of where its numbers lie,
and every other class is replaced by an inert one; nothing is imported. The second step reads the numbers that are asked
for, and compares them with the file's checksums.
"""

import functools
import io
import os
import pickle
import pickletools
import re
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..files import printable

__all__ = ['Inert', 'Refused', 'Stored', 'open_archive']


class Refused(Exception):
    """A file is refused; the message says what it holds in place of what it should, as it follows the word 'got'."""


class Inert:
    """Stands for every object of a pickle that is not needed: it can be built, called and filled, and does nothing."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> 'Inert':
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> 'Inert':
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def _take(self, value: Any) -> None:
        pass

    __setstate__ = append = extend = add = _take


class Stored(NamedTuple):
    """Where in a file a tensor lies. It is a tuple, so that a pickle cannot set its fields."""

    key: str
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


# The names of the standard library that honest files hold. They become inert, as all names of other packages do. Every
# other name of the standard library, such as os.system, is a sign of an attack, which is refused although it could do
# nothing.
_HARMLESS = re.compile(
    r'(argparse|collections|datetime|decimal|enum|fractions|pathlib(\._local)?|typing|uuid)\.\w+'
    r'|builtins\.(bool|bytearray|bytes|complex|dict|float|frozenset|getattr|int|list|object|range|set|slice|str|tuple)'
    r'|_codecs\.encode|copyreg\.(_reconstructor|__newobj__)|functools\.partial|types\.(MappingProxyType|SimpleNamespace)'
)

_STORAGES = {
    'BFloat16Storage': torch.bfloat16,
    'BoolStorage': torch.bool,
    'ByteStorage': torch.uint8,
    'CharStorage': torch.int8,
    'DoubleStorage': torch.float64,
    'FloatStorage': torch.float32,
    'HalfStorage': torch.float16,
    'IntStorage': torch.int32,
    'LongStorage': torch.int64,
    'ShortStorage': torch.int16,
}


# The types of numbers that a tensor in an untyped storage may have: only those whose numbers fill whole bytes.
_DTYPES = (
    'bfloat16 bool float16 float32 float64 float8_e4m3fn float8_e5m2 int8 int16 int32 int64 uint8 uint16 uint32 uint64'
).split()


class _Unpickler(pickle.Unpickler):
    """Reads the structure of a file that `torch.save` wrote, and imports nothing: every class but a tensor's is inert.

    All that it hands out is made anew for each file or cannot be changed, so that a file leaves no trace.
    """

    def __init__(self, file: BinaryIO, known: Mapping[str, Any]) -> None:
        super().__init__(file, encoding='utf-8')

        def rebuild(storage, offset, size, stride, *rest):
            return Stored(*storage, offset, size, stride)

        def rebuild_v3(storage, offset, size, stride, requires_grad, hooks, dtype, *rest):
            return Stored(storage[0], dtype, offset, size, stride)

        def parameter(data, *rest):
            return data

        def with_attributes(function, kind, args, state):
            return function(*args)

        self.dtypes: dict[str, torch.dtype] = {}  # of the storages that were referred to
        self.known = {
            'collections.OrderedDict': OrderedDict,
            'torch._tensor._rebuild_from_type_v2': with_attributes,
            'torch._utils._rebuild_parameter': parameter,
            'torch._utils._rebuild_parameter_with_state': parameter,
            'torch._utils._rebuild_tensor': rebuild,
            'torch._utils._rebuild_tensor_v2': rebuild,
            'torch._utils._rebuild_tensor_v3': rebuild_v3,
            'torch.storage.UntypedStorage': torch.uint8,
            **{f'torch.{name}': dtype for name, dtype in _STORAGES.items()},
            **{f'torch.{name}': getattr(torch, name) for name in _DTYPES},
            **known,
        }

    def find_class(self, module: str, name: str) -> Any:
        # torch.save writes the names of Python 2: __builtin__ and copy_reg.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full_name = f'{module}.{name}'
        if full_name in self.known:
            return self.known[full_name]
        if module.partition('.')[0] in sys.stdlib_module_names and not _HARMLESS.fullmatch(full_name):
            raise Refused(f'one that asks for {printable(full_name)}, which no weights need')
        return type(printable(full_name), (Inert,), {'__slots__': ()})

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        kind, dtype, key, _, _, *view = pid
        if kind != 'storage' or not isinstance(key, str) or any(view):
            raise Refused('one that refers to what is no storage')
        self.dtypes[key] = dtype
        return key, dtype


def open_archive(
    file: BinaryIO, known: Mapping[str, Any] | None = None
) -> tuple[Any, Callable[[Stored], Tensor], bool]:
    """The content of a file that `torch.save` wrote, with a `Stored` for each tensor.

    Args:
        file: The open file.
        known: Functions and classes that must do no harm whatever they are called with, by the names that a pickle
            asks for; all others are inert.

    Returns:
        The content; a function that makes the tensor of a `Stored`, on the CPU; and whether that function compares
        the numbers with checksums, which files of PyTorch before 1.6 have none of.

    Raises:
        Refused: The file is something else, or claims more memory than it holds.
        Exception: The file is malformed in any other way.
    """
    head = file.read(64).lstrip().lower()
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not size:
        raise Refused('an empty file')
    if head.startswith((b'<!doctype', b'<html')):
        raise Refused('a web page')
    if head.startswith(b'pk\3\4'):
        return *_open_zip(file, size, known or {}), True
    return *_open_legacy(io.BytesIO(file.read()), known or {}), False


_PART = 1 << 20


def _open_zip(file: BinaryIO, size: int, known: Mapping[str, Any]) -> tuple[Any, Callable[[Stored], Tensor]]:
    archive = zipfile.ZipFile(file)  # which checks what it reads by CRC-32
    records = {info.filename.partition('/')[2]: info for info in archive.infolist()}
    # torch.save does not compress, so that it wrote no record that is larger than the file.
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise Refused('one that is compressed')
    if sum(info.file_size for info in archive.infolist()) > size:
        raise Refused('one whose records claim more than it holds')
    if 'byteorder' in records and archive.read(records['byteorder']).decode() != sys.byteorder:
        raise Refused('one in the byte order of another machine')

    @functools.cache
    def storage(key: str) -> bytearray:
        info = records[f'data/{key}']
        data = bytearray(info.file_size)
        with archive.open(info) as record, memoryview(data) as view:  # in parts, or all of it would be there twice
            for start in range(0, len(data), _PART):
                view[start : start + _PART] = record.read(_PART)
        return data

    unpickler = _Unpickler(_program(io.BytesIO(archive.read(records['data.pkl']))), known)
    return unpickler.load(), lambda stored: _tensor(stored, storage(stored.key))


# What PyTorch before 1.6 wrote first, and writes with _use_new_zipfile_serialization=False.
_MAGIC = 0x1950A86A20F9469CFC6C


def _open_legacy(file: io.BytesIO, known: Mapping[str, Any]) -> tuple[Any, Callable[[Stored], Tensor]]:
    """Programs for a magic number, a version, the machine, the content and the keys of storages; then the storages."""
    if _Unpickler(_program(file), {}).load() != _MAGIC:
        raise Refused('one that torch.save did not write')
    _, machine = (_Unpickler(_program(file), {}).load() for _ in range(2))
    if machine['little_endian'] is not (sys.byteorder == 'little'):
        raise Refused('one in the byte order of another machine')
    unpickler = _Unpickler(_program(file), known)
    content = unpickler.load()
    storages = {}
    for key in _Unpickler(_program(file), {}).load():
        length = int.from_bytes(file.read(8), sys.byteorder) * unpickler.dtypes[key].itemsize
        storages[key] = bytearray(file.read(length))
        if len(storages[key]) != length:
            raise Refused('one that lacks its end')
    return content, lambda stored: _tensor(stored, storages[stored.key])


def _program(file: io.BytesIO) -> io.BytesIO:
    """The pickle that begins where a file stands, which it is then behind; one that needs vast memory is refused."""
    start, highest = file.tell(), 0
    for opcode, arg, _ in pickletools.genops(file):
        if opcode.name in ('PUT', 'LONG_BINPUT'):
            highest = max(highest, int(arg or 0))
    program = file.getbuffer()[start : file.tell()]
    if highest > len(program):  # each number up to it would take memory
        raise Refused('one that numbers more objects than it holds')
    return io.BytesIO(program)


def _tensor(stored: Stored, data: bytearray) -> Tensor:
    numbers = torch.frombuffer(data, dtype=stored.dtype) if data else torch.empty(0, dtype=stored.dtype)
    tensor = numbers.as_strided(stored.size, stored.stride, stored.offset)  # refuses to look beyond the storage
    # An expanded tensor takes hardly any room in a file, and any amount of it once it is copied.
    if tensor.numel() * tensor.element_size() > len(data):
        raise Refused('one in which a tensor claims more numbers than there are')
    return tensor
