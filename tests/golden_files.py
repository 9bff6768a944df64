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
