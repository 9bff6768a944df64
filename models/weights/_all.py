# SPDX-License-Identifier: Apache-2.0
"""Weights from files: read without running what a file may hold, tell the network, convert to safetensors, cache.

A pickle is a program, and training files carry optimizer states and configuration objects along with the weights. So a
file is read in two steps. The first unpickles its structure, in which tensors are notes of where their numbers lie and
all other classes are inert; nothing is imported for it. The second reads the numbers of the weights that were chosen.
"""

import functools
import hashlib
import inspect
import io
import json
import os
import pickle
import pickletools
import re
import shutil
import sys
import tempfile
import time
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import PretrainedCfg, resolve_pretrained_cfg
from torch import Tensor, nn

from ...version import __version__

__all__ = [
    'Converted',
    'cached_path',
    'convert',
    'download_pretrained',
    'identify',
    'is_cached',
    'list_models',
    'misfits',
    'pretrained_kwargs',
    'read_checkpoint',
    'rename_fn',
    'strip_prefixes',
]

WEIGHTS = ('auto', 'model', 'model_ema')


def _pass_cfg_nodes() -> None:
    """Let PyTorch's weights-only reader make inert dictionaries of yacs's, unless the user has let it do otherwise.

    Swin's trainer, and with it VMamba's, Spatial-Mamba's and 2DMamba's, saves one beside the weights. So
    `timm.create_model(name, checkpoint_path=published_file)` works.
    """
    name = 'yacs.config.CfgNode'
    for entry in torch.serialization.get_safe_globals():
        if (entry[1] if isinstance(entry, tuple) else f'{entry.__module__}.{entry.__qualname__}') == name:
            return
    torch.serialization.add_safe_globals([(OrderedDict, name)])


_pass_cfg_nodes()


# ---- reading ---------------------------------------------------------------------------------------------------------


class _Refused(Exception):
    """What a file holds in place of weights, to follow 'got'."""


class _Inert:
    """Stands for whatever a pickle builds, calls or fills that is no weight: takes everything and does nothing."""

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
    """Where in an archive a tensor lies. A tuple, so that a pickle cannot set its fields."""

    key: str
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


# Names of the standard library that honest files hold; they become inert like everyone else's. Any other one, such as
# os.system or builtins.eval, is a sign of an attack, which is refused although it could do nothing.
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


# The types of numbers that a storage without a type of its own may have: those of one number in whole bytes, no others.
_DTYPES = (
    'bfloat16 bool float16 float32 float64 float8_e4m3fn float8_e5m2 int8 int16 int32 int64 uint8 uint16 uint32 uint64'
).split()


class _Unpickler(pickle.Unpickler):
    """Of the structure of a file that `torch.save` wrote: finds what a tensor needs and inert classes, imports nothing.

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
    """Whatever a stranger's bytes make of a reader is a ValueError of one sentence."""
    try:
        yield
    except Exception as error:
        # Not PyTorch's own words, which advise to load the file without weights_only.
        got = error if isinstance(error, _Refused) else f'one that cannot be read as such ({type(error).__name__})'
        raise ValueError(
            f'checkpoint {path} must be a .safetensors file, or a .pth file as torch.save writes it, got {got}.'
        ) from error


def read_checkpoint(path: str | Path, which: str = 'auto') -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights in a file, under its names, and what it says about them.

    Nothing that the file brings along is run or imported. Of a .pth file only the chosen weights are read, checked by
    the archive's own sums; those of before PyTorch 1.6 are left to PyTorch's weights-only reader.

    Args:
        path: A .safetensors file, or one that `torch.save` wrote: names and tensors, perhaps under state_dict or model,
            averaged ones under state_dict_ema or model_ema, or both as mmengine has them.
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
            if not isinstance(name, str):  # and its text may be endless
                raise ValueError(f'checkpoint {path} must map names to tensors, got a key of {type(name).__name__}.')
            if not isinstance(value, (_Stored, Tensor)):
                raise ValueError(f'checkpoint {path} must map names to tensors, got {name}: {type(value).__name__}.')
        with _reading(path):
            tensors = {name: load(value) for name, value in weights.items()}
            for name, value in tensors.items():
                # An expanded tensor takes no room in a file and any amount of it later.
                if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                    raise _Refused(f'one in which {name} claims more numbers than there are')
    return tensors, {'weights': kind}


