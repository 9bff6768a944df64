# SPDX-License-Identifier: Apache-2.0
"""What is particular to the state fusion, beside the suite of test_ops.py.

Stored numbers, the definition in loops, and kernels against the reference at the edges of their blocks.
"""

import random

import pytest
import torch
from op_cases import make_fusion
from op_inputs import random_like

from vssm.ops import state_fusion, state_fusion_ref


def make_case(*args, **kwargs):
    """(h, weight), both needing a gradient, and a gradient of the output."""
    tensors, _ = make_fusion(*args, **kwargs)
    h, weight = (t.requires_grad_() for t in tensors.values())
    return h, weight, random_like(h)


def run(fuse, h, weight, grad):
    y = fuse(h, weight)
    return y.detach(), *torch.autograd.grad(y, (h, weight), grad)


def assert_agrees(case, assert_close, value=2e-6, summed=2e-6):
    """The kernels on `case` against the reference in float64, by the scan's error measures."""
    y, grad_h, grad_weight = run(state_fusion, *case)
    wide = [t.detach().double() for t in case]
    expected = run(state_fusion_ref, wide[0].requires_grad_(), wide[1].requires_grad_(), wide[2])
    assert (y.dtype, grad_h.dtype, grad_weight.dtype) == (case[0].dtype, case[0].dtype, case[1].dtype)
    assert_close(y, expected[0], value, 'y')
    assert_close(grad_h, expected[1], value, 'gradient of h')
    # The weights' gradients sum over positions, where terms cancel: judged by the sum of the terms' sizes.
    with torch.no_grad():
        h, grad = wide[0].detach().abs().requires_grad_(), wide[2].abs()
    terms = run(state_fusion_ref, h, wide[1].detach().abs().requires_grad_(), grad)[2].max()
    assert (grad_weight.double() - expected[2]).abs().max() <= summed * terms


# ---- the definition --------------------------------------------------------------------------------------------------


def test_golden_fusions(golden, backend, assert_close):
    tensors, _ = golden('state_fusion_cases')
    names = sorted({name.split('.')[0] for name in tensors})
    assert {'1x1', '14x14'} <= set(names)
    tolerance, grad_tolerance = (1e-6, 1e-6) if backend.dtype == torch.float64 else (1e-5, 1e-4)
    for case in names:
        t = {k.removeprefix(f'{case}.'): v.to(backend.dtype) for k, v in tensors.items() if k.startswith(f'{case}.')}
        kernels = [t[f'param.{name}'].requires_grad_() for name in ('kernel_3', 'kernel_3_1', 'kernel_3_2')]
        alpha = t['param.alpha'].requires_grad_()
        h = t['input'].permute(0, 2, 3, 1).contiguous().requires_grad_()  # [B, E, H, W] -> [B, H, W, E]
        y = state_fusion(h, alpha.view(3, 1, 1, 1) * torch.cat(kernels, 1).transpose(0, 1)).permute(0, 3, 1, 2)
        y.backward(t['grad_output'])
        assert_close(y, t['output'], tolerance, f'{case} output')
        assert_close(h.grad.permute(0, 3, 1, 2), t['grad.input'], grad_tolerance, f'{case} input')
        assert_close(alpha.grad, t['grad.alpha'], grad_tolerance, f'{case} alpha')
        for name, kernel in zip(('kernel_3', 'kernel_3_1', 'kernel_3_2'), kernels, strict=True):
            assert_close(kernel.grad, t[f'grad.{name}'], grad_tolerance, f'{case} {name}')


@pytest.mark.parametrize('size', [(1, 1), (1, 7), (6, 1), (3, 8), (12, 13)], ids=str)
def test_fusion_reference_is_the_definition(size, assert_close):
    h, weight, _ = make_case(1, *size, channels=2)
    height, width = size
    expected = torch.zeros(h.shape, dtype=h.dtype)
    with torch.no_grad():
        for i in range(height):
            for j in range(width):
                for d, dilation in enumerate((1, 3, 5)):
                    for u in range(3):
                        for v in range(3):
                            row = min(max(i + (u - 1) * dilation, 0), height - 1)
                            column = min(max(j + (v - 1) * dilation, 0), width - 1)
                            expected[0, i, j] += weight[d, :, u, v] * h[0, row, column]
    assert_close(state_fusion_ref(h, weight), expected, 1e-14)


