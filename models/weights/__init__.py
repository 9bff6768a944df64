# SPDX-License-Identifier: Apache-2.0
"""Weights from files."""

from ._all import (
    WEIGHTS,
    Converted,
    cached_path,
    convert,
    download_pretrained,
    identify,
    is_cached,
    list_models,
    misfits,
    pretrained_kwargs,
    read_checkpoint,
    rename_fn,
    strip_prefixes,
)

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
    'read_checkpoint',
    'rename_fn',
    'strip_prefixes',
]
