# SPDX-License-Identifier: Apache-2.0
"""What is particular to the selective scan, beside the suite of test_ops.py.

Stored numbers, the definition in loops, what walks have in common, kernels against the reference at the edges of their
blocks, and arguments that do not go together.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from scan_cases import (
    NAMES,
    SUMMED,
    assert_matches_oracle,
    convert,
    describe,
    draw_case,
    make_case,
    oracle,
    random_like,
    values_and_grads,
)

from vssm.ops import selective_scan, selective_scan_ref, use_reference

PINNED = Path(__file__).parent / 'data' / 'selective_scan.safetensors'

# ---- stored numbers --------------------------------------------------------------------------------------------------


def golden_arguments(leaves, options, group, state):
    """One group of a golden case as arguments of the op, without C one state of it; differentiable views."""
    batch, D = options['batch'], options['channels_per_group']
    height, width = options.get('height', 1), options.get('width', options.get('length'))
    channels = slice(group * D, (group + 1) * D)

    def per_channel(t):  # (batch, K D, L) -> (batch, H, W, D)
        return t[:, channels].reshape(batch, D, height, width).permute(0, 2, 3, 1)

    def per_state(t):  # (batch, K, N, L) -> (batch, H, W, 1, N)
        t = t[:, group].reshape(batch, -1, height, width).permute(0, 2, 3, 1).unsqueeze(3)
        return t if state is None else t[..., state, None]

    A = leaves['A'][channels].unsqueeze(0)
    return dict(
        x=per_channel(leaves['u']),
        dt=per_channel(leaves['delta']).unsqueeze(3),
        A=A if state is None else A[..., state, None],
        B=per_state(leaves['B']),
        C=per_state(leaves['C']) if 'C' in leaves else None,
        D=leaves['D'][channels].unsqueeze(0) if 'D' in leaves else None,
        dt_bias=leaves['delta_bias'][channels].unsqueeze(0) if 'delta_bias' in leaves else None,
    )


def test_golden_scans(golden_scan, backend, assert_close):
    tensors, options = golden_scan
    value_tolerance, grad_tolerance = (1e-6, 1e-6) if backend.dtype == torch.float64 else (1e-5, 1e-4)
    leaves = {
        name: t.detach().to(backend.dtype).requires_grad_()
        for name, t in tensors.items()
        if name not in ('y', 'grad_y') and not name.startswith('grad.')
    }
    assert options['has_C'] == ('C' in leaves) and options['has_D'] == ('D' in leaves)

    def scan(group, state=None):
        y = selective_scan(
            **golden_arguments(leaves, options, group, state),
            ndim=options['ndim'],
            orders=(0,),
            softplus=options['delta_softplus'],
        )
        return y.permute(0, 3, 1, 2).flatten(2)  # (batch, H, W, D) -> (batch, D, L)

    groups = range(options['groups'])
    if options['has_C']:
        y = torch.cat([scan(group) for group in groups], 1)
    else:
        states = range(options['state'])
        y = torch.cat([torch.stack([scan(group, n) for n in states], 2) for group in groups], 1)
    assert_close(y, tensors['y'], value_tolerance, 'y')
    grads = torch.autograd.grad(
        y, list(leaves.values()), tensors['grad_y'].to(backend.dtype), allow_unused=True, materialize_grads=True
    )
    for name, grad in zip(leaves, grads, strict=True):
        assert_close(grad, tensors[f'grad.{name}'], grad_tolerance, f'gradient of {name}')


PINNED_CASES = {
    '2d-all-low-rank': dict(height=3, width=4, channels=3, states=2, rank=2),
    '1d-all-low-rank': dict(height=3, width=2, channels=3, states=1, rank=2, ndim=1),
    '2d-orders-3-1': dict(height=2, width=5, channels=2, states=3, orders=(3, 1), has_D=False),
    '1d-orders-0-2': dict(height=1, width=6, channels=2, states=1, orders=(0, 2), ndim=1, has_bias=False),
    '1d-order-2-no-C': dict(height=2, width=4, channels=3, states=1, orders=(2,), ndim=1, has_C=False, has_D=False),
    '2d-no-softplus': dict(height=3, width=3, channels=2, states=2, orders=(0,), softplus=False, rank=1),
    '2d-large-steps': dict(height=3, width=2, channels=2, states=1, large_steps=True),
}


def write_pinned():
    """Recompute tests/ops/data: inputs in float32, the float64 reference's y and gradients for a random gradient."""
    tensors, metadata = {}, {}
    for name, sizes in PINNED_CASES.items():
        inputs, options = make_case(**sizes, batch=1, dtype=torch.float32)
        grad_y = random_like(inputs['x'])
        y, grads = values_and_grads(convert(inputs, torch.float64), options, grad_y.double(), selective_scan_ref)
        tensors |= {f'{name}.{n}': t.contiguous() for n, t in inputs.items() if t is not None}
        tensors |= {f'{name}.grad.{n}': t.contiguous() for n, t in grads.items()}
        tensors |= {f'{name}.y': y, f'{name}.grad_y': grad_y}
        metadata[name] = json.dumps(options)
    PINNED.write_bytes(save(tensors, metadata=metadata))


