# SPDX-License-Identifier: Apache-2.0
"""What computes an op: the compiled kernels, loaded here, or on request the reference in plain PyTorch."""

import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = Path(__file__).with_name('_C.so')
if not LIBRARY.exists():
    raise ImportError(
        f'vssm was installed without its compiled kernels ({LIBRARY.name} is missing beside {__file__}): '
        'run `pip install --no-build-isolation -e .` in a clone, which needs a C++ compiler, or install a wheel.'
    )
try:
    torch.ops.load_library(LIBRARY)
except OSError as error:  # empty, of another platform, or built for a newer PyTorch, whose functions it does not find
    raise ImportError(
        f'The compiled kernels of vssm cannot be loaded ({error}). They need PyTorch 2.10 or newer and a wheel of this '
        f'platform, got PyTorch {torch.__version__} on {sysconfig.get_platform()}: run `pip install "torch>=2.10"`, '
        'then install a wheel of vssm again, or run `pip install --no-build-isolation -e .` in a clone.'
    ) from error

_use_reference = os.environ.get('VSSM_REFERENCE', '0') == '1'


@contextmanager
def use_reference(enabled: bool = True) -> Iterator[None]:
    """Run the ops as plain tensor operations inside this context, whatever the device and dtype.

    The environment variable VSSM_REFERENCE=1, read at import, selects it for a whole process.

    Args:
        enabled: Whether the reference computes; False returns to the kernels inside an outer context.
    """
    global _use_reference
    previous, _use_reference = _use_reference, enabled
    try:
        yield
    finally:
        _use_reference = previous


def uses_reference(x: Tensor) -> bool:
    """Whether the reference computes with x: where it was asked for, and in float64 on CUDA, where no kernel does."""
    return _use_reference or (x.is_cuda and x.dtype == torch.float64)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that an op computes in for a first argument x: float64 for float64, float32 for all else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, or forward-mode differentiation, is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# Asked about these, PyTorch raises an error; the function that would tell which they are cannot be compiled.
_WITHOUT_AUTOCAST = ('meta', 'lazy', 'vulkan', 'fpga', 've')


def autocast_is_on(x: Tensor) -> bool:
    """Whether autocast would choose dtypes on the device of x, which may be one that has no autocast."""
    device = x.device.type
    return device not in _WITHOUT_AUTOCAST and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which the reference computes as precisely as a kernel."""
    return torch.autocast(x.device.type, enabled=False) if autocast_is_on(x) else nullcontext()


def check_device(op: str, x: Tensor) -> None:
    """Raise a NotImplementedError where an op has no kernel."""
    if x.device.type not in ('cpu', 'cuda', 'meta'):
        raise no_kernel(op, x)


def no_kernel(op: str, x: Tensor) -> NotImplementedError:
    """What an op without a kernel for the device of x raises."""
    return NotImplementedError(
        f'{op}: there is no kernel for device {x.device.type!r}; the reference runs there, slowly: '
        'use `with vssm.ops.use_reference():` or set VSSM_REFERENCE=1.'
    )


def check_precision(op: str, x: Tensor) -> None:
    """Raise a NotImplementedError where an operator meets a dtype that the public function does not give it."""
    if x.dtype == torch.float64:
        raise NotImplementedError(f'{op}: the CUDA kernels compute in float32, got {x.dtype}; call vssm.ops.{op}.')


def import_triton(op: str, kernels: Callable[[], tuple[Callable, ...]]) -> tuple[Callable, ...]:
    """The CUDA kernels of an op, imported by calling `kernels`; without Triton an ImportError says what to install."""
    try:
        return kernels()
    except ModuleNotFoundError as error:
        if error.name != 'triton':
            raise
        raise ImportError(
            f'{op}: CUDA tensors need Triton, which is not installed: run `pip install triton`, or on Windows '
            '`pip install triton-windows`.'
        ) from error
