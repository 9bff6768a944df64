# SPDX-License-Identifier: Apache-2.0
"""The networks: sizes and costs as published, numbers as the golden files have them, and all that timm expects."""

import collections
import fnmatch
import math
import re
import sys

import pytest
import timm
import torch
from timm.layers import create_feature_extractor, get_graph_node_names
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_feature_extractor

import vssm
from vssm.ops import state_fusion

MODELS = timm.list_models(module=['vmamba', 'spatial_mamba'], name_matches_cfg=True)  # without the aliases
SMALL = [name for name in MODELS if name.startswith('test_')]
TINY = [name for name in MODELS if name.endswith('_tiny') and name != 'vmamba_tiny']  # whose layers are vmamba2d_tiny's
FULL_SIZE = {  # parameters, GMACs at 224, widths, depths
    'vmamba_tiny': (30_249_064, 4.9056, (96, 192, 384, 768), (2, 2, 8, 2)),
    'vmamba_small': (50_147_752, 8.7158, (96, 192, 384, 768), (2, 2, 15, 2)),
    'vmamba_base': (88_557_800, 15.3589, (128, 256, 512, 1024), (2, 2, 15, 2)),
    'vmamba2d_tiny': (30_249_064, 4.9435, (96, 192, 384, 768), (2, 2, 8, 2)),
    'vmamba2d_small': (50_147_752, 8.8169, (96, 192, 384, 768), (2, 2, 15, 2)),
    'vmamba2d_base': (88_557_800, 15.4938, (128, 256, 512, 1024), (2, 2, 15, 2)),
    'spatial_mamba_tiny': (26_748_862, 4.4677, (64, 128, 256, 512), (2, 4, 8, 4)),
    'spatial_mamba_small': (43_074_280, 7.1170, (64, 128, 256, 512), (2, 4, 21, 5)),
    'spatial_mamba_base': (95_745_592, 15.8006, (96, 192, 384, 768), (2, 4, 21, 5)),
}
SIZES = ((32, 32), (33, 47), (64, 96), (224, 224))
GRAPH_TOLERANCE = 1e-5  # a graph's large linear layers sum in another order than eager ones, see `models/layers.py`


def in_turn(names):
    """The names, the small ones among the slow tests: about as deep as base ones, and no wider than the others."""
    return [pytest.param(name, marks=pytest.mark.slow) if name.endswith('_small') else name for name in names]


every_model = pytest.mark.parametrize('name', in_turn(MODELS))
every_test_model = pytest.mark.parametrize('name', SMALL)
# What depends on widths and depths, as numbers, gradients and graphs do, is among the slow tests for the tiny models.
every_small_model = pytest.mark.parametrize('name', [*SMALL, *(pytest.param(n, marks=pytest.mark.slow) for n in TINY)])
every_tiny_model = pytest.mark.parametrize('name', TINY)


def create(name, device=None, **kwargs):
    return timm.create_model(name, device=device, **kwargs).eval()


def images(height=64, width=96, batch=2, channels=3, device=None, dtype=None):
    return torch.randn(batch, channels, height, width, device=device, dtype=dtype)


def reduced(size, reduction):
    return tuple(math.ceil(s / reduction) for s in size)


def spread(model):
    """Redraw the parameters so that each of them, the scans' too, moves the output visibly: at initialisation many are
    equal, zero or small."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(('.bias', '.D', '.A_log', '.alpha')):
                p.add_(0.2 * torch.randn_like(p))
            elif name.endswith('.dt_bias'):
                p.add_(2)
            elif '.kernel_3' in name or name.endswith('.weight') and p.dim() > 1:
                p.normal_(0, p[0].numel() ** -0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
    return model


def filter_fn(model):
    """`checkpoint_filter_fn` of the model's file."""
    return sys.modules[type(model).__module__].checkpoint_filter_fn


# ---- sizes and costs -------------------------------------------------------------------------------------------------


def test_registry_holds_what_is_tested():
    assert set(MODELS) == {*FULL_SIZE, 'test_vmamba', 'test_vmamba2d', 'test_spatial_mamba'}


