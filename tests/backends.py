# SPDX-License-Identifier: Apache-2.0
"""The ways to compute the ops: the reference, the paths of the CPU kernels, the CUDA kernels."""

import importlib.util
import os
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    os.environ['TRITON_INTERPRET'] = '1'  # Triton reads it when it is imported, as timm does

import vssm  # noqa: E402

CAPABILITY = 'VSSM_CPU_CAPABILITY'


@contextmanager
def cpu_capability(name: str | None):
    """Force one CPU path of the kernels; None leaves the choice to them."""
    before = os.environ.pop(CAPABILITY, None)
    if name is not None:
        os.environ[CAPABILITY] = name
    try:
        yield
    finally:
        os.environ.pop(CAPABILITY, None)
        if before is not None:
            os.environ[CAPABILITY] = before


def _available_paths() -> list[str]:
    paths = []
    for name in ('avx512', 'avx2', 'portable'):
        with cpu_capability(name):
            try:
                paths.append(torch.ops.vssm.cpu_capability())
            except RuntimeError:  # this CPU lacks it
                continue
    return paths


CPU_PATHS = _available_paths()
TRITON = pytest.param(
    'triton',
    marks=[
        pytest.mark.triton,
        pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='Triton is not installed'),
    ],
)


def _slices(self, input):
    """The steps of a scan or reduction along an axis, slice by slice: Triton's interpreter goes element by element."""
    data = [np.moveaxis(t.handle.data, self.axis, 0) for t in input]
    slices = [[self.to_tensor(np.ascontiguousarray(d[i]), t.dtype) for d, t in zip(data, input, strict=True)]
              for i in range(len(data[0]))]  # fmt: skip
    for i in range(1, len(slices)):
        slices[i] = self.combine_fn.fn(*slices[i - 1], *slices[i])
    return slices


def _scan_slices(self, input):
    columns = zip(*_slices(self, input), strict=True)
    return [self.to_tensor(np.stack([t.handle.data for t in c], self.axis), c[0].dtype) for c in columns]


def _reduce_slices(self, input):
    return list(_slices(self, input)[-1])


def _call_at_once(call):
    """The interpreter sets up Triton's language anew for each function that a kernel calls; ours share the kernel's."""

    def call_function(self, *args, **options):
        is_ours = self.fn.__module__.startswith('vssm.')
        return self.rewrite()(*args, **options) if is_ours else call(self, *args, **options)

    return call_function


def _dot_in_float32(create_dot):
    """Triton's interpreter holds bfloat16 as integers, and would multiply those."""

    def as_float32(t):
        from triton.language import bfloat16, float32
        from triton.runtime.interpreter import TensorHandle, _convert_float

        if t.dtype.scalar != bfloat16:
            return t
        return TensorHandle(_convert_float(t.data, bfloat16, float32, None).view(np.float32), float32)

    return lambda self, a, b, *args: create_dot(self, as_float32(a), as_float32(b), *args)


def _through_cuda(function):
    """`function` for tensors on the CPU: their storages go to the GPU, so that they keep their strides, and back."""

    def there(t):
        if not isinstance(t, torch.Tensor) or INTERPRETED:
            return t
        storage = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).cuda().view(t.dtype)
        return storage.as_strided(t.shape, t.stride(), t.storage_offset())

    def call(*args):
        results = function(*map(there, args))
        return results.cpu() if isinstance(results, torch.Tensor) else tuple(t.cpu() for t in results)

    return call


