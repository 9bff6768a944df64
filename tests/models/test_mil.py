# SPDX-License-Identifier: Apache-2.0
"""Networks for whole slides: the golden numbers, the grid, what the pad token and the crop change, survival's maths."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vssm.models.mil import (
    MambaMIL,
    checkpoint_filter_fn,
    create_mil_model,
    current_name,
    grid,
    list_mil_models,
    networks,
    survival,
    to_cells,
)

pytestmark = pytest.mark.usefixtures('one_thread')
BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'


SEQUENCES = ('mamba1d_mil', 'srmambamil', 'mambamil', 's4mil', 'transmil', 'dtfd_mil')
BY_MAXIMUM = ('max_mil', 's4mil')  # which show no attention


def small(name, **kwargs):
    return create_mil_model(name, **dict(dict(in_dim=6, dim=16, num_classes=3), **kwargs)).eval()


def bag(cells, patch_size=512, in_dim=6, dtype=torch.float32):
    """Random features at cells, (row, column) each, with coordinates somewhere in the cell."""
    cells = torch.tensor(cells)
    coords = cells.flip(1) * patch_size + torch.randint(patch_size, (2,))
    return torch.randn(len(cells), in_dim, dtype=dtype), coords


TISSUE = [
    (3, 4),
    (3, 5),
    (3, 8),
    (4, 3),
    (4, 4),
    (5, 4),
    (5, 5),
    (5, 6),
    (5, 9),
    (7, 3),
    (7, 9),
]  # rows 3-7, columns 3-9


# ---- golden numbers --------------------------------------------------------------------------------------------------


def golden_model(options, dtype):
    args = dict(
        in_dim=options['in_dim'],
        num_classes=options['n_classes'],
        dim=options['mambamil_dim'],
        depth=options['mambamil_layer'],
        d_state=options['mambamil_state_dim'],
        inner_norms=options['mambamil_inner_layernorms'],
        dtype=dtype,
    )
    if options['model_type'] == 'MambaMIL_2D':  # so the authors' code calls the 1-D variant
        return create_mil_model('mamba1d_mil', **args).eval()
    return create_mil_model(
        'mamba2d_mil',
        patch_size=options['mamba_2d_patch_size'],
        grid_size=(options['grid_height'], options['grid_width']),
        pad_token=dict(trainable='learned', zero='zero')[options['mamba_2d_pad_token']],
        **args,
    ).eval()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['float32', 'float64'])
@pytest.mark.parametrize('case', ['cls2d', 'surv2d', 'cls1d'])
def test_golden(case, dtype, golden, assert_close):
    """Outputs and every gradient of the published code, under its checkpoint's names."""
    tensors, metadata = golden('mil_micro')
    tensors = {name.removeprefix(f'{case}.'): t for name, t in tensors.items() if name.startswith(f'{case}.')}
    options = metadata['cases'][case]
    model = golden_model(options, dtype)
    published = {n.removeprefix('state_dict.'): t for n, t in tensors.items() if n.startswith('state_dict.')}
    model.load_state_dict(published)
    features = tensors['features'].to(dtype).requires_grad_()
    logits = model(features, tensors['coords'])
    tolerance, grad_tolerance = (1e-5, 1e-4) if dtype == torch.float32 else (1e-6, 1e-6)
    assert_close(logits, tensors['logits'], tolerance, 'logits')
    if options['survival']:
        S = survival.survival(logits)
        assert_close(logits.sigmoid(), tensors['hazards'], tolerance, 'hazards')
        assert_close(S, tensors['S'], tolerance, 'S')
        loss = S
    else:
        assert_close(logits.softmax(1), tensors['Y_prob'], tolerance, 'Y_prob')
        assert torch.equal(logits.argmax(1, keepdim=True), tensors['Y_hat'])
        loss = logits
    (loss * tensors['loss_weight'].to(dtype)).sum().backward()

    assert_close(features.grad, tensors['grad.features'], grad_tolerance, 'features')
    expected = {n.removeprefix('grad.'): t for n, t in tensors.items() if n.startswith('grad.')}
    del expected['features']
    expected = checkpoint_filter_fn(expected, model)
    own = {name: p.grad for name, p in model.named_parameters()}
    assert own.keys() - {'pad_token'} == expected.keys() - {'pad_token'}
    for name, grad in expected.items():
        if grad.abs().max() < 1e-12:  # the bias before a softmax
            assert own[name].abs().max() < 1e-6, name
        else:
            assert_close(own[name], grad, grad_tolerance, name)


