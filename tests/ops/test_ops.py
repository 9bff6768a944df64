# SPDX-License-Identifier: Apache-2.0
"""The suite that every op passes through, by the table in op_cases.py, and every kernel: against the reference.

What is particular to an op is in test_selective_scan.py, test_state_fusion.py and test_gated_readout.py.
"""

import doctest
import itertools
import math
import sys

import pytest
import torch
from fresh_processes import run_fresh
from op_cases import OPS, arguments, backward_arguments
from op_inputs import LAYOUTS, convert, lay_out, random_like
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vssm.ops import use_reference
from vssm.ops.decompositions import DECOMPOSITIONS


def over(*cases):
    """Parametrise with (op, ...) and ids such as `scan-x`."""
    return dict(argvalues=cases, ids=['-'.join(map(str, case)) for case in cases])


every_op = pytest.mark.parametrize('op', OPS, ids=str)
every_argument = pytest.mark.parametrize(('op', 'name'), **over(*((op, name) for op in OPS for name in op.names)))
every_variant = pytest.mark.parametrize(('op', 'variant'), **over(*((op, name) for op in OPS for name in op.variants)))
every_way = pytest.mark.parametrize('way', ('function', 'operator'))
by_reference_and_kernel = pytest.mark.parametrize('reference', (False, True), ids=('kernel', 'reference'))
in_half = pytest.mark.parametrize('half', (torch.bfloat16, torch.float16), ids=('bfloat16', 'float16'))


def skip_what_the_reference_computes(op, path, dtype=torch.float32):
    if path == 'triton' and (not op.has_cuda or dtype == torch.float64):
        pytest.skip('the reference computes on CUDA')


@pytest.fixture(params=['cpu', pytest.param('triton', marks=pytest.mark.triton)])
def device_kernels(request):
    """The kernels of a device: of the CPU along its best path, or of CUDA."""
    if request.param == 'triton':
        request.getfixturevalue('triton_path')
    return request.param


def grad_for(tensors):
    """A gradient of y, which has the shape and dtype of the first tensor."""
    return random_like(next(iter(tensors.values())))


def cast(op, tensors, dtype):
    """Inputs as autocast hands them to an op."""
    return {n: t.to(dtype) if n in op.autocast and t is not None else t for n, t in tensors.items()}


# ---- values and gradients --------------------------------------------------------------------------------------------

DTYPES = {  # of the maps and of the parameters; tolerances of y and of the gradients
    'float32': (torch.float32, torch.float32, 2e-6, 2e-5),
    'float64': (torch.float64, torch.float64, 1e-12, 1e-12),
    'bfloat16': (torch.bfloat16, torch.bfloat16, 1e-2, 2e-2),
    'float16': (torch.float16, torch.float16, 1e-2, 1e-2),
    'bfloat16-float32': (torch.bfloat16, torch.float32, 1e-2, 1e-2),
    'float16-float32': (torch.float16, torch.float32, 1e-2, 1e-2),
}


@pytest.mark.parametrize('dtypes', DTYPES)
@every_op
def test_values_and_gradients(op, dtypes, kernel_path, interpreted, assert_close):
    """In every layout: y contiguous and the same bits, and all as the float64 reference has it."""
    map_dtype, parameter_dtype, tolerance, grad_tolerance = DTYPES[dtypes]
    skip_what_the_reference_computes(op, kernel_path, map_dtype)
    slow = kernel_path == 'triton' and interpreted
    tensors, options = op.make(**({} if slow else op.medium))  # of more channels than a vector has lanes
    tensors = {name: t.to(map_dtype if name in op.maps else parameter_dtype) for name, t in tensors.items()}
    grad_y = grad_for(tensors)
    with use_reference():
        expected, expected_grads = op.values_and_grads(convert(tensors, torch.float64), options, grad_y.double())
    first = None
    layouts = ('contiguous', *LAYOUTS)
    for layout in layouts[:2] if slow else layouts:
        laid_out = {name: lay_out(t, layout) for name, t in tensors.items()}
        y, grads = op.values_and_grads(laid_out, options, lay_out(grad_y, layout))
        first = y if first is None else first
        assert y.dtype == map_dtype and y.is_contiguous() and torch.equal(y, first), layout
        assert_close(y, expected, tolerance, f'y, {layout}')
        for name, grad in grads.items():
            assert grad.dtype == tensors[name].dtype, name
            assert_close(grad, expected_grads[name], grad_tolerance, f'gradient of {name}, {layout}')


