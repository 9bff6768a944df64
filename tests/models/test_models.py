# SPDX-License-Identifier: Apache-2.0
"""The networks: sizes and costs as published, numbers as the golden files have them, and all that timm expects."""

import collections
import fnmatch
import functools
import inspect
import itertools
import math
import re
import sys

import pytest
import timm
import torch
from golden_files import under
from timm.layers import create_feature_extractor, get_graph_node_names
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_feature_extractor

import vssm
from vssm.models import SpatialMamba, VMamba
from vssm.models.backbone import NormPoolHead
from vssm.models.groupmamba import GroupMixer
from vssm.models.layers import Blocks
from vssm.models.mambavision import Attention
from vssm.models.vmamba import PatchMerging
from vssm.models.weights import list_models
from vssm.ops import state_fusion

MODELS = list_models()
SMALL = [name for name in MODELS if name.startswith('test_')]
TINY = ('vmamba2d_tiny', 'vanilla_vmamba_tiny', 'spatial_mamba_tiny')
TINY += ('vim_tiny_patch16_224', 'groupmamba_tiny', 'mambavision_tiny')
FULL_SIZE = {  # parameters, GMACs at the size of the configuration unless that takes long, widths, depths
    'vmamba_tiny': (30_249_064, 4.9056, (96, 192, 384, 768), (2, 2, 8, 2)),
    'vmamba_small': (50_147_752, 8.7158, (96, 192, 384, 768), (2, 2, 15, 2)),
    'vmamba_base': (88_557_800, 15.3589, (128, 256, 512, 1024), (2, 2, 15, 2)),
    'vmamba_tiny_s2l5': (30_705_832, 4.8577, (96, 192, 384, 768), (2, 2, 5, 2)),
    'vmamba_small_s1l20': (49_012_840, 8.6122, (96, 192, 384, 768), (2, 2, 20, 2)),
    'vmamba_base_s1l20': (86_614_504, 15.2209, (128, 256, 512, 1024), (2, 2, 20, 2)),
    'vmamba2d_tiny': (30_249_064, 4.9435, (96, 192, 384, 768), (2, 2, 8, 2)),
    'vmamba2d_small': (50_147_752, 8.8169, (96, 192, 384, 768), (2, 2, 15, 2)),
    'vmamba2d_base': (88_557_800, 15.4938, (128, 256, 512, 1024), (2, 2, 15, 2)),
    'vanilla_vmamba_tiny': (22_893_448, 5.6269, (96, 192, 384, 768), (2, 2, 9, 2)),
    'vanilla_vmamba_small': (44_417_416, 11.2315, (96, 192, 384, 768), (2, 2, 27, 2)),
    'vanilla_vmamba_base': (76_254_056, 18.0196, (128, 256, 512, 1024), (2, 2, 27, 2)),
    'spatial_mamba_tiny': (26_748_862, 4.4677, (64, 128, 256, 512), (2, 4, 8, 4)),
    'spatial_mamba_small': (43_074_280, 7.1170, (64, 128, 256, 512), (2, 4, 21, 5)),
    'spatial_mamba_base': (95_745_592, 15.8006, (96, 192, 384, 768), (2, 4, 21, 5)),
    'vim_tiny_patch16_224': (7_148_008, 1.8194, (192,), (24,)),
    'vim_small_patch16_224': (25_796_584, 5.9047, (384,), (24,)),
    'vim_base_patch16_224': (97_598_440, 20.8726, (768,), (24,)),
    'vim_tiny_patch16_stride8_224': (7_250_344, 6.7414, (192,), (24,)),
    'vim_small_patch16_stride8_224': (26_001_256, 21.8789, (384,), (24,)),
    'groupmamba_tiny': (23_361_917, 4.7058, (64, 128, 348, 448), (3, 4, 9, 3)),
    'groupmamba_small': (34_781_555, 7.2810, (64, 128, 348, 512), (3, 4, 16, 3)),
    'groupmamba_base': (57_150_838, 14.1865, (96, 192, 424, 512), (3, 6, 21, 3)),
    'mambavision_tiny': (31_794_248, 4.4816, (80, 160, 320, 640), (1, 3, 8, 4)),
    'mambavision_tiny2': (35_104_008, 5.1342, (80, 160, 320, 640), (1, 3, 11, 4)),
    'mambavision_small': (50_140_584, 7.5117, (96, 192, 384, 768), (3, 3, 7, 5)),
    'mambavision_base': (97_685_288, 15.0020, (128, 256, 512, 1024), (3, 3, 10, 5)),
    'mambavision_large': (227_961_048, 34.9132, (196, 392, 784, 1568), (3, 3, 10, 5)),
    'mambavision_large2': (241_554_824, 37.5815, (196, 392, 784, 1568), (3, 3, 12, 5)),
    'mambavision_large2_512': (241_554_824, None, (196, 392, 784, 1568), (3, 3, 12, 5)),
    'mambavision_large3': (739_570_472, 122.3293, (256, 512, 1024, 2048), (3, 3, 20, 10)),
    'mambavision_large3_512': (739_570_472, None, (256, 512, 1024, 2048), (3, 3, 20, 10)),
}
SIZES = ((32, 32), (33, 47), (64, 96), (224, 224))
GRAPH_TOLERANCE = 1e-5  # a graph's large linear layers sum in another order than eager ones, see `models/layers.py`


def slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def in_turn(names):
    """The names, those of larger networks among the slow tests."""
    return [name if name in SMALL or name in TINY else slow(name)[0] for name in names]


every_model = pytest.mark.parametrize('name', in_turn(MODELS))
every_test_model = pytest.mark.parametrize('name', SMALL)
# What depends on widths and depths, as numbers and gradients do, is among the slow tests for tiny models.
every_small_and_tiny_model = pytest.mark.parametrize('name', [*SMALL, *slow(*TINY)])
every_tiny_model = pytest.mark.parametrize('name', TINY)


def create(name, device=None, **kwargs):
    """A model in evaluation mode, which takes images of any size."""
    if timm.get_pretrained_cfg(name).fixed_input_size:
        kwargs.setdefault('dynamic_img_size', True)
    return timm.create_model(name, device=device, **kwargs).eval()


@functools.cache
def on_meta(name):
    """A model that is only looked at: whoever changes it makes one of his own."""
    return create(name, 'meta')


def images(height=64, width=96, batch=2, channels=3, device=None, dtype=None):
    return torch.randn(batch, channels, height, width, device=device, dtype=dtype)


# ---- what the networks differ in -------------------------------------------------------------------------------------


def levels(model):
    """The modules whose outputs are features."""
    return [model.get_submodule(info['module']) for info in model.feature_info]


def blocks(model):
    return [block for part in model.modules() if isinstance(part, Blocks) for block in part]


def layout(model):
    return getattr(model, 'output_fmt', 'NLC')  # tokens are no map


def classifiers(model):
    found = model.get_classifier()
    return found if isinstance(found, tuple) else (found,)


def scores(model, pre_logits):
    return sum(classifier(pre_logits) for classifier in classifiers(model)) / len(classifiers(model))


def last_norm(model):
    return model.norm if layout(model) == 'NLC' else model.head.norm


def pools(model):
    return ('token', 'avg', 'max', 'avgmax') if layout(model) == 'NLC' else ('avg', 'max', 'avgmax', 'catavgmax')


def map_sizes(model, size):
    """Height and width of each level's map: the first convolutions give that of the first level, and at every further
    one it is halved, an odd one rounded up, unless the levels have one scale."""
    for conv in model.get_submodule(model.pretrained_cfg['first_conv'].rpartition('.')[0]).modules():
        if isinstance(conv, nn.Conv2d):
            sides = zip(size, conv.kernel_size, conv.stride, conv.padding, strict=True)
            size = tuple((side + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in sides)
    first, *_ = reductions = [info['reduction'] for info in model.feature_info]
    return [tuple(math.ceil(side * first / reduction) for side in size) for reduction in reductions]


def as_map(model, features, size):
    """Features in the network's own layout as a map, (batch, channels, height, width), without a class token."""
    if layout(model) == 'NLC':
        middle = features.shape[1] // 2
        patches = torch.cat([features[:, :middle], features[:, middle + 1 :]], dim=1)
        return patches.mT.unflatten(2, map_sizes(model, size)[0])
    return features.permute(0, 3, 1, 2) if layout(model) == 'NHWC' else features


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


def arguments(name):
    """Names of the arguments of a model's class."""
    return inspect.signature(type(on_meta(name)).__init__).parameters.keys()


def filter_fn(model):
    """`checkpoint_filter_fn` of the model's file."""
    return sys.modules[type(model).__module__].checkpoint_filter_fn


# ---- sizes and costs -------------------------------------------------------------------------------------------------


def test_registry_holds_what_is_tested():
    """One small model a kind of network, and all of full size."""
    assert set(MODELS) == {*FULL_SIZE, *SMALL}
    assert {type(on_meta(name)) for name in SMALL} == {type(on_meta(name)) for name in TINY}


@pytest.mark.parametrize('name', in_turn(FULL_SIZE))
def test_parameter_count(name):
    model = on_meta(name)
    params, _, dims, depths = FULL_SIZE[name]
    assert sum(p.numel() for p in model.parameters()) == params
    buffers = {n.rpartition('.')[2] for n, _ in model.named_buffers()}
    has_batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert buffers == ({'running_mean', 'running_var', 'num_batches_tracked'} if has_batch_norm else set())
    assert tuple(len(part) for part in model.modules() if isinstance(part, Blocks)) == depths
    assert tuple(dict.fromkeys(info['num_chs'] for info in model.feature_info)) == dims
    pyramid = [4 * 2**i for i in range(4)]
    stride = 8 if 'stride8' in name else 16
    assert [info['reduction'] for info in model.feature_info] == (pyramid if len(dims) == 4 else [stride] * depths[0])
    assert {getattr(module, 'scan_ndim', 1) for module in model.modules()} <= {1, 2 if '2d' in name else 1}
    assert any(getattr(module, 'scan_ndim', 1) == 2 for module in model.modules()) == ('2d' in name)


@pytest.mark.parametrize('name', in_turn(name for name, (_, gmacs, *_) in FULL_SIZE.items() if gmacs))
def test_macs(name):
    """By fvcore's rules, but as the authors of VMamba and Spatial-Mamba counted: a norm 5 per element, VMamba's average
    pool 1, activations, sums and products nothing."""
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import elementwise_flop_counter

    model = create(name, 'meta').to_empty(device='cpu')  # the count does not depend on the weights
    with torch.no_grad():
        analysis = FlopCountAnalysis(model, torch.zeros(1, *model.pretrained_cfg['input_size']))
        analysis.set_op_handle('vssm::selective_scan', vssm.ops.selective_scan_fvcore_macs)
        analysis.set_op_handle('vssm::state_fusion', vssm.ops.state_fusion_fvcore_macs)
        if isinstance(model, (VMamba, SpatialMamba)):
            analysis.set_op_handle('aten::batch_norm', elementwise_flop_counter(5, 0))
            analysis.set_op_handle('aten::mean', elementwise_flop_counter(int(isinstance(model, VMamba)), 0))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        macs = analysis.total()
    assert round(macs / 1e9, 4) == FULL_SIZE[name][1]
    uncounted = {'add', 'addcmul', 'div', 'mul', 'gelu', 'silu', 'sigmoid', 'unflatten', 'pad', 'exp', 'neg', 'mean'}
    uncounted |= {'sub', 'rms_norm', 'scaled_dot_product_attention'}
    assert {op.removeprefix('aten::') for op in analysis.unsupported_ops()} <= uncounted


# ---- shapes ----------------------------------------------------------------------------------------------------------


@every_test_model
def test_output_shapes(name):
    model = on_meta(name)
    for size in SIZES:
        x = images(*size, device='meta')
        features = model.forward_features(x)
        assert as_map(model, features, size).shape == (2, model.num_features, *map_sizes(model, size)[-1]), size
        assert model(x).shape == model.forward_head(features).shape == (2, 1000), size
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size), size