def read_pinned(name):
    with safe_open(PINNED, 'pt') as f:
        tensors = {n.removeprefix(f'{name}.'): f.get_tensor(n) for n in f.keys() if n.startswith(f'{name}.')}
        return tensors, json.loads(f.metadata()[name])


@pytest.mark.parametrize('name', PINNED_CASES)
def test_pinned_scans(name, backend, assert_close):
    """Parity for a clone without the golden files."""
    stored, options = read_pinned(name)
    inputs = {n: stored[n].to(backend.dtype) if n in stored else None for n in NAMES}
    y, grads = values_and_grads(inputs, options, stored['grad_y'].to(backend.dtype))
    # In float64 another machine's exp and sums differ by a few roundings; in float32 as for the golden cases.
    value_tolerance, grad_tolerance = (1e-12, 1e-12) if backend.dtype == torch.float64 else (1e-5, 1e-4)
    assert_close(y, stored['y'], value_tolerance, 'y')
    for n, grad in grads.items():
        assert_close(grad, stored[f'grad.{n}'], grad_tolerance, f'gradient of {n}')


# ---- the definition, in plain loops ----------------------------------------------------------------------------------


def walk(order, height, width):
    """The positions of a walk, as a list over its outer axis of lists over its inner axis."""
    if order in (0, 2):
        lines = [[(r, c) for c in range(width)] for r in range(height)]
    else:
        lines = [[(r, c) for r in range(height)] for c in range(width)]
    if order >= 2:
        lines = [line[::-1] for line in lines[::-1]]
    return lines


def scan_in_loops(x, dt, A, B, C, D, dt_bias, *, dt_weight, ndim, orders, softplus):
    """The definition, one number at a time."""
    batch, height, width, channels = x.shape
    states = A.shape[2]
    x_, dt_, A_, B_ = x.tolist(), dt.tolist(), A.tolist(), B.tolist()
    y = torch.zeros(x.shape, dtype=torch.float64)

    def step(n, r, c, k, e):
        if dt_weight is None:
            v = dt_[n][r][c][k][e]
        else:
            v = sum(float(w) * low for w, low in zip(dt_weight[k, e], dt_[n][r][c][k], strict=True))
        if dt_bias is not None:
            v += float(dt_bias[k, e])
        if not softplus or v > 20:
            return v
        return math.log1p(math.exp(v))

    for n, (k, order), e, s in itertools.product(range(batch), enumerate(orders), range(channels), range(states)):
        lines = walk(order, height, width)
        a, b = {}, {}
        for r, c in itertools.chain(*lines):
            d = step(n, r, c, k, e)
            a[r, c] = math.exp(d * A_[k][e][s])
            b[r, c] = d * B_[n][r][c][k][s] * x_[n][r][c][e]
        h = {}
        if ndim == 1:
            last = 0.0
            for p in itertools.chain(*lines):
                last = h[p] = a[p] * last + b[p]
        else:
            above = dict.fromkeys(range(len(lines[0])), 0.0)  # h of the outer axis's previous line
            for line in lines:
                g = 0.0
                for j, p in enumerate(line):
                    g = a[p] * g + b[p]
                    above[j] = h[p] = a[p] * above[j] + g
        for (r, c), value in h.items():
            y[n, r, c, e] += value if C is None else float(C[n, r, c, k, s]) * value
            if D is not None and s == 0:
                y[n, r, c, e] += float(D[k, e]) * x_[n][r][c][e]
    return y