@by_reference_and_kernel
@every_variant
def test_gradcheck(op, variant, reference):
    tensors, options = op.make(**op.variants[variant])
    present = {name: t.requires_grad_() for name, t in tensors.items() if t is not None}

    def call(*args):
        return op.function(**{**tensors, **dict(zip(present, args, strict=True))}, **options)

    with use_reference(reference):
        assert torch.autograd.gradcheck(call, tuple(present.values()))


@every_argument
def test_any_input_alone_may_need_a_gradient(op, name):
    tensors, options = op.make(dtype=torch.float32)
    grad_y = grad_for(tensors)
    _, expected = op.values_and_grads(tensors, options, grad_y)
    leaf = tensors[name].detach().requires_grad_()
    op.function(**{**tensors, name: leaf}, **options).backward(grad_y)
    assert torch.equal(leaf.grad, expected[name])


@pytest.mark.parametrize('mode', (torch.no_grad, torch.inference_mode), ids=('no_grad', 'inference_mode'))
@every_op
def test_without_gradients(op, mode):
    tensors, options = op.make(dtype=torch.float32)
    expected = op.function(**tensors, **options)
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    with mode():
        y = op.function(**leaves, **options)
    assert not y.requires_grad and torch.equal(y, expected)


@every_variant
def test_only_wanted_gradients_are_computed(op, variant, kernel_path):
    """The others are empty; each is the same, whichever are wanted with it."""
    skip_what_the_reference_computes(op, kernel_path)
    tensors, options = op.make(**op.variants[variant], dtype=torch.float32)
    present = [name for name, t in tensors.items() if t is not None]
    grad_y = grad_for(tensors)
    expected = dict(zip(op.names, op.operator_backward(*backward_arguments(op, grad_y, tensors, options)), strict=True))
    # In Triton's interpreter, which is slow, no more than each once with others and once not.
    singles = [(name,) for name in present] if kernel_path != 'triton' else []
    for wanted in ((), *singles, tuple(present[::2]), tuple(present[1::2])):
        grads = op.operator_backward(*backward_arguments(op, grad_y, tensors, options, wanted))
        for name, grad in zip(op.names, grads, strict=True):
            assert torch.equal(grad, expected[name] if name in wanted else torch.empty(0)), (name, wanted)


class Wanted(TorchDispatchMode):
    """What the backward operator is asked for."""

    def __init__(self, op):
        super().__init__()
        self.op, self.flags = op, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func == self.op.operator_backward:
            self.flags = args[-1]
        return func(*args, **(kwargs or {}))


@every_op
def test_autograd_asks_for_what_needs_a_gradient(op):
    tensors, options = op.make(dtype=torch.float32)
    for needed in (op.names[:1], op.names[1:], op.names[::2]):
        leaves = {name: t.requires_grad_(name in needed) for name, t in tensors.items()}
        y = op.function(**leaves, **options)
        with Wanted(op) as wanted:
            y.sum().backward()
        assert wanted.flags == [name in needed for name in op.names]


# ---- derivatives that no kernel has ----------------------------------------------------------------------------------


def refused(op, derivative):
    return pytest.raises(NotImplementedError, match=f'{op.name}.*{derivative}.*use_reference')


def of_first(op, way, tensors, options):
    """The op as a function of its first tensor, and that tensor."""
    call, (first, x) = op.called(way), next(iter(tensors.items()))
    return lambda x: call(**{**tensors, first: x}, **options), x