@pytest.mark.parametrize('name', FULL_SIZE)
def test_parameter_count(name):
    model = create(name, 'meta')
    params, _, dims, depths = FULL_SIZE[name]
    assert sum(p.numel() for p in model.parameters()) == params
    buffers = {n.rpartition('.')[2] for n, _ in model.named_buffers()}
    assert buffers == ({'running_mean', 'running_var', 'num_batches_tracked'} if 'spatial' in name else set())
    assert tuple(info['num_chs'] for info in model.feature_info) == dims
    assert tuple(len(stage.blocks) for stage in model.stages) == depths
    if 'spatial' not in name:
        scans = {block.mixer.scan_ndim for stage in model.stages for block in stage.blocks}
        assert scans == {2 if '2d' in name else 1}


@pytest.mark.parametrize('name', in_turn(FULL_SIZE))
def test_macs(name):
    """fvcore at 224: a norm counts 5 per element, VMamba's average pool 1, activations, sums and products nothing."""
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import elementwise_flop_counter

    model = create(name, 'meta').to_empty(device='cpu')  # the count does not depend on the weights
    with torch.no_grad():
        analysis = FlopCountAnalysis(model, torch.zeros(1, 3, 224, 224))
        analysis.set_op_handle('vssm::selective_scan', vssm.ops.selective_scan_fvcore_macs)
        analysis.set_op_handle('vssm::state_fusion', vssm.ops.state_fusion_fvcore_macs)
        analysis.set_op_handle('aten::batch_norm', elementwise_flop_counter(5, 0))
        analysis.set_op_handle('aten::mean', elementwise_flop_counter(0 if 'spatial' in name else 1, 0))
        analysis.unsupported_ops_warnings(False)
        macs = analysis.total()
    assert round(macs / 1e9, 4) == FULL_SIZE[name][1]
    uncounted = {'add', 'addcmul', 'mul', 'gelu', 'silu', 'unflatten', 'exp', 'neg'}
    assert {op.removeprefix('aten::') for op in analysis.unsupported_ops()} <= uncounted


# ---- shapes ----------------------------------------------------------------------------------------------------------


@every_model
def test_output_shapes(name):
    model = create(name, 'meta')
    for size in SIZES:
        x = images(*size, device='meta')
        features = model.forward_features(x)
        assert features.shape == (2, *reduced(size, 32), model.num_features), size
        assert model(x).shape == model.forward_head(features).shape == (2, 1000), size
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size), size


@every_small_model
@pytest.mark.parametrize('size', SIZES, ids=lambda s: f'{s[0]}x{s[1]}')
def test_output_is_finite(name, size):
    y = create(name)(images(*size))
    assert y.shape == (2, 1000) and y.isfinite().all()


@pytest.mark.parametrize('name', FULL_SIZE)
def test_full_size_output_is_finite(name):
    with torch.no_grad():
        y = create(name)(images(96, 96))
    assert y.shape == (2, 1000) and y.isfinite().all() and y.std() > 1e-3


@every_test_model
@pytest.mark.parametrize('size', [(37, 41), (32, 256), (263, 33), (53, 97), (101, 32)], ids=lambda s: f'{s[0]}x{s[1]}')
def test_any_size_trains(name, size):
    """Primes, and sides in a ratio of 1 to 8."""
    model = create(name).train()
    x = images(*size).requires_grad_()
    y = model(x)
    assert y.shape == (2, 1000) and y.isfinite().all()
    y.square().mean().backward()
    assert x.grad.isfinite().all() and x.grad.any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_model
def test_in_chans_and_no_classes(name):
    model = create(name, 'meta', in_chans=4, num_classes=0)
    assert model(images(channels=4, device='meta')).shape == (2, model.num_features)
    assert isinstance(model.get_classifier(), nn.Identity) and model.num_classes == 0 and model.in_chans == 4


@every_model
def test_pretrained_cfg_fits_the_model(name):
    model = create(name, 'meta')
    cfg, state = model.pretrained_cfg, model.state_dict()
    assert state[f'{cfg["classifier"]}.weight'].shape == (cfg['num_classes'], model.num_features)
    assert state[f'{cfg["first_conv"]}.weight'].dim() == 4
    x = torch.empty(1, *cfg['input_size'], device='meta')
    assert model.forward_features(x).shape[1:3] == cfg['pool_size'] and model.output_fmt == 'NHWC'
    # Weights of VMamba are published where timm can fetch them, of Spatial-Mamba elsewhere, of 2DVMamba none.
    assert bool(cfg['url']) == (name.startswith('vmamba_'))
    assert bool(cfg.get('origin_url')) == name.startswith('spatial_mamba_')