LOOP_CASES = {
    **{f'{ndim}d-order-{k}': dict(ndim=ndim, orders=(k,)) for ndim in (1, 2) for k in range(4)},
    **{
        f'{ndim}d-order-{k}-no-C': dict(ndim=ndim, orders=(k,), states=1, has_C=False, has_D=False)
        for ndim in (1, 2)
        for k in (0, 3)
    },
    '2d-all': dict(),
    '1d-all': dict(ndim=1),
    '2d-low-rank': dict(rank=3),
    '1d-orders-3-0-low-rank': dict(ndim=1, orders=(3, 0), rank=2, has_bias=False),
    '2d-no-softplus-no-D': dict(softplus=False, has_D=False),
    '2d-large-steps': dict(large_steps=True),
    '2d-one-row': dict(height=1, width=7),
    '2d-one-column': dict(height=7, width=1),
}


@pytest.mark.parametrize('case', LOOP_CASES.values(), ids=LOOP_CASES)
def test_scan_reference_is_the_definition(case, assert_close):
    tensors, options = make_case(**{**dict(batch=2, height=3, width=4, channels=2), **case})
    expected = scan_in_loops(**tensors, **options)
    assert_close(selective_scan_ref(**tensors, **options), expected, 1e-13, 'y')


@pytest.mark.parametrize('order', range(4))
def test_one_row_makes_both_scans_equal(backend, order, assert_close):
    tensors, options = make_case(height=1, width=9, orders=(order,), rank=2, dtype=backend.dtype)
    if order in (1, 3):  # whose inner axis is the map's height
        for name in ('x', 'dt', 'B', 'C'):
            tensors[name] = tensors[name].transpose(1, 2)
    grad_y = random_like(tensors['x'])
    y1, grads1 = values_and_grads(tensors, {**options, 'ndim': 1}, grad_y)
    y2, grads2 = values_and_grads(tensors, {**options, 'ndim': 2}, grad_y)
    tolerance = 1e-13 if backend.dtype == torch.float64 else 2e-6
    assert_close(y1, y2, tolerance, 'y')
    for name in grads1:
        assert_close(grads1[name], grads2[name], 5 * tolerance, f'gradient of {name}')


def assert_same(first, second, dtype, assert_close):
    """Two ways to write the same thing: y and gradients agree to a few roundings."""
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    assert_close(first[0], second[0], tolerance, 'y')
    assert first[1].keys() == second[1].keys()
    for name in first[1]:
        assert_close(first[1][name], second[1][name], 5 * tolerance, f'gradient of {name}')


@pytest.mark.parametrize('ndim', (1, 2))
@pytest.mark.parametrize('order', (1, 2, 3))
def test_orders_are_transposes_and_flips(backend, ndim, order, assert_close):
    case = make_case(1, height=5, width=3, channels=19, ndim=ndim, orders=(order,), rank=2, dtype=backend.dtype)
    tensors, options = case
    grad_y = random_like(tensors['x'])

    def rewritten(x, dt, A, B, C, *args, orders, **kwargs):
        def there(t):
            t = t.transpose(1, 2) if order in (1, 3) else t
            return t.flip((1, 2)) if order >= 2 else t

        def back(t):
            t = t.flip((1, 2)) if order >= 2 else t
            return t.transpose(1, 2) if order in (1, 3) else t

        return back(selective_scan(there(x), there(dt), A, there(B), there(C), *args, orders=(0,), **kwargs))

    assert_same(
        values_and_grads(tensors, options, grad_y),
        values_and_grads(tensors, options, grad_y, rewritten),
        backend.dtype,
        assert_close,
    )


