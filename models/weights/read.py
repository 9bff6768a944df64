# SPDX-License-Identifier: Apache-2.0
"""Reads the weights of untrusted files; `archive` and `checksum` open them."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import printable, state_of
from .archive import Refused, Stored, open_archive
from .checksum import read_safetensors

__all__ = [
    'WEIGHTS',
    'check_names',
    'is_safetensors',
    'pass_cfg_nodes',
    'read_checkpoint',
    'read_structure',
    'refusing',
]

WEIGHTS = ('auto', 'model', 'model_ema')
NEEDED = 'must be a .safetensors file, or a .pth file as torch.save writes it'


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


@contextmanager
def refusing(path: Path, needed: str = NEEDED) -> Iterator[None]:
    """Turn every error that a malformed file causes in a reader into a ValueError of one sentence.

    Args:
        path: The file, with which the sentence begins.
        needed: The middle of the sentence, which says what the file must be.
    """
    try:
        yield
    except Exception as error:
        # The text of others may hold what the file says, and PyTorch's advises to load it without weights_only.
        got = error if isinstance(error, Refused) else f'one that cannot be read as such ({type(error).__name__})'
        raise ValueError(f'checkpoint {path} {needed}, got {got}.') from error


def is_safetensors(path: Path) -> bool:
    """Whether a file is one of safetensors, by its name or by its beginning: the length of a JSON object, and it."""
    if path.suffix == '.safetensors':
        return True
    with open(path, 'rb') as file:
        return file.read(9)[8:] == b'{'


def read_checkpoint(path: str | Path, which: str = 'auto') -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights in a file, under the file's own names, and the file's metadata.

    Nothing that the file brings along is run or imported. Of a .pth file only the chosen weights are read, and checked
    by the archive's checksums, which files from before PyTorch 1.6 lack; of a .safetensors file that we wrote, all of
    it is checked.

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
        raise FileNotFoundError(f'checkpoint {path} {state_of(path)}.')
    if is_safetensors(path):
        with refusing(path):
            tensors, metadata = read_safetensors(path)
            check_names(tensors)
        metadata = {'weights': 'model', **metadata}
        if metadata['weights'] not in WEIGHTS[1:]:
            raise ValueError(f'checkpoint {path} must note model or model_ema as its weights, got other metadata.')
        if which not in ('auto', metadata['weights']):
            raise ValueError(f'checkpoint {path} must hold {which}, got {metadata["weights"]}.')
        return tensors, metadata

    with open(path, 'rb') as file:
        with refusing(path):
            checkpoint, load, _ = open_archive(file)
        weights, kind = _choose(path, checkpoint, which)
        weights = dict(dict.items(weights))
        with refusing(path, 'must map names to tensors'):
            check_names(weights)
            for name, value in weights.items():
                if not isinstance(value, Stored):
                    raise Refused(f'{name}: {type(value).__name__}')
        with refusing(path):
            tensors = {name: load(value) for name, value in weights.items()}
            _check_sharing(tensors)
    return tensors, {'weights': kind}


def read_structure(path: str | Path) -> Any:
    """What `torch.save` wrote into a .pth file, with plain values alone: all else, tensors too, is inert.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read safely.
    """
    with open(path, 'rb') as file, refusing(Path(path)):
        return open_archive(file)[0]


def check_names(weights: dict[Any, Any]) -> None:
    """Refuse what no tensor is called: control characters would reach a terminal."""
    for name in weights:
        if not isinstance(name, str):  # whose text, which may be endless, is not shown
            raise Refused(f'a key of {type(name).__name__}')
        if not name.isprintable() or len(name) > 1000:
            raise Refused(f'{printable(name[:40])!r}, which is no name')


def _check_sharing(tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that share their numbers beyond what tied weights do, and are many times the file once copied."""
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors.values()}
    if sum(value.numel() * value.element_size() for value in tensors.values()) > 4 * sum(storages.values()):
        raise Refused('one whose tensors claim more than four times the numbers that there are')


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