@every_model
def test_only_the_stride_of_the_stages_is_to_be_had(name):
    assert create(name, 'meta', output_stride=32).num_features
    for features_only in (False, True):
        with pytest.raises(ValueError, match=f'{name}: output_stride must be 32.*got 16'):
            create(name, 'meta', output_stride=16, features_only=features_only)


@pytest.mark.parametrize(
    'name, out_indices',
    [(name, out_indices) for name in SMALL for out_indices in (None, (0, 1, 2, 3), (1, 3), (0,), (-2, -1))]
    + [(name, None) for name in FULL_SIZE],
    ids=str,
)
def test_features_only_shapes(name, out_indices):
    kwargs = {} if out_indices is None else dict(out_indices=out_indices)
    model = create(name, 'meta', features_only=True, **kwargs)
    taken = [i % 4 for i in out_indices or range(4)]
    assert model.feature_info.reduction() == [4 * 2**i for i in taken]
    if name in FULL_SIZE:
        assert model.feature_info.channels() == [FULL_SIZE[name][2][i] for i in taken]
    features = model(images(96, 70, device='meta'))
    assert [f.shape for f in features] == [
        (2, channels, *reduced((96, 70), reduction))
        for channels, reduction in zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    ]


# ---- timm's methods --------------------------------------------------------------------------------------------------


@every_test_model
def test_features_only_gives_the_stages(name):
    model = create(name)
    backbone = create(name, features_only=True)
    backbone.load_state_dict({f'model.{k}': v for k, v in model.state_dict().items() if not k.startswith('head.')})
    x = images()
    expected = model.stem(x)
    for feature, stage in zip(backbone(x), model.stages, strict=True):
        expected = stage(expected)
        assert torch.equal(feature, expected.permute(0, 3, 1, 2))


@every_test_model
@pytest.mark.parametrize('pool, multiple', [('avg', 1), ('max', 1), ('avgmax', 1), ('catavgmax', 2)])
def test_head(name, pool, multiple):
    model = create(name, num_classes=10, global_pool=pool)
    x = images()
    features = model.forward_features(x)
    assert torch.equal(model(x), model.forward_head(features))
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size) == (2, multiple * model.num_features)
    assert torch.equal(model.get_classifier()(pre_logits), model(x))
    if pool == 'avg':
        normed = nn.functional.layer_norm(features, features.shape[-1:], eps=1e-5)
        torch.testing.assert_close(pre_logits, normed.mean((1, 2)))
    model.reset_classifier(0)
    assert torch.equal(model(x), pre_logits)


@every_test_model
def test_reset_classifier(name):
    model = create(name, num_classes=10, dtype=torch.float64)
    x = images(dtype=torch.float64)
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(x).shape == (2, 7) and not model.get_classifier().training
    model.train().reset_classifier(7, 'catavgmax')
    assert model(x).shape == (2, 7) and model.get_classifier().training
    assert model.head_hidden_size == 2 * model.num_features
    model.reset_classifier(0, '')
    assert model(x).shape == model.forward_features(x).shape


@every_test_model
def test_without_pooling(name):
    model = create(name, num_classes=0, global_pool='')
    x = images(70, 96)
    assert model(x).shape == (2, 3, 3, model.num_features)
    unpooled = model(x)
    model.reset_classifier(0, 'avg')
    torch.testing.assert_close(unpooled.mean((1, 2)), model(x))


@every_test_model
def test_dropout_before_the_classifier(name):
    model = create(name, drop_rate=0.5)
    features = model.forward_features(images())
    assert torch.equal(model.forward_head(features), model.forward_head(features))
    model.train()
    kept = model.forward_head(features, pre_logits=True) != 0
    assert 0.3 < kept.float().mean() < 0.7


@every_test_model
@pytest.mark.parametrize('norm', (False, True), ids=('raw', 'norm'))
@pytest.mark.parametrize('indices, taken', [(None, range(4)), (2, (2, 3)), ([0, 2], (0, 2)), ([-1], (3,))], ids=str)
def test_forward_intermediates(name, indices, taken, norm):
    model = spread(create(name))
    x = images()
    expected = []
    features = model.stem(x)
    for stage in model.stages:
        features = stage(features)
        expected.append(features)
    if norm:
        expected[-1] = model.head.norm(features)

    final, intermediates = model.forward_intermediates(x, indices=indices, norm=norm)
    assert torch.equal(final, model.forward_features(x))
    assert len(intermediates) == len(taken)
    for i, intermediate in zip(taken, intermediates, strict=True):
        assert torch.equal(intermediate, expected[i].permute(0, 3, 1, 2))
    nhwc = model.forward_intermediates(
        x, indices=indices, norm=norm, stop_early=True, output_fmt='NHWC', intermediates_only=True
    )
    assert isinstance(nhwc, list)
    for i, intermediate in zip(taken, nhwc, strict=True):
        assert torch.equal(intermediate, expected[i])