@pytest.mark.parametrize('ndim', (1, 2))
@pytest.mark.parametrize('orders', ((0, 1, 2, 3), (3, 1, 0, 2), (2, 1), (0, 3)), ids=lambda o: '-'.join(map(str, o)))
def test_walks_are_summed(backend, ndim, orders, assert_close):
    tensors, options = make_case(
        1, height=5, width=3, channels=19, ndim=ndim, orders=orders, rank=2, dtype=backend.dtype
    )
    grad_y = random_like(tensors['x'])

    def rewritten(x, dt, A, B, C, D, dt_bias, *, dt_weight, orders, **kwargs):
        return sum(
            selective_scan(
                x,
                dt[..., k : k + 1, :],
                A[k : k + 1],
                B[..., k : k + 1, :],
                C[..., k : k + 1, :],
                D[k : k + 1],
                dt_bias[k : k + 1],
                dt_weight=dt_weight[k : k + 1],
                orders=(order,),
                **kwargs,
            )
            for k, order in enumerate(orders)
        )

    assert_same(
        values_and_grads(tensors, options, grad_y),
        values_and_grads(tensors, options, grad_y, lambda **kwargs: rewritten(**kwargs)),
        backend.dtype,
        assert_close,
    )


@pytest.mark.parametrize('ndim', (1, 2))
@pytest.mark.parametrize('rank', (1, 3, 17))
def test_low_rank_steps_are_a_matrix_product(backend, ndim, rank, assert_close):
    tensors, options = make_case(1, height=5, width=3, channels=19, ndim=ndim, rank=rank, dtype=backend.dtype)
    grad_y = random_like(tensors['x'])

    def rewritten(x, dt, *args, dt_weight, **kwargs):
        dt = torch.matmul(dt_weight, dt.unsqueeze(-1)).squeeze(-1)  # (K, E, R) @ (batch, H, W, K, R, 1)
        return selective_scan(x, dt, *args, **kwargs)

    def by_position(x, dt, A, B, C, D, dt_bias, **kwargs):
        return rewritten(x, dt, A, B, C, D, dt_bias, **kwargs)

    assert_same(
        values_and_grads(tensors, options, grad_y),
        values_and_grads(tensors, options, grad_y, by_position),
        backend.dtype,
        assert_close,
    )


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('wanted', (('x', 'A'), ('dt', 'dt_weight', 'C')), ids=str)
def test_several_inputs_of_a_scan_may_need_a_gradient(wanted):
    tensors, options = make_case(rank=2, dtype=torch.float32)
    grad_y = random_like(tensors['x'])
    _, expected = values_and_grads(tensors, options, grad_y)
    leaves = {name: tensors[name].detach().requires_grad_() for name in wanted}
    selective_scan(**{**tensors, **leaves}, **options).backward(grad_y)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[name]), name


def two_positions(step, B=(1.0, 1.0)):
    """One walk over two positions of one channel, all ones but for the step sizes and B."""
    one = torch.ones(1, 1, 2, 1, 1, dtype=torch.float64)
    B = torch.tensor(B, dtype=torch.float64).view_as(one)
    x, parameter = one[..., 0], one[0, 0, 0]
    tensors = dict(dict.fromkeys(NAMES), x=x, dt=step * one, A=-one[0, 0, :1], B=B, C=one, D=parameter[:1])
    return tensors, dict(ndim=2, orders=(0,), softplus=False)


def spread_out(bias, **sizes):
    tensors, options = make_case(**sizes)
    return {**tensors, 'dt_bias': torch.full_like(tensors['dt_bias'], bias)}, options


LARGE_DECAYS = {
    'step-10': two_positions(10.0),
    'step-18': two_positions(18.0),
    'step-18-without-input': two_positions(18.0, B=(1.0, 0.0)),
    'bias-100': spread_out(100.0, rank=2),
    'bias-100-1d': spread_out(100.0, ndim=1, orders=(2,)),
}


