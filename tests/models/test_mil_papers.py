# SPDX-License-Identifier: Apache-2.0
"""The networks for slides that were written from other papers, each against its definition by plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from vssm.models.mil import create_mil_model
from vssm.models.mil.dtfd import TwoTierPool
from vssm.models.mil.mambamil import SRMamba, Walk
from vssm.models.mil.networks import MambaMixer
from vssm.models.mil.s4mil import S4D
from vssm.models.mil.transmil import PPEG, NystromAttention, TransformerPool, pseudo_inverse

pytestmark = pytest.mark.usefixtures('one_thread')
f64 = dict(dtype=torch.float64)


def count(name, **kwargs):
    return sum(p.numel() for p in create_mil_model(name, device='meta', **kwargs).parameters())


def linear(inputs, outputs, bias=True):
    return inputs * outputs + outputs * bias


GATED = 2 * linear(512, 128) + linear(128, 1)
WALK = 5 * 1024 + linear(1024, 32 + 2 * 16, False) + linear(32, 1024) + 1024 * 16 + 1024
ENDS = linear(1024, 512) + linear(512, 2)


@pytest.mark.parametrize(
    'name, expected',
    [
        ('mambamil', ENDS + GATED + 1024 + 2 * (1024 + linear(512, 2048, False) + WALK + linear(1024, 512, False))),
        (
            'srmambamil',
            ENDS + GATED + 1024 + 2 * (1024 + linear(512, 2048, False) + 2 * WALK + linear(1024, 512, False)),
        ),
        ('s4mil', ENDS + 1024 + 2 * 512 + 512 * 32 * 4 + linear(512, 1024)),
        (
            'transmil',
            ENDS + 512 + 3 * 1024 + 512 * (49 + 25 + 9 + 3) + 2 * (3 * 512**2 + linear(512, 512) + 8 * 33),
        ),
        ('dtfd_mil', ENDS + 2 * GATED + linear(512, 2)),
    ],
)
def test_the_sizes_that_the_papers_describe(name, expected):
    assert count(name) == expected


# ---- MambaMIL and SRMambaMIL -----------------------------------------------------------------------------------------


def test_mambamils_mixer_is_mambas():
    """The same as 2DMambaMIL's, along a sequence."""
    mixer, other = SRMamba(16, d_state=4, **f64), MambaMixer(16, d_state=4, scan_ndim=1, **f64)
    state = {name.replace('walks.0.', ''): value for name, value in mixer.state_dict().items()}
    other.load_state_dict(state)
    x = torch.randn(11, 16, **f64)
    torch.testing.assert_close(mixer(x), other(x[None])[0])


@pytest.mark.parametrize('n', [1, 3, 7, 9, 12])
def test_the_second_walk_is_a_loop_over_a_stride(n):
    """By hand: every third token from each of the first three on; zeros where the sequence has ended, then dropped."""
    walk = Walk(4, dt_rank=2, d_state=3, rate=3, **f64)
    x = torch.randn(n, 4, **f64)
    rows = math.ceil(n / 3)
    order = [row * 3 + column for column in range(3) for row in range(rows)]
    visited = [x[t] if t < n else torch.zeros(4, **f64) for t in order]
    kernel, zero = walk.conv.weight[:, 0], torch.zeros(4, **f64)
    A, h, expected = -walk.A_log[0].exp(), torch.zeros(4, 3, **f64), {}
    for i, t in enumerate(order):
        taps = [kernel[:, 3 - k] * (visited[i - k] if i >= k else zero) for k in range(4)]
        u = F.silu(sum(taps) + walk.conv.bias)
        low, B, C = walk.x_proj(u).split([2, 3, 3])
        dt = F.softplus(walk.dt_weight[0] @ low + walk.dt_bias[0])[:, None]
        h = (dt * A).exp() * h + dt * B * u[:, None]
        expected[t] = h @ C + walk.D[0] * u
    torch.testing.assert_close(walk(x), torch.stack([expected[t] for t in range(n)]))


def test_the_walks_are_summed_before_the_gate():
    mixer, x = SRMamba(16, d_state=4, rates=(None, 5), **f64), torch.randn(12, 16, **f64)
    u, z = mixer.in_proj(x).chunk(2, -1)
    first, second = mixer.walks
    assert first.rate is None and second.rate == 5
    torch.testing.assert_close(mixer(x), mixer.out_proj((first(u) + second(u)) * F.silu(z)))