# ---- kernels against the reference -----------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64), ids=str)
def test_random_fusions(dtype, cpu_path, assert_close):
    rng = random.Random(0)
    for seed in range(20):
        sizes = dict(
            batch=rng.choice((1, 2, 5)),
            height=rng.choice((1, 2, 3, 5, 7, 13, 31)),
            width=rng.choice((1, 2, 4, 6, 11, 16, 33)),
            channels=rng.choice((1, 3, 4, 8, 17, 40)),
        )
        tolerance = 1e-13 if dtype == torch.float64 else 2e-6
        assert_agrees(make_case(**sizes, dtype=dtype, seed=seed), assert_close, tolerance, tolerance)


@pytest.mark.parametrize(
    'sizes', [(1, 200, 300, 3), (2, 300, 9, 20), (1, 5, 1200, 16), (40, 2, 3, 40)], ids=lambda s: 'x'.join(map(str, s))
)
def test_large_maps_of_a_fusion_are_cut_into_bands(sizes, cpu_path, assert_close):
    assert_agrees(make_case(*sizes, dtype=torch.float32), assert_close)


def test_fusion_takes_views_and_expanded_maps(kernel_path, assert_close):
    base = torch.randn(2, 8, 3, 6)
    for h in (base.permute(0, 3, 1, 2), base[:, ::2, :, 1:5], base[:, :1].expand(-1, 4, -1, -1), base.flip(1)):
        weight = torch.randn(3, h.shape[3], 3, 3)
        y = state_fusion(h, weight)
        assert y.is_contiguous()
        assert_close(y, state_fusion(h.contiguous(), weight), 0)
    h, weight, grad = make_case(2, 2, 7, dtype=torch.float32)
    assert_agrees((h, weight, grad[:1].expand(2, -1, -1, -1)), assert_close)
    assert_agrees((h, weight, grad.transpose(1, 3).contiguous().transpose(1, 3)), assert_close)


@pytest.mark.parametrize('value', (float('nan'), float('inf')))
def test_fusion_values_that_are_not_finite_spread_no_further_than_their_reach(value, kernel_path):
    h, weight, _ = make_case(1, 20, 20, 4, dtype=torch.float32)
    with torch.no_grad():
        clean = state_fusion(h, weight)
        h[0, 10, 10, 2] = value
        y = state_fusion(h, weight)
    changed = (y != clean) | y.isnan()
    assert changed[0, 10, 10, 2] and changed.sum() == 25 and not changed[..., (0, 1, 3)].any()


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('h', 'weight', 'parts'),
    [
        ((2, 3, 4), (3, 4, 3, 3), ('h must be (batch, H, W, E)', '(2, 3, 4)')),
        ((2, 0, 4, 5), (3, 5, 3, 3), ('h must', 'not empty', '(2, 0, 4, 5)')),
        ((2, 3, 4, 5), (3, 4, 3, 3), ('weight must be', '(3, 5, 3, 3)', '(3, 4, 3, 3)')),
        ((2, 3, 4, 5), (3, 5, 1, 3, 3), ('weight must be', '(3, 5, 1, 3, 3)')),
    ],
    ids=('rank', 'empty', 'channels', 'weight-rank'),
)
def test_bad_shapes_of_a_fusion(h, weight, parts):
    with pytest.raises(ValueError) as error:
        state_fusion(torch.zeros(h), torch.zeros(weight))
    for part in ('state_fusion: ', *parts):
        assert part in str(error.value)


def test_fusion_operator_refuses_what_it_could_not_read_safely():
    h, weight, grad = (t.detach() for t in make_case())
    with pytest.raises(RuntimeError, match='vssm::state_fusion: bad arguments'):
        torch.ops.vssm.state_fusion(h, weight[:2])
    with pytest.raises(RuntimeError, match='vssm::state_fusion: grad_y has the wrong shape'):
        torch.ops.vssm.state_fusion_backward(grad[:1], h, weight, [True] * 2)