@pytest.mark.parametrize('case', LARGE_DECAYS.values(), ids=LARGE_DECAYS)
def test_gradients_of_large_decays(case, backend):
    """Element by element for A: where a decay leaves next to nothing, so does every gradient that flows through it."""
    tensors, options = case
    tensors = convert(tensors, backend.dtype)
    grad_y = torch.ones_like(tensors['x'])
    _, expected, terms = oracle(tensors, options, grad_y)
    _, grads = values_and_grads(tensors, options, grad_y)
    if tensors['x'].numel() == 2 and tensors['B'].all():  # the state of the first position, and its decay
        step = tensors['dt'][0, 0, 0].item()
        assert grads['A'].item() == pytest.approx(step * step * math.exp(-step), rel=1e-5)
    for name, wanted in expected.items():
        # A decay is exp of a product, whose rounding it multiplies; below 1e-38 float32 has no numbers.
        scale = terms[name] if name in SUMMED else wanted.abs().max()
        difference = (grads[name].double() - wanted).abs()
        assert (difference <= 2e-5 * scale + 1e-30).all(), f'{name}: {grads[name]}, expected {wanted}'


def test_scan_reference_gives_every_input_a_gradient():
    """On one position, too, where no decay has anything to act on."""
    tensors, options = make_case(1, 1, 1, 3, rank=2)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    selective_scan_ref(**leaves, **options).sum().backward()
    assert [name for name, t in leaves.items() if t.grad is None] == []


# ---- the operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('path', ('avx1024', 'AVX2', 'sse'))
def test_unknown_cpu_capability(path, monkeypatch):
    tensors, options = make_case(dtype=torch.float32)
    monkeypatch.setenv('VSSM_CPU_CAPABILITY', path)
    with pytest.raises(RuntimeError, match=f'VSSM_CPU_CAPABILITY.*{path}'):
        selective_scan(**tensors, **options)
    with pytest.raises(RuntimeError, match=f'VSSM_CPU_CAPABILITY.*{path}'):
        torch.ops.vssm.cpu_capability()


def test_cpu_capability_is_read_on_every_call(cpu_paths):
    paths, capability = cpu_paths
    assert paths[-1] == 'portable'
    for path in paths:
        with capability(path):
            assert torch.ops.vssm.cpu_capability() == path
    with capability(None):
        assert torch.ops.vssm.cpu_capability() == paths[0]


# ---- kernels against the reference -----------------------------------------------------------------------------------


def test_random_scans(draw, cpu_paths):
    """Every CPU path against the float64 reference; `pytest --draws N` runs N of them."""
    tensors, options, grad_y = draw_case(draw)
    expected = oracle(tensors, options, grad_y)
    paths, capability = cpu_paths
    for path in paths if tensors['x'].dtype != torch.float64 else paths[:1]:
        with capability(path):
            actual = values_and_grads(tensors, options, grad_y)
        what = f'draw {draw} on {path}, {describe(tensors, options)}'
        assert_matches_oracle(actual, expected, tensors, options, grad_y, what)


@pytest.mark.triton
@pytest.mark.parametrize('seed', range(16), ids='draw{}'.format)
def test_random_scans_in_triton(seed, triton_path, interpreted):
    tensors, options, grad_y = draw_case(seed, elements=(100, 400, 1_000) if interpreted else (3_000, 100_000))
    if tensors['x'].dtype == torch.float64:
        pytest.skip('the reference computes in float64 on CUDA')
    expected = oracle(tensors, options, grad_y)
    actual = values_and_grads(tensors, options, grad_y)
    assert_matches_oracle(actual, expected, tensors, options, grad_y, f'draw {seed}, {describe(tensors, options)}')


@pytest.mark.triton
@pytest.mark.parametrize('seed', (0, 14), ids='draw{}'.format)
def test_low_rank_steps_in_bfloat16_in_triton(seed, triton_path):
    """Of a weight 16 bits are taken, and its gradient is a product of bfloat16, as of PyTorch's own linear layers."""
    tensors, options, grad_y = draw_case(seed, elements=(100, 300))
    assert tensors['dt'].dtype == torch.bfloat16 and tensors['dt_weight'].dtype == torch.float32
    expected = oracle(tensors, options, grad_y)
    actual = values_and_grads(tensors, options, grad_y)
    limits = dict(A=2e-5, dt_bias=2e-5, dt_weight=1e-2)
    assert_matches_oracle(actual, expected, tensors, options, grad_y, describe(tensors, options), limits)