# ---- S4MIL -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('n', [1, 2, 10, 37])
def test_the_filter_of_s4d_is_its_recurrence(n, assert_close):
    layer = S4D(5, d_state=6, **f64)
    x = torch.randn(n, 5, **f64, requires_grad=True)
    A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    a = (A * layer.log_dt.exp()[:, None]).exp()
    b, C = (a - 1) / A, torch.view_as_complex(layer.C)
    h, outputs = torch.zeros_like(a), []
    for u in x:
        h = a * h + b * u[:, None]
        outputs.append(2 * (C * h).sum(1).real + layer.D * u)
    expected = F.glu(layer.out_proj(F.gelu(torch.stack(outputs))), dim=-1)
    assert_close(layer(x), expected, 1e-10, 'output')
    weight = torch.randn_like(expected)
    grads = [torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]) for y in (layer(x), expected)]
    for actual, wanted in zip(*grads, strict=True):
        assert_close(actual, wanted, 1e-9, 'gradient')


def test_the_filter_of_s4d_in_float32_is_that_in_float64(assert_close):
    """Also for the smallest steps and at the end of a long sequence."""
    layer = S4D(4)
    torch.nn.init.constant_(layer.log_dt, math.log(1e-3))
    with torch.no_grad():
        assert_close(layer.kernel(5000), layer.double().kernel(5000), 1e-4, 'kernel')


def test_s4d_begins_as_s4d_lin():
    layer = S4D(4, d_state=8)
    torch.testing.assert_close(layer.log_A_real.exp(), torch.full((4, 4), 0.5))
    torch.testing.assert_close(layer.A_imag[0], math.pi * torch.arange(4.0))


# ---- TransMIL --------------------------------------------------------------------------------------------------------


def softmax_attention(layer, x):
    q, k, v = layer.qkv(x).unflatten(1, (3, layer.num_heads, -1)).permute(1, 2, 0, 3)
    y = (q @ k.mT / q.shape[2] ** 0.5).softmax(-1) @ v + layer.conv(v[None])[0]
    return layer.proj(y.transpose(0, 1).flatten(1))


@pytest.mark.parametrize('n', [1, 5, 12])
def test_with_a_landmark_for_each_token_attention_is_exact(n, assert_close):
    layer = NystromAttention(16, num_heads=2, landmarks=12, iterations=30, **f64)
    x = 3 * torch.randn(n, 16, **f64)
    assert_close(layer(x), softmax_attention(layer, x), 1e-6, 'attention')


def test_the_pseudo_inverse_is_that_of_its_equation():
    a = torch.randn(2, 6, 6, **f64).softmax(-1)
    torch.testing.assert_close(pseudo_inverse(a, 30), torch.linalg.inv(a), rtol=1e-6, atol=1e-8)
    z = a[0].mT / (a[0].sum(0).max() * a[0].sum(1).max())
    eye = torch.eye(6, **f64)
    for _ in range(2):
        z = (z @ (13 * eye - a[0] @ z @ (15 * eye - a[0] @ z @ (7 * eye - a[0] @ z)))) / 4
    torch.testing.assert_close(pseudo_inverse(a, 2)[0], z)


def test_landmarks_are_means_of_segments():
    """Of 4 tokens each, the last of the 2 that remain; nothing is padded."""
    x = torch.randn(3, 14, 5)
    means = NystromAttention(15, num_heads=3, landmarks=4).segment_means(x)
    torch.testing.assert_close(means, torch.stack([part.mean(1) for part in x.split(4, dim=1)], 1))


def test_position_encodings_are_convolutions_of_the_square():
    layer, x = PPEG(4, **f64), torch.randn(1 + 9, 4, **f64)
    square = torch.zeros(3 + 6, 3 + 6, 4, **f64)
    square[3:6, 3:6] = x[1:].unflatten(0, (3, 3))
    actual = layer(x)
    assert torch.equal(actual[0], x[0])
    for row in range(3):
        for column in range(3):
            expected = square[row + 3, column + 3].clone()
            for conv, size in zip(layer.convs, (7, 5, 3), strict=True):
                reach = size // 2
                window = square[row + 3 - reach : row + 4 + reach, column + 3 - reach : column + 4 + reach]
                expected += conv.bias + torch.einsum('ijc,cij->c', window, conv.weight[:, 0])
            torch.testing.assert_close(actual[1 + 3 * row + column], expected)


