# SPDX-License-Identifier: Apache-2.0
"""Weights from files.

* `read`: the weights in a file that may be hostile, with `archive` for .pth and `checksum` for .safetensors files.
* `fit`: what keeps tensors from being those of a network.
* `rename`: published names to ours.
* `identify`: the network that tensors belong to.
* `convert`: a published file to safetensors under our names.
* `pretrained`: download and cache, for timm's `pretrained=True`.
"""

from .checksum import write_safetensors
from .convert import Converted, convert, translate
from .fit import adapt_input, misfits, unfit_numbers
from .identify import identify, list_models
from .pretrained import cached_path, download_pretrained, is_cached, pretrained_kwargs, published_at
from .read import WEIGHTS, read_checkpoint, read_structure
from .rename import rename_checkpoint, rename_fn, strip_prefixes

__all__ = [
    'Converted',
    'WEIGHTS',
    'adapt_input',
    'cached_path',
    'convert',
    'download_pretrained',
    'identify',
    'is_cached',
    'list_models',
    'misfits',
    'pretrained_kwargs',
    'published_at',
    'read_checkpoint',
    'read_structure',
    'rename_checkpoint',
    'rename_fn',
    'strip_prefixes',
    'translate',
    'unfit_numbers',
    'write_safetensors',
]