FIXED_CASES = {
    'B1-1x1-E1-N1': dict(batch=1, height=1, width=1, channels=1, states=1),
    'B3-1x1-E17-N2': dict(batch=3, height=1, width=1, channels=17, rank=2),
    'B1-1x37-E33': dict(batch=1, height=1, width=37, channels=33, rank=3),
    'B1-37x1-E33': dict(batch=1, height=37, width=1, channels=33, rank=3),
    'B1-37x1-E33-1d': dict(batch=1, height=37, width=1, channels=33, rank=3, ndim=1),
    'B2-7x13-E31-N1-R2': dict(batch=2, height=7, width=13, channels=31, states=1, rank=2),
    'B2-7x13-E31-N1-R2-1d': dict(batch=2, height=7, width=13, channels=31, states=1, rank=2, ndim=1),
    'B1-56x56-E24-N1-R6': dict(batch=1, height=56, width=56, channels=24, states=1, rank=6),
    'B1-14x14-E192-N1-R24': dict(batch=1, height=14, width=14, channels=192, states=1, rank=24),
    'B1-7x7-E768-N1-R48': dict(batch=1, height=7, width=7, channels=768, states=1, rank=48),
    'B1-3x3-E1100-N1-R2': dict(batch=1, channels=1100, width=3, states=1, rank=2),
    'B1-65x9-E16-N3': dict(batch=1, height=65, width=9, channels=16, states=3, rank=1),
    'B1-9x130-E16-N3': dict(batch=1, height=9, width=130, channels=16, states=3),
    'B1-5x6-E9-N64': dict(batch=1, height=5, width=6, channels=9, states=64, rank=4),
    'B1-5x6-E20-N33-1d': dict(batch=1, height=5, width=6, channels=20, states=33, ndim=1),
    'B1-1x5000-E5-N1-1d': dict(batch=1, height=1, width=5000, channels=5, states=1, ndim=1, orders=(0,), rank=1),
    'B1-1x5000-E5-N1-reversed': dict(batch=1, height=1, width=5000, channels=5, states=1, ndim=1, orders=(2,)),
    'B1-400x3-E7-N2': dict(batch=1, height=400, width=3, channels=7, states=2, rank=2),
    'B1-3x400-E7-N2': dict(batch=1, height=3, width=400, channels=7, states=2, rank=2),
    # Maps that the backward pass redoes in bands, on every path.
    'B1-90x100-E3-N2-R2': dict(batch=1, height=90, width=100, channels=3, states=2, rank=2),
    'B1-33x530-E3-N1': dict(batch=1, height=33, width=530, channels=3, states=1, orders=(0, 3)),
    'B1-72x100-E3-N2-1d': dict(batch=1, height=72, width=100, channels=3, states=2, ndim=1, orders=(1, 2)),
    # Batches and widths that it cuts into groups.
    'B40-2x3-E5-N1': dict(batch=40, height=2, width=3, channels=5, states=1, rank=1),
    'B70-2x3-E37-N1': dict(batch=70, height=2, width=3, channels=37, states=1, rank=1),
    'B2-20x20-E21-no-C': dict(
        batch=2, height=20, width=20, channels=21, states=1, orders=(0,), ndim=1, has_C=False, has_D=False
    ),
    'B2-9x9-E21-large-steps': dict(batch=2, height=9, width=9, channels=21, states=2, large_steps=True, rank=3),
}


@pytest.mark.parametrize('case', FIXED_CASES.values(), ids=FIXED_CASES)
def test_fixed_scans(case, cpu_paths):
    """Shapes at the edges of the kernels' blocks: vectors, chunks of a row, bands of rows, many states."""
    tensors, options = make_case(**case, dtype=torch.float32)
    grad_y = random_like(tensors['x'])
    expected = oracle(tensors, options, grad_y)
    paths, capability = cpu_paths
    for path in paths:
        with capability(path):
            actual = values_and_grads(tensors, options, grad_y)
        assert_matches_oracle(actual, expected, tensors, options, grad_y, path)
    tensors, grad_y = convert(tensors, torch.float64), grad_y.double()  # one code, whatever the path
    actual = values_and_grads(tensors, options, grad_y)
    assert_matches_oracle(actual, expected, tensors, options, grad_y, 'float64')


# ---- bad input -------------------------------------------------------------------------------------------------------