@contextmanager
def triton_kernels():
    """Run the CUDA kernels on tensors of the CPU: through the GPU, or where there is none in Triton's interpreter."""
    from vssm.ops.fusion import triton as fusion
    from vssm.ops.scan.triton import launch as scan

    if INTERPRETED:
        from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceOps, ScanOps

        if ScanOps.generic_scan is not _scan_slices:
            ScanOps.generic_scan = _scan_slices
            ReduceOps.generic_reduce = _reduce_slices
            InterpretedFunction.__call__ = _call_at_once(InterpretedFunction.__call__)
            InterpreterBuilder.create_dot = _dot_in_float32(InterpreterBuilder.create_dot)
    library = torch.library.Library('vssm', 'IMPL')
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*verrid', UserWarning)
        for module, op in ((scan, 'selective_scan'), (fusion, 'state_fusion')):
            for name in ('', '_backward'):
                function = _through_cuda(getattr(module, f'{op}_triton{name}'))
                library.impl(op + name, function, 'CPU', allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def kernel_path_context(name: str | None):
    """Force one path of the kernels: of the CPU, or 'triton'."""
    return triton_kernels() if name == 'triton' else cpu_capability(name)


@dataclass(frozen=True)
class Backend:
    """One way to compute an op: the reference, or the kernels along one path; and in which dtype."""

    path: str | None  # None is the reference
    dtype: torch.dtype

    def __str__(self) -> str:
        return f'{self.path or "reference"}-{str(self.dtype).removeprefix("torch.")}'

    @contextmanager
    def active(self):
        with vssm.ops.use_reference(self.path is None), kernel_path_context(self.path):
            yield


BACKENDS = [
    Backend(None, torch.float64),
    Backend(None, torch.float32),
    Backend(CPU_PATHS[0], torch.float64),  # one code serves float64, whatever the path
    *[Backend(path, torch.float32) for path in CPU_PATHS],
    pytest.param(Backend('triton', torch.float32), marks=TRITON.marks),
]


# Triton's interpreter takes milliseconds a position. What it leaves out is implied: the comparison with the reference
# implies what holds for the reference, its agreement with the golden files among it; the smallest cases of an operator
# stand for its registration, two types for the others, and one input of a network for those of other sizes.
IMPLIED_IF_INTERPRETED = {  # by test, the words in the names of its cases
    'test_one_row_makes_both_scans_equal': '.*',
    'test_orders_are_transposes_and_flips': '.*',
    'test_walks_are_summed': '.*',
    'test_low_rank_steps_are_a_matrix_product': '.*',
    'test_golden_classifier': 'square|odd|stride8|(vmamba|2dvmamba|vanilla|vim|groupmamba|mambavision)\\w*',
    'test_golden_backbone': '.*',
    # The largest.
    'test_golden_scans': '[12]d-(n4\\w*|n16\\w*|single|long|n1_(square|rect)_k4|two_tiles_k4|large_tile)',
    'test_opcheck': 'bfloat16|2d|1d-all|1d-orders?',
    'test_only_wanted_gradients_are_computed': '[12]d-all-low-rank|[12]d-orders',
    'test_pinned_scans': '2d-(orders-3-1|all-low-rank)',  # of several states
    'test_random_scans_in_triton': 'draw11',  # which takes as long as all others
    'test_scan_makes_no_number_of_what_is_none': '16',  # states, which are gone through one by one
    'test_scan_values_that_are_not_finite_spoil_no_other_image': 'B|C|D|dt_bias',  # as x and A, in the same programs
    # Of the walks in a map, those by one order or those by two.
    'test_strips_and_bands': 'one-warp-1d|(one-warp|lines|(?<!in-)bands)-2d(?!-pair)|strips-in-bands-2d-pair',
    'test_values_and_gradients': 'scan|float16|bfloat16-float32',  # of the scan: its pinned and random cases
}
SLOW_IF_INTERPRETED = {
    'test_64_states',
    'test_fusion_takes_views_and_expanded_maps',
    'test_fusion_values_that_are_not_finite_spread_no_further_than_their_reach',
    'test_golden_classifier',
    'test_golden_fusions',
    'test_golden_scans',
    'test_nothing_is_a_multiple_of_the_map',
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    interpreted = [item for item in items if INTERPRETED and item.get_closest_marker('triton')]
    implied = set()
    for item in interpreted:
        cases = IMPLIED_IF_INTERPRETED.get(item.originalname)
        if cases and re.search(rf'\b({cases})\b', item.name):
            implied.add(item)
        elif item.originalname in SLOW_IF_INTERPRETED or re.search('more-bands|strips-in-bands|bias-100', item.name):
            item.add_marker(pytest.mark.slow)
    config.hook.pytest_deselected(items=list(implied))
    items[:] = [item for item in items if item not in implied]


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request):
    """Each way to compute the ops in turn; they take it while the test runs."""
    with request.param.active():
        yield request.param


@pytest.fixture(params=CPU_PATHS)
def cpu_path(request):
    with cpu_capability(request.param):
        yield request.param


@pytest.fixture(params=[*CPU_PATHS, TRITON])
def kernel_path(request):
    with kernel_path_context(request.param):
        yield request.param


@pytest.fixture(scope='session')
def interpreted():
    """Whether the CUDA kernels run in Triton's interpreter, which takes milliseconds a position."""
    return INTERPRETED


@pytest.fixture(scope='session')
def cpu_paths():
    """The CPU paths that this machine has, best first, and the context manager that forces one."""
    return CPU_PATHS, cpu_capability


@pytest.fixture
def triton_path():
    """The CUDA kernels, on the GPU or in Triton's interpreter."""
    pytest.importorskip('triton')
    with triton_kernels():
        yield


@pytest.fixture(autouse=True)
def _kernels():
    """Test the kernels, whatever VSSM_REFERENCE says, unless a test asks for the reference."""
    with vssm.ops.use_reference(False):
        yield
