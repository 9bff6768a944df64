# SPDX-License-Identifier: Apache-2.0
"""Weights from files.

* `read`: the weights in a file that may be hostile.
* `rename`: published names to ours.
* `identify`: the network that tensors belong to.
* `convert`: a published file to safetensors under our names.
* `pretrained`: download and cache, for timm's `pretrained=True`.
"""

from .convert import Converted, convert
from .identify import identify, list_models, misfits
from .pretrained import cached_path, download_pretrained, is_cached, pretrained_kwargs, published_at
from .read import WEIGHTS, read_checkpoint
from .rename import rename_checkpoint, rename_fn, strip_prefixes

__all__ = [
    'Converted',
    'WEIGHTS',
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
    'rename_checkpoint',
    'rename_fn',
    'strip_prefixes',
]