def assert_refused(tensors, options, *parts):
    """A ValueError whose message has every part, from the reference too."""
    for reference in (False, True):
        with use_reference(reference), pytest.raises(ValueError) as error:
            selective_scan(**tensors, **options)
        message = str(error.value)
        assert message.startswith('selective_scan: '), message
        for part in parts:
            assert str(part) in message, f'{part!r} not in {message!r}'


def bad_case(**kwargs):
    return make_case(**{**dict(rank=3, dtype=torch.float32), **kwargs})


@pytest.mark.parametrize('name, axis', [('dt', 4), ('dt_bias', 1)])
def test_mismatched_size_of_full_steps(name, axis):
    tensors, options = bad_case(rank=None)
    tensors[name] = tensors[name].narrow(axis, 0, 4)
    assert_refused(tensors, options, f'{name} must be (', f'got {tuple(tensors[name].shape)}')


@pytest.mark.parametrize(
    'size, blamed',
    [
        ('batch', 'x'),
        ('height', 'x'),
        ('width', 'x'),
        ('channels', 'x'),
        ('states', 'A'),
        ('rank', 'dt'),
    ],
)
def test_empty_input_of_a_scan(size, blamed):
    tensors, options = bad_case(rank=3)
    axes = {'batch': 0, 'height': 1, 'width': 2}
    if size in axes:
        for name in ('x', 'dt', 'B', 'C'):
            tensors[name] = tensors[name].narrow(axes[size], 0, 0)
    elif size == 'channels':
        for name, axis in dict(x=3, A=1, D=1, dt_bias=1, dt_weight=1).items():
            tensors[name] = tensors[name].narrow(axis, 0, 0)
    else:
        for name in ('A', 'B', 'C') if size == 'states' else ('dt', 'dt_weight'):
            tensors[name] = tensors[name][..., :0]
    assert_refused(tensors, options, f'{blamed} must not be empty', f'got {tuple(tensors[blamed].shape)}')


@pytest.mark.parametrize(
    'case, got',
    [
        (dict(orders=(0,), states=2, has_D=False), 'K = 1, N = 2, D absent'),
        (dict(orders=(0, 1), states=1, has_D=False), 'K = 2, N = 1, D absent'),
        (dict(orders=(0,), states=1, has_D=True), 'K = 1, N = 1, D given'),
    ],
    ids=('two-states', 'two-orders', 'D'),
)
def test_what_needs_C(case, got):
    tensors, options = bad_case(**case)
    tensors['C'] = None
    assert_refused(tensors, options, 'without C', got)


@pytest.mark.parametrize(
    'orders',
    (
        *((), (0, 1, 2), (0, 0), (0, 1, 2, 2), (4,), (-1,), (0, 1, 2, 3, 0), (0, 5), (0.0,), 0, '0', {0, 1}),
        *((True, False), (False,), (np.bool_(True),), (0, np.int64(0)), range(3), range(1, 5), None),
    ),
    ids=repr,
)
def test_bad_orders(orders):
    tensors, options = bad_case()
    assert_refused(tensors, {**options, 'orders': orders}, 'orders must be', f'got {orders!r}')


@pytest.mark.parametrize('ndim', (0, 3, '2', None, 2.0, True, np.float32(1), np.int64(3)), ids=repr)
def test_bad_ndim(ndim):
    tensors, options = bad_case()
    assert_refused(tensors, {**options, 'ndim': ndim}, 'ndim must be 1 or 2', f'got {ndim!r}')


@pytest.mark.parametrize('softplus', ('no', 1, 0, None, np.bool_(True)), ids=repr)
def test_bad_softplus(softplus):
    tensors, options = bad_case()
    assert_refused(tensors, {**options, 'softplus': softplus}, 'softplus must be True or False', f'got {softplus!r}')


@pytest.mark.parametrize(
    ('ndim', 'orders'),
    (
        *((np.int64(1), (0, 1, 2, 3)), (2, range(4)), (1, range(3, -1, -1)), (2, [np.int32(2), 0])),
        (np.uint8(2), tuple(np.arange(4))),
    ),
    ids=repr,
)
def test_integers_of_any_kind(ndim, orders):
    tensors, options = bad_case(orders=tuple(map(int, orders)), ndim=int(ndim))
    for reference in (False, True):
        with use_reference(reference):
            y = selective_scan(**tensors, **{**options, 'ndim': ndim, 'orders': orders})
            assert torch.equal(y, selective_scan(**tensors, **options))


