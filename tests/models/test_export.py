# SPDX-License-Identifier: Apache-2.0
"""What PyTorch makes of the networks: compiled, exported, in ONNX, under the transforms of torch.func, quantised."""

import copy
import io
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap

import vssm
from vssm.models import export
from vssm.models.weights import list_models
from vssm.ops.scan.decomp import selective_scan_decomp

# VMamba's layers are 2DVMamba's.
SMALL = [name for name in list_models() if name.startswith('test_') and name != 'test_vmamba']
SHALLOW = {  # what makes networks shallow that are no pyramid of alike stages
    'test_mambavision': dict(depths=(1, 1, 2, 1), dims=16),
    'test_vim': dict(depth=2),
}
SIZES = ((1, 64, 96), (2, 33, 47), (3, 32, 96), (1, 96, 32))  # at 1/32 the last three have a height or a width of 1
# A graph of windows holds where several of them cover either side, with and without padding as at the first size.
IN_WINDOWS = ((6, 96, 160), (4, 80, 96), (3, 224, 224), (6, 129, 70))
every_small_model = pytest.mark.parametrize('name', SMALL)
every_graph = pytest.mark.parametrize(  # whose sizes take PyTorch long to reason about
    'name', [name if name == 'test_vmamba2d' else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
# Where the op is one call of the graph, whatever its scan, and compiling takes long.
every_family = pytest.mark.parametrize('name', ('test_vmamba2d', 'test_spatial_mamba'))
dynamic = torch.export.Dim.DYNAMIC
every_size = ({0: dynamic, 2: dynamic, 3: dynamic},)


def create(name, **kwargs):
    """A model whose parameters all move the output visibly: at initialisation many are equal, zero or small."""
    model = timm.create_model(name, num_classes=10, **kwargs).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.add_(2 if n.endswith('.dt_bias') else 0.1 * torch.randn_like(p))
    return model


def create_shallow(name, stages=2):
    """Few stages of one block, at a fraction of the time to compile; a second one begins with a downsampling."""
    return create(name, **SHALLOW.get(name, dict(depths=(1,) * stages, dims=(16, 32)[:stages])))


def images(batch=2, height=64, width=96):
    return torch.randn(batch, 3, height, width)


# ---- compilation -----------------------------------------------------------------------------------------------------


def training_step(model, forward, x):
    """The output, and the gradients of the image and of every parameter."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch._dynamo.maybe_mark_dynamic(x, 0)  # a first compilation with a fixed batch is spared
    y = forward(x)
    y.square().sum().backward()
    return dict(y=y.detach(), x=x.grad, **{name: p.grad for name, p in model.named_parameters()})


def check_training(model, compiled, sizes, assert_close):
    """Outputs and gradients are those of eager mode; after the first size nothing is compiled.

    The sizes stay where PyTorch itself compiles nothing further: 2 to 15 images, whose convolution may be another one
    outside, and maps of up to 4096 positions in all, whose sums in the backward inductor splits beyond.
    """
    for i, x in enumerate(images(*size) for size in sizes):
        expected = training_step(model, model, x)
        with torch.compiler.set_stance('fail_on_recompile' if i else 'default'):
            actual = training_step(model, compiled, x)
        for key in expected:
            assert_close(actual[key], expected[key], 1e-5 if key == 'y' else 1e-4, key)


@pytest.mark.slow
@every_family
def test_compile(name, fresh_dynamo, assert_close):
    model = create_shallow(name, stages=1)
    check_training(model, torch.compile(model, fullgraph=True), [(2, 32, 48), (3, 32, 48), (8, 32, 48)], assert_close)


@every_graph
def test_one_graph_for_every_size(name, fresh_dynamo, assert_close):
    model = create_shallow(name)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend='eager')
    sizes = ((2, 64, 96), (3, 64, 96), (5, 64, 96), (9, 64, 96), (2, 33, 47), (2, 32, 96))
    first, *others = IN_WINDOWS if name == 'test_mambavision' else sizes
    compiled(images(*first))
    with torch.compiler.set_stance('fail_on_recompile'):
        for batch, height, width in others:
            x = images(batch, height, width)
            assert_close(compiled(x), model(x), 1e-5)


@pytest.mark.slow
def test_compile_every_size(fresh_dynamo, assert_close):
    model = create_shallow('test_vmamba2d', stages=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        compiled(images())
        with torch.compiler.set_stance('fail_on_recompile'):
            for batch, height, width in ((3, 64, 96), (8, 64, 96), (2, 33, 47), (2, 32, 96)):
                x = images(batch, height, width)
                assert_close(compiled(x), model(x), 1e-5)


@pytest.mark.slow
def test_compile_training_on_every_size(fresh_dynamo, assert_close):
    """Inductor's layout optimisation cannot sort the strides of a map of symbolic height and width that it saves for
    the backward, of any convolutional network (PyTorch 2.11, pytorch/pytorch issue 185510)."""
    model = create_shallow('test_vmamba2d', stages=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, options={'layout_optimization': False})
    check_training(model, compiled, [(2, 32, 48), (3, 32, 48), (2, 33, 47)], assert_close)


# ---- export ----------------------------------------------------------------------------------------------------------


@every_graph
def test_export(name, assert_close):
    model = create_shallow(name)
    first, *others = IN_WINDOWS if name == 'test_mambavision' else ((2, 64, 96), *SIZES)
    program = torch.export.export(model, (images(*first),), dynamic_shapes=every_size)
    calls = [node for node in program.graph.nodes if node.target == torch.ops.vssm.selective_scan.default]
    assert len(calls) == sum('A_log' in module._parameters for module in model.modules())  # one a scan
    exported = program.module()
    for size in others:
        x = images(*size)
        assert_close(exported(x), model(x), 1e-6)


RUN_ALONE = """
import sys
import torch
library, package, cases = sys.argv[1:]
torch.ops.load_library(library)
model = torch._inductor.aoti_load_package(package)
torch.save([model(x) for x in torch.load(cases)], cases)
assert not {'vssm', 'timm'} & set(sys.modules)
"""


@pytest.mark.slow
def test_ahead_of_time(tmp_path, assert_close):
    """A process that knows torch and the library of the ops alone runs the compiled network, of most of the ops, on
    every size. The README compiles 2DVMamba so."""
    model = create_shallow('test_spatial_mamba', stages=1)
    with torch.no_grad():
        program = torch.export.export(model, (images(),), dynamic_shapes=every_size)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / 'model.pt2'))
        cases = [images(*size) for size in ((2, 64, 96), (5, 64, 96), *SIZES)]
        expected = [model(x) for x in cases]
    torch.save(cases, tmp_path / 'cases.pt')
    library = Path(vssm.ops.__file__).with_name('_C.so')
    command = [sys.executable, '-I', '-c', RUN_ALONE, library, package, tmp_path / 'cases.pt']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for actual, y in zip(torch.load(tmp_path / 'cases.pt'), expected, strict=True):
        assert_close(actual, y, 1e-5)


# ---- ONNX ------------------------------------------------------------------------------------------------------------

DECOMPOSED = {
    '2d-low-rank': dict(ndim=2, rank=2),
    '1d-low-rank': dict(ndim=1, rank=2),
    '2d-two-states': dict(ndim=2, orders=(1, 2), states=2, absent=('D',)),
    '1d-sixteen-states': dict(ndim=1, orders=(3, 0), states=16, absent=('dt_bias',)),
    '2d-one': dict(ndim=2, orders=(3,), softplus=False),
    '1d-no-C': dict(ndim=1, orders=(2,), absent=('C', 'D')),
    '2d-one-row': dict(ndim=2, height=1),
    '1d-one-position': dict(ndim=1, height=1, width=1, batch=1, rank=1),
}


def scan_arguments(ndim, orders=(0, 1, 2, 3), states=1, rank=0, softplus=True, absent=(), batch=2, height=3, width=5):
    """What the operator takes, in order."""
    E, K = 6, len(orders)
    tensors = dict(
        x=torch.randn(batch, height, width, E),
        dt=torch.randn(batch, height, width, K, rank or E),
        A=-torch.rand(K, E, states) - 0.1,
        B=torch.randn(batch, height, width, K, states),
        C=torch.randn(batch, height, width, K, states),
        D=torch.randn(K, E),
        dt_bias=torch.randn(K, E),
        dt_weight=torch.randn(K, E, rank) if rank else None,
    )
    if not softplus:
        tensors.update(dt=torch.rand_like(tensors['dt']), dt_bias=None)
    return [None if name in absent else t for name, t in tensors.items()] + [ndim, list(orders), softplus]


@pytest.mark.parametrize('case', DECOMPOSED.values(), ids=DECOMPOSED)
@pytest.mark.parametrize('dtype', (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_decomposition(case, dtype, assert_close):
    args = [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in scan_arguments(**case)]
    expected = torch.ops.vssm.selective_scan(*args)
    actual = selective_scan_decomp(*args)
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype])


def check_onnx(path, model, assert_close, sizes=SIZES):
    """One file of standard operators, which ONNX Runtime computes as eager PyTorch does, whatever the size."""
    onnx, onnxruntime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    file = onnx.load(path)
    batch, _, height, width = file.graph.input[0].type.tensor_type.shape.dim
    assert (batch.dim_param, height.dim_param, width.dim_param) == ('batch', 'height', 'width')
    assert {opset.domain for opset in file.opset_import} <= {'', 'ai.onnx'} and not file.functions
    assert 'Scan' in {node.op_type for node in file.graph.node}
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for size in sizes:
        x = images(*size)
        (y,) = session.run(None, {'images': x.numpy()})
        with torch.no_grad():
            assert_close(torch.from_numpy(y), model(x), 1e-5, str(size))


ONNX = {  # of every family, as few blocks as have all its layers
    'test_vmamba2d': dict(depths=(1, 1), dims=(16, 32)),
    'test_spatial_mamba': dict(depths=(1, 1), dims=(16, 32)),
    'test_vim': dict(depth=1),
    'test_groupmamba': dict(depths=(1,), dims=(16,), mlp_ratio=2.0),
    'test_mambavision': dict(depths=(1, 1, 2, 1), dims=16),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', ONNX)
def test_onnx(name, tmp_path, assert_close):
    pytest.importorskip('onnxscript')
    model = create(name, **ONNX[name])
    first, *others = IN_WINDOWS if name == 'test_mambavision' else ((2, 64, 96), *SIZES)
    export.export_onnx(model, tmp_path / 'model.onnx', images(*first))
    check_onnx(tmp_path / 'model.onnx', model, assert_close, others)


@pytest.mark.slow
def test_onnx_of_a_network_for_images_of_one_size(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model = create('test_vim', depth=1, dynamic_img_size=False)
    export.export_onnx(model, tmp_path / 'model.onnx')
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    assert session.get_inputs()[0].shape == ['batch', 3, 64, 64]
    assert session.run(None, {'images': images(5, 64, 64).numpy()})[0].shape == (5, 10)


@pytest.mark.slow
def test_onnx_of_one_block(tmp_path, assert_close):
    pytest.importorskip('onnxscript')
    model = create_shallow('test_vmamba', stages=1)
    export.export_onnx(model, tmp_path / 'model.onnx', images())
    check_onnx(tmp_path / 'model.onnx', model, assert_close, [*SIZES, (2, 4, 20)])


def test_onnx_leaves_no_half_file(tmp_path, monkeypatch):
    pytest.importorskip('onnxscript')
    path = tmp_path / 'model.onnx'
    path.write_text('an older one')

    def save(self, destination, **kwargs):
        Path(destination).write_text('half a')
        raise OSError('no space left')

    monkeypatch.setattr(torch.onnx.ONNXProgram, 'save', save)
    with pytest.raises(OSError, match='no space'):
        export.export_onnx(nn.Conv2d(3, 4, 3).eval(), path, images())
    assert path.read_text() == 'an older one' and list(tmp_path.iterdir()) == [path]


def test_onnx_without_its_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(export, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=re.escape('`pip install ".[export]"`')):
        export.export_onnx(create_shallow(SMALL[0]), tmp_path / 'model.onnx')


@pytest.mark.parametrize('shape', [(1, 3, 64, 96), (2, 3, 64, 64), (3, 64, 96)], ids=str)
def test_onnx_of_images_that_tell_no_axes(shape, tmp_path):
    pytest.importorskip('onnxscript')
    with pytest.raises(ValueError, match=f'images must be .* got {re.escape(str(shape))}'):
        export.export_onnx(create_shallow(SMALL[0]), tmp_path / 'model.onnx', torch.zeros(shape))


def test_onnx_into_no_folder(tmp_path):
    pytest.importorskip('onnxscript')
    with pytest.raises(FileNotFoundError, match='the folder of path .* does not exist'):
        export.export_onnx(create_shallow(SMALL[0]), tmp_path / 'none' / 'model.onnx')


def test_onnx_of_a_model_in_training(tmp_path):
    pytest.importorskip('onnxscript')
    with pytest.raises(ValueError, match='eval'):
        export.export_onnx(create_shallow(SMALL[0]).train(), tmp_path / 'model.onnx')


# ---- torch.func ------------------------------------------------------------------------------------------------------

# In float64: in float32 a ReLU whose input is all but zero may fall to either side, and with it the gradient.


def loss(model, params, x, target):
    """Of one image and its class."""
    return F.cross_entropy(functional_call(model, params, (x.unsqueeze(0),)), target.unsqueeze(0))


def parameters_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


@every_small_model
def test_gradients_of_every_sample(name, assert_close):
    model = create_shallow(name).double()
    x, target = images(3, 32, 48).double(), torch.tensor([1, 2, 3])
    of_one = grad(lambda *args: loss(model, *args))
    grads = vmap(of_one, in_dims=(None, 0, 0))(parameters_of(model), x, target)
    for i in range(3):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), target[i : i + 1]).backward()
        for n, p in model.named_parameters():
            assert_close(grads[n][i], p.grad, 1e-10, n)


@every_family
def test_ensemble(name, assert_close):
    models = [create_shallow(name).double() for _ in range(3)]
    params, buffers = stack_module_state(models)
    x, target = images(2, 32, 48).double(), torch.tensor([1, 2])

    def forward(params, buffers):
        y = functional_call(models[0], (params, buffers), (x,))
        return F.cross_entropy(y, target), y

    grads, ys = vmap(grad(forward, has_aux=True))(params, buffers)
    for i, model in enumerate(models):
        y = model(x)
        assert_close(ys[i], y, 1e-12)
        F.cross_entropy(y, target).backward()
        for n, p in model.named_parameters():
            assert_close(grads[n][i], p.grad, 1e-10, n)


@every_small_model
def test_jacobian(name, assert_close):
    model = create_shallow(name).double()
    x = images(1, 32, 48).double().requires_grad_()
    jacobian = jacrev(model)(x.detach())  # [1, classes, 1, 3, H, W]
    (expected,) = torch.autograd.grad(model(x)[0, 2], x)
    assert_close(jacobian[0, 2], expected, 1e-10)


def mapped(mapped_axes, size=3):
    """Arguments of the operator of which some have one more axis, and where."""
    args = scan_arguments(ndim=2, rank=2)
    names = ('x', 'dt', 'A', 'B', 'C', 'D', 'dt_bias', 'dt_weight')
    in_dims = [mapped_axes.get(name) for name in names]
    for i, dim in enumerate(in_dims):
        if dim is not None:
            args[i] = torch.stack([args[i] * (1 + 0.1 * n) for n in range(size)], dim)  # A stays negative
    return args, (*in_dims, None, None, None)


MAPPED = {
    'x': dict(x=0),
    'x-in-its-middle': dict(x=2),
    'maps': dict(x=0, dt=1, B=-1, C=2),
    'A': dict(A=0),
    'all': dict(x=1, dt=0, A=1, B=0, C=0, D=1, dt_bias=0, dt_weight=-1),
}


@pytest.mark.filterwarnings('error')  # without a rule of ours PyTorch warns of its own, a slow one
@pytest.mark.parametrize('axes', MAPPED.values(), ids=MAPPED)
def test_vmap_over_any_argument(axes, assert_close):
    args, in_dims = mapped(axes)
    op = torch.ops.vssm.selective_scan

    def each(f):
        slices = [
            [arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)]
            for i in range(3)
        ]
        return [f(*one) for one in slices]

    def scan(x, dt, A, B, C, D, dt_bias, dt_weight, *options):
        return vssm.ops.selective_scan(x, dt, A, B, C, D, dt_bias, dt_weight=dt_weight)

    assert torch.equal(vmap(op, in_dims)(*args), torch.stack(each(op)))
    assert torch.equal(vmap(scan, in_dims)(*args), torch.stack(each(scan)))
    for i in range(8):
        gradient = grad(lambda *args: scan(*args).square().sum(), argnums=i)
        assert_close(vmap(gradient, in_dims)(*args), torch.stack(each(gradient)), 1e-5)


def test_nested_vmap():
    args = scan_arguments(ndim=1, rank=2)
    x = torch.randn(3, 4, *args[0].shape)
    A = torch.stack([args[2], 2 * args[2], 3 * args[2]])

    def scan(x, A):
        return torch.ops.vssm.selective_scan(x, args[1], A, *args[3:])

    actual = vmap(vmap(scan, (0, None)))(x, A)
    assert torch.equal(actual, torch.stack([torch.stack([scan(x[i, j], A[i]) for j in range(4)]) for i in range(3)]))


def test_grad_under_autocast(assert_close):
    model = create_shallow('test_vmamba2d')
    x, target = images(1, 32, 48), torch.tensor([1])
    with torch.autocast('cpu', torch.bfloat16):
        grads = grad(lambda params: loss(model, params, x[0], target[0]))(parameters_of(model))
        F.cross_entropy(model(x), target).backward()
    for n, p in model.named_parameters():  # bfloat16 rounds by 4e-3, in another order of operations
        assert_close(grads[n], p.grad, 5e-2, n)


def dual(f, x):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(x, x))


IMPOSSIBLE = {
    'jvp': (lambda f, x: jvp(f, (x,), (x,)), 'forward-mode'),
    'dual': (dual, 'forward-mode'),
    'hessian': (lambda f, x: hessian(f)(x), 'forward-mode'),
    'grad-of-grad': (lambda f, x: grad(lambda x: grad(f)(x).sum())(x), 'second derivative'),
}


@pytest.mark.parametrize('transform, what', IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_transforms(transform, what):
    """They say what is missing, and that the reference has it."""
    args = scan_arguments(ndim=2, height=2, width=2)

    def scan(x):
        return vssm.ops.selective_scan(x, *args[1:7]).square().sum()

    with pytest.raises(NotImplementedError, match=f'selective_scan.*{what}.*use_reference'):
        transform(scan, args[0])
    with vssm.ops.use_reference():
        transform(scan, args[0])


# ---- quantisation ----------------------------------------------------------------------------------------------------


def megabytes(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return len(file.getvalue()) / 1e6


@every_small_model
def test_quantised_linear_layers(name):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = timm.create_model(name).eval()
    quantised = copy.deepcopy(model)
    quantize_(quantised, Int8DynamicActivationInt8WeightConfig())
    linear = [module for module in quantised.modules() if isinstance(module, nn.Linear)]
    assert not [module for module in linear if type(module.weight) is nn.Parameter]
    assert len(linear) == sum(isinstance(module, nn.Linear) for module in model.modules())
    assert quantised.state_dict().keys() == model.state_dict().keys()
    assert megabytes(quantised) < 0.6 * megabytes(model)
    x = images()
    with torch.inference_mode():
        similarity = F.cosine_similarity(quantised(x), model(x)).min().item()
    assert 0.999 < similarity < 1 and not math.isnan(similarity)