def test_our_own_checkpoints_pass_unchanged():
    for name in list_mil_models():
        weights = small(name).state_dict()
        assert checkpoint_filter_fn(weights, small(name)) == weights


def test_a_former_name_is_told():
    assert current_name('mamba_mil') == current_name('mamba1d_mil') == 'mamba1d_mil' and current_name('mamba') is None
    with pytest.warns(FutureWarning, match='mamba_mil is now called mamba1d_mil, .* the paper MambaMIL is mambamil'):
        model = small('mamba_mil')
    assert type(model) is MambaMIL and model.scan_ndim == 1


def test_a_checkpoint_with_a_pad_token_does_not_fit_a_network_without():
    with pytest.raises(RuntimeError, match='pad_token'):
        small('mamba2d_mil', pad_token='none').load_state_dict(small('mamba2d_mil').state_dict())


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', list_mil_models())
def test_every_network(name):
    """Takes any number of patches, gives every parameter a gradient, and lies on the meta device."""
    model = small(name).train()
    features, coords = bag(TISSUE)
    logits, parts = model.forward_train(features, coords)
    assert logits.shape == (1, 3) and parts.shape == (5 if name == 'dtfd_mil' else 0, 3)
    torch.cat([logits, parts]).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    assert torch.equal(model(features, coords), model.forward_train(features, coords)[0])
    for n in (1, 2, 3):
        assert model(features[:n], coords[:n]).shape == (1, 3) and model(features[:n], coords[:n]).isfinite().all()
    assert all(p.is_meta for p in small(name, device='meta').parameters())
    assert {p.dtype for p in small(name, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize('name', list_mil_models())
@pytest.mark.parametrize('far', [0, 50])
def test_autocast(name, far):
    model = small(name, **(dict(pad_token='none') if name == 'mamba2d_mil' and far else {}))
    features, coords = bag([*TISSUE, (far, far)])
    with torch.autocast('cpu', torch.bfloat16):
        logits = model(features, coords)
    torch.testing.assert_close(logits.float(), model(features, coords), rtol=0.05, atol=0.02)


@pytest.mark.parametrize('name', list_mil_models())
def test_what_the_order_of_the_patches_changes(name):
    """Nothing but in the networks that walk or count in the order of the file."""
    model, (features, coords) = small(name).double(), bag(TISSUE, dtype=torch.float64)
    order = torch.randperm(len(features))
    same = torch.allclose(model(features, coords), model(features[order], coords[order]), rtol=1e-10)
    assert same == (name not in SEQUENCES)


@pytest.mark.parametrize('name', list_mil_models())
def test_what_the_place_of_the_patches_changes(name):
    model, (features, coords) = small(name), bag(TISSUE)
    moved = torch.equal(model(features, coords), model(features, coords.flip(1)))
    assert moved == (name != 'mamba2d_mil')


@pytest.mark.parametrize('name', [name for name in list_mil_models() if name not in BY_MAXIMUM])
@pytest.mark.parametrize('pad_token', ['learned', 'none'])
def test_attention_is_what_the_pooling_uses(name, pad_token):
    kwargs = dict(pad_token=pad_token) if name == 'mamba2d_mil' else {}
    model, (features, coords) = small(name, **kwargs), bag(TISSUE)
    weights = model.attention(features, coords)
    tokens, patches = model.forward_features(features, coords)
    empty = len(tokens) - len(features)
    assert (weights >= 0).all() and weights.shape == (len(features),)
    assert bool(empty) == (name == 'mamba2d_mil' and pad_token == 'learned')
    if empty or name == 'transmil':  # whose class token looks at itself, too
        assert weights.sum() < 1 - 1e-3
    else:
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
        torch.testing.assert_close(model.head(weights[None] @ tokens[patches]), model(features, coords))


@pytest.mark.parametrize('name', list_mil_models())
def test_several_slides_are_pooled_together(name):
    """Each on its own grid or in its own order, and their coordinates may be the same; the order of the slides matters
    where all patches are one sequence."""
    model = small(name).double()
    slides = [bag(TISSUE, dtype=torch.float64), bag(TISSUE[:5], dtype=torch.float64)]

    def logits(slides):
        features, coords = (torch.cat(part) for part in zip(*slides, strict=True))
        return model(features, coords, lengths=[len(part[0]) for part in slides])

    expected = logits(slides)
    assert torch.allclose(logits(slides[::-1]), expected) == (name not in ('transmil', 'dtfd_mil'))
    tokens = torch.cat([model.forward_features(*slide)[0] for slide in slides])
    torch.testing.assert_close(model.head(model.pool(tokens)), expected)
    if name not in BY_MAXIMUM:
        weights = model.attention(*(torch.cat(part) for part in zip(*slides, strict=True)), lengths=[11, 5])
        assert weights.shape == (16,)


def test_initialisation_is_mambas():
    mixer = create_mil_model('mamba2d_mil').blocks[0].mixer
    assert (mixer.dt_rank, mixer.d_state, mixer.D.shape) == (8, 16, (1, 256))
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(1, 256, 16))
    assert torch.equal(mixer.D, torch.ones(1, 256))
    step = torch.nn.functional.softplus(mixer.dt_bias)
    assert step.min() >= 0.9e-3 and step.max() <= 0.11 and step.log().std() > 1  # the published code has zeros
    assert mixer.dt_weight.abs().max() <= 8**-0.5


def test_the_published_sizes():
    model = create_mil_model('mamba2d_mil')
    names = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert names['embed.weight'] == (128, 1024) and names['blocks.0.mixer.in_proj.weight'] == (512, 128)
    assert names['blocks.0.mixer.x_proj.weight'] == (40, 256) and names['pool.fc1.weight'] == (128, 128)
    assert model.drop.p == 0.25


@pytest.mark.parametrize(
    'make, said',
    [
        (lambda: create_mil_model('vit'), "model_name must be one of mamba2d_mil, .*, got 'vit'"),
        (lambda: small('mamba2d_mil', scan_ndim=3), 'scan_ndim must be 1 or 2, got 3'),
        (lambda: small('mamba2d_mil', pad_token='one'), "pad_token must be 'learned', 'zero' or 'none', got 'one'"),
        (lambda: small('mamba2d_mil', crop=True, grid_size=(4, 4)), 'grid_size .* must be None, got .4, 4.'),
        (lambda: small('mamba2d_mil', max_gap=-1), 'max_gap must be 0 or more, .* got -1'),
        (lambda: small('mamba2d_mil', max_gap=3, pad_token='none'), 'max_gap must be .* got 3'),
        (lambda: small('mean_mil', pool='median'), "pool must be one of attention, gated, mean, max, got 'median'"),
        (lambda: small('mean_mil')(torch.randn(3, 5)), r'features must be \(n, 6\) with n >= 1, got \(3, 5\)'),
        (lambda: small('mean_mil')(torch.randn(0, 6)), r'features must be .*, got \(0, 6\)'),
        (lambda: small('mamba2d_mil')(torch.randn(3, 6)), 'coords must be .* for a 2-D scan, got None'),
        (lambda: small('mamba2d_mil')(torch.randn(3, 6), torch.zeros(2, 2)), r'coords must be \(3, 2\), got \(2, 2\)'),
        (lambda: small('mean_mil')(torch.randn(3, 6), lengths=[2, 2]), r'add up to 3, got \[2, 2\]'),
        (lambda: small('max_mil').attention(torch.randn(3, 6)), 'attention needs a pooling with weights'),
        (lambda: small('s4mil').attention(torch.randn(3, 6)), 'S4MIL: attention needs a pooling with weights'),
        (lambda: small('s4mil', d_state=5), 'd_state must be an even number from 2 up, got 5'),
        (lambda: small('srmambamil', rate=1), 'rate must be 2 or more, or None, got 1'),
        (lambda: small('transmil', num_heads=5), 'num_heads must divide dim and .* got 5, 16 and 8'),
        (lambda: small('transmil', landmarks=0), 'landmarks be 1 or more, got 8, 16 and 0'),
        (lambda: small('dtfd_mil', parts=0), "parts must be 1 or more .* got 0 and 'afs'"),
        (lambda: small('dtfd_mil', distillation='mas'), "one of afs, max, maxmin, attention, got 5 and 'mas'"),
    ],
)
def test_bad_arguments_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# ---- grid ------------------------------------------------------------------------------------------------------------


def test_cells():
    coords = torch.tensor([[0, 0], [1023, 511], [512, 1536]])
    assert to_cells(coords, 512)[1] == (4, 2)
    assert to_cells(coords, 512)[0].tolist() == [0, 1, 7]
    assert to_cells(coords, 512, grid_size=(5, 3))[0].tolist() == [0, 1, 10]
    cells, size = to_cells(coords + torch.tensor([512, 1024]), 512, crop=True)
    assert cells.tolist() == [0, 1, 7] and size == (4, 2)


@pytest.mark.parametrize(
    'coords, options, said',
    [
        ([[0, 0], [-1, 5]], {}, r'coords row 1 must lie on the grid of 512 pixels each, got \(-1, 5\)'),
        ([[0, 0], [5120, 0]], dict(grid_size=(10, 10)), r'row 1 must lie on a grid of 10 x 10 cells .*got \(5120, 0\)'),
        ([[0, 0], [9, 9], [600, 0], [700, 0]], {}, r'rows 0 and 1 in one, \(0, 0\) and \(9, 9\): is patch_size right'),
        ([[0, 0], [512 << 20, 512 << 20]], {}, 'coords must span at most 4194304 cells, got 1048577 x 1048577'),
        ([], {}, 'coords must be whole numbers'),
        ([[0.5, 0.0]], {}, 'coords must be whole numbers .*torch.float32'),
    ],
)
def test_coordinates_off_the_grid_are_named(coords, options, said):
    with pytest.raises(ValueError, match=said):
        to_cells(torch.tensor(coords), 512, **options)


@pytest.mark.parametrize('depth', [1, 3])
@pytest.mark.parametrize('inner_norms', [False, True])
def test_without_a_pad_token_the_crop_changes_nothing(depth, inner_norms, assert_close):
    """Nor does any number of empty rows and columns around the tissue; values and gradients."""
    features, coords = bag(TISSUE, dtype=torch.float64)
    results = []
    for options in (dict(crop=True), dict(), dict(grid_size=(12, 10)), dict(grid_size=(8, 31))):
        torch.manual_seed(1)
        model = small(
            'mamba2d_mil', pad_token='none', depth=depth, inner_norms=inner_norms, dtype=torch.float64, **options
        )
        x = features.clone().requires_grad_()
        logits = model(x, coords)
        logits.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        results.append(dict(grads, logits=logits.detach(), features=x.grad))
    for other in results[1:]:
        for name, value in results[0].items():
            assert_close(other[name], value, 1e-10, name)


def test_with_a_pad_token_the_crop_is_another_network():
    features, coords = bag(TISSUE)
    logits = []
    for options in (dict(crop=True), dict()):
        torch.manual_seed(1)
        logits.append(small('mamba2d_mil', **options)(features, coords))
    assert not torch.allclose(*logits, rtol=1e-3)


def test_without_a_pad_token_holes_take_no_part():
    """By hand: convolution and states over the cells there are; across a hole a state fades as the step's bias says."""
    torch.manual_seed(1)
    model = small('mamba2d_mil', pad_token='none', dtype=torch.float64)
    cells = [(0, 0), (0, 1), (0, 4), (1, 0), (1, 3), (1, 4)]
    features, coords = bag(cells, dtype=torch.float64)
    tokens, _ = model.forward_features(features, coords)

    mixer, norm = model.blocks[0].mixer, model.blocks[0].norm
    u = model.act(model.embed(features))
    x, z = mixer.in_proj(norm(u)).chunk(2, -1)
    x = dict(zip(cells, x, strict=True))
    kernel, zero = mixer.conv.weight[:, 0], x[0, 0] * 0
    expected = []
    convolved = {}
    for row, column in cells:
        terms = [kernel[:, 3 - k] * x.get((row, column - k), zero) for k in range(4)]
        convolved[row, column] = torch.nn.functional.silu(sum(terms) + mixer.conv.bias)
    A = -mixer.A_log[0].exp()
    g, h = {}, {}
    for row in range(2):
        for column in range(5):
            v = convolved.get((row, column), zero)
            low, B, C = mixer.x_proj(v).split([mixer.dt_rank, 16, 16])
            dt = torch.nn.functional.softplus(mixer.dt_weight[0] @ low + mixer.dt_bias[0])[:, None]
            a, b = (dt * A).exp(), dt * B * v[:, None]
            g[row, column] = a * g.get((row, column - 1), 0) + b
            h[row, column] = a * h.get((row - 1, column), 0) + g[row, column]
            if (row, column) in x:
                expected.append(h[row, column] @ C + mixer.D[0] * v)
    y = mixer.out_proj(torch.stack(expected) * torch.nn.functional.silu(z))
    torch.testing.assert_close(tokens, model.norm(u + y), rtol=1e-9, atol=1e-12)


FAR = [
    (row + y, column + x) for row in range(2) for column in range(3) for y, x in ((0, 0), (37, 0), (60, 90), (3, 19))
]


@pytest.mark.parametrize('depth', [1, 2])
@pytest.mark.parametrize('inner_norms', [False, True])
def test_without_a_pad_token_folded_gaps_change_nothing(depth, inner_norms, assert_close, monkeypatch):
    """A row or column in the place of 16 empty ones; values and every gradient, as on the whole grid."""
    features, coords = bag(FAR, dtype=torch.float64)
    assert networks.fold_gaps(*to_cells(coords, 512))[1] == (32, 33)  # of 62 x 93
    results = []
    for fold in (True, False):
        if not fold:
            monkeypatch.setattr(networks, 'fold_gaps', lambda cells, grid: (cells, grid, None))
        torch.manual_seed(1)
        model = small('mamba2d_mil', pad_token='none', depth=depth, inner_norms=inner_norms, dtype=torch.float64)
        for block in model.blocks:
            torch.nn.init.uniform_(block.mixer.dt_bias, -7, 1)  # small steps, which a gap lets pass, and large ones
        x = features.clone().requires_grad_()
        logits = model(x, coords)
        logits.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        results.append(dict(grads, logits=logits.detach(), features=x.grad))
    for name, value in results[0].items():
        assert_close(value, results[1][name], 1e-10, name)


@pytest.mark.parametrize('gap', [1, 3, 4, 18, 19, 20, 34, 35, 36, 371])
def test_a_folded_gap_is_as_long_as_it_was(gap):
    """Each folded row counts 16, three or more that are not folded stay, and no row is lost."""
    coords = 512 * torch.tensor([[9, 9], [9, 10 + gap], [10 + gap, 9]])
    cells, (height, width), folded = networks.fold_gaps(*to_cells(coords, 512))
    assert height == width and cells.tolist() == [0, (height - 1) * width, width - 1]
    folded = torch.zeros(height, width).bool() if folded is None else folded
    empty = folded[1:-1, 0]
    assert torch.equal(folded, folded.T) and not folded[0, 0]
    assert len(empty) + 15 * empty.sum() == gap
    assert (~empty).sum() >= min(gap, 3) and (~empty).sum() <= 18


@pytest.mark.parametrize('pad_token', ['learned', 'zero'])
def test_the_longest_gap(pad_token):
    """What a gap has beyond max_gap is as if it were not there, also before the first patch."""
    model = small('mamba2d_mil', pad_token=pad_token, max_gap=5)
    features = torch.randn(3, 6)
    expected = model(features, 512 * torch.tensor([[5, 2], [6, 2], [12, 8]]))
    assert torch.equal(model(features, 512 * torch.tensor([[50, 2], [51, 2], [90, 70]])), expected)
    assert len(model.forward_features(features, 512 * torch.tensor([[50, 2], [51, 2], [90, 70]]))[0]) == 9 * 13
    whole = small('mamba2d_mil', pad_token=pad_token)
    whole.load_state_dict(model.state_dict())
    assert torch.equal(whole(features, 512 * torch.tensor([[5, 2], [6, 2], [12, 8]])), expected)


@pytest.mark.parametrize('options, cells', [(dict(pad_token='none'), 55**2), (dict(max_gap=8, crop=True), 28**2)])
def test_two_pieces_in_opposite_corners_make_a_small_grid(options, cells, monkeypatch):
    sizes = []
    monkeypatch.setattr(networks, 'check_memory', lambda grid, *rest: sizes.append(grid[0] * grid[1]))
    corners = [(row + corner, column + corner) for corner in (0, 390) for row in range(10) for column in range(10)]
    small('mamba2d_mil', **options)(*bag(corners))
    assert sizes == [cells]


def test_a_grid_that_memory_has_no_room_for_is_refused(monkeypatch):
    """2,001 x 2,001 cells, for which a step of the published network needs some 49 GB."""
    model = create_mil_model('mamba2d_mil', in_dim=6)
    features, coords = bag([(0, 0), (2000, 2000)])
    monkeypatch.setattr('vssm.models.mil.grid._free_bytes', lambda device: 15 << 30)
    with pytest.raises(
        ValueError, match=r'grid of 2001 x 2001 cells, which needs about 49.2 GB of memory, got 16.1 GB'
    ):
        model(features, coords)
    with torch.no_grad(), pytest.raises(ValueError, match='needs about 28.7 GB'):
        model(features, coords)


@pytest.mark.skipif(sys.platform != 'linux', reason='free memory is read from /proc')
def test_the_free_memory_is_some():
    assert 1 << 20 < grid._free_bytes(torch.device('cpu')) < 1 << 50


# ---- survival --------------------------------------------------------------------------------------------------------


def test_time_edges_are_quantiles_of_the_events():
    times = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 1000, 2000])
    censored = torch.tensor([False] * 8 + [True] * 2)
    edges = survival.time_edges(times, censored, 4)
    assert edges.tolist() == [2.75, 4.5, 6.25]
    assert survival.time_bin(torch.tensor([0.0, 2.75, 4.4, 6.25, 9999]), edges).tolist() == [0, 1, 1, 3, 3]
    counts = survival.time_bin(times[:8], edges).bincount(minlength=4)
    assert counts.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    'times, censored, bins, said',
    [
        ([1.0, 2, 3], [1, 1, 1], 4, 'from 2 to the number of events, 0, got 4'),
        ([1.0, 2, 3, 4], [0] * 4, 1, 'from 2 to the number of events, 4, got 1'),
        ([1.0, 1, 1, 1, 2], [0] * 5, 4, 'in each of 4 bins, got 5 events at 2 different times'),
    ],
    ids=['no event', 'one bin', 'two times'],
)
def test_too_few_events_are_refused(times, censored, bins, said):
    with pytest.raises(ValueError, match=said):
        survival.time_edges(torch.tensor(times), torch.tensor(censored), bins)