@every_test_model
@pytest.mark.parametrize('size', SIZES, ids=lambda s: f'{s[0]}x{s[1]}')
def test_output_is_finite(name, size):
    y = create(name)(images(*size))
    assert y.shape == (2, 1000) and y.isfinite().all()


@pytest.mark.parametrize(
    'name', in_turn(name for name in FULL_SIZE if name in TINY or re.search('_base(_patch|$)', name))
)
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


@every_test_model
def test_in_chans_and_no_classes(name):
    model = create(name, 'meta', in_chans=4, num_classes=0)
    assert model(images(channels=4, device='meta')).shape == (2, model.num_features)
    assert all(isinstance(classifier, nn.Identity) for classifier in classifiers(model))
    assert model.num_classes == 0 and model.in_chans == 4


PUBLISHED = {  # where weights are, by the beginning of the name
    'vmamba2d': None,
    'vmamba': 'url',
    'vanilla_vmamba': 'url',
    'spatial_mamba': 'origin_url',  # where timm cannot fetch them
    'vim': 'hf_hub_id',
    'groupmamba': 'hf_hub_id',
    'mambavision': 'hf_hub_id',
    'test': None,
}


@every_model
def test_pretrained_cfg_fits_the_model(name):
    model = on_meta(name)
    cfg, state = model.pretrained_cfg, model.state_dict()
    names = [cfg['classifier']] if isinstance(cfg['classifier'], str) else cfg['classifier']
    assert [model.get_submodule(n) for n in names] == [*classifiers(model)]
    assert {state[f'{n}.weight'].shape for n in names} == {(cfg['num_classes'], model.num_features)}
    assert state[f'{cfg["first_conv"]}.weight'].dim() == 4
    last_map = map_sizes(model, cfg['input_size'][1:])[-1]
    assert cfg['pool_size'] == (None if layout(model) == 'NLC' else last_map)
    published = next(where for start, where in PUBLISHED.items() if name.startswith(start))
    where = [key for key in ('url', 'hf_hub_id', 'origin_url') if cfg.get(key)]  # the Hub's may come from elsewhere
    assert where[:1] == ([published] if published else [])


@pytest.mark.parametrize('name', (*SMALL, 'vim_tiny_patch16_stride8_224'))
def test_only_the_stride_of_the_network_is_to_be_had(name):
    stride = on_meta(name).feature_info[-1]['reduction']
    assert create(name, 'meta', output_stride=stride).num_features
    for features_only in (False, True):
        with pytest.raises(ValueError, match=f'{name}: output_stride must be {stride}.*got 64'):
            create(name, 'meta', output_stride=64, features_only=features_only)


@pytest.mark.parametrize(
    'name, out_indices',
    [
        *itertools.product(SMALL, (None, (0, 1, 2, 3), (1, 3), (0,), (-2, -1))),
        *[pytest.param(name, None, marks=pytest.mark.slow) for name in TINY],
    ],
    ids=str,
)
def test_features_only_shapes(name, out_indices):
    """Of one scale, three levels are as many as timm gives; of a pyramid all."""
    kwargs = {} if out_indices is None else dict(out_indices=out_indices)
    infos, model = on_meta(name).feature_info, create(name, 'meta', features_only=True, **kwargs)
    is_pyramid = len({info['reduction'] for info in infos}) > 1
    taken = [infos[i] for i in out_indices or (range(4) if is_pyramid else (-3, -2, -1))]
    assert model.feature_info.reduction() == [info['reduction'] for info in taken]
    assert model.feature_info.channels() == [info['num_chs'] for info in taken]
    assert model.feature_info.module_name() == [info['module'] for info in taken]
    sizes = map_sizes(on_meta(name), (96, 70))
    features = model(images(96, 70, device='meta'))
    assert [f.shape for f in features] == [(2, info['num_chs'], *sizes[infos.index(info)]) for info in taken]


