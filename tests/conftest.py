# SPDX-License-Identifier: Apache-2.0
"""What every test shares: the golden files, the ways to compute the ops, error measure, poisoned memory."""

import importlib.util
import json
import os
import runpy
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # which deterministic products need on CUDA
INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    os.environ['TRITON_INTERPRET'] = '1'  # Triton reads it when it is imported, as timm does

import vssm  # noqa: E402

ROOT = Path(__file__).parent.parent
GOLDEN = Path(os.environ.get('VSSM_GOLDEN', ROOT.parent / 'shared' / 'golden'))
CAPABILITY = 'VSSM_CPU_CAPABILITY'


def pytest_addoption(parser):
    parser.addoption('--draws', type=int, default=300, help='random cases of the property tests of the scan')


def pytest_generate_tests(metafunc):
    if 'draw' in metafunc.fixturenames:
        draws = range(metafunc.config.getoption('draws'))
        metafunc.parametrize('draw', draws, ids=[f'draw{i}' for i in draws])
    if 'golden_scan' in metafunc.fixturenames:
        metafunc.parametrize('golden_scan', _golden_scans())


# What takes longest in Triton's interpreter: whole models, and what the comparison with the reference implies.
SLOW_IF_INTERPRETED = {
    'test_golden_classifier',
    'test_golden_backbone',
    'test_low_rank_steps_are_a_matrix_product',
    'test_orders_are_transposes_and_flips',
    'test_walks_are_summed',
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if INTERPRETED and item.get_closest_marker('triton'):
            is_half_opcheck = 'opcheck' in item.name and 'bfloat16' in item.name
            if item.originalname in SLOW_IF_INTERPRETED or is_half_opcheck:
                item.add_marker(pytest.mark.slow)


# ---- golden files ----------------------------------------------------------------------------------------------------

_need_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f'golden files not found, set VSSM_GOLDEN (now {GOLDEN})')


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


def _golden_scans() -> list:
    """(tensors, sizes and options) of every golden case of the op; without the folder one skipped placeholder."""
    if not GOLDEN.is_dir():
        return [pytest.param(None, id='absent', marks=_need_golden)]
    params = []
    for ndim in (1, 2):
        tensors, metadata = read_tensors(GOLDEN / f'scan_{ndim}d_cases.safetensors')
        for name, options in metadata['cases'].items():
            case = under(tensors, f'{name}.'), dict(options, ndim=ndim)
            params.append(pytest.param(case, id=f'{ndim}d-{name}'))
    return params


@pytest.fixture(scope='session')
def golden():
    """Reader of the golden folder: `.json` files as they are, safetensors as (tensors, metadata)."""
    if not GOLDEN.is_dir():
        pytest.skip(_need_golden.kwargs['reason'])

    def read(name: str):
        if name.endswith('.json'):
            return json.loads((GOLDEN / name).read_text())
        return read_tensors(GOLDEN / f'{name}.safetensors')

    return read


# ---- ways to compute the ops -----------------------------------------------------------------------------------------


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


def _scan_slices(self, input):
    """Triton's interpreter scans a tensor element by element; this goes slice by slice along the axis."""
    data = [np.moveaxis(t.handle.data, self.axis, 0) for t in input]
    slices = [[self.to_tensor(np.ascontiguousarray(d[i]), t.dtype) for d, t in zip(data, input, strict=True)]
              for i in range(len(data[0]))]  # fmt: skip
    for i in range(1, len(slices)):
        slices[i] = self.combine_fn.fn(*slices[i - 1], *slices[i])
    columns = zip(*slices, strict=True)
    return [self.to_tensor(np.stack([t.handle.data for t in c], self.axis), c[0].dtype) for c in columns]


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
        from triton.runtime.interpreter import ScanOps

        ScanOps.generic_scan = _scan_slices
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

    @property
    def interpreted(self) -> bool:
        """Whether it takes milliseconds a position."""
        return self.path == 'triton' and INTERPRETED

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


# ---- how errors are measured -----------------------------------------------------------------------------------------


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual - expected| / max |expected|, absolute where the expected values are zero by symmetry."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    scale = expected.double().abs().max().item()
    error = (actual.double() - expected.double()).abs().max().item()
    return error if scale < 1e-12 else error / scale


@pytest.fixture(scope='session')
def assert_close():
    """assert_close(actual, expected, tolerance, what): `relative_error` within tolerance; NaN never is."""

    def check(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = '') -> None:
        error = relative_error(actual, expected)
        assert error <= tolerance, f'{what}: relative error {error:.2e} exceeds {tolerance:.0e}'

    return check