def test_scan_operator_refuses_states_without_C():
    """Called past the public function's checks, it would read beyond its arguments."""
    tensors, options = bad_case()
    tensors['C'] = tensors['D'] = None
    with pytest.raises(RuntimeError, match='without C'):
        torch.ops.vssm.selective_scan(*tensors.values(), 2, [0, 1, 2, 3], True)


@pytest.mark.parametrize('states', (1, 3, 16))
def test_scan_where_some_steps_are_enormous(states, cpu_path):
    """Decays of many states go without bounds where a chunk's steps allow it: those out of reach become 0, and those
    of other channels stay as they are."""
    tensors, options = make_case(1, 1, 70, 24, states, ndim=1, orders=(0, 2), dtype=torch.float32)
    calm = selective_scan(**tensors, **options)
    tensors['dt'][:, :, 3, :, 5] = 1e4
    y = selective_scan(**tensors, **options)
    others = [e for e in range(24) if e != 5]
    assert torch.equal(y[..., others], calm[..., others])
    y_ref = selective_scan_ref(**convert(tensors, torch.float64), **options)
    assert (y - y_ref).abs().max() < 2e-6 * y_ref.abs().max()


@pytest.mark.parametrize('value', (math.nan, math.inf, -math.inf, 1e38, -1e38), ids=str)
@pytest.mark.parametrize('name', NAMES)
def test_scan_values_that_are_not_finite_spoil_no_other_image(name, value, kernel_path, interpreted):
    """They may spoil their own image or channel, never another's."""
    sizes = dict(height=9, width=5, channels=35)
    if kernel_path == 'triton' and interpreted:
        if not math.isnan(value):
            pytest.skip('the interpreter is slow: NaN must do')
        sizes = dict(height=1, width=2, channels=3, orders=(2,))
    tensors, options = make_case(**sizes, rank=2, dtype=torch.float32)
    grad_y = random_like(tensors['x'])
    y_clean, grads_clean = values_and_grads(tensors, options, grad_y)
    spoilt = {**tensors, name: tensors[name].clone()}
    if name in SUMMED:  # of channel 0
        spoilt[name][:, 0] = value
        y, grads = values_and_grads(spoilt, options, grad_y)
        assert torch.equal(y[..., 1:], y_clean[..., 1:])
        assert torch.equal(grads['x'][..., 1:], grads_clean['x'][..., 1:])
        for other in SUMMED:
            assert torch.equal(grads[other][:, 1:], grads_clean[other][:, 1:]), other
    else:  # of image 0
        spoilt[name][0] = value
        y, grads = values_and_grads(spoilt, options, grad_y)
        assert torch.equal(y[1:], y_clean[1:])
        for other in ('x', 'dt', 'B', 'C'):
            assert torch.equal(grads[other][1:], grads_clean[other][1:]), other


@pytest.mark.parametrize('states', (1, 16))
@pytest.mark.parametrize('name', NAMES)
def test_scan_makes_no_number_of_what_is_none(name, states, kernel_path, interpreted):
    """Where the definition gives NaN, and its gradient, the kernels do: no such loss looks sound."""
    sizes = dict(height=1, width=2, channels=3, orders=(2,)) if kernel_path == 'triton' and interpreted else {}
    tensors, options = make_case(**sizes, states=states, rank=2, dtype=torch.float32)
    tensors[name].view(-1)[-1] = math.nan
    grad_y = random_like(tensors['x'])
    y, grads = values_and_grads(tensors, options, grad_y)
    y_ref, grads_ref = values_and_grads(tensors, options, grad_y, selective_scan_ref)
    assert y_ref.isnan().any() and not (y_ref.isnan() & ~y.isnan()).any()
    for other, grad in grads_ref.items():
        assert not (grad.isnan() & ~grads[other].isnan()).any(), other


if __name__ == '__main__':
    write_pinned()