@pytest.mark.parametrize('alpha', [0.0, 0.4, 1.0])
def test_the_likelihood_of_hazards(alpha):
    """Against its textbook form, with hazards and products."""
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    bins, censored = torch.tensor([0, 1, 3, 0, 2, 3]), torch.tensor([False, False, False, True, True, True])
    expected = 0
    for row, k, c in zip(logits.sigmoid(), bins, censored, strict=True):
        before = torch.prod(1 - row[:k])
        likelihood = before * (1 - row[k]) if c else before * row[k]
        expected -= (1 - alpha if c else 1) * likelihood.log() / 6
    actual = survival.survival_nll(logits, bins, censored, alpha)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(survival.survival(logits), (1 - logits.sigmoid()).cumprod(1))


def test_the_likelihood_stays_finite_for_extreme_logits():
    logits = torch.tensor([[90.0, -90, 90, -90]], requires_grad=True)
    for censored in (True, False):
        loss = survival.survival_nll(logits, torch.tensor([3]), torch.tensor([censored]))
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and grad.isfinite().all()


def test_risk_grows_with_the_hazards():
    logits = torch.randn(5, 4)
    assert (survival.risk_score(logits + 0.1) > survival.risk_score(logits)).all()
    assert torch.equal(survival.risk_score(logits[:, :1]), logits[:, 0])


