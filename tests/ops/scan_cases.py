# SPDX-License-Identifier: Apache-2.0
"""Inputs of the selective scan, made or drawn, and what every kernel is judged by."""

import math
import random
import types

import op_inputs
import torch
from op_inputs import LAYOUTS, convert, lay_out, random_like

from vssm.ops import selective_scan, selective_scan_ref

NAMES = ('x', 'dt', 'A', 'B', 'C', 'D', 'dt_bias', 'dt_weight')
SUMMED = ('A', 'D', 'dt_bias', 'dt_weight')  # their gradients sum over all positions
HALF = (torch.bfloat16, torch.float16)


# ---- inputs and gradients --------------------------------------------------------------------------------------------


def make_case(
    batch=2,
    height=3,
    width=4,
    channels=5,
    states=2,
    rank=None,
    *,
    ndim=2,
    orders=(0, 1, 2, 3),
    has_C=True,
    has_D=True,
    has_bias=True,
    softplus=True,
    large_steps=False,
    dtype=torch.float64,
    seed=0,
):
    """Inputs as a trained model has them: (tensors by name, options). Steps are mostly within [1e-3, 1].

    With `large_steps` they spread over both branches of softplus.
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def log_uniform(low, high, *shape):
        u = torch.rand(shape, generator=g, dtype=torch.float64)
        return torch.exp(math.log(low) + u * math.log(high / low))

    K, E, N = len(orders), channels, states
    grid = (batch, height, width)
    t = dict.fromkeys(NAMES)
    t['x'] = randn(*grid, E)
    t['A'] = -torch.arange(1, N + 1) * torch.exp(0.5 * randn(K, E, N))
    t['B'] = randn(*grid, K, N)
    t['C'] = randn(*grid, K, N) if has_C else None
    t['D'] = 1 + 0.3 * randn(K, E) if has_D else None
    if softplus:
        step = log_uniform(1e-3, 1e-1, K, E)
        t['dt_bias'] = step + torch.log(-torch.expm1(-step)) if has_bias else None
        spread = 12.0 if large_steps else 1.0
        if rank is None:
            t['dt'] = spread * randn(*grid, K, E) - (0 if has_bias else 3)
        else:
            t['dt'] = spread * randn(*grid, K, rank)
            t['dt_weight'] = rank**-0.5 * (2 * torch.rand(K, E, rank, generator=g, dtype=torch.float64) - 1)
    else:  # nothing keeps the steps positive but their terms
        t['dt_bias'] = log_uniform(1e-3, 1e-1, K, E) if has_bias else None
        t['dt'] = log_uniform(1e-3, 3e-1, *grid, K, rank or E)
        if rank is not None:
            t['dt_weight'] = 2 / rank * torch.rand(K, E, rank, generator=g, dtype=torch.float64)
    t = {name: None if v is None else v.to(dtype) for name, v in t.items()}
    return t, dict(ndim=ndim, orders=orders, softplus=softplus)


def values_and_grads(tensors, options, grad_y, scan=selective_scan):
    """y and the gradient of every input, for the given gradient of y."""
    return op_inputs.values_and_grads(tensors, options, grad_y, scan)


def oracle(tensors, options, grad_y):
    """The float64 reference: y, gradients, and for those that sum over positions the sum of their |terms|.

    The reference broadcasts: given A, D and dt_bias once for every position, autograd returns each term.
    """
    tensors = convert(tensors, torch.float64)
    batch, height, width, channels = tensors['x'].shape
    K = len(options['orders'])
    grid = (batch, height, width)
    wide = dict(tensors)
    wide['A'] = tensors['A'][:, None, None, None].expand(-1, *grid, -1, -1)
    if tensors['D'] is not None:
        wide['D'] = tensors['D'][:, None, None, None].expand(-1, *grid, -1)
    bias = torch.zeros(K, channels, dtype=torch.float64) if tensors['dt_bias'] is None else tensors['dt_bias']
    wide['dt_bias'] = bias.expand(*grid, -1, -1)
    y, grads = values_and_grads(wide, options, grad_y.double(), selective_scan_ref)

    terms = {'A': grads['A'].abs().sum((1, 2, 3)), 'dt_bias': grads['dt_bias'].abs().sum((0, 1, 2))}
    if tensors['dt_weight'] is not None:  # dW = sum over positions of d raw_dt * low, and d raw_dt = d dt_bias
        draw_dt, low = grads['dt_bias'].abs(), tensors['dt'].abs()
        terms['dt_weight'] = torch.einsum('bhwke,bhwkr->ker', draw_dt, low)
    grads['A'] = grads['A'].sum((1, 2, 3))
    grads['dt_bias'] = grads['dt_bias'].sum((0, 1, 2))
    if tensors['D'] is not None:
        terms['D'] = grads['D'].abs().sum((1, 2, 3))
        grads['D'] = grads['D'].sum((1, 2, 3))
    return y, {name: grads[name] for name, t in tensors.items() if t is not None}, terms


def assert_matches_oracle(actual, expected, tensors, options, grad_y, what, limits=types.MappingProxyType({})):
    """Hold a kernel's y and gradients to the tolerances of their dtypes, all of them before failing.

    `limits` are those of single gradients, where they are others.
    """
    (y, grads), (y_ref, grads_ref, terms) = actual, expected
    float32_error = {}  # of the reference, computed when first needed

    def error(a, e, scale):
        scale = scale.abs().max().item()
        difference = (a.double() - e).abs().max().item()
        return difference if scale < 1e-12 else difference / scale

    def reference_error(name):
        if not float32_error:
            _, rough = values_and_grads(convert(tensors, torch.float32), options, grad_y.float(), selective_scan_ref)
            float32_error.update({n: error(rough[n], grads_ref[n], terms[n]) for n in SUMMED if n in grads_ref})
        return float32_error[name]

    failures = []
    for name, a, e in [('y', y, y_ref), *((f'grad {n}', grads[n], grads_ref[n]) for n in grads_ref)]:
        source = name.removeprefix('grad ')
        dtype = tensors['x' if source == 'y' else source].dtype
        if a.shape != e.shape or a.dtype != dtype:
            failures.append(f'{name} is {tuple(a.shape)} {a.dtype}, expected {tuple(e.shape)} {dtype}')
            continue
        summed = source in SUMMED
        value = error(a, e, terms[source] if summed else e)
        if source in limits:
            limit = limits[source]
        elif dtype in HALF:
            limit = 1e-2
        elif tensors['x'].dtype == torch.float64:  # a gradient in float32 is rounded once
            limit = 1e-9 if dtype == torch.float64 else 1e-7
        else:
            limit = 2e-6 if summed or source == 'y' else 2e-5
        if not value <= limit and not (summed and value <= 4 * reference_error(source)):
            failures.append(f'{name}: error {value:.2e} exceeds {limit:.0e}')
    assert not failures, f'{what}: ' + '; '.join(failures)


def describe(tensors, options):
    shapes = ', '.join(
        f'{n} {tuple(t.shape)} {str(t.dtype)[6:]} strides {t.stride()}' for n, t in tensors.items() if t is not None
    )
    return f'{options}, {shapes}'


# ---- types and random cases ------------------------------------------------------------------------------------------


DTYPES = {  # of x, of dt, B and C, of D, dt_bias and dt_weight, and of A
    'float32': ('float32', 'float32', 'float32', 'float32'),
    'bfloat16': ('bfloat16', 'bfloat16', 'float32', 'float32'),
    'bfloat16-all': ('bfloat16', 'bfloat16', 'bfloat16', 'float32'),
    'float16': ('float16', 'float16', 'float32', 'float32'),
    'mixed': ('float32', 'bfloat16', 'float16', 'float32'),
    'mixed-x': ('bfloat16', 'float32', 'float32', 'bfloat16'),
    'float64': ('float64', 'float64', 'float64', 'float64'),
    'float64-x': ('float64', 'float32', 'float32', 'float64'),
}


def cast_case(tensors, kind):
    x, maps, parameters, A = (getattr(torch, name) for name in DTYPES[kind])
    dtypes = dict(x=x, dt=maps, B=maps, C=maps, D=parameters, dt_bias=parameters, dt_weight=parameters, A=A)
    return {name: None if t is None else t.to(dtypes[name]) for name, t in tensors.items()}


def draw_case(seed, elements=(3_000, 10_000, 30_000, 30_000, 100_000)):
    """A random case: sizes, options, dtypes and strides; sizes shrink until it has no more than one of `elements`.

    Returns the inputs, the options and the gradient of y.
    """
    rng = random.Random(seed)
    ndim = rng.choice((1, 2))
    orders = tuple(rng.sample(range(4), rng.choice((1, 2, 4))))
    has_C = len(orders) > 1 or rng.random() < 0.7
    sizes = dict(
        batch=rng.randint(1, 3),
        height=rng.randint(1, 40),
        width=rng.randint(1, 40),
        channels=rng.randint(1, 70),
        states=rng.choice((1, 1, 2, 4, 16, rng.randint(1, 20))) if has_C else 1,
    )
    elements = rng.choice(elements)
    steps = 1600 if ndim == 2 else rng.choice((60, 200, 400))  # the 1-D reference takes one at a time
    while math.prod(sizes.values()) * len(orders) > elements:
        name = rng.choice([name for name, size in sizes.items() if size > 1])
        sizes[name] = (sizes[name] + 1) // 2
    while sizes['height'] * sizes['width'] > steps:
        name = 'height' if sizes['height'] > sizes['width'] else 'width'
        sizes[name] = (sizes[name] + 1) // 2
    softplus = rng.random() < 0.8
    tensors, options = make_case(
        **sizes,
        rank=rng.choice((None, rng.randint(1, 6), rng.randint(1, 50))),
        ndim=ndim,
        orders=orders,
        has_C=has_C,
        has_D=has_C and rng.random() < 0.7,
        has_bias=rng.random() < 0.7,
        softplus=softplus,
        large_steps=softplus and rng.random() < 0.15,
        seed=seed,
    )
    kind = rng.choice(('float32',) * 6 + ('bfloat16',) * 3 + tuple(DTYPES)[2:])
    tensors = cast_case(tensors, kind)
    tensors['grad_y'] = random_like(tensors['x'], seed + 1)
    plain = rng.random() < 0.4  # contiguous
    for name, t in tensors.items():
        if t is None or plain:
            continue
        if rng.random() < 0.15:
            axis = rng.randrange(t.dim())
            tensors[name] = t.narrow(axis, 0, 1).expand_as(t)
        elif rng.random() < 0.6:
            tensors[name] = lay_out(t, rng.choice(LAYOUTS))
    grad_y = tensors.pop('grad_y')
    return tensors, options, grad_y