def _open_checkpoint(file: BinaryIO) -> tuple[Any, Callable[[Any], Tensor]]:
    """What is in a .pth file, and the function that makes a tensor of each `_Stored` in it."""
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
    # torch.save does not compress, so that a record which unpacks to more than the file is none of its.
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
        if opcode.name in ('PUT', 'LONG_BINPUT') and arg > len(program):  # which would take memory up to this index
            raise _Refused('one that numbers more objects than it holds')
    return _Unpickler(io.BytesIO(program)).load(), load


def _choose(path: Path, checkpoint: Any, which: str) -> tuple[dict[str, Any], str]:
    """The dictionary of the weights within a file, and which ones they are."""
    if not isinstance(checkpoint, dict):
        raise ValueError(f'checkpoint {path} must map names to tensors, got {type(checkpoint).__name__}.')
    if not checkpoint:
        raise ValueError(f'checkpoint {path} must map names to tensors, got an empty dict.')
    checkpoint = dict(dict.items(checkpoint))  # its own methods may be anything
    keys = dict(model_ema=('state_dict_ema', 'model_ema'), model=('state_dict', 'model'))
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


# ---- which network ---------------------------------------------------------------------------------------------------


def list_models() -> list[str]:
    """The models of timm's registry that are ours."""
    package = __name__.partition('.')[0]
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith(f'{package}.')]


def misfits(state_dict: dict[str, Tensor], own: dict[str, Tensor], limit: int = 20) -> str:
    """What keeps tensors from being those of a network, '' if nothing does.

    Args:
        state_dict: Names and tensors.
        own: The network's own.
        limit: How many names to list of each kind.
    """
    problems = dict(
        missing=[name for name in own if name not in state_dict],
        unexpected=[name for name in state_dict if name not in own],
        misshapen=[name for name in own if name in state_dict and own[name].shape != state_dict[name].shape],
    )
    listed = [f'{len(names)} {problem} ({_shorten(names, limit)})' for problem, names in problems.items() if names]
    if problems['misshapen']:
        name = problems['misshapen'][0]
        listed.append(f'{name} must be {tuple(own[name].shape)} and is {tuple(state_dict[name].shape)}')
    return ', '.join(listed)


def _shorten(names: Sequence[str], limit: int = 20) -> str:
    return ', '.join([*names[:limit], *(['...'] if len(names) > limit else [])])


def rename_fn(model: str) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]:
    """What brings the published names of a model of ours to our names."""
    return sys.modules[timm.model_entrypoint(model).__module__].checkpoint_filter_fn


@functools.cache
def _registered(model: str) -> nn.Module:
    return timm.create_model(model, device='meta')


def _scan_ndim(model: str) -> int:
    return max((module.scan_ndim for module in _registered(model).modules() if hasattr(module, 'scan_ndim')), default=1)


def _sizes(state_dict: dict[str, Tensor]) -> set:
    """Names with numbers of elements: the published shapes of the scan's tensors differ from ours, these do not."""
    return {(name, value.numel()) for name, value in state_dict.items()}