# ---- timm's methods --------------------------------------------------------------------------------------------------


@every_test_model
def test_features_only_gives_the_levels(name):
    model = spread(create(name))
    backbone = create(name, features_only=True, out_indices=(0, 1, 2, 3))
    assert not backbone.load_state_dict({f'model.{k}': v for k, v in model.state_dict().items()}, strict=False)[0]
    x, expected = images(), []
    for level in levels(model):
        level.register_forward_hook(lambda module, args, y: expected.append(as_map(model, y, x.shape[2:])))
    model(x)
    assert len(expected) == 4
    assert all(map(torch.equal, backbone(x), expected))


@every_test_model
def test_head(name):
    x = images()
    for pool in pools(on_meta(name)):
        model = create(name, num_classes=10, global_pool=pool)
        features = model.forward_features(x)
        assert torch.equal(model(x), model.forward_head(features))
        pre_logits = model.forward_head(features, pre_logits=True)
        multiple = 2 if pool == 'catavgmax' else 1
        assert pre_logits.shape == (2, model.head_hidden_size) == (2, multiple * model.num_features)
        assert torch.equal(scores(model, pre_logits), model(x))
        model.reset_classifier(0)
        assert torch.equal(model(x), pre_logits)


@every_test_model
def test_reset_classifier(name):
    model = create(name, num_classes=10, dtype=torch.float64)
    x = images(dtype=torch.float64)
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(x).shape == (2, 7)
    assert not any(classifier.training for classifier in classifiers(model))
    pool = pools(model)[-1]
    model.train().reset_classifier(7, pool)
    assert model(x).shape == (2, 7) and all(classifier.training for classifier in classifiers(model))
    assert model.head_hidden_size == (2 if pool == 'catavgmax' else 1) * model.num_features
    model.reset_classifier(0, '')
    assert model(x).shape == model.forward_features(x).shape


@pytest.mark.parametrize('name', [name for name in SMALL if type(getattr(on_meta(name), 'head', None)) is NormPoolHead])
def test_the_norm_comes_before_the_pooling(name):
    model = spread(create(name, num_classes=0, global_pool=''))
    x = images(70, 96)
    unpooled = as_map(model, model(x), x.shape[2:])
    assert torch.equal(unpooled, as_map(model, model.head.norm(model.forward_features(x)), x.shape[2:]))
    assert model.head.norm.eps == 1e-5
    model.reset_classifier(0, 'avg')
    torch.testing.assert_close(unpooled.mean((2, 3)), model(x))


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
    """The last norm is for what has the width and the scale of the last level."""
    model = spread(create(name))
    x, expected = images(), []
    for level in levels(model):
        level.register_forward_hook(lambda module, args, y: expected.append(y))
    final, intermediates = model.forward_intermediates(x, indices=indices, norm=norm)
    expected, _ = expected[:4], expected.clear()
    for i, info in enumerate(model.feature_info):
        if norm and dict(info, module='') == dict(model.feature_info[-1], module=''):
            expected[i] = last_norm(model)(expected[i])
    expected = [as_map(model, y, x.shape[2:]) for y in expected]

    assert torch.equal(final, model.forward_features(x))
    assert len(intermediates) == len(taken)
    for i, intermediate in zip(taken, intermediates, strict=True):
        assert torch.equal(intermediate, expected[i])
    output_fmt = 'NLC' if layout(model) == 'NLC' else 'NHWC'
    others = model.forward_intermediates(
        x, indices=indices, norm=norm, stop_early=True, output_fmt=output_fmt, intermediates_only=True
    )
    assert isinstance(others, list)
    for i, intermediate in zip(taken, others, strict=True):
        nhwc = expected[i].permute(0, 2, 3, 1)
        assert torch.equal(intermediate, nhwc if output_fmt == 'NHWC' else nhwc.flatten(1, 2))


@every_test_model
def test_forward_intermediates_stops_early(name):
    model = create(name)
    calls = []
    levels(model)[3].register_forward_hook(lambda *args: calls.append(1))
    final, _ = model.forward_intermediates(x := images(), indices=[1], stop_early=True)
    assert not calls and as_map(model, final, x.shape[2:]).shape[1] == model.feature_info[1]['num_chs']
    model.forward_intermediates(x, indices=[1])
    assert calls


@every_test_model
def test_forward_intermediates_refuses_other_layouts(name):
    with pytest.raises(ValueError, match='output_fmt.*NCL'):
        on_meta(name).forward_intermediates(images(device='meta'), output_fmt='NCL')


@every_test_model
@pytest.mark.parametrize(
    'indices, kept', [(1, [3]), ([0, 2], [0, 2]), ([1], [1]), ((0, 1, 2, 3), [0, 1, 2, 3])], ids=str
)
def test_prune_intermediate_layers(name, indices, kept):
    model = create(name)
    x = images()
    expected = model.forward_intermediates(x, indices=kept, intermediates_only=True)
    assert list(model.prune_intermediate_layers(indices)) == kept
    left = {n for n, _ in model.named_modules()}
    assert [info['module'] in left for info in model.feature_info] == [i <= kept[-1] for i in range(4)]
    assert all(map(torch.equal, model.forward_intermediates(x, indices=kept, intermediates_only=True), expected))
    assert all(isinstance(classifier, nn.Identity) for classifier in classifiers(model))
    width = as_map(model, model(x), x.shape[2:]).shape[1]
    assert width == model.num_features == model.feature_info[kept[-1]]['num_chs']


