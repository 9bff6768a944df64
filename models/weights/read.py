# SPDX-License-Identifier: Apache-2.0
"""Reads the weights of untrusted files without running what such a file may hold.

A pickle is a program, and training files carry optimizer states and configuration objects along with the weights. So a
file is read in two steps. The first unpickles its structure, in which a tensor is only a note of where its numbers lie,
and every other class is replaced by an inert one; nothing is imported. The second step reads the numbers of the weights
that were chosen.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

__all__ = ['WEIGHTS', 'pass_cfg_nodes', 'read_checkpoint', 'read_structure']

WEIGHTS = ('auto', 'model', 'model_ema')


def pass_cfg_nodes() -> None:
    """Let PyTorch's weights-only reader take yacs's configuration nodes, as plain dictionaries, for the whole process.

    Swin's trainer, and so VMamba's, Spatial-Mamba's and 2DMamba's, saves one beside the weights. timm reads the file of
    `timm.create_model(name, checkpoint_path=FILE)` itself, so that only a setting of the process can let it pass. A
    class that the user has named for these nodes is left in place.
    """
    name = 'yacs.config.CfgNode'
    for entry in torch.serialization.get_safe_globals():
        if (entry[1] if isinstance(entry, tuple) else f'{entry.__module__}.{entry.__qualname__}') == name:
            return
    torch.serialization.add_safe_globals([(OrderedDict, name)])


class _Refused(Exception):
    """A file is refused; the message says what it holds in place of weights, as it follows the word 'got'."""


class _Inert:
    """Stands for every object of a pickle that is no weight: it can be built, called and filled, and does nothing."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> '_Inert':
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> '_Inert':
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def _take(self, value: Any) -> None:
        pass

    __setstate__ = append = extend = add = _take


class _Stored(NamedTuple):
    """Where in an archive a tensor lies. It is a tuple, so that a pickle cannot set its fields."""

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

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding='utf-8')

        def rebuild(storage, offset, size, stride, *rest):
            return _Stored(*storage, offset, size, stride)

        def rebuild_v3(storage, offset, size, stride, requires_grad, hooks, dtype, *rest):
            return _Stored(storage[0], dtype, offset, size, stride)

        def parameter(data, *rest):
            return data

        def with_attributes(function, kind, args, state):
            return function(*args)

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
        }

    def find_class(self, module: str, name: str) -> Any:
        # torch.save writes the names of Python 2: __builtin__ and copy_reg.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full_name = f'{module}.{name}'
        if full_name in self.known:
            return self.known[full_name]
        if module.partition('.')[0] in sys.stdlib_module_names and not _HARMLESS.fullmatch(full_name):
            raise _Refused(f'one that asks for {full_name}, which no weights need')
        return type(full_name, (_Inert,), {'__slots__': ()})

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        kind, dtype, key, _, _ = pid
        if kind != 'storage':
            raise _Refused(f'one that refers to a {kind}')
        return key, dtype


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn every error that a malformed file causes in a reader into a ValueError of one sentence."""
    try:
        yield
    except Exception as error:
        # PyTorch's own words would advise to load the file without weights_only.
        got = error if isinstance(error, _Refused) else f'one that cannot be read as such ({type(error).__name__})'
        raise ValueError(
            f'checkpoint {path} must be a .safetensors file, or a .pth file as torch.save writes it, got {got}.'
        ) from error


def read_checkpoint(path: str | Path, which: str = 'auto') -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights in a file, under the file's own names, and the file's metadata.

    Nothing that the file brings along is run or imported. Of a .pth file only the chosen weights are read, and checked
    by the archive's checksums. Files from before PyTorch 1.6 are left to PyTorch's weights-only reader.

    Args:
        path: A .safetensors file, or one that `torch.save` wrote. The latter maps names to tensors, either itself or
            under state_dict or model, with averaged weights under state_dict_ema or model_ema; or it has the keys under
            which mmengine keeps the two.
        which: 'model_ema' for averaged weights, 'model' for the others, 'auto' for averaged ones where there are any.

    Returns:
        Names and tensors on the CPU; and the metadata, in which `weights` is 'model' or 'model_ema'.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read safely, or has no such weights.
    """
    path = Path(path)
    if which not in WEIGHTS:
        raise ValueError(f'read_checkpoint: which must be one of {", ".join(WEIGHTS)}, got {which!r}.')
    if not path.is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist.')
    if path.suffix == '.safetensors':
        with _reading(path), safe_open(path, framework='pt') as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = {'weights': 'model', **(file.metadata() or {})}
        if which not in ('auto', metadata['weights']):
            raise ValueError(f'checkpoint {path} must hold {which}, got {metadata["weights"]}.')
        return tensors, metadata

    with open(path, 'rb') as file:
        with _reading(path):
            checkpoint, load = _open_checkpoint(file)
        weights, kind = _choose(path, checkpoint, which)
        weights = dict(dict.items(weights))
        for name, value in weights.items():
            if not isinstance(name, str):  # whose text, which may be endless, is not shown
                raise ValueError(f'checkpoint {path} must map names to tensors, got a key of {type(name).__name__}.')
            if not isinstance(value, (_Stored, Tensor)):
                raise ValueError(f'checkpoint {path} must map names to tensors, got {name}: {type(value).__name__}.')
        with _reading(path):
            tensors = {name: load(value) for name, value in weights.items()}
            for name, value in tensors.items():
                # An expanded tensor takes hardly any room in a file, and any amount of it once it is copied.
                if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                    raise _Refused(f'one in which {name} claims more numbers than there are')
    return tensors, {'weights': kind}