@pytest.mark.parametrize('n', [1, 2, 5, 9])
def test_the_first_tokens_fill_the_square(n):
    """So that a bag of a square of tokens, the last of which are the first again, gives the same; and its attention."""
    pool = TransformerPool(16, 2, 8, 6, **f64)
    x = torch.randn(n, 16, **f64)
    whole = torch.cat([x, x])[: math.ceil(n**0.5) ** 2]
    torch.testing.assert_close(pool(x), pool(whole))
    weights, of_whole = pool.weights(x), pool.weights(whole)
    assert weights.shape == (n,) and (weights >= 0).all() and weights.sum() < 1
    pool.attn2.iterations = 40  # nothing is below 0 where the inverse is exact
    weights, of_whole = pool.weights(x), pool.weights(whole)
    if len(whole) < pool.attn2.landmarks:
        again = F.pad(of_whole[n:], (0, n - len(of_whole[n:])))
        torch.testing.assert_close(weights, of_whole[:n] + again)


# ---- DTFD-MIL --------------------------------------------------------------------------------------------------------


def two_tiers(distillation, num_classes=3, parts=2):
    return TwoTierPool(6, num_classes, parts, distillation, **f64).eval()


@pytest.mark.parametrize('num_classes', [1, 2, 3])
@pytest.mark.parametrize('distillation', ['afs', 'max', 'maxmin', 'attention'])
def test_what_is_distilled(distillation, num_classes):
    """By a loop over the pseudo-bags and their patches."""
    pool, x = two_tiers(distillation, num_classes), torch.randn(23, 6, **f64)
    parts, distilled = [], []
    for start in (0, 1):
        part = x[start::2]
        weights = pool.tier1.weights(part)
        embedding = sum(w * token for w, token in zip(weights, part, strict=True))
        parts.append(pool.head(embedding))
        shares = [w * pool.head.weight @ token for w, token in zip(weights, part, strict=True)]
        p = [(share if num_classes == 1 else share.softmax(0)).tolist() for share in shares]
        patches = range(len(part))
        if distillation == 'afs':
            distilled.append(embedding)
        elif distillation == 'max':
            distilled.append(part[max(patches, key=lambda i: p[i][-1])])
        elif distillation == 'attention':
            distilled.append(part[max(patches, key=lambda i: weights[i])])
        elif num_classes == 1:
            distilled += [part[max(patches, key=lambda i: p[i][0])], part[min(patches, key=lambda i: p[i][0])]]
        else:
            distilled += [part[max(patches, key=lambda i, c=c: p[i][c])] for c in range(num_classes)]
    embedding, logits = pool.forward_parts(x)
    torch.testing.assert_close(logits, torch.stack(parts))
    torch.testing.assert_close(embedding, pool.tier2(torch.stack(distilled)))
    torch.testing.assert_close(pool.weights(x)[None] @ x, embedding)


def test_each_tier_learns_by_its_own_loss():
    model = create_mil_model('dtfd_mil', in_dim=6, dim=8)
    bag, parts = model.forward_train(torch.randn(20, 6))
    bag.square().sum().backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learned and all(name.startswith(('pool.tier2.', 'head.')) for name in learned)
    parts.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('n, sizes', [(12, [3, 3, 2, 2, 2]), (3, [1, 1, 1])])
def test_pseudo_bags_are_dealt_out(n, sizes):
    """At random in a training and else in turns, each patch once."""
    pool, x = two_tiers('afs', parts=5), torch.randn(n, 6, **f64)
    assert [index.tolist() for index in pool.pseudo_bags(x)] == [list(range(n))[i::5] for i in range(len(sizes))]
    dealt = list(pool.train().pseudo_bags(x))
    assert [len(index) for index in dealt] == sizes and sorted(torch.cat(dealt).tolist()) == list(range(n))
    torch.manual_seed(0)
    first = torch.cat(list(pool.pseudo_bags(x)))
    assert any(not torch.equal(first, torch.cat(list(pool.pseudo_bags(x)))) for _ in range(5))