def _constructor_args(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """The constructor's arguments that decide names and shapes, from tensors under our names.

    Raises:
        LookupError: A tensor that tells one of them is missing, or of fewer dimensions.
        ZeroDivisionError: A tensor is empty.
    """
    blocks: dict[int, set] = {}
    for name in state_dict:
        match = re.match(r'stages\.(\d+)\.blocks\.(\d+)\.', name)
        if match:
            blocks.setdefault(int(match[1]), set()).add(match[2])
    first = [f'stages.{i}.blocks.0.' for i in sorted(blocks)]
    dims = [state_dict[f'{prefix}norm1.weight'].shape[0] for prefix in first]

    def ratio(name: str, dim: int) -> float:
        # Widths are rounded down, so that the largest quotient gives all of them.
        return max(state_dict[f'{prefix}{name}'].shape[dim] / width for prefix, width in zip(first, dims, strict=True))

    args = dict(
        in_chans=state_dict['stem.conv1.weight'].shape[1],
        num_classes=state_dict['head.fc.weight'].shape[0] if 'head.fc.weight' in state_dict else 0,
        depths=[len(blocks[i]) for i in sorted(blocks)],  # counted, so that a large number in a name stays a name
        dims=dims,
        d_state=state_dict[f'{first[0]}mixer.A_log'].numel() // state_dict[f'{first[0]}mixer.D'].numel(),
        ssm_ratio=ratio('mixer.out_proj.weight', 1),
        mlp_ratio=ratio('mlp.fc1.weight', 0),
    )
    if 'head.norm.weight' not in state_dict:  # the backbone of a detector or segmentor
        args['features_only'] = True
        del args['num_classes']
    return args


def identify(state_dict: dict[str, Tensor], model: str | None = None) -> tuple[str, dict[str, Any], list[str]]:
    """The network that tensors belong to, told by names and shapes.

    Args:
        state_dict: Tensors under published names or ours, without any prefix.
        model: One of our models that it must be, with whatever arguments.

    Returns:
        The model that is nearest; the arguments in which the tensors' network differs from it, for `timm.create_model`;
        and our other models that have the same names and shapes: of a 2-D scan's and a 1-D scan's the 1-D one is taken.

    Raises:
        ValueError: No name is known, or the network is not one of ours.
    """
    if model is not None and model not in list_models():
        raise ValueError(f'model must be one of {", ".join(list_models())}, got {model!r}.')
    candidates = [model] if model else list_models()
    families = {rename: rename(state_dict, nn.Module()) for rename in set(map(rename_fn, candidates))}

    def distance(name: str) -> tuple[int, int]:
        return len(_sizes(families[rename_fn(name)]) ^ _sizes(_registered(name).state_dict())), _scan_ndim(name)

    nearest = min(candidates, key=distance)
    renamed, own = families[rename_fn(nearest)], _registered(nearest).state_dict()
    if not renamed.keys() & own.keys():
        raise ValueError(
            f'checkpoint must hold {model or "one of our networks"}, got {len(state_dict)} tensors of which no name is '
            f'known: {_shorten(list(state_dict))}.'
        )
    _refuse_vanilla(renamed)
    if len(renamed) > 16 * len(own):  # before a network of as many blocks as there are names is built
        raise ValueError(f'checkpoint must hold one of our networks, got {len(state_dict)} tensors.')
    try:
        args = _constructor_args(renamed)
    except (LookupError, ZeroDivisionError):
        renamed = rename_fn(nearest)(state_dict, _registered(nearest))
        raise ValueError(
            f'checkpoint must hold {model or "one of our networks"}, got {len(state_dict)} tensors; of {nearest}, the '
            f'nearest, {misfits(renamed, own)}.'
        ) from None
    takes = inspect.signature(type(_registered(nearest))).parameters.keys() | {'features_only'}
    defaults = _constructor_args(own)
    args = {key: value for key, value in args.items() if key in takes and value != defaults.get(key)}
    twins = [name for name in candidates if name != nearest and _sizes(_registered(name).state_dict()) == _sizes(own)]
    return nearest, args, twins


def _refuse_vanilla(state_dict: dict[str, Tensor]) -> None:
    block = 'stages.0.blocks.0.mixer.'
    gate, out = state_dict.get(f'{block}in_proj.weight'), state_dict.get(f'{block}out_proj.weight')
    if gate is None or out is None or any('fusion' in name for name in state_dict):  # Spatial-Mamba has a gate
        return
    if gate.shape[:1].numel() == 2 * out.shape[-1:].numel():
        raise ValueError(
            'checkpoint must hold one of our networks, got a Vanilla VMamba: its block, with a gate, is older than '
            'those of this package.'
        )


# ---- conversion ------------------------------------------------------------------------------------------------------


class Converted(NamedTuple):
    """What `convert` wrote."""

    metadata: dict[str, str]  # as in the file
    twins: list[str]  # models that the same names and shapes could be
    left_out: list[str]  # names of the source that are not the network's: necks, heads, counters


def convert(
    source: str | Path,
    target: str | Path,
    model: str | None = None,
    which: str = 'auto',
    origin: str | None = None,
) -> Converted:
    """Write the weights of a published file, or of a training's, as safetensors under our names.

    The metadata hold what rebuilds the network, `timm.create_model(model, checkpoint_path=target, **model_args)`, which
    weights they are, and where they are from: source and its sha256. The backbone of a detector or segmentor keeps its
    output norms, outnorm0 and on, which `timm` does not know; its model_args say features_only.

    Args:
        source: What `read_checkpoint` reads.
        target: A .safetensors file, replaced as a whole.
        model: One of our models that the file must hold, told by the file unless given.
        which: See `read_checkpoint`.
        origin: What to note as the source, its file name unless given.

    Raises:
        FileNotFoundError: There is no such source, or no folder for the target.
        ValueError: The source cannot be read or does not fit, or the target has another suffix.
    """
    source, target = Path(source), Path(target)
    if target.suffix != '.safetensors':
        raise ValueError(f'convert: target must end in .safetensors, got {target}.')
    if not target.parent.is_dir():
        raise FileNotFoundError(f'convert: the folder of target {target} does not exist.')
    tensors, metadata = read_checkpoint(source, which)
    tensors, left_out = strip_prefixes(tensors)
    recorded = metadata.get('model')
    model = model or recorded
    name, args, twins = identify(tensors, model)
    if model == recorded:
        # What shapes do not tell: the scan, the pooling, rates. The rest is for the tensors to say.
        untold = inspect.signature(type(_registered(name))).parameters.keys() - _SHAPE_ARGS
        try:
            noted = dict(json.loads(metadata.get('model_args', '{}')).items())
        except (AttributeError, RecursionError, ValueError) as error:
            raise ValueError(f'checkpoint {source} must note its model_args as a JSON object.') from error
        args = {**{key: value for key, value in noted.items() if key in untold}, **args}
    tensors = _fit(tensors, name, args)
    with open(source, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    metadata.update(
        model=name, model_args=json.dumps(args), source=origin or source.name, sha256=digest, vssm=__version__
    )
    # safetensors takes neither views nor tensors that share their numbers
    tensors = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_UNFINISHED) as folder:
        written = Path(folder, target.name)
        save_file(tensors, written, metadata)
        shutil.copymode(source, written)  # safetensors writes for the owner alone, and a cache may be shared
        os.replace(written, target)
    return Converted(metadata, twins, left_out)


_UNFINISHED = '.vssm-'  # what a folder's name begins with, in which a file is written before it is renamed

_SHAPE_ARGS = {'in_chans', 'num_classes', 'depths', 'dims', 'd_state', 'ssm_ratio', 'mlp_ratio', 'device', 'dtype'}

# What wraps a network: data parallelism, an average, torch.compile, our ImageClassifier, a detector and its adapter.
_PREFIX = re.compile(r'(?:module\.|_orig_mod\.|model\.)*(backbone\.)?(?:_orig_mod\.|model\.)*')


def strip_prefixes(state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the network alone, without prefixes, and the names of the rest."""
    prefixes = {name: _PREFIX.match(name) for name in state_dict}
    has_backbone = any(prefix[1] for prefix in prefixes.values())
    counters = {'steps', 'n_averaged'} if any(name.startswith('module.') for name in state_dict) else set()
    out, left_out = {}, []
    for name, value in state_dict.items():
        ours = name[prefixes[name].end() :]
        if name in counters or has_backbone and not prefixes[name][1]:
            left_out.append(name)
        elif ours in out:
            raise ValueError(f'checkpoint must hold one network, got two tensors that both are {ours}.')
        else:
            out[ours] = value
    return out, left_out


def _fit(state_dict: dict[str, Tensor], model: str, args: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors under our names and in our shapes, each one checked."""
    try:
        network = timm.create_model(model, device='meta', **args) if args else _registered(model)
    except Exception as error:  # of arguments that a file brought
        raise ValueError(f'checkpoint must hold {model}, got one with {args}: {error}') from error
    network = network.model if args.get('features_only') else network
    state_dict = rename_fn(model)(state_dict, network)
    own = network.state_dict()
    if args.get('features_only'):
        for i, info in enumerate(network.feature_info):
            norm = nn.LayerNorm(info['num_chs'], device='meta').state_dict(prefix=f'outnorm{i}.')
            own.update((name, value) for name, value in norm.items() if name in state_dict)
    problems = misfits(state_dict, own)
    if problems:
        args = f' with {args}' if args else ''
        raise ValueError(
            f'checkpoint must hold the {len(own)} tensors of {model}{args}, got {len(state_dict)}: {problems}.'
        )
    for name, value in state_dict.items():
        if own[name].is_floating_point() and not value.is_floating_point():
            raise ValueError(f'checkpoint must hold numbers like {own[name].dtype} as {name}, got {value.dtype}.')
    return state_dict


# ---- pretrained weights ----------------------------------------------------------------------------------------------


def cached_path(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Path:
    """Where the converted weights of a configuration are kept, if they are: by their source, which tags may share.

    Args:
        cfg: With `architecture`, and `url` or else `origin_url`.
        cache_dir: The folder, that of torch.hub's checkpoints unless given.
    """
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir(), 'checkpoints')
    digest = hashlib.sha256((cfg.url or cfg.origin_url).encode()).hexdigest()
    return folder / f'{cfg.architecture}-{digest[:8]}.safetensors'


def is_cached(path: Path) -> bool:
    """Whether a file of the cache is there and whole; a damaged one counts as none, to be replaced."""
    try:
        with safe_open(path, framework='pt'):
            return True
    except (OSError, SafetensorError):
        return False


def download_pretrained(
    cfg: PretrainedCfg,
    cache_dir: str | Path | None = None,
    fetch: Callable[[str, str], None] = functools.partial(torch.hub.download_url_to_file, progress=False),
) -> Path:
    """The converted weights of a configuration, downloaded if they are not cached; a failure leaves no file behind.

    Args:
        cfg: See `cached_path`.
        cache_dir: See `cached_path`.
        fetch: Called with a URL and the path to save it at.

    Raises:
        RuntimeError: The weights cannot be downloaded, or are not what they should be.
    """
    path = cached_path(cfg, cache_dir)
    if is_cached(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in path.parent.glob(f'{_UNFINISHED}*'):
        if time.time() - folder.stat().st_mtime > 24 * 3600:  # of a process that was killed
            shutil.rmtree(folder, ignore_errors=True)
    url = cfg.url or cfg.origin_url
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_UNFINISHED) as folder:
        suffix = '.safetensors' if urlsplit(url).path.endswith('.safetensors') else '.pth'
        downloaded, converted = Path(folder, f'download{suffix}'), Path(folder, path.name)
        try:
            fetch(url, str(downloaded))
            metadata = convert(downloaded, converted, cfg.architecture, origin=url).metadata
            _check_against_cfg(json.loads(metadata['model_args']), cfg)
        except (OSError, HTTPException, ValueError) as error:
            raise RuntimeError(f'{cfg.architecture}: no weights from {url}: {error}') from error
        os.replace(converted, path)
    return path


def _check_against_cfg(args: dict[str, Any], cfg: PretrainedCfg) -> None:
    """timm adapts images' channels and classes, from what the configuration says that the weights have."""
    defaults = _constructor_args(_registered(cfg.architecture).state_dict())
    got = {key: defaults[key] for key in ('in_chans', 'num_classes')}
    got |= {key: value for key, value in args.items() if key in _SHAPE_ARGS | {'features_only'}}
    needed = dict(in_chans=cfg.input_size[0], num_classes=cfg.num_classes)
    if got != needed:
        raise ValueError(f'checkpoint must hold {cfg.architecture} with {needed}, got one with {got}.')


def pretrained_kwargs(variant: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of an entrypoint, for pretrained=True: a URL becomes the file that was made of it.

    timm's own download keeps what breaks off, and cannot read files with unknown classes. Sources other than a URL are
    timm's.

    Raises:
        RuntimeError: There are no weights, or no way to them from here; it says what to do.
    """
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    if cfg.state_dict or cfg.file or cfg.hf_hub_id:
        return kwargs
    cache_dir = kwargs.get('cache_dir')
    if cfg.url:
        path = download_pretrained(cfg, cache_dir)
    elif cfg.origin_url:
        path = cached_path(cfg, cache_dir)
        if not is_cached(path):
            option = f' --cache-dir {cache_dir}' if cache_dir else ''
            raise RuntimeError(
                f'{variant}: its weights are published where they cannot be loaded from, {cfg.origin_url}: run '
                f'`vssm download {variant}{option}` once, then pretrained=True finds them.'
            )
    else:
        raise RuntimeError(
            f'{variant}: no weights are published, so that pretrained must be False; checkpoint_path=FILE loads yours.'
        )
    return {**kwargs, 'pretrained_cfg_overlay': {**(kwargs.get('pretrained_cfg_overlay') or {}), 'file': str(path)}}
