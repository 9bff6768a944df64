# SPDX-License-Identifier: Apache-2.0
"""safetensors files with a checksum, which the format itself has none of."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .archive import Refused

__all__ = ['read_safetensors', 'write_safetensors']

_KEY = 'checksum'  # of the metadata


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata, with the checksum of both among the metadata.

    Args:
        path: The file to write.
        tensors: Names and tensors, which are stored apart even if they share their numbers.
        metadata: Keys and values; a checksum among them, as of the file that they are from, is replaced.

    Raises:
        SafetensorError: The file cannot be written, as on a full disk.
        OSError: The same.
    """
    # safetensors takes neither views nor tensors that share their numbers
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    metadata = {key: value for key, value in metadata.items() if key != _KEY}
    save_file(tensors, path, {**metadata, _KEY: _checksum(tensors, metadata)})


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file; those of others, which note no checksum, are taken as they are.

    Raises:
        Refused: The tensors or the metadata are not those that were written.
        SafetensorError: The file is malformed.
        OSError: The file cannot be read.
    """
    with safe_open(path, framework='pt') as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # they are the file's own memory
        metadata = dict(file.metadata() or {})
    if _KEY in metadata and metadata.pop(_KEY) != _checksum(tensors, metadata):
        raise Refused('one that was damaged after it was written: its checksum differs')
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The sha256 of the metadata, and of every tensor's name, type, shape and bytes, in the order of the names."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return f'sha256:{digest.hexdigest()}'
