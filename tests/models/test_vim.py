# SPDX-License-Identifier: Apache-2.0
"""Vim: what tokens with a class token in their middle ask of timm's contract."""

import sys

import pytest
import timm
import torch
from golden_files import under
from torch import nn


def create(name='test_vim', **kwargs):
    return timm.create_model(name, **kwargs).eval()


def filter_fn(model):
    return sys.modules[type(model).__module__].checkpoint_filter_fn


def create_golden(tensors, metadata, dtype, **kwargs):
    config = metadata['config']
    model = create(
        'vim_tiny_patch16_224',
        img_size=tuple(config['img_size']),
        patch_size=config['patch_size'],
        patch_stride=config['stride'],
        depth=config['depth'],
        embed_dim=config['embed_dim'],
        d_state=config['d_state'],
        num_classes=config['num_classes'],
        dtype=dtype,
        **kwargs,
    )
    model.load_state_dict(under(tensors, 'state_dict.'))
    return model


# ---- tokens ----------------------------------------------------------------------------------------------------------


def images(height=64, width=64, batch=2, **kwargs):
    return torch.randn(batch, 3, height, width, **kwargs)


def split(tokens):
    """Patches, and the class token that stands in their middle."""
    middle = (tokens.shape[1] - 1) // 2
    return torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], 1), tokens[:, middle]


@pytest.mark.parametrize('img_size, stride, grid', [(64, 16, (4, 4)), ((70, 95), 16, (4, 5)), ((64, 40), 8, (7, 4))])
def test_tokens(img_size, stride, grid):
    model = create(img_size=img_size, patch_stride=stride)
    x = images(*model.patch_embed.img_size)
    tokens = model.embed(x)
    patches, token = split(tokens)
    assert model.patch_embed.grid_size == grid and tokens.shape == (2, grid[0] * grid[1] + 1, 32)
    positions, row = split(model.pos_embed)
    torch.testing.assert_close(token, (model.cls_token[:, 0] + row).expand(2, -1))
    embedded = nn.functional.conv2d(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride)
    torch.testing.assert_close(patches, embedded.flatten(2).transpose(1, 2) + positions)


def test_pooling():
    model, x = create(num_classes=5), images()
    tokens = model.forward_features(x)
    patches, token = split(tokens)
    assert model.num_prefix_tokens == 1 and model.global_pool == 'token'
    torch.testing.assert_close(model(x), model.head(token))
    pooled = {'token': token, 'avg': patches.mean(1), 'max': patches.amax(1), '': tokens}
    pooled['avgmax'] = (pooled['avg'] + pooled['max']) / 2
    for pool, expected in pooled.items():
        model.reset_classifier(0, pool)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), expected)
    model.train().reset_classifier(7, 'avg')
    assert model.head.training and model(x).shape == (2, 7) and model.num_classes == 7
    for make in (lambda: create(global_pool='catavgmax'), lambda: model.reset_classifier(7, 'map')):
        with pytest.raises(ValueError, match="global_pool must be one of .*'token'.*, got"):
            make()


@pytest.mark.parametrize('norm', (False, True), ids=('raw', 'norm'))
@pytest.mark.parametrize('checkpointed', (False, True), ids=('plain', 'checkpointed'))
def test_forward_intermediates_of_tokens(norm, checkpointed):
    model, x = create(img_size=(64, 48)), images(64, 48)
    model.set_grad_checkpointing(checkpointed)
    expected, tokens = [], model.embed(x)
    for block in model.blocks:
        tokens = block(tokens)
        expected.append(split(model.norm(tokens) if norm else tokens))
    final, maps = model.forward_intermediates(x, norm=norm)
    torch.testing.assert_close(final, model.forward_features(x))
    assert len(maps) == 4
    for actual, (patches, _) in zip(maps, expected, strict=True):
        torch.testing.assert_close(actual, patches.transpose(1, 2).reshape(2, 32, 4, 3))
    pairs = model.forward_intermediates(
        x, [0, 2], return_prefix_tokens=True, norm=norm, stop_early=True, output_fmt='NLC', intermediates_only=True
    )
    assert len(pairs) == 2
    for (patches, token), i in zip(pairs, (0, 2), strict=True):
        torch.testing.assert_close(patches, expected[i][0])
        torch.testing.assert_close(token, expected[i][1][:, None])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(x, output_fmt='NHWC')