# ---- small trainings -------------------------------------------------------------------------------------------------


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """Miniature data sets in the real layout, see make_datasets.py."""
    pytest.importorskip('mmdet', reason="mmdet is not installed: pip install '.[mmlab]'")
    root = tmp_path_factory.mktemp('data')
    runpy.run_path(str(Path(__file__).parent / 'mm' / 'make_datasets.py'))['main'](root)
    return root


@pytest.fixture(scope='session')
def small_config():
    """small_config(task, model_name): a shipped config, and changes to it for a test model and two steps on `data`."""
    dims = [32, 48, 64, 96]  # of every test model

    def imagenet(model_name):
        mesa = 'spatial' in model_name
        return f'imagenet/{"spatial_mamba" if mesa else "vmamba"}_tiny_8xb128-300e_in1k', {
            'model.model_name': model_name,
            'model.num_classes': 2,
            'model.data_preprocessor.mixup.num_classes': 2,
            'train_dataloader.batch_size': 2,
            'train_dataloader.num_workers': 0,
            'train_dataloader.persistent_workers': False,
            'train_dataloader.dataset.transform.input_size': 64,
            'val_dataloader.num_workers': 0,
            'val_dataloader.persistent_workers': False,
            'val_dataloader.dataset.transform.input_size': 64,
            'test_dataloader.num_workers': 0,
            'test_dataloader.persistent_workers': False,
            'test_dataloader.dataset.transform.input_size': 64,
            'val_evaluator.topk': (1, 2),
            'test_evaluator.topk': (1, 2),
            'param_scheduler': [dict(type='CosineAnnealingLR', T_max=4, end=4, convert_to_iter_based=True)],
            'train_cfg.max_epochs': 1,
        }

    def ade20k(model_name):
        return 'ade20k/upernet_vmamba_tiny_4xb4-160k_ade20k-512x512', {
            'model.backbone.model_name': model_name,
            'model.backbone.pretrained': False,
            'model.decode_head': dict(in_channels=dims, channels=32),
            'model.auxiliary_head': dict(in_channels=dims[2], channels=16),
            'model.data_preprocessor.size': (64, 64),
            'train_cfg': dict(max_iters=2, val_interval=2),
            'train_dataloader.batch_size': 2,
            'train_dataloader.dataset.pipeline.2.scale': (256, 64),
            'train_dataloader.dataset.pipeline.3.crop_size': (64, 64),
            'val_dataloader.dataset.pipeline.1.scale': (256, 64),
            'test_dataloader.dataset.pipeline.1.scale': (256, 64),
            'default_hooks.checkpoint.interval': 2,
            'param_scheduler.0.start_factor': 1.0,  # a warm-up's first steps are too small to be seen
        }

    def coco(model_name):
        return 'coco/mask-rcnn_vmamba_tiny_fpn_8xb2-1x_coco', {
            'model.backbone.model_name': model_name,
            'model.backbone.pretrained': False,
            'model.neck': dict(in_channels=dims, out_channels=32),
            'model.rpn_head': dict(in_channels=32, feat_channels=32),
            'model.roi_head.bbox_roi_extractor.out_channels': 32,
            'model.roi_head.mask_roi_extractor.out_channels': 32,
            'model.roi_head.bbox_head': dict(in_channels=32, fc_out_channels=32),
            'model.roi_head.mask_head': dict(in_channels=32, conv_out_channels=16),
            'model.test_cfg.rcnn.score_thr': 0.0,  # two steps make no confident detector
            'train_cfg.max_epochs': 1,
            'train_dataloader.dataset.pipeline.2.scale': (128, 96),
            'val_dataloader.dataset.pipeline.1.scale': (128, 96),
            'test_dataloader.dataset.pipeline.1.scale': (128, 96),
            'param_scheduler.0.start_factor': 1.0,
        }

    return lambda task, model_name: dict(imagenet=imagenet, ade20k=ade20k, coco=coco)[task](model_name)


# ---- state of the process --------------------------------------------------------------------------------------------


@pytest.fixture(scope='session', autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """For maps this small: threads would wait for one another more than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _kernels():
    """Test the kernels, whatever VSSM_REFERENCE says, unless a test asks for the reference."""
    with vssm.ops.use_reference(False):
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill every newly allocated tensor with NaN: a kernel that leaves an element of its output unwritten is seen."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