@every_test_model
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
    blocks(model)[-2].register_forward_pre_hook(lambda *args: calls.append(1))
    y_checkpointed, grads_checkpointed = run()
    assert len(calls) == 2  # once more in the backward pass
    assert torch.equal(y, y_checkpointed)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_checkpointed[name], grad)
    model.set_grad_checkpointing(False)
    calls.clear()
    run()
    assert len(calls) == 1


def check_gradients(model, autocast=False):
    """Every parameter gets a gradient, but a decay that has nothing to act on, of a map of one position, and the layers
    around a ReLU that lets nothing through."""
    idle = set()

    def look(module, args, y, name):
        if 'A_log' in module._parameters and y.numel() == y.shape[0] * y.shape[-1]:
            idle.add(f'{name}.A_log')
        elif isinstance(module, nn.ReLU) and not y.any():
            idle.add(f'{name.rpartition(".")[0]}.')

    for name, module in model.named_modules():
        module.register_forward_hook(functools.partial(look, name=name))
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        y = model.train()(images())
    nn.functional.cross_entropy(y.float(), torch.tensor([1, 2])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all(), name
        assert p.grad.any() or name.startswith(tuple(idle)), name


@every_small_and_tiny_model
def test_every_parameter_gets_a_gradient(name):
    check_gradients(create(name))


@every_test_model
def test_one_position_leaves_no_parameter_without_a_gradient(name):
    """A 32x32 image has a last stage of one position, where the decay has nothing to act on."""
    model = create(name).train()
    model(images(32, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_model
def test_weight_decay(name):
    """A, D, the step's bias, positions, biases and norms do not decay; the matrices and convolutions do."""
    model = on_meta(name)
    names = [n for n, _ in model.named_parameters()]
    marked = {n for pattern in model.no_weight_decay() for n in fnmatch.filter(names, pattern)}
    assert marked == {n for n in names if n.endswith(('.A_log', '.D', '.dt_bias')) or n in ('pos_embed', 'cls_token')}
    assert all(fnmatch.filter(names, pattern) for pattern in model.no_weight_decay())
    still, decaying = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert still['weight_decay'] == 0 and decaying['weight_decay'] == 0.05
    decays = {id(p) for p in decaying['params']}
    for n, p in model.named_parameters():
        matrix = n.endswith(('.weight', '.dt_weight')) and not re.search(r'\bnorm\d?\.weight$', n)
        assert (id(p) in decays) == (matrix or '.kernel_3' in n), n


@every_model
def test_layer_groups(name):
    model = on_meta(name)
    groups = group_parameters(model, model.group_matcher(), reverse=True)  # name -> group
    parameters = list(dict(model.named_parameters()))
    assert groups.keys() == set(parameters)

    def group_of(start, groups=groups):
        (group,) = {g for n, g in groups.items() if n.startswith(start)}
        return group

    first = model.feature_info[0]['module']
    before = list(itertools.takewhile(lambda n: not n.startswith(f'{first}.'), parameters))
    assert before and {groups[n] for n in before} == {0}
    names = {module: n for n, module in model.named_modules()}
    in_order = blocks(model)
    order = [group_of(f'{names[block]}.') for block in in_order]
    assert order == sorted(set(order)) and order[0] > 0
    for stage in list(getattr(model, 'stages', []))[1:]:  # a downsampling goes with what surrounds it
        i = in_order.index(stage.blocks[0])
        assert order[i - 1] <= group_of(f'{names[stage.downsample]}.') <= order[i]
    assert groups[f'{names[last_norm(model)]}.weight'] == order[-1]
    assert {group_of(f'{names[classifier]}.') for classifier in classifiers(model)} == {order[-1] + 1}

    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    for i, info in enumerate(model.feature_info):
        assert group_of(f'{info["module"]}.', coarse) == i + 1

    scales = [group['lr_scale'] for group in param_groups_layer_decay(model, layer_decay=0.5)]
    assert max(scales) == 1.0 and min(scales) < 0.5 ** len(order)


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
    model = on_meta(name)
    assert {p.device.type for p in model.parameters()} == {'meta'}
    if name in SMALL:
        shapes = {n: t.shape for n, t in model.state_dict().items()}
        assert shapes == {n: t.shape for n, t in create(name).state_dict().items()}


INITIALISED_AS_VMAMBA = [name for name in SMALL if name not in ('test_mambavision', 'test_vim')]


@pytest.mark.parametrize('name', INITIALISED_AS_VMAMBA)
def test_initialisation(name):
    more_states = dict(d_state=3) if 'd_state' in arguments(name) else {}
    model = create(name, dims=(32, 64, 128, 256), **more_states)
    assert {t.isfinite().all().item() for t in model.state_dict().values()} == {True}
    steps, uniform, normal = [], [], []
    for module_name, module in model.named_modules():
        if 'A_log' in module._parameters:
            K, E, N = module.A_log.shape
            rank = module.dt_weight.shape[2]
            torch.testing.assert_close(-module.A_log.exp(), -torch.arange(1.0, N + 1).expand(K, E, N))
            assert (
                (module.D == 1).all()
                and N == more_states.get('d_state', 1)
                and rank == math.ceil(module.in_proj.in_features / 16)
            )
            uniform.append((f'{module_name}.dt_weight', module.dt_weight, rank**-0.5))
            steps.append(nn.functional.softplus(module.dt_bias).flatten())
        elif module_name.endswith('x_proj') or isinstance(module, nn.Conv2d):  # as PyTorch initialises them
            uniform.append((module_name, module.weight, module.weight[0].numel() ** -0.5))
        elif isinstance(module, nn.Linear):
            normal.append((module_name, module.weight, 0.02))
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert (module.weight == 1).all() and not module.bias.any() and module.eps in (1e-5, 1e-6)
            assert getattr(module, 'momentum', 0.1) == 0.1
        elif module_name.endswith('.fusion'):
            assert all((p == 1).all() for p in module.parameters())
    for draws, std in ((uniform, 3**-0.5), (normal, 1)):
        for what, weight, scale in draws:
            assert 0.5 < weight.square().mean().sqrt() / scale / std < 1.5, what
            assert draws is normal or weight.abs().max() <= scale, what
        assert abs(torch.cat([weight.flatten() / scale for _, weight, scale in draws]).std() / std - 1) < 0.01
    log_steps = torch.cat(steps).log10()
    assert -3.001 <= log_steps.min() < -2.95 and -1.05 < log_steps.max() <= -0.999
    assert abs(log_steps.mean() + 2) < 0.1 and abs(log_steps.std() - 2 / 12**0.5) < 0.05  # log-uniform


@every_test_model
def test_drop_path_rates_grow_linearly(name):
    model = create(name, drop_path_rate=0.4)
    rates = [
        [getattr(part, 'drop_prob', 0.0) for n, part in block.named_children() if n.startswith('drop_path')]
        for block in blocks(model)
    ]
    for i, of_block in enumerate(rates):
        assert of_block == [pytest.approx(0.4 * i / (len(rates) - 1))] * len(of_block) != []


every_pyramid = pytest.mark.parametrize('name', [name for name in SMALL if layout(on_meta(name)) != 'NLC'])


@every_pyramid
def test_dims_may_be_one_width(name):
    model = create(name, 'meta', dims=16)
    assert [info['num_chs'] for info in model.feature_info] == [16, 32, 64, 128]


@pytest.mark.parametrize('features_only', (False, True), ids=('classifier', 'features'))
def test_batch_norm_arguments(features_only):
    model = create('test_spatial_mamba', bn_momentum=0.03, bn_eps=1e-3, features_only=features_only)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 5 + 3 and {(norm.momentum, norm.eps) for norm in norms} == {(0.03, 1e-3)}


@every_pyramid
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


CALLS = {  # of layers that are not called once, by the class that has them
    (GroupMixer, 'norm'): 2,  # the published network has one at both ends
    (Attention, 'attn_drop'): 0,  # the fused attention takes its rate
}


@every_test_model
def test_every_layer_is_called_once(name):
    """Attributions that keep what a layer saw, such as DeepLift's, need one object a use."""
    model, calls, expected = create(name), collections.Counter(), {}
    for parent_name, parent in model.named_modules():
        for child_name, layer in parent.named_children():
            if not [*layer.children()]:
                layer_name = f'{parent_name}.{child_name}'
                layer.register_forward_hook(lambda *_, layer_name=layer_name: calls.update([layer_name]))
                expected[layer_name] = CALLS.get((type(parent), child_name), 1)
    model(images())
    assert calls == collections.Counter(expected)


def transpose_(model):
    """Transpose what knows rows from columns: kernels, orders of scans, and the order in which patches are merged."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 4:
                p.copy_(p.transpose(2, 3).clone())
    for module in model.modules():
        if hasattr(module, 'orders'):
            module.orders = [order ^ 1 for order in module.orders]
        if isinstance(module, PatchMerging):
            for p in module.parameters():
                p.data = p.data.unflatten(-1, (2, 2, -1)).transpose(-3, -2).flatten(-3)


# Of sequences there is nothing to transpose.
OF_MAPS = [n for n in SMALL if not any(p.dim() == 4 and p.shape[2] != p.shape[3] for p in on_meta(n).parameters())]


@pytest.mark.parametrize('name', OF_MAPS)
def test_height_and_width_are_told_apart(name, assert_close):
    """Transposing the image, the kernels of the convolutions and the orders of the scans changes nothing."""
    model = spread(create(name, dtype=torch.float64))
    x = images(dtype=torch.float64)
    y = model(x)
    transpose_(model)
    assert_close(model(x.transpose(2, 3)), y, 1e-12)
    assert (model(x) - y).abs().max() > 0.01 * y.abs().max()


@every_test_model
def test_images_of_a_batch_do_not_mix(name, assert_close):
    model = spread(create(name))
    x = images(batch=3)
    assert_close(model(x), torch.cat([model(image[None]) for image in x]), 1e-5)


@every_test_model
def test_channels_last_images(name, assert_close):
    model = spread(create(name))
    x = images()
    assert_close(model(x.contiguous(memory_format=torch.channels_last)), model(x), 1e-5)


@every_small_and_tiny_model
def test_kernel_and_reference_agree(name, assert_close):
    model = spread(create(name))
    x = images()
    y = model(x)
    with vssm.ops.use_reference():
        assert_close(y, model(x), 2e-5)


@every_test_model
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


@every_test_model
def test_autocast_trains(name):
    check_gradients(create(name), autocast=True)


# ---- graphs ----------------------------------------------------------------------------------------------------------


class OnOurOp(nn.Module):
    """A module of somebody else, which calls an op of ours."""

    def forward(self, h, weight):
        return state_fusion(h, weight) + 1


def test_fx_traces_modules_of_others_that_call_our_ops(assert_close):
    h, weight = torch.randn(1, 4, 5, 3), torch.randn(3, 3, 3, 3)
    traced = create_feature_extractor(OnOurOp(), {'add': 'y'})
    assert_close(traced(h, weight)['y'], state_fusion(h, weight) + 1, 1e-6)


@every_test_model
def test_timm_fx(name):
    """Bit for bit: timm's tracer takes what has a shortcut for one node, and runs it as it is."""
    model = spread(create(name))
    nodes, _ = get_graph_node_names(model)
    traced = create_feature_extractor(model, [nodes[-1]])
    for x in (images(), images(33, 47)):  # no size is baked in
        assert torch.equal(traced(x)[nodes[-1]], model(x))


@every_test_model
def test_plain_fx(name, assert_close):
    """A tracer that knows nothing of timm."""
    model = spread(create(name))
    traced = torch.fx.symbolic_trace(model)
    for x in (images(), images(33, 47)):
        assert_close(traced(x), model(x), GRAPH_TOLERANCE)


@every_test_model
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


@every_test_model
def test_torchvision_features(name, assert_close):
    """Of stages, blocks, and what is within them."""
    model = spread(create(name))
    within = r'\.downsample|\.mixer(.*\.x_proj)?|\.mlp\.fc1'
    wanted = rf'stem|patch_embed|(head\.)?norm|((stages\.\d\.)?blocks|stages)\.\d({within})?'
    names = [n for n, _ in model.named_modules() if re.fullmatch(wanted, n)]
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
@pytest.mark.parametrize('graph', (False, pytest.param(True, marks=pytest.mark.slow)), ids=('modules', 'graph'))
@every_test_model
def test_torchscript(name, graph, assert_close):
    model = spread(create(name))
    scripted = torch.jit.script(torch.fx.symbolic_trace(model) if graph else model)
    for x in (images(), images(33, 47)):
        assert_close(scripted(x), model(x), GRAPH_TOLERANCE)


@pytest.mark.filterwarnings('ignore:.*torch.jit.*:DeprecationWarning')
@every_test_model
def test_torch_jit_trace(name, assert_close):
    model = spread(create(name))
    x = images()
    assert_close(torch.jit.trace(model, x, check_trace=False)(x), model(x), GRAPH_TOLERANCE)


# ---- training --------------------------------------------------------------------------------------------------------


@every_test_model
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
def test_precision_of_the_tiny_models(name, assert_close):
    """Of the largest logit, half precision is within 2 % of float64."""
    model, x = create(name), images(128, 128)
    with torch.no_grad():
        expected = create(name, dtype=torch.float64)
        expected.load_state_dict(model.state_dict())
        expected = expected(x.double())
        assert_close(model(x), expected, 1e-5)
        with torch.autocast('cpu', torch.bfloat16):
            assert_close(model(x), expected, 2e-2)
        assert_close(model.bfloat16()(x.bfloat16()), expected, 2e-2)


@pytest.mark.slow
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason='bfloat16 convolutions need AVX-512')
@pytest.mark.parametrize(
    'name', ('vmamba2d_tiny', 'spatial_mamba_tiny', 'test_vim', 'test_groupmamba', 'test_mambavision')
)
def test_two_hundred_steps_in_bfloat16(name):
    """With the published learning rate and weight decay, on noise."""
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

GOLDEN = {  # files, with the model that they are one of when it has their sizes, and their inputs
    'vmamba_micro': ('vmamba_tiny', ('square', 'nonsquare', 'odd')),
    '2dvmamba_micro': ('vmamba2d_tiny', ('square', 'nonsquare', 'odd')),
    'vanilla_vmamba_micro': ('vanilla_vmamba_tiny', ('square', 'nonsquare')),
    'spatialmamba_micro': ('spatial_mamba_tiny', ('square', 'nonsquare', 'odd')),
    'vim_micro_square': ('vim_tiny_patch16_224', ('square',)),
    'vim_micro_nonsquare': ('vim_tiny_patch16_224', ('nonsquare',)),
    'vim_micro_stride8': ('vim_tiny_patch16_224', ('stride8',)),
    'groupmamba_micro': ('groupmamba_tiny', ('square', 'nonsquare', 'odd')),
    'mambavision_micro': ('mambavision_tiny', ('square', 'nonsquare', 'odd')),
}
BACKBONES = ('vmamba_micro', '2dvmamba_micro', 'spatialmamba_micro')  # the older files: gradients of some parameters
OUR_ARGUMENTS = dict(
    ssm_d_state='d_state',
    stride='patch_stride',
    stem_hidden_dim='stem_dim',
    embed_dims='dims',
    in_dim='stem_dim',
    dim='dims',
)
# Where a pre-activation is on the kink of a ReLU, or the rounding of image and weights alone moves a gradient by the
# tolerance: the gradients are judged in float64.
ILL_CONDITIONED = {('spatialmamba_micro', 'square'), ('groupmamba_micro', 'square')}


def create_golden(file, tensors, metadata, dtype, **kwargs):
    """The network of a golden file; what its backbone has besides, the output norms, comes back apart."""
    name = GOLDEN[file.removesuffix('_backbone')][0]
    for key, value in metadata['config'].items():
        key = OUR_ARGUMENTS.get(key, key)
        if key in arguments(name):
            kwargs[key] = tuple(value) if isinstance(value, list) else value
    model = timm.create_model(name, dtype=dtype, **kwargs).eval()
    state = under(tensors, 'state_dict.')
    norms = {name: state.pop(name).to(dtype) for name in list(state) if name.startswith('outnorm')}
    network = model.model if kwargs.get('features_only') else model
    network.load_state_dict(state)
    return model, norms


@pytest.mark.parametrize('file, case', [(file, case) for file, (_, cases) in GOLDEN.items() for case in cases])
def test_golden_classifier(golden, backend, file, case, assert_close):
    tensors, metadata = golden(file)
    model, _ = create_golden(file, tensors, metadata, backend.dtype)
    value_tolerance, grad_tolerance = (1e-6, 1e-6) if backend.dtype == torch.float64 else (1e-5, 1e-4)
    x = tensors[f'{case}.input'].detach().to(backend.dtype).requires_grad_()
    logits = model(x)
    assert_close(logits, tensors[f'{case}.logits'], value_tolerance, 'logits')

    if (file, case) in ILL_CONDITIONED and backend.dtype == torch.float32:
        return
    (logits * tensors[f'{case}.loss_weight']).sum().backward()
    expected = under(tensors, f'{case}.grad.')
    assert_close(x.grad, expected.pop('input'), grad_tolerance, 'gradient of the image')
    parameters = dict(model.named_parameters())
    expected = filter_fn(model)(expected, model)  # a gradient is named and laid out as its parameter
    if case not in ('square', 'nonsquare'):
        assert not expected
    else:
        assert expected if file in BACKBONES else expected.keys() == parameters.keys()
    for name, grad in expected.items():
        if name.endswith('.skip_scale') and backend.dtype == torch.float32:
            continue  # the norm behind it takes out every scale: what is left of this gradient is rounding
        actual = parameters[name].grad
        actual = torch.zeros_like(parameters[name]) if actual is None else actual
        assert_close(actual, grad, grad_tolerance, f'gradient of {name}')


@pytest.mark.parametrize('file', BACKBONES)
@pytest.mark.parametrize('case', ('square', 'nonsquare', 'odd'))
def test_golden_backbone(golden, backend, file, case, assert_close):
    tensors, metadata = golden(f'{file}_backbone')
    model, norms = create_golden(file, tensors, metadata, backend.dtype, features_only=True)
    features = model(tensors[f'{case}.input'].to(backend.dtype))
    assert len(features) == 4 and len(norms) == 8
    for i, feature in enumerate(features):
        feature = feature.permute(0, 2, 3, 1)  # [B, C, H, W] -> [B, H, W, C]
        feature = nn.functional.layer_norm(
            feature, feature.shape[-1:], norms[f'outnorm{i}.weight'], norms[f'outnorm{i}.bias'], eps=1e-5
        )
        tolerance = 1e-6 if backend.dtype == torch.float64 else 1e-5
        assert_close(feature.permute(0, 3, 1, 2), tensors[f'{case}.feature.{i}'], tolerance, f'feature {i}')


KEY_FILES = {  # where they have other names than the models
    'vmamba_tiny': 'vmamba_tiny_s1l8',
    'vmamba_small': 'vmamba_small_s2l15',
    'vmamba_base': 'vmamba_base_s2l15',
    'mambavision_tiny': 'mambavision_T',
    'mambavision_tiny2': 'mambavision_T2',
    'mambavision_small': 'mambavision_S',
    'mambavision_base': 'mambavision_B',
    'mambavision_large': 'mambavision_L',
    'mambavision_large2': 'mambavision_L2',
    'mambavision_large2_512': 'mambavision_L2',
    'mambavision_large3': 'mambavision_L3_256_21k',
    'mambavision_large3_512': 'mambavision_L3_256_21k',
}
RENAMED = {'vmamba2d': '2dvmamba', 'spatial_mamba': 'spatialmamba', '_patch16': '', '_224': ''}


@pytest.mark.parametrize('name', in_turn(FULL_SIZE))
def test_golden_sizes(golden, name):
    """The tables above are those of the golden files, whose names load."""
    variant = KEY_FILES.get(name, functools.reduce(lambda name, old: name.replace(old, RENAMED[old]), RENAMED, name))
    published, model = golden(f'keys_{variant}.json'), on_meta(name)
    assert published['num_params'] == FULL_SIZE[name][0]
    assert len(published['buffers']) == len(list(model.buffers()))
    state = {n: torch.empty(shape, device='meta') for n, shape in published['state_dict'].items()}
    renamed = filter_fn(model)(state, model)
    assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert filter_fn(model)(renamed, model) == renamed
    model.load_state_dict(state)
    reported = golden('reported.json')['variants'].get(variant)
    if reported:  # of the other families nothing was measured
        measured = reported['measured']
        assert FULL_SIZE[name][:2] == (measured['params'], round(measured['flops_224'] / 1e9, 4))