@every_test_model
def test_forward_intermediates_stops_early(name):
    model = create(name)
    calls = []
    model.stages[3].register_forward_hook(lambda *args: calls.append(1))
    final, _ = model.forward_intermediates(images(), indices=[1], stop_early=True)
    assert not calls and final.shape[-1] == model.feature_info[1]['num_chs']
    model.forward_intermediates(images(), indices=[1])
    assert calls


def test_forward_intermediates_refuses_other_layouts():
    with pytest.raises(ValueError, match='output_fmt.*NLC'):
        create('test_vmamba', 'meta').forward_intermediates(images(device='meta'), output_fmt='NLC')


@every_test_model
@pytest.mark.parametrize(
    'indices, kept', [(1, [3]), ([0, 2], [0, 2]), ([1], [1]), ((0, 1, 2, 3), [0, 1, 2, 3])], ids=str
)
def test_prune_intermediate_layers(name, indices, kept):
    model = create(name)
    x = images()
    expected = model.forward_intermediates(x, indices=kept, intermediates_only=True)
    assert list(model.prune_intermediate_layers(indices)) == kept
    assert len(model.stages) == kept[-1] + 1
    assert all(map(torch.equal, model.forward_intermediates(x, indices=kept, intermediates_only=True), expected))
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape[-1] == model.num_features == model.feature_info[kept[-1]]['num_chs']


@every_small_model
def test_grad_checkpointing_changes_nothing(name):
    model = spread(create(name)).train()
    x = images()

    def run():
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    y, grads = run()
    model.set_grad_checkpointing()
    calls = []
    model.stages[2].blocks[0].register_forward_pre_hook(lambda *args: calls.append(1))
    y_checkpointed, grads_checkpointed = run()
    assert len(calls) == 2  # once more in the backward pass
    assert torch.equal(y, y_checkpointed)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_checkpointed[name], grad)
    model.set_grad_checkpointing(False)
    calls.clear()
    run()
    assert len(calls) == 1


@every_small_model
def test_every_parameter_gets_a_gradient(name):
    model = create(name).train()
    model(images()).square().mean().backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), parameter_name