SECOND_DERIVATIVES = {
    'grad-grad': lambda f, x: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(x),
    'jacrev-grad': lambda f, x: torch.func.jacrev(torch.func.grad(f))(x),
    'vjp-grad': lambda f, x: torch.func.vjp(torch.func.grad(f), x)[1](x),
    'autograd': lambda f, x: torch.autograd.functional.hessian(f, x),
}
FORWARD_MODE = {
    'jvp': lambda f, x: torch.func.jvp(f, (x,), (x,)),
    'jacfwd': lambda f, x: torch.func.jacfwd(f)(x),
    'linearize': lambda f, x: torch.func.linearize(f, x),
    'vmap-jvp': lambda f, x: torch.vmap(lambda t: torch.func.jvp(f, (x,), (t,)))(x[None]),
    'forward-over-reverse': lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (x,)),
    'dual': lambda f, x: dual(f, x),
    'dual-that-needs-a-gradient': lambda f, x: dual(f, x.clone().requires_grad_()),
}


def dual(f, x):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, x.detach()))


@every_way
@every_op
def test_second_derivative_is_refused_by_kernels_alone(op, way):
    tensors, options = op.make(**next(iter(op.variants.values())))
    call, x = of_first(op, way, tensors, options)
    for how, differentiate in SECOND_DERIVATIVES.items():
        with refused(op, 'second derivative'):
            pytest.fail(f'{how} gives {differentiate(lambda x: call(x).square().sum(), x)}')


@every_op
def test_reference_has_second_derivatives(op):
    tensors, options = op.make(**next(iter(op.variants.values())))
    leaves = tuple(t.requires_grad_() for t in tensors.values())

    def call(*args):
        return op.function(**dict(zip(tensors, args, strict=True)), **options)

    with use_reference():
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@every_way
@every_op
def test_forward_mode_is_refused_by_kernels_alone(op, way, assert_close):
    tensors, options = op.make(**next(iter(op.variants.values())))
    call, x = of_first(op, way, tensors, options)
    for how, differentiate in FORWARD_MODE.items():
        with refused(op, 'forward-mode derivative'):
            pytest.fail(f'{how} gives {differentiate(lambda x: call(x).sum(), x)}')
    with refused(op, 'forward-mode derivative'):
        dual(lambda grad_y: op.operator_backward(*backward_arguments(op, grad_y, tensors, options)), grad_for(tensors))
    # What has no tangent is no business of forward mode.
    _, tangent = torch.func.jvp(lambda scale: scale * call(x).sum(), (torch.ones(()).to(x),), (torch.ones(()).to(x),))
    assert torch.equal(tangent, call(x).sum())
    if way == 'function':
        step = random_like(x)
        with use_reference():
            _, tangent = torch.func.jvp(call, (x,), (step,))
            assert_close(tangent, (call(x + 1e-6 * step) - call(x - 1e-6 * step)) / 2e-6, 1e-6)


# ---- numbers that are not finite -------------------------------------------------------------------------------------

CHANNELS = [pytest.param(n, marks=() if n == 17 else pytest.mark.slow) for n in range(1, 41)]


