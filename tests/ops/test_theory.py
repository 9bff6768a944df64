# SPDX-License-Identifier: Apache-2.0
"""docs/theory.md, executed: the mixers are matrices, of the closed form and of the structure that the page gives."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from vssm.models import spatial_mamba, ssm, vmamba
from vssm.ops import selective_scan, selective_scan_ref, state_fusion

ROOT = Path(__file__).parents[2]
H, W = 4, 5
theory = SimpleNamespace(**runpy.run_path(str(ROOT / 'examples' / 'mixing_matrices.py')))


def make_scan(orders, states=1, height=H, width=W):
    """Step sizes, decay rates, B, C and D of one channel, float64."""
    K, dd = len(orders), dict(dtype=torch.float64)
    dt = torch.rand(height, width, K, **dd) + 0.1
    A = -torch.rand(K, states, **dd) - 0.1
    B, C = (torch.randn(height, width, K, states, **dd) for _ in range(2))
    return dt, A, B, C, torch.randn(K, **dd)


def op(x, dt, A, B, C, D, op=selective_scan, **options):
    """One of the ops on one channel, (H, W) -> (H, W)."""
    args = x[None, :, :, None], dt[None, ..., None], A[:, None], B[None], C[None], D[:, None]
    return op(*args, softplus=False, **options)[0, :, :, 0]


def fused_op(x, dt, A, B, C, D, weight):
    """Spatial-Mamba's mixer on one channel, as models/spatial_mamba.py has it."""
    h = selective_scan(
        x[None, :, :, None], dt[None, ..., None], A[:, None], B[None], ndim=1, orders=(0,), softplus=False
    )
    return C[..., 0, 0] * state_fusion(h, weight[:, None])[0, :, :, 0] + D * x


def same(a, b):
    return torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def jacobian(function):
    return torch.autograd.functional.jacobian(function, torch.randn(H, W, dtype=torch.float64)).view(H * W, H * W)