@every_small_model
def test_one_position_leaves_no_parameter_without_a_gradient(name):
    """A 32x32 image has a last stage of one position, where the decay has nothing to act on."""
    model = create(name).train()
    model(images(32, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_model
def test_weight_decay(name):
    """A, D, the step's bias, biases and norms do not decay; the matrices and convolutions do."""
    model = create(name, 'meta')
    names = [n for n, _ in model.named_parameters()]
    marked = {n for pattern in model.no_weight_decay() for n in fnmatch.filter(names, pattern)}
    assert marked == {n for n in names if n.endswith(('.A_log', '.D', '.dt_bias'))}
    assert all(fnmatch.filter(names, pattern) for pattern in model.no_weight_decay())
    still, decaying = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert still['weight_decay'] == 0 and decaying['weight_decay'] == 0.05
    decays = {id(p) for p in decaying['params']}
    for n, p in model.named_parameters():
        matrix = n.endswith(('.weight', '.dt_weight')) and not re.search(r'\.norm\d?\.weight$', n)
        assert (id(p) in decays) == (matrix or '.kernel_3' in n), n


@every_model
def test_layer_groups(name):
    model = create(name, 'meta')
    depths = [len(stage.blocks) for stage in model.stages]
    groups = group_parameters(model, model.group_matcher(), reverse=True)  # name -> group
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert {g for n, g in groups.items() if n.startswith('stem.')} == {0}
    order = []
    for i, depth in enumerate(depths):
        for j in range(depth):
            (group,) = {g for n, g in groups.items() if n.startswith(f'stages.{i}.blocks.{j}.')}
            order.append(group)
        if i:  # a downsampling goes with what surrounds it
            (group,) = {g for n, g in groups.items() if n.startswith(f'stages.{i}.downsample.')}
            first = sum(depths[:i])
            assert order[first - 1] <= group <= order[first]
    assert order == sorted(set(order)) and len(order) == sum(depths) and order[0] > 0
    assert groups['head.norm.weight'] == order[-1] < groups['head.fc.weight'] == groups['head.fc.bias']

    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    for i in range(4):
        (group,) = {g for n, g in coarse.items() if n.startswith(f'stages.{i}.')}
        assert group == i + 1

    scales = [group['lr_scale'] for group in param_groups_layer_decay(model, layer_decay=0.5)]
    assert max(scales) == 1.0 and min(scales) < 0.5 ** sum(depths)


# ---- construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', (torch.float64, torch.bfloat16, torch.float16), ids=str)
@every_test_model
def test_construction_in_a_dtype(name, dtype):
    model = create(name, dtype=dtype)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {dtype}
    y = model(images(dtype=dtype))
    assert y.dtype == dtype and y.isfinite().all()


@every_model
def test_construction_on_meta_gives_the_same_parameters(name):
    model = create(name, 'meta')
    assert {p.device.type for p in model.parameters()} == {'meta'}
    if name in SMALL:
        shapes = {n: t.shape for n, t in model.state_dict().items()}
        assert shapes == {n: t.shape for n, t in create(name).state_dict().items()}


@every_test_model
def test_initialisation(name):
    states = 1 if 'spatial' in name else 3
    model = create(name, dims=(32, 64, 128, 256), **({} if 'spatial' in name else dict(d_state=states)))
    assert {t.isfinite().all().item() for t in model.state_dict().values()} == {True}
    steps = []
    for module_name, module in model.named_modules():
        if module_name.endswith('.mixer'):
            K, E, N = module.A_log.shape
            rank = module.dt_weight.shape[2]
            torch.testing.assert_close(-module.A_log.exp(), -torch.arange(1.0, N + 1).expand(K, E, N))
            assert (module.D == 1).all() and N == states and rank == math.ceil(module.in_proj.in_features / 16)
            assert module.dt_weight.abs().max() <= rank**-0.5
            assert abs(module.dt_weight.std() * (3 * rank) ** 0.5 - 1) < 0.15
            steps.append(nn.functional.softplus(module.dt_bias).flatten())
            bound = module.x_proj.in_features**-0.5  # as PyTorch initialises a linear layer
            assert 0.9 * bound < module.x_proj.weight.abs().max() <= bound
        elif isinstance(module, nn.Linear) and not module_name.endswith('x_proj'):
            assert abs(module.weight.std() / 0.02 - 1) < 0.1, module_name
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert (module.weight == 1).all() and not module.bias.any() and module.eps == 1e-5
            assert getattr(module, 'momentum', 0.1) == 0.1
        elif module_name.endswith('.fusion'):
            assert all((p == 1).all() for p in module.parameters())
        elif isinstance(module, nn.Conv2d):
            bound = (module.weight[0].numel()) ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound, module_name
    log_steps = torch.cat(steps).log10()
    assert -3.001 <= log_steps.min() < -2.95 and -1.05 < log_steps.max() <= -0.999
    assert abs(log_steps.mean() + 2) < 0.1 and abs(log_steps.std() - 2 / 12**0.5) < 0.05  # log-uniform


@every_test_model
def test_drop_path_rates_grow_linearly(name):
    model = create(name, drop_path_rate=0.4)
    rates = [
        [getattr(drop_path, 'drop_prob', 0.0) for drop_path in (block.drop_path1, block.drop_path2)]
        for stage in model.stages
        for block in stage.blocks
    ]
    assert rates == [[pytest.approx(0.4 * i / (len(rates) - 1))] * 2 for i in range(len(rates))]


@every_test_model
def test_dims_may_be_one_width(name):
    model = create(name, 'meta', dims=16)
    assert [info['num_chs'] for info in model.feature_info] == [16, 32, 64, 128]


@pytest.mark.parametrize('features_only', (False, True), ids=('classifier', 'features'))
def test_batch_norm_arguments(features_only):
    model = create('test_spatial_mamba', bn_momentum=0.03, bn_eps=1e-3, features_only=features_only)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 5 + 3 and {(norm.momentum, norm.eps) for norm in norms} == {(0.03, 1e-3)}


@every_test_model
def test_wrong_number_of_dims(name):
    with pytest.raises(ValueError, match=r'dims.*4 depths.*\(32, 48, 64\)'):
        create(name, 'meta', dims=(32, 48, 64))


def test_unknown_scan():
    with pytest.raises(ValueError, match='scan_ndim.*3'):
        create('test_vmamba', 'meta', scan_ndim=3)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_only_the_scan_tells_the_two_apart():
    one, two = spread(create('test_vmamba')), create('test_vmamba2d')
    two.load_state_dict(one.state_dict())
    x = images()
    one, two = one(x), two(x)
    assert (one - two).abs().max() > 0.01 * one.abs().max()


@every_test_model
def test_every_layer_is_called_once(name):
    """Attributions that keep what a layer saw, such as DeepLift's, need one object a use."""
    model, calls = create(name), collections.Counter()
    layers = {n: m for n, m in model.named_modules() if not [*m.children()]}
    for layer_name, layer in layers.items():
        layer.register_forward_hook(lambda *_, layer_name=layer_name: calls.update([layer_name]))
    model(images())
    assert calls == collections.Counter(layers.keys())


@every_test_model
def test_height_and_width_are_told_apart(name, assert_close):
    """Transposing the image, the kernels of the convolutions and the orders of the scans changes nothing."""
    model = spread(create(name, dtype=torch.float64))
    x = images(dtype=torch.float64)
    y = model(x)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 4:
                p.copy_(p.transpose(2, 3).clone())
        for module in model.modules():
            if hasattr(module, 'orders'):
                module.orders = [order ^ 1 for order in module.orders]
    assert_close(model(x.transpose(2, 3)), y, 1e-12)
    assert (model(x) - y).abs().max() > 0.01 * y.abs().max()


@every_small_model
def test_images_of_a_batch_do_not_mix(name, assert_close):
    model = spread(create(name))
    x = images(batch=3)
    assert_close(model(x), torch.cat([model(image[None]) for image in x]), 1e-5)


@every_small_model
def test_channels_last_images(name, assert_close):
    model = spread(create(name))
    x = images()
    assert_close(model(x.contiguous(memory_format=torch.channels_last)), model(x), 1e-5)


@every_small_model
def test_kernel_and_reference_agree(name, assert_close):
    model = spread(create(name))
    x = images()
    y = model(x)
    with vssm.ops.use_reference():
        assert_close(y, model(x), 1e-5)


@every_small_model
@pytest.mark.parametrize('how', ('bfloat16', 'autocast'))
def test_half_precision_is_near_float32(name, how, assert_close):
    model = spread(create(name))
    x = images()
    expected = model(x)
    if how == 'autocast':
        with torch.autocast('cpu', torch.bfloat16):
            y = model(x)
    else:
        y = model.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert_close(y, expected, 3e-2)


@every_small_model
def test_autocast_trains(name):
    model = create(name).train()
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(images()).float().square().mean()
    loss.backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any(), parameter_name


# ---- graphs ----------------------------------------------------------------------------------------------------------


class OnOurOp(nn.Module):
    """A module of somebody else, which calls an op of ours."""

    def forward(self, h, weight):
        return state_fusion(h, weight) + 1


def test_fx_traces_modules_of_others_that_call_our_ops(assert_close):
    h, weight = torch.randn(1, 4, 5, 3), torch.randn(3, 3, 3, 3)
    traced = create_feature_extractor(OnOurOp(), {'add': 'y'})
    assert_close(traced(h, weight)['y'], state_fusion(h, weight) + 1, 1e-6)


@every_small_model
def test_timm_fx(name):
    """Bit for bit: timm's tracer takes what has a shortcut for one node, and runs it as it is."""
    model = spread(create(name))
    nodes, _ = get_graph_node_names(model)
    traced = create_feature_extractor(model, [nodes[-1]])
    for x in (images(), images(33, 47)):  # no size is baked in
        assert torch.equal(traced(x)[nodes[-1]], model(x))


@every_small_model
def test_plain_fx(name, assert_close):
    """A tracer that knows nothing of timm."""
    model = spread(create(name))
    traced = torch.fx.symbolic_trace(model)
    for x in (images(), images(33, 47)):
        assert_close(traced(x), model(x), GRAPH_TOLERANCE)


@every_small_model
def test_plain_fx_trains(name, assert_close):
    """Neither a parameter nor a dtype is baked in: a graph drawn in float32 has the gradients of float64."""
    model = spread(create(name)).train()
    traced = torch.fx.symbolic_trace(model).double()
    x = images(dtype=torch.float64)
    traced(x).square().mean().backward()
    actual = {n: p.grad.clone() for n, p in traced.named_parameters()}
    model.double().zero_grad()  # whose parameters the graph shares
    model(x).square().mean().backward()
    for parameter_name, p in model.named_parameters():
        assert_close(actual.pop(parameter_name), p.grad, 1e-9, parameter_name)
    assert not actual


@every_small_model
def test_torchvision_features(name, assert_close):
    """Of stages, blocks, and what is within them."""
    model = spread(create(name))
    names = ['stem', 'stages.1.downsample', 'stages.2.blocks.0', 'stages.2.blocks.1', 'stages.3', 'head.norm']
    names += ['stages.0.blocks.0.mixer', 'stages.0.blocks.0.mixer.norm', 'stages.2.blocks.1.mlp.fc1']
    extractor = torchvision_feature_extractor(model, names)
    expected = {}
    for module_name in names:
        model.get_submodule(module_name).register_forward_hook(
            lambda module, args, y, module_name=module_name: expected.__setitem__(module_name, y)
        )
    for training in (False, True):
        x = images(33, 47)
        model.train(training)(x)
        features = extractor.train(training)(x)
        assert features.keys() == expected.keys()
        for module_name, feature in features.items():
            assert_close(feature, expected[module_name], GRAPH_TOLERANCE, module_name)


@every_test_model
def test_plain_fx_of_features_only(name, assert_close):
    model = spread(create(name, features_only=True))
    x = images(33, 47)
    for actual, expected in zip(torch.fx.symbolic_trace(model)(x), model(x), strict=True):
        assert_close(actual, expected, GRAPH_TOLERANCE)


@pytest.mark.filterwarnings('ignore:.*torch.jit.*:DeprecationWarning')
@pytest.mark.parametrize('graph', (False, True), ids=('modules', 'graph'))
@every_small_model
def test_torchscript(name, graph, assert_close):
    model = spread(create(name))
    scripted = torch.jit.script(torch.fx.symbolic_trace(model) if graph else model)
    for x in (images(), images(33, 47)):
        assert_close(scripted(x), model(x), GRAPH_TOLERANCE)


@pytest.mark.filterwarnings('ignore:.*torch.jit.*:DeprecationWarning')
@every_small_model
def test_torch_jit_trace(name, assert_close):
    model = spread(create(name))
    x = images()
    assert_close(torch.jit.trace(model, x)(x), model(x), GRAPH_TOLERANCE)


# ---- training --------------------------------------------------------------------------------------------------------


@every_small_model
def test_evaluation_follows_training(name):
    """Nothing that an evaluation computes outlives a change of the weights."""
    model = spread(create(name))
    x = images()
    with torch.no_grad():
        before = model(x)
    model.train()(x).square().mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad / p.grad.norm().clamp(min=1e-6)
    with torch.no_grad():
        after = model.eval()(x)
        fresh = create(name)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(after, fresh(x))
    assert (after - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.slow
@every_tiny_model
@pytest.mark.parametrize('how', ('float32', 'bfloat16', 'autocast'))
def test_precision_of_the_tiny_models(name, how, assert_close):
    """Within 2 % of float64 on the largest logit."""
    model, x = create(name), images(224, 224)
    with torch.no_grad():
        expected = create(name, dtype=torch.float64)
        expected.load_state_dict(model.state_dict())
        expected = expected(x.double())
        if how == 'autocast':
            with torch.autocast('cpu', torch.bfloat16):
                y = model(x)
        else:
            dtype = getattr(torch, how)
            y = model.to(dtype)(x.to(dtype))
    assert_close(y, expected, 1e-5 if how == 'float32' else 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize('name', [*SMALL, 'vmamba2d_tiny', 'spatial_mamba_tiny'])
def test_two_hundred_steps_in_bfloat16(name):
    """With the published learning rate and weight decay, on noise."""
    if name in TINY and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("PyTorch's bfloat16 convolutions need AVX-512: without it these steps take half an hour")
    model = create(name, num_classes=10, drop_path_rate=0.2).train()
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    for _ in range(200):
        with torch.autocast('cpu', torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images(32, 32, batch=4)), torch.randint(10, (4,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert all(t.isfinite().all() for t in model.state_dict().values())


# ---- golden files ----------------------------------------------------------------------------------------------------

FAMILIES = {
    'vmamba_micro': 'test_vmamba',
    '2dvmamba_micro': 'test_vmamba2d',
    'spatialmamba_micro': 'test_spatial_mamba',
}
every_family = pytest.mark.parametrize('family', FAMILIES)
every_input = pytest.mark.parametrize('case', ('square', 'nonsquare', 'odd'))


def create_golden(family, tensors, metadata, dtype, **kwargs):
    """The network of a golden file; what its backbone has besides, the output norms, comes back apart."""
    config = metadata['config']
    kwargs = dict(num_classes=config['num_classes'], **kwargs)
    if 'ssm_ratio' in config:
        kwargs |= dict(d_state=config['ssm_d_state'], ssm_ratio=config['ssm_ratio'])
    model = create(
        FAMILIES[family],
        depths=tuple(config['depths']),
        dims=config['dims'] if isinstance(config['dims'], int) else tuple(config['dims']),
        mlp_ratio=config['mlp_ratio'],
        dtype=dtype,
        **kwargs,
    )
    prefix = 'state_dict.'
    state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    norms = {name: state.pop(name).to(dtype) for name in list(state) if name.startswith('outnorm')}
    network = model.model if kwargs.get('features_only') else model
    network.load_state_dict(state)
    return model, norms


@every_family
@every_input
def test_golden_classifier(golden, backend, family, case, assert_close):
    tensors, metadata = golden(family)
    model, _ = create_golden(family, tensors, metadata, backend.dtype)
    value_tolerance, grad_tolerance = (1e-6, 1e-6) if backend.dtype == torch.float64 else (1e-5, 1e-4)
    x = tensors[f'{case}.input'].detach().to(backend.dtype).requires_grad_()
    logits = model(x)
    assert_close(logits, tensors[f'{case}.logits'], value_tolerance, 'logits')

    if (family, case, backend.dtype) == ('spatialmamba_micro', 'square', torch.float32):
        return  # one of its activations is within 3e-7 of a kink: its gradients are judged in float64
    (logits * tensors[f'{case}.loss_weight']).sum().backward()
    assert_close(x.grad, tensors[f'{case}.grad.input'], grad_tolerance, 'gradient of the image')
    prefix = f'{case}.grad.'
    expected = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    expected.pop('input')
    assert bool(expected) == (case != 'odd')
    parameters = dict(model.named_parameters())
    # A gradient is named and laid out as its parameter.
    for name, grad in filter_fn(model)(expected, model).items():
        actual = parameters[name].grad
        actual = torch.zeros_like(parameters[name]) if actual is None else actual
        assert_close(actual, grad, grad_tolerance, f'gradient of {name}')


@every_family
@every_input
def test_golden_backbone(golden, backend, family, case, assert_close):
    tensors, metadata = golden(f'{family}_backbone')
    model, norms = create_golden(family, tensors, metadata, backend.dtype, features_only=True)
    features = model(tensors[f'{case}.input'].to(backend.dtype))
    assert len(features) == 4 and len(norms) == 8
    for i, feature in enumerate(features):
        feature = feature.permute(0, 2, 3, 1)  # [B, C, H, W] -> [B, H, W, C]
        feature = nn.functional.layer_norm(
            feature, feature.shape[-1:], norms[f'outnorm{i}.weight'], norms[f'outnorm{i}.bias'], eps=1e-5
        )
        tolerance = 1e-6 if backend.dtype == torch.float64 else 1e-5
        assert_close(feature.permute(0, 3, 1, 2), tensors[f'{case}.feature.{i}'], tolerance, f'feature {i}')


@pytest.mark.parametrize('name', FULL_SIZE)
def test_golden_sizes(golden, name):
    """The tables above are those of the golden files."""
    family, _, size = name.rpartition('_')
    depth = {'tiny': 's1l8', 'small': 's2l15', 'base': 's2l15'}[size]
    variants = dict(vmamba=f'{name}_{depth}', vmamba2d=f'2dvmamba_{size}', spatial_mamba=f'spatialmamba_{size}')
    variant = variants[family]
    measured = golden('reported.json')['variants'][variant]['measured']
    assert FULL_SIZE[name][:2] == (measured['params'], round(measured['flops_224'] / 1e9, 4))