@pytest.mark.parametrize('channels', CHANNELS)
@every_op
def test_what_is_not_finite_spreads_no_further_than_in_the_reference(op, channels, cpu_path):
    """Where the last vector of channels is not full, nothing may read what the kernel computes beyond them; nor what it
    computes beyond the map."""
    values = (math.inf, -math.inf, math.nan) if channels == 17 else (math.nan if channels % 2 else math.inf,)
    for case in op.with_channels:
        tensors, options = op.make(**case(channels), dtype=torch.float32)
        tensors['grad_y'] = grad_for(tensors)
        for name, value in itertools.product(tensors, values):
            spoilt = {**tensors, name: tensors[name].clone()}
            spoilt[name].view(-1)[spoilt[name].numel() // 2] = value
            grad_y = spoilt.pop('grad_y')
            with use_reference():
                expected, expected_grads = op.values_and_grads(spoilt, options, grad_y)
            y, grads = op.values_and_grads(spoilt, options, grad_y)
            assert not (expected.isfinite() & ~y.isfinite()).any(), (name, value)
            for other, grad in grads.items():
                more = expected_grads[other].isfinite() & ~grad.isfinite()
                assert not more.any(), f'{value} in {name}: {int(more.sum())} more of the gradient of {other}'


# ---- memory ----------------------------------------------------------------------------------------------------------


def allocated(call):
    """Bytes that a call allocates on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())


LONG_MAPS = [
    pytest.param(height, width, id=f'{height}x{width}', marks=() if height < 16 else pytest.mark.slow)
    for height, width in ((4, 5_000), (1, 20_000), (16, 1_250), (5_000, 4), (20_000, 1))
]


@pytest.mark.parametrize(('height', 'width'), LONG_MAPS)
@every_op
def test_long_maps_need_no_more_memory_than_square_ones(op, height, width):
    for case in op.with_size:
        needed = []
        for size in ((125, 160), (height, width)):
            tensors, options = op.make(**case(*size), dtype=torch.float32)
            arguments_back = backward_arguments(op, grad_for(tensors), tensors, options)
            needed += [
                allocated(lambda tensors=tensors, options=options: op.operator(*arguments(tensors, options))),
                allocated(lambda args=arguments_back: op.operator_backward(*args)),
            ]
        for square, long in zip(needed[:2], needed[2:], strict=True):
            assert long <= square + (1 << 19)


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16), ids=('float32', 'bfloat16'))
@pytest.mark.parametrize(('op', 'case'), **over(*((op, name) for op in OPS for name in op.large)))
def test_any_number_of_threads_gives_the_same_bits(op, case, dtype, cpu_path):
    tensors, options = op.make(**op.large[case], dtype=dtype)
    grad_y = grad_for(tensors)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(op.values_and_grads(tensors, options, grad_y))
    finally:
        torch.set_num_threads(before)
    y, grads = results[0]
    for other_y, other_grads in results[1:]:
        assert torch.equal(y, other_y)
        for name, grad in grads.items():
            assert torch.equal(grad, other_grads[name]), name


# ---- the operator ----------------------------------------------------------------------------------------------------


OPERATOR_CASES = [(op, variant, 'float32') for op in OPS for variant in op.variants]
OPERATOR_CASES += [(op, next(iter(op.variants)), 'bfloat16') for op in OPS if op.has_cuda]  # the others take one dtype


@pytest.mark.parametrize(('op', 'variant', 'dtype'), **over(*OPERATOR_CASES))
def test_opcheck(op, variant, dtype, device_kernels):
    skip_what_the_reference_computes(op, device_kernels)
    tensors, options = op.make(**op.variants[variant], dtype=torch.float32)
    tensors = {n: t.to(getattr(torch, dtype)) if n in op.maps and t is not None else t for n, t in tensors.items()}
    leaves = {n: None if t is None else t.clone().requires_grad_() for n, t in tensors.items()}
    torch.library.opcheck(op.operator, arguments(leaves, options))
    grad_y = grad_for(tensors)
    torch.library.opcheck(op.operator_backward, backward_arguments(op, grad_y, tensors, options))


def entries(t, count=3):
    """Several inputs like t, (count, ...)."""
    return torch.stack([t * (1 - 0.3 * i) for i in range(count)])


@every_way
@every_op
def test_vmap_over_any_tensors(op, way):
    """Over each tensor alone, over all maps, over all tensors, and along an axis that is not the first."""
    tensors, options = op.make(dtype=torch.float32)
    for mapped in (*((name,) for name in tensors), op.maps, tuple(tensors)):
        stacked = {name: entries(tensors[name]) for name in mapped}

        def call(values, tensors=tensors):
            return op.called(way)(**{**tensors, **values}, **options)

        expected = torch.stack([call({n: t[i] for n, t in stacked.items()}) for i in range(3)])
        assert torch.equal(torch.vmap(call)(stacked), expected), mapped
        last = {name: t.movedim(0, -1) for name, t in stacked.items()}
        assert torch.equal(torch.vmap(call, in_dims=-1)(last), expected), mapped


@every_way
@every_op
def test_gradients_of_each_image(op, way):
    """torch.func.grad, alone and under vmap, gives what autograd gives."""
    tensors, options = op.make(dtype=torch.float32)
    grad_y = grad_for(tensors)
    images = {name: entries(tensors[name]) for name in op.maps}
    parameters = {name: t for name, t in tensors.items() if name not in op.maps}

    def loss(parameters, maps):
        return (op.called(way)(**parameters, **maps, **options) * grad_y).sum()

    grads = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, 0))(parameters, images)
    for i in range(3):
        maps = {name: t[i] for name, t in images.items()}
        _, expected = op.values_and_grads({**tensors, **maps}, options, grad_y)
        alone = torch.func.grad(loss, argnums=(0, 1))(parameters, maps)
        for kind in (0, 1):
            for name, grad in grads[kind].items():
                assert torch.equal(grad[i], expected[name]) and torch.equal(alone[kind][name], expected[name]), name


@every_op
def test_compiles_whole_for_any_size(op, fresh_dynamo, assert_close):
    call = torch.compile(op.function, backend='aot_eager', fullgraph=True, dynamic=True)
    for sizes in ({}, op.medium):
        tensors, options = op.make(**sizes, dtype=torch.float32)
        assert_close(call(**tensors, **options), op.function(**tensors, **options), 1e-6)


TRANSFORMS = {
    'grad': lambda f: torch.func.grad(lambda x: f(x).square().sum()),
    'vjp': lambda f: lambda x: torch.func.vjp(f, x)[1](x)[0],
    'vmap': lambda f: lambda x: torch.vmap(f)(torch.stack([x, 2 * x])),
    'vmap-grad': lambda f: lambda x: torch.vmap(torch.func.grad(lambda x: f(x).sum()))(torch.stack([x, 2 * x])),
}


@pytest.mark.slow
@pytest.mark.parametrize('transform', TRANSFORMS)
@every_way
@every_op
def test_transforms_compile_whole(op, way, transform, fresh_dynamo, assert_close):
    call, x = of_first(op, way, *op.make(dtype=torch.float32))
    transformed = TRANSFORMS[transform](call)
    assert_close(torch.compile(transformed, backend='aot_eager', fullgraph=True)(x), transformed(x), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('autocast', (False, True), ids=('', 'autocast'))
@pytest.mark.parametrize('inside', (False, True), ids=('around', 'inside'))
@every_op
def test_reference_compiles_whole(op, inside, autocast, fresh_dynamo, assert_close):
    call, x = of_first(op, 'function', *op.make(dtype=torch.float32))

    def with_reference(x):
        with use_reference():
            return call(x)

    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        expected = with_reference(x)
        compiled = torch.compile(with_reference if inside else call, backend='aot_eager', fullgraph=True)
        with use_reference(not inside):
            assert_close(compiled(x), expected, 1e-6)
        x = x.clone().requires_grad_()
        with use_reference(not inside):
            compiled(x).sum().backward()
        assert_close(x.grad, *torch.autograd.grad(with_reference(x).sum(), x), 1e-6)


@pytest.mark.slow
@by_reference_and_kernel
@every_op
def test_strict_export(op, reference, assert_close):
    tensors, options = op.make(dtype=torch.float32)
    with use_reference(reference):
        program = torch.export.export(Calls(op, list(tensors), options), tuple(tensors.values()), strict=True)
    assert (f'vssm.{op.name}' in str(program.graph)) != reference
    y = program.module()(*tensors.values())
    assert_close(y, op.function(**tensors, **options), 2e-6)


class Calls(torch.nn.Module):
    """The op as a module of tensors alone, as tracers and exporters want it."""

    def __init__(self, op, names, options):
        super().__init__()
        self.op, self.names, self.options = op, names, options

    def forward(self, *args):
        return self.op.function(**dict(zip(self.names, args, strict=True)), **self.options)


@every_op
def test_decomposition_leaves_no_operator_of_ours(op, assert_close):
    tensors, options = op.make(dtype=torch.float32)
    program = torch.export.export(Calls(op, list(tensors), options), tuple(tensors.values()))
    assert f'vssm.{op.name}' in str(program.graph)
    decomposed = program.run_decompositions(DECOMPOSITIONS)
    assert 'vssm' not in str(decomposed.graph)
    y = decomposed.module()(*tensors.values())
    assert_close(y, op.function(**tensors, **options), 2e-6)


@every_op
def test_operators_take_meta_tensors(op):
    tensors, options = op.make(dtype=torch.float32)
    y, grads = op.values_and_grads(
        {name: t.to('meta') for name, t in tensors.items()}, options, grad_for(tensors).to('meta')
    )
    assert y.is_meta
    for name, grad in grads.items():
        assert grad.is_meta and grad.shape == tensors[name].shape, name


@by_reference_and_kernel
@every_op
def test_meta_tensors_give_shapes(op, reference):
    tensors, options = op.make(dtype=torch.bfloat16)
    with use_reference(reference):
        y = op.function(**{name: t.to('meta') for name, t in tensors.items()}, **options)
    x = next(iter(tensors.values()))
    assert y.is_meta and y.shape == x.shape and y.dtype == torch.bfloat16


# ---- autocast and FLOPs ----------------------------------------------------------------------------------------------


@in_half
@by_reference_and_kernel
@every_op
def test_autocast_casts_no_more_than_it_says(op, half, reference):
    tensors, options = op.make(**op.medium, dtype=torch.float32)
    first, x = next(iter(tensors.items()))
    with use_reference(reference):
        expected = op.function(**cast(op, tensors, half), **options)
        with torch.autocast('cpu', half):
            y = op.function(**tensors, **options)
            mapped = torch.vmap(lambda x: op.function(**{**tensors, first: x}, **options))(x.unsqueeze(0))
        assert y.dtype == (half if op.autocast else torch.float32)
        assert torch.equal(y, expected) and torch.equal(mapped[0], expected)
        for name in tensors.keys() - set(op.autocast):  # rounding one of these as well would change the result
            rounded = cast(op, tensors, half)
            rounded[name] = rounded[name].to(half).float()
            assert not torch.equal(op.function(**rounded, **options), expected), name


@every_op
def test_autocast_returns_gradients_in_the_inputs_dtypes(op, assert_close):
    tensors, options = op.make(dtype=torch.float32)
    y, expected = op.values_and_grads(tensors, options, grad_for(tensors))
    with torch.autocast('cpu', torch.bfloat16):
        grad_y = random_like(y).to(torch.bfloat16 if op.autocast else torch.float32)
        _, grads = op.values_and_grads(tensors, options, grad_y)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert_close(grad, expected[name], 2e-2, f'gradient of {name}')


@every_op
def test_autocast_leaves_float64_alone(op):
    tensors, options = op.make()
    expected = op.function(**tensors, **options)
    with torch.autocast('cpu', torch.bfloat16):
        y = op.function(**tensors, **options)
    assert torch.equal(y, expected)


every_cost = pytest.mark.parametrize(('op', 'case'), **over(*((op, name) for op in OPS for name in op.costs)))


@every_cost
def test_flop_counter(op, case):
    sizes, macs = op.costs[case]
    macs *= op.in_torch
    tensors, options = op.make(**sizes, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        y = op.function(**tensors, **options)
    assert counter.get_total_flops() == 2 * macs
    with FlopCounterMode(display=False) as counter:  # the backward pass counts twice the forward
        op.values_and_grads(tensors, options, random_like(y))
    assert counter.get_total_flops() == 6 * macs


@pytest.mark.filterwarnings('ignore:.*torch.jit.*:DeprecationWarning')
@every_cost
def test_fvcore(op, case):
    from fvcore.nn import FlopCountAnalysis

    sizes, macs = op.costs[case]
    tensors, options = op.make(**sizes, dtype=torch.float32)
    present = {name: t for name, t in tensors.items() if t is not None}
    analysis = FlopCountAnalysis(Calls(op, list(present), options), tuple(present.values()))
    analysis.set_op_handle(f'vssm::{op.name}', op.fvcore_macs)
    assert analysis.total() == macs
    assert not analysis.unsupported_ops()


# ---- what computes ---------------------------------------------------------------------------------------------------


class CountedReference:
    """Stands in for the reference and counts its calls."""

    def __init__(self, op):
        self.reference, self.calls = op.reference, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.reference(*args, **kwargs)


@pytest.fixture
def counted_reference(monkeypatch):
    """counted_reference(op): what stands in for the op's reference while the test runs."""

    def replace(op):
        counter = CountedReference(op)
        for module in (f'vssm.ops.{op.folder}', f'vssm.ops.{op.folder}.op'):
            monkeypatch.setattr(sys.modules[module], f'{op.name}_ref', counter, raising=False)
        return counter

    return replace


@every_op
def test_use_reference_selects_nests_and_restores(op, counted_reference):
    counter = counted_reference(op)
    tensors, options = op.make(dtype=torch.float32)

    def uses_reference():
        before = counter.calls
        op.function(**tensors, **options)
        return counter.calls > before

    with use_reference(False):
        assert not uses_reference()
        with use_reference():
            assert uses_reference()
            with use_reference(False):
                assert not uses_reference()
            assert uses_reference()
            with pytest.raises(KeyError), use_reference(False):
                raise KeyError
            assert uses_reference()
        assert not uses_reference()


@pytest.mark.filterwarnings('ignore:.*torch.jit.*:DeprecationWarning')
@every_op
def test_use_reference_holds_while_tracing(op, counted_reference):
    counter = counted_reference(op)
    tensors, options = op.make(dtype=torch.float32)
    with use_reference():
        torch.jit.trace(Calls(op, list(tensors), options), tuple(tensors.values()), check_trace=False)
    assert counter.calls == 1


def test_environment_variable_selects_the_reference_of_every_op():
    script = 'import sys, torch, vssm.ops; print(sys.modules["vssm.ops.backend"].uses_reference(torch.empty(1)))'
    assert run_fresh(script, VSSM_REFERENCE='1').stdout.strip() == 'True'


@pytest.mark.parametrize('device', ('mps', 'xpu'))
@every_op
def test_device_without_a_kernel(op, device):
    tensors, options = op.make(dtype=torch.float32)
    with FakeTensorMode():
        tensors = {name: torch.empty(t.shape, device=device) for name, t in tensors.items()}
        with pytest.raises(NotImplementedError, match=f'{op.name}: .*{device!r}.*use_reference.*VSSM_REFERENCE'):
            op.function(**tensors, **options)


@every_op
def test_float64_and_what_has_no_kernel_go_to_the_reference_on_cuda(op, counted_reference):
    counter = counted_reference(op)
    tensors, options = op.make()
    with FakeTensorMode():
        tensors = {name: torch.empty(t.shape, device='cuda', dtype=t.dtype) for name, t in tensors.items()}
        op.function(**tensors, **options)
        assert counter.calls == 1
        if not op.has_cuda:
            op.function(**convert(tensors, torch.float32), **options)
            assert counter.calls == 2


@every_op
def test_examples_of_docstrings(op):
    result = doctest.testmod(sys.modules[f'vssm.ops.{op.folder}'])
    assert result.attempted and not result.failed


# ---- bad input -------------------------------------------------------------------------------------------------------


def assert_refused(op, tensors, options, *parts):
    """A ValueError whose message has every part, from the reference too."""
    for reference in (False, True):
        with use_reference(reference), pytest.raises(ValueError) as error:
            op.function(**tensors, **options)
        message = str(error.value)
        assert message.startswith(f'{op.name}: '), message
        for part in parts:
            assert str(part) in message, f'{part!r} not in {message!r}'


@pytest.mark.parametrize('more', (True, False), ids=('one-axis-more', 'one-axis-less'))
@every_argument
def test_wrong_number_of_axes(op, name, more):
    tensors, options = op.make(dtype=torch.float32)
    tensors[name] = tensors[name].unsqueeze(0) if more else tensors[name][0]
    blamed = op.blamed.get((name, None), name)
    assert_refused(op, tensors, options, f'{blamed} must be (', f'got {tuple(tensors[blamed].shape)}')


@every_argument
def test_mismatched_size(op, name):
    original, options = op.make(dtype=torch.float32)
    t = original[name]
    for axis in range(t.dim()):
        tensors = {**original, name: torch.cat([t, t.narrow(axis, 0, 1)], axis)}
        blamed = op.blamed.get((name, axis), name)
        if blamed is None:
            op.function(**tensors, **options)
        else:
            assert_refused(op, tensors, options, f'{blamed} must be (', f'got {tuple(tensors[blamed].shape)}')


@pytest.mark.parametrize('dtype', (torch.int64, torch.bool, torch.complex64), ids=str)
@every_argument
def test_dtype_that_is_not_floating(op, name, dtype):
    tensors, options = op.make(dtype=torch.float32)
    tensors[name] = tensors[name].to(dtype)
    assert_refused(op, tensors, options, f'{name} must have a floating dtype', f'got {dtype}')


@every_argument
def test_tensors_on_two_devices(op, name):
    tensors, options = op.make(dtype=torch.float32)
    tensors[name] = tensors[name].to('meta')
    first, second, *_ = tensors
    blamed, place, other = (name, 'cpu', 'meta') if name != first else (second, 'meta', 'cpu')
    assert_refused(op, tensors, options, f'{blamed} must be on the device of {first}, {place}, got {other}')


@every_argument
def test_operators_refuse_two_devices(op, name):
    """PyTorch hands a mix with meta tensors to the rule for those, whose result is memory that nobody has set."""
    tensors, options = op.make(dtype=torch.float32)
    grad_y = grad_for(tensors)
    first, second, *_ = tensors
    tensors[name] = tensors[name].to('meta')
    blamed = second if name == first else name
    for run in (lambda t: t, torch.Tensor.requires_grad_):
        with pytest.raises(ValueError, match=f'^{op.name}: {blamed} must be on the device of {first}, '):
            op.operator(*arguments({n: run(t) for n, t in tensors.items()}, options))
    with pytest.raises(ValueError, match=f'^{op.name}: {name} must be on the device of grad_y, cpu, got meta'):
        op.operator_backward(*backward_arguments(op, grad_y, tensors, options))
    with pytest.raises(ValueError, match=f'^{op.name}: {blamed} must be on the device of {first}, '):
        torch.vmap(lambda x: op.operator(*arguments({**tensors, name: x}, options)))(tensors[name][None])


@every_op
def test_backward_operator_refuses_a_gradient_on_another_device(op):
    tensors, options = op.make(dtype=torch.float32)
    first = next(iter(tensors))
    with pytest.raises(ValueError, match=f'^{op.name}: {first} must be on the device of grad_y, meta, got cpu'):
        op.operator_backward(*backward_arguments(op, grad_for(tensors).to('meta'), tensors, options))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
@every_argument
def test_operators_refuse_a_mix_of_cpu_and_cuda(op, name):
    tensors, options = op.make(dtype=torch.float32)
    grad_y = grad_for(tensors)
    tensors[name] = tensors[name].cuda()
    with pytest.raises(ValueError, match=f'^{op.name}: .* must be on the device of'):
        op.operator(*arguments(tensors, options))
    with pytest.raises(ValueError, match=f'^{op.name}: {name} must be on the device of grad_y, cpu, got cuda:0'):
        op.operator_backward(*backward_arguments(op, grad_y, tensors, options))


@pytest.mark.parametrize('value', ([[1.0]], 1.0, None), ids=('list', 'float', 'None'))
@every_argument
def test_argument_that_is_no_tensor(op, name, value):
    if value is None and name in op.optional:
        pytest.skip('it may be absent')
    tensors, options = op.make(dtype=torch.float32)
    tensors[name] = value
    assert_refused(op, tensors, options, f'{name} must be a tensor, got {type(value).__name__}')
