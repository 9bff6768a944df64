# SPDX-License-Identifier: Apache-2.0
"""What runs an op: the compiled kernels, loaded here, or on request the reference in plain PyTorch."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name('_C.abi3.so')
if not LIBRARY.exists():
    raise ImportError(
        f'vssm was installed without its compiled kernels ({LIBRARY.name} is missing beside {__file__}): '
        'run `pip install --no-build-isolation -e .` in a clone, which needs a C++ compiler, or install a wheel.'
    )
torch.ops.load_library(LIBRARY)

_use_reference = os.environ.get('VSSM_REFERENCE', '0') == '1'


@contextmanager
def use_reference(enabled: bool = True) -> Iterator[None]:
    """Run the ops as plain tensor operations inside this context, whatever the device and dtype.

    The environment variable VSSM_REFERENCE=1, read at import, selects it for a whole process.
    """
    global _use_reference
    previous, _use_reference = _use_reference, enabled
    try:
        yield
    finally:
        _use_reference = previous


def uses_reference() -> bool:
    return _use_reference


def check_device(op: str, x: Tensor) -> None:
    """Raise a NotImplementedError where an op has no kernel."""
    if x.device.type not in ('cpu', 'meta'):
        raise NotImplementedError(
            f'{op}: there is no kernel for device {x.device.type!r}; the reference runs there, slowly: '
            'use `with vssm.ops.use_reference():` or set VSSM_REFERENCE=1.'
        )