def read_structure(path: str | Path) -> Any:
    """What `torch.save` wrote into a .pth file, with plain values alone: all else, tensors too, is inert.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read safely.
    """
    with open(path, 'rb') as file, _reading(Path(path)):
        return _open_checkpoint(file)[0]


def _open_checkpoint(file: BinaryIO) -> tuple[Any, Callable[[Any], Tensor]]:
    """The content of a .pth file, and the function that makes a tensor of each `_Stored` in it."""
    head = file.read(64).lstrip().lower()
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not size:
        raise _Refused('an empty file')
    if head.startswith((b'<!doctype', b'<html')):
        raise _Refused('a web page')
    if not head.startswith(b'pk\3\4'):
        return torch.load(file, map_location='cpu', weights_only=True), lambda tensor: tensor

    archive = zipfile.ZipFile(file)
    records = {info.filename.partition('/')[2]: info for info in archive.infolist()}
    # torch.save does not compress, so that it wrote no record that is larger than the file.
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise _Refused('one that is compressed')
    if sum(info.file_size for info in archive.infolist()) > size:
        raise _Refused('one whose records claim more than it holds')
    if 'byteorder' in records and archive.read(records['byteorder']).decode() != sys.byteorder:
        raise _Refused('one in the byte order of another machine')

    @functools.cache
    def storage(key: str) -> bytearray:
        return bytearray(archive.read(records[f'data/{key}']))

    def load(stored: _Stored) -> Tensor:
        data = storage(stored.key)
        numbers = torch.frombuffer(data, dtype=stored.dtype) if data else torch.empty(0, dtype=stored.dtype)
        return numbers.as_strided(stored.size, stored.stride, stored.offset)  # refuses to look beyond the storage

    program = archive.read(records['data.pkl'])
    for opcode, arg, _ in pickletools.genops(program):
        if opcode.name in ('PUT', 'LONG_BINPUT') and int(arg or 0) > len(program):  # it would take as much memory
            raise _Refused('one that numbers more objects than it holds')
    return _Unpickler(io.BytesIO(program)).load(), load


def _choose(path: Path, checkpoint: Any, which: str) -> tuple[dict[str, Any], str]:
    """The dictionary of the weights within a file's content, and whether they are 'model' or 'model_ema'."""
    if not isinstance(checkpoint, dict):
        raise ValueError(f'checkpoint {path} must map names to tensors, got {type(checkpoint).__name__}.')
    if not checkpoint:
        raise ValueError(f'checkpoint {path} must map names to tensors, got an empty dict.')
    checkpoint = dict(dict.items(checkpoint))  # its own methods could be anything
    keys: dict[str, tuple[str, ...]] = dict(model_ema=('state_dict_ema', 'model_ema'), model=('state_dict', 'model'))
    if isinstance(checkpoint.get('ema_state_dict'), dict):  # mmengine swaps the two when it saves
        keys = dict(model_ema=('state_dict',), model=('ema_state_dict',))
    found = {
        kind: checkpoint[key]
        for kind in keys
        for key in reversed(keys[kind])
        if isinstance(checkpoint.get(key), dict) and checkpoint[key]
    }
    found = found or {'model': checkpoint}
    kind = next(iter(found)) if which == 'auto' else which
    if kind not in found:
        raise ValueError(f'checkpoint {path} must hold {kind}, got {", ".join(found)} alone.')
    return found[kind], kind