# ---- y = M x ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('compute', [selective_scan, selective_scan_ref], ids=['kernel', 'reference'])
@pytest.mark.parametrize('states', [1, 3])
@pytest.mark.parametrize('orders', [(0,), (1,), (2,), (3,), (2, 1), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize('ndim', [1, 2])
def test_a_scan_is_its_matrix(ndim, orders, states, compute):
    scan = make_scan(orders, states)
    M = theory.scan_matrix(*scan, ndim=ndim, orders=orders)
    x = torch.randn(H, W, dtype=torch.float64)
    same(op(x, *scan, op=compute, ndim=ndim, orders=orders), (M @ x.flatten()).view(H, W))
    same(jacobian(lambda x: op(x, *scan, op=compute, ndim=ndim, orders=orders)), M)


def test_the_fused_scan_is_its_matrix():
    scan, weight = make_scan((0,)), torch.randn(3, 3, 3, dtype=torch.float64)
    M = theory.fused_matrix(*scan, weight)
    x = torch.randn(H, W, dtype=torch.float64)
    same(fused_op(x, *scan, weight), (M @ x.flatten()).view(H, W))
    same(jacobian(lambda x: fused_op(x, *scan, weight)), M)


def test_the_state_fusion_is_its_matrix():
    weight, h = torch.randn(3, 3, 3, dtype=torch.float64), torch.randn(H, W, dtype=torch.float64)
    fused = state_fusion(h[None, :, :, None], weight[:, None])[0, :, :, 0]
    same(fused, (theory.fusion_matrix(weight, H, W) @ h.flatten()).view(H, W))


@pytest.mark.parametrize('ndim', [1, 2])
def test_a_mixer_of_a_network_is_its_matrices(ndim, monkeypatch):
    """Of every channel one; what the network computes from the image for the step sizes, B and C is in them."""
    calls = []

    def record(x, *args, **options):
        calls.append((x, args, options))
        return selective_scan(x, *args, **options)

    monkeypatch.setattr(ssm, 'selective_scan', record)
    y = []
    mixer = vmamba.SS2D(16, scan_ndim=ndim, dtype=torch.float64)
    mixer.norm.register_forward_pre_hook(lambda module, args: y.append(args[0]))
    with torch.no_grad():
        mixer(torch.randn(1, H, W, 16, dtype=torch.float64))
    ((x, (low, A, B, C, D, dt_bias), options),) = calls
    for e in range(16):
        dt = F.softplus((low[0] * options['dt_weight'][:, e]).sum(-1) + dt_bias[:, e])
        M = theory.scan_matrix(dt, A[:, e], B[0], C[0], D[:, e], ndim=ndim)
        same((M @ x[0, :, :, e].flatten()).view(H, W), y[0][0, :, :, e])


def test_the_mixer_of_spatial_mamba_is_its_matrices(monkeypatch):
    calls, y = [], []

    def record(x, *args, **options):
        calls.append((x, args, options))
        return selective_scan(x, *args, **options)

    monkeypatch.setattr(ssm, 'selective_scan', record)
    mixer = spatial_mamba.SpatialMixer(16, dtype=torch.float64)
    mixer.norm.register_forward_pre_hook(lambda module, args: y.append(args[0]))
    for parameter in mixer.fusion.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        mixer(torch.randn(1, H, W, 16, dtype=torch.float64))
    ((x, (low, A, B, _, _, dt_bias), options),) = calls
    C = mixer.x_proj(x)[0, :, :, -1:, None]
    fusion = mixer.fusion
    for e in range(32):
        dt = F.softplus((low[0] * options['dt_weight'][:, e]).sum(-1) + dt_bias[:, e])
        kernels = torch.stack([fusion.kernel_3[e, 0], fusion.kernel_3_1[e, 0], fusion.kernel_3_2[e, 0]])
        M = theory.fused_matrix(dt, A[:, e], B[0], C, mixer.D[:, e], fusion.alpha.view(3, 1, 1) * kernels)
        same((M @ x[0, :, :, e].flatten()).view(H, W), y[0][0, :, :, e])


# ---- the structure of M ----------------------------------------------------------------------------------------------


def support(ndim, orders, **sizes):
    return theory.scan_matrix(*make_scan(orders, **sizes), ndim=ndim, orders=orders) != 0


def positions():
    """Rows and columns of the map of p, (HW, 1), and of q, (1, HW)."""
    i, j = torch.meshgrid(torch.arange(H), torch.arange(W), indexing='ij')
    return (i.reshape(-1, 1), j.reshape(-1, 1)), (i.reshape(1, -1), j.reshape(1, -1))


def test_a_1d_scan_takes_from_all_that_its_walk_has_met():
    full = torch.ones(H * W, H * W, dtype=torch.bool)
    assert torch.equal(support(1, (0,)), full.tril())
    assert torch.equal(support(1, (2,)), full.triu())
    (i, j), (k, l) = positions()  # noqa: E741
    met = (l < j) | (l == j) & (k <= i)
    assert torch.equal(support(1, (1,)), met)
    assert torch.equal(support(1, (3,)), met.T)
    assert support(1, (0, 1, 2, 3)).all()


def test_a_2d_scan_takes_from_one_quadrant_and_all_orders_from_two():
    (i, j), (k, l) = positions()  # noqa: E741
    above_left = (k <= i) & (l <= j)
    assert torch.equal(support(2, (0,)), above_left)
    assert torch.equal(support(2, (1,)), above_left)
    assert torch.equal(support(2, (2,)), above_left.T)
    assert torch.equal(support(2, (3,)), above_left.T)
    assert torch.equal(support(2, (0, 1, 2, 3)), above_left | above_left.T)


def test_the_fused_scan_looks_ahead_by_five_rows_and_columns():
    """A tap reaches (i + 5, j + 5), and its state all that the walk has met by then; never a later position."""
    height = width = 13
    scan = (t.abs() for t in make_scan((0,), height=height, width=width)[:4])
    dt, A, B, C = scan
    M = theory.fused_matrix(dt, -A, B, C, torch.zeros(1, dtype=torch.float64), torch.ones(3, 3, 3, dtype=torch.float64))
    row = M.view(height, width, -1)[6, 6]
    last = (6 + 5) * width + 6 + 5
    assert (row[: last + 1] > 0).all() and not row[last + 1 :].any()


@pytest.mark.parametrize('states', [1, 2, 3])
def test_below_the_diagonal_a_1d_scan_has_the_rank_of_its_state(states):
    """All that passes from before a step to after it passes through N numbers."""
    M = theory.scan_matrix(*make_scan((0,), states), ndim=1, orders=(0,))
    ranks = [torch.linalg.matrix_rank(M[t:, :t], rtol=1e-10).item() for t in range(1, H * W)]
    assert ranks == [min(states, t, H * W - t) for t in range(1, H * W)]


def test_without_decay_a_1d_scan_is_causal_linear_attention():
    dt, A, B, C, D = make_scan((0,), states=3)
    M = theory.scan_matrix(dt, 0 * A, B, C, 0 * D, ndim=1, orders=(0,))
    queries, keys = C.view(H * W, 3), (dt[..., None] * B).view(H * W, 3)
    same(M, (queries @ keys.T).tril())


def test_on_one_row_both_scans_are_the_same():
    orders = (0, 2)
    scan = make_scan(orders, height=1, width=7)
    one, two = (theory.scan_matrix(*scan, ndim=ndim, orders=orders) for ndim in (1, 2))
    same(one, two)


@pytest.mark.parametrize('ndim', [1, 2])
def test_one_decay_for_all_gives_the_lengths_of_the_paths(ndim):
    """As the page has it: a^(steps of the walk) in 1-D, a^(rows + columns) in 2-D."""
    ones = torch.ones(H, W, 1, dtype=torch.float64)
    A = torch.full((1, 1), -0.5, dtype=torch.float64)
    M = theory.scan_matrix(ones, A, ones[..., None], ones[..., None], 0 * ones[0, 0], ndim=ndim, orders=(0,))
    (i, j), (k, l) = positions()  # noqa: E741
    steps = (i - k) * W + (j - l) if ndim == 1 else (i - k) + (j - l)
    same(M, torch.exp(-0.5 * steps.double()).where(M != 0, 0))


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_example_draws_what_the_page_shows(tmp_path):
    pytest.importorskip('matplotlib')
    theory.draw(str(tmp_path / 'a.png'), height=3, width=3)
    assert (tmp_path / 'a.png').stat().st_size > 10_000


@pytest.mark.parametrize('page', ['theory.md', 'receptive-fields.md'])
def test_the_files_that_a_page_names_are_there(page):
    text = (ROOT / 'docs' / page).read_text()
    assert 'SPDX' not in text
    paths = [ROOT / 'docs' / path for path in re.findall(r'\]\(([^):]+)\)', text)]
    paths += [ROOT / path for path in re.findall(r'`((?:ops|models|tools|tests|examples)/[\w/]+\.py)`', text)]
    assert paths and not [path for path in paths if not path.is_file()]