def test_cox_loss_is_the_partial_likelihood():
    times, censored = torch.tensor([5.0, 1.0, 3.0, 4.0]), torch.tensor([True, False, False, True])
    risks = torch.randn(4, 1, requires_grad=True)
    r = risks[:, 0]
    at_1, at_3 = torch.logsumexp(r, 0), torch.logsumexp(r[[0, 2, 3]], 0)
    torch.testing.assert_close(survival.cox_loss(risks, times, censored), -((r[1] - at_1) + (r[2] - at_3)) / 2)
    loss = survival.cox_loss(risks, times, torch.ones(4, dtype=bool))
    assert loss == 0 and not torch.autograd.grad(loss, risks)[0].any()


@pytest.mark.parametrize('shift', [0.0, 90.0, -200.0])
def test_cox_loss_of_ties_is_a_mean_over_events_wherever_the_outputs_drift(shift):
    """Efron's product by hand, at 1 with two events of four at risk, then at 2, where one is censored too, and at 3."""
    times, censored = torch.tensor([1.0, 1, 2, 2, 3]), torch.tensor([False, False, False, True, False])
    r = torch.tensor([0.5, -1.0, 0.25, 2.0, -0.5], dtype=torch.float64, requires_grad=True)
    a, b, c, d, e = hazards = r.exp()
    total = hazards.sum()
    likelihood = a * b / (total * (total - (a + b) / 2)) * c / (c + d + e) * e / e
    expected = -likelihood.log() / 4
    drifted = (r + shift).float().detach()[:, None].requires_grad_()
    loss = survival.cox_loss(drifted, times, censored)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for actual, value in zip(*map(torch.autograd.grad, (loss, expected), (drifted, r)), strict=True):
        torch.testing.assert_close(actual.squeeze().double(), value, rtol=1e-4, atol=1e-5)


