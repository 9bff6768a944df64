# SPDX-License-Identifier: Apache-2.0
"""The golden files: numbers of the published code, which lie in a folder of their own."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).parent.parent
GOLDEN = Path(os.environ.get('VSSM_GOLDEN', ROOT.parent / 'shared' / 'golden'))

KEY_FILES = {  # keys_NAME.json, with the names and shapes of a published file: our model
    **{
        f'{theirs}_{size}': f'{ours}_{size}'
        for theirs, ours in {
            '2dvmamba': 'vmamba2d',
            'spatialmamba': 'spatial_mamba',
            'vanilla_vmamba': 'vanilla_vmamba',
            'groupmamba': 'groupmamba',
        }.items()
        for size in ('tiny', 'small', 'base')
    },
    'vmamba_tiny_s1l8': 'vmamba_tiny',
    'vmamba_small_s2l15': 'vmamba_small',
    'vmamba_base_s2l15': 'vmamba_base',
    'vmamba_tiny_s2l5': 'vmamba_tiny_s2l5',
    'vmamba_small_s1l20': 'vmamba_small_s1l20',
    'vmamba_base_s1l20': 'vmamba_base_s1l20',
    'vim_tiny': 'vim_tiny_patch16_224',
    'vim_small': 'vim_small_patch16_224',
    'vim_base': 'vim_base_patch16_224',
    'vim_tiny_stride8': 'vim_tiny_patch16_stride8_224',
    'vim_small_stride8': 'vim_small_patch16_stride8_224',
    'mambavision_T': 'mambavision_tiny',
    'mambavision_T2': 'mambavision_tiny2',
    'mambavision_S': 'mambavision_small',
    'mambavision_B': 'mambavision_base',
    'mambavision_L': 'mambavision_large',
    'mambavision_L2': 'mambavision_large2',
    'mambavision_L3_256_21k': 'mambavision_large3',
}

need_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f'golden files not found, set VSSM_GOLDEN (now {GOLDEN})')


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and decoded metadata of a safetensors file."""
    with safe_open(path, 'pt') as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}
        metadata = {}
        for key, value in (f.metadata() or {}).items():
            try:
                metadata[key] = json.loads(value)
            except json.JSONDecodeError:
                metadata[key] = value
    return tensors, metadata


def under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


@pytest.fixture(scope='session')
def golden():
    """Reader of the golden folder: `.json` files as they are, safetensors as (tensors, metadata)."""
    if not GOLDEN.is_dir():
        pytest.skip(need_golden.kwargs['reason'])

    def read(name: str):
        if name.endswith('.json'):
            return json.loads((GOLDEN / name).read_text())
        return read_tensors(GOLDEN / f'{name}.safetensors')

    return read