def test_features_only():
    model = create('vim_tiny_patch16_stride8_224', device='meta', features_only=True, dynamic_img_size=True)
    assert model.feature_info.reduction() == [8, 8, 8] and model.feature_info.channels() == [192] * 3
    assert model.feature_info.module_name() == ['blocks.21', 'blocks.22', 'blocks.23']
    maps = model(images(96, 70, device='meta'))
    assert [m.shape for m in maps] == [(2, 192, 11, 7)] * 3
    few = create(features_only=True, out_indices=(1, 3))
    whole = create()
    whole.load_state_dict(few.model.state_dict(), strict=False)
    for actual, expected in zip(few(x := images(80, 64)), whole.forward_intermediates(x, [1, 3])[1], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize('indices, kept', [(1, [3]), ([0, 2], [0, 2]), ([1], [1])], ids=str)
def test_prune_intermediate_layers_of_tokens(indices, kept):
    model, x = create(), images()
    expected = model.forward_intermediates(x, kept, intermediates_only=True)
    assert model.prune_intermediate_layers(indices, prune_norm=True) == kept
    assert len(model.blocks) == kept[-1] + 1
    assert all(map(torch.equal, model.forward_intermediates(x, kept, intermediates_only=True), expected))
    assert isinstance(model.norm, nn.Identity) and isinstance(model.head, nn.Identity)
    assert model(x).shape == (2, 17, 32)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_another_size_is_refused_unless_dynamic():
    with pytest.raises(AssertionError, match=r'size img_size, \(64, 64\), .* got width 80'):
        create(dynamic_img_size=False)(images(64, 80))
    with pytest.raises(ValueError, match=r'img_size must hold a patch of \(16, 16\), got \(64, 15\)'):
        create(img_size=(64, 15))


def positions(pos_embed, grid):
    patches, token = split(pos_embed)
    return patches.reshape(grid).permute(2, 0, 1)[None], token


def test_positions_are_resampled(assert_close):
    """As a map without the class token's row, which stays as it is, in every way to another size."""
    small = create(img_size=64, dtype=torch.float64)
    x = images(80, 112, dtype=torch.float64)
    state = small.state_dict()
    dynamic = small(x)
    large = create(img_size=(80, 112), dynamic_img_size=False, dtype=torch.float64)
    large.load_state_dict(state)
    before, row = positions(small.pos_embed, (4, 4, 32))
    after, row_after = positions(large.pos_embed, (5, 7, 32))
    assert torch.equal(row, row_after)
    expected = nn.functional.interpolate(before.float(), (5, 7), mode='bicubic', antialias=True).double()
    torch.testing.assert_close(after, expected)
    assert_close(large(x), dynamic, 1e-6)
    small.set_input_size((80, 112))
    assert small.patch_embed.img_size == (80, 112) and small.pos_embed.requires_grad
    assert torch.equal(small.pos_embed, large.pos_embed)
    assert torch.equal(small(x), large(x))
    assert state['pos_embed'].shape[1] == 17  # what was loaded is left as it was


def test_stride_and_patches_change():
    model = create(img_size=64)
    weight = model.patch_embed.proj.weight
    model.set_input_size(patch_stride=8)
    assert model.patch_embed.grid_size == (7, 7) and model.pos_embed.shape[1] == 50
    assert model.patch_embed.proj.weight is weight
    assert {info['reduction'] for info in model.feature_info} == {8}
    model.set_input_size(patch_size=8)  # and the stride with it, to 4
    assert model.patch_embed.grid_size == (15, 15) and model.patch_embed.proj.weight.shape[2:] == (8, 8)
    assert model(images()).shape == (2, 1000)
    fresh = create(img_size=64, patch_size=8, patch_stride=4)
    fresh.load_state_dict(create(img_size=64).state_dict())
    assert fresh(images()).isfinite().all()


def test_a_published_file_of_another_stride_loads(golden):
    tensors, metadata = golden('vim_micro_square')
    model = create_golden(tensors, metadata, torch.float32)
    metadata['config']['stride'] = 8
    finer = create_golden(tensors, metadata, torch.float32)
    before, after = split(model.pos_embed), split(finer.pos_embed)
    assert torch.equal(before[1], after[1]) and after[0].shape[1] == 49
    assert torch.equal(model.blocks[0].mixer.scan_back.conv.weight, finer.blocks[0].mixer.scan_back.conv.weight)


def test_a_grid_that_is_not_known_does_not_load():
    with pytest.raises(RuntimeError, match='size mismatch for pos_embed'):
        create(img_size=64).load_state_dict(create(img_size=(64, 80)).state_dict())


# ---- training --------------------------------------------------------------------------------------------------------


def test_initialisation_of_tokens():
    model = create(embed_dim=128, depth=4)
    scale = model.patch_embed.proj.weight[0].numel() ** -0.5  # LeCun's
    assert abs(model.patch_embed.proj.weight.std() / scale - 1) < 0.05 and not model.patch_embed.proj.bias.any()
    for p in (model.pos_embed, model.cls_token, model.head.weight):
        assert abs(p.std() / 0.02 - 1) < 0.2
    for block in model.blocks:
        assert block.norm1.eps == 1e-5 and (block.norm1.weight == 1).all()
        bounds = {'in_proj': 128**-0.5, 'out_proj': 256**-0.5 / 2, 'scan_ahead.x_proj': 256**-0.5}
        for name, bound in bounds.items():
            assert 0.95 * bound < block.mixer.get_submodule(name).weight.abs().max() <= bound
        for scan in (block.mixer.scan_ahead, block.mixer.scan_back):
            steps = nn.functional.softplus(scan.dt_bias).log10()
            assert -3.001 <= steps.min() and steps.max() <= -0.999 and abs(steps.mean() + 2) < 0.2
            assert (scan.D == 1).all() and torch.allclose(scan.A_log.exp(), torch.arange(1.0, 17))