def test_cox_loss_is_finite_where_the_hazards_lie_far_apart():
    risks = torch.tensor([[300.0], [-300.0], [-310.0]], requires_grad=True)
    loss = survival.cox_loss(risks, torch.tensor([1.0, 2, 2]), torch.zeros(3, dtype=bool))
    (grad,) = torch.autograd.grad(loss, risks)
    expected = -(-310 + 300 - math.log((1 + math.exp(-10)) / 2) - math.log1p(math.exp(-10))) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5) and grad.isfinite().all()


# ---- big slides ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is read from /proc')
def test_a_slide_of_400_by_400_patches_within_memory_and_time(tmp_path):
    """Forward and backward, with its features of 1,024 numbers, Python and PyTorch: below 4 GB; and 180 s, beside other
    workers of the suite, where an idle machine took 15."""
    file = tmp_path / 'figures.json'
    command = [sys.executable, BENCHMARKS / 'slide_memory.py', '--rounds', '1', '--tissue', '1.0', '--json', file]
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())['rows']
    assert len(rows) == 3
    for row in rows:
        assert row['patches'] == 160_000
        assert row['peak_gb'] < 4 and row['step_s'] < 180 and math.isfinite(row['forward_s'])


def test_the_crop_saves_what_is_not_tissue():
    full, cropped = (MambaMIL(in_dim=6, dim=16, crop=crop).eval() for crop in (False, True))
    features, coords = bag([(row + 90, column + 90) for row in range(10) for column in range(10)])
    assert len(full.forward_features(features, coords)[0]) == 10_000
    assert len(cropped.forward_features(features, coords)[0]) == 100
