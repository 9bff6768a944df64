# SPDX-License-Identifier: Apache-2.0
"""Detection and segmentation: the stand-in for mmcv's operators, the backbone, the configs, a step of each task."""

import copy
import functools
import importlib
import importlib.util
import json
import math
import re
import runpy
import sys
import uuid
from pathlib import Path

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict
from mmengine.structures import InstanceData
from processes import finish, start
from safetensors.torch import save_file
from torch import nn

from vssm.models import mm
from vssm.models.weights import convert
from vssm.tools._common import find_config, list_configs
from vssm.tools._count import multiply_adds

mmcv, mmdet, mmseg = (
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[mmlab]'")
    for package in ('mmcv', 'mmdet', 'mmseg')
)
for module in ('mmcv.ops', 'mmdet.registry', 'mmseg.registry'):  # these need operators: the stand-in's, thanks to mm
    importlib.import_module(module)

ADE20K = [name for name in list_configs() if name.startswith('ade20k/upernet')]
COCO_1X = [name for name in list_configs() if name.startswith('coco/mask-rcnn') and '-1x_' in name]
COCO_3X = [name for name in list_configs() if name.startswith('coco/mask-rcnn') and '-3x_' in name]
DENSE_FAMILIES = ('groupmamba', 'mambavision', 'spatial_mamba', 'vmamba2d', 'vmamba')
SIZES = [f'{family}_{size}' for family in DENSE_FAMILIES for size in ('base', 'small', 'tiny')]
FAMILIES = {
    '2dvmamba_micro': 'vmamba2d_tiny',
    'vmamba_micro': 'vmamba_tiny',
    'spatialmamba_micro': 'spatial_mamba_tiny',
}

pytestmark = pytest.mark.usefixtures('one_thread', 'quick_configs')


# ---- the backbone ----------------------------------------------------------------------------------------------------


def micro_args(metadata):
    """What `timm.create_model` needs for the network of a golden file."""
    config = metadata['config']
    args = dict(depths=config['depths'], dims=config['dims'], mlp_ratio=config['mlp_ratio'])
    return args | (dict(ssm_ratio=config['ssm_ratio'], d_state=config['ssm_d_state']) if 'ssm_ratio' in config else {})


def from_file(path):
    return dict(init_cfg=dict(type='Pretrained', checkpoint=str(path)))


def backbone(name='test_vmamba', **kwargs):
    module = mm.TimmFeatures(name, **kwargs)
    module.init_weights()
    return module.eval()


def randomise(module):
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5)
    return module


@pytest.mark.parametrize('family', FAMILIES)
def test_golden_features(golden, family, tmp_path, assert_close):
    """From a detector's file under published names to its features."""
    tensors, metadata = golden(f'{family}_backbone')
    state = {k.removeprefix('state_dict.'): v for k, v in tensors.items() if k.startswith('state_dict.')}
    detector = {f'backbone.{name}': value for name, value in state.items()} | {'neck.weight': torch.zeros(3)}
    torch.save(dict(state_dict=detector, meta=dict(epoch=12)), tmp_path / 'detector.pth')
    module = backbone(FAMILIES[family], **micro_args(metadata), **from_file(tmp_path / 'detector.pth'))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-6)):
        module.to(dtype)
        for case in ('square', 'nonsquare', 'odd'):
            features = module(tensors[f'{case}.input'].to(dtype))
            assert isinstance(features, tuple) and len(features) == 4
            for i, feature in enumerate(features):
                assert feature.is_contiguous()
                assert_close(feature, tensors[f'{case}.feature.{i}'], tolerance, f'{case} {i} {dtype}')


@pytest.mark.parametrize('family', FAMILIES)
def test_every_kind_of_file_gives_the_same_backbone(golden, family, tmp_path):
    """The golden classifier and the golden backbone hold the same weights."""
    tensors, metadata = golden(family)
    norms, _ = golden(f'{family}_backbone')
    args = micro_args(metadata)
    state = {k.removeprefix('state_dict.'): v for k, v in tensors.items() if k.startswith('state_dict.')}
    norms = {k.removeprefix('state_dict.'): v for k, v in norms.items() if '.outnorm' in k}
    name = FAMILIES[family]
    torch.save({'model': state}, tmp_path / 'classifier.pth')
    expected = backbone(name, **args, **from_file(tmp_path / 'classifier.pth')).state_dict()
    network = timm.create_model(name, checkpoint_path=str(tmp_path / 'classifier.pth'), num_classes=7, **args)
    for key, value in network.state_dict().items():
        if not key.startswith('head.'):
            assert torch.equal(expected.pop(f'model.model.{key}'), value), key
    assert len(expected) == 8 and all(
        torch.equal(value, torch.full_like(value, key.endswith('weight'))) for key, value in expected.items()
    )

    torch.save(
        {k: v for k, v in state.items() if not k.startswith(('classifier', 'head', 'norm.'))} | norms,
        tmp_path / 'dense.pth',
    )
    for kind in ('classifier', 'dense'):
        convert(tmp_path / f'{kind}.pth', tmp_path / f'{kind}.safetensors', model=name)
    ours = backbone(name, **args, **from_file(tmp_path / 'dense.pth'))
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in ours.state_dict().items()}}, tmp_path / 'ours.pth')
    save_file(ours.state_dict(), tmp_path / 'ours.safetensors')
    for file in ('classifier.safetensors', 'dense.safetensors', 'ours.pth', 'ours.safetensors'):
        loaded = backbone(name, **args, **from_file(tmp_path / file)).state_dict()
        for key, value in ours.state_dict().items():
            begun_anew = file.startswith('classifier') and key.startswith('outnorm')
            assert torch.equal(loaded[key], value) != begun_anew, (file, key)


def test_what_a_backbone_lacks_is_left_aside(tmp_path):
    whole = randomise(backbone())
    file = tmp_path / 'whole.pth'
    torch.save(whole.state_dict(), file)
    part = backbone(out_indices=(1, 2), **from_file(file))
    names = {name.partition('.')[0] for name in part.state_dict()}
    assert names == {'model', 'outnorm1', 'outnorm2'}
    images = torch.randn(1, 3, 64, 64)
    for actual, expected in zip(part(images), whole(images)[1:3], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    'change, said',
    [
        (lambda s: s.pop('outnorm2.bias'), r'1 missing \(outnorm2\.bias\)'),
        (lambda s: s.pop('model.model.stem.conv1.bias'), r'1 missing \(stem\.conv1\.bias\)'),
        (lambda s: s.update(extra=torch.zeros(1)), r'1 unexpected \(extra\)'),
        (lambda s: s.update({'model.model.stem.conv1.bias': torch.zeros(3)}), r'stem\.conv1\.bias must be \(16,\)'),
    ],
    ids=['norm', 'missing', 'unexpected', 'misshapen'],
)
def test_a_file_that_does_not_fit_is_refused(change, said, tmp_path):
    state = backbone().state_dict()
    change(state)
    torch.save(state, tmp_path / 'bad.pth')
    module = mm.TimmFeatures('test_vmamba', **from_file(tmp_path / 'bad.pth'))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        module.init_weights()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_files_of_something_else_are_refused(tmp_path):
    save_file(backbone().state_dict(), tmp_path / 'other.safetensors', dict(model='test_vmamba2d'))
    for kwargs, error, said in [
        (from_file(tmp_path / 'other.safetensors'), ValueError, 'must hold test_vmamba, got test_vmamba2d'),
        (from_file(tmp_path / 'absent.pth'), FileNotFoundError, 'does not exist'),
        (dict(out_norm=False, **from_file(tmp_path / 'norms.pth')), ValueError, r'8 unexpected \(outnorm0'),
        (dict(pretrained=True), RuntimeError, 'no weights are published'),
    ]:
        torch.save(backbone().state_dict(), tmp_path / 'norms.pth')
        with pytest.raises(error, match=said):
            backbone(**kwargs)


@pytest.mark.parametrize(
    'kwargs, said',
    [
        (
            dict(init_cfg=dict(type='Normal')),
            "init_cfg must be dict(type='Pretrained', checkpoint=FILE) or a list of one",
        ),
        (dict(pretrained='a.pth'), "pretrained must be True or False, and False where init_cfg names a file, got 'a.p"),
        (dict(pretrained=True, **from_file('a.pth')), 'pretrained must be True or False'),
        (dict(frozen_stages=5), 'frozen_stages must be -1, or 0 to 4 for test_vmamba, got 5'),
        (dict(out_indices=(1, -3)), 'out_indices must name each level once, got (1, -3)'),
    ],
)
def test_bad_arguments_are_refused(kwargs, said):
    with pytest.raises(ValueError) as error:
        mm.TimmFeatures('test_vmamba', **kwargs)
    assert said in str(error.value)


def test_pretrained_weights_are_read_by_init_weights_alone(tmp_path, monkeypatch):
    """Here from a file that timm's configuration of the model names, so that nothing is downloaded."""
    source = randomise(timm.create_model('test_vmamba'))
    save_file(source.state_dict(), tmp_path / 'weights.safetensors')
    overlay = dict(file=str(tmp_path / 'weights.safetensors'))
    module = mm.TimmFeatures('test_vmamba', pretrained=True, pretrained_cfg_overlay=overlay)
    assert not torch.equal(module.model.model.stem.conv1.weight, source.stem.conv1.weight)
    module.init_weights()
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in module.model.model.state_dict().items())


def test_a_published_detector_loads_as_a_whole(golden):
    """By `load_state_dict`, as a run's load_from does it, and by mmengine's loader."""
    tensors, metadata = golden('vmamba_micro_backbone')
    state = {k.removeprefix('state_dict.'): v for k, v in tensors.items() if k.startswith('state_dict.')}
    published = {f'backbone.{k}': v for k, v in state.items()} | {
        'neck.weight': torch.ones(1, 2),
        'neck.bias': torch.ones(1),
    }

    def detector():
        return nn.ModuleDict(
            dict(backbone=mm.TimmFeatures('vmamba_tiny', **micro_args(metadata)), neck=nn.Linear(2, 1))
        ).eval()

    images = tensors['odd.input']
    for load in (nn.Module.load_state_dict, lambda m, s: load_state_dict(m, s, strict=True)):
        model = detector()
        load(model, published)
        assert torch.equal(model['neck'].weight, torch.ones(1, 2))
        torch.testing.assert_close(model['backbone'](images)[3], tensors['odd.feature.3'], rtol=1e-4, atol=1e-4)
        again = copy.deepcopy(detector())
        load(again, model.state_dict())
        assert torch.equal(again['backbone'](images)[3], model['backbone'](images)[3])
    with pytest.raises(RuntimeError, match='backbone.model.model.stem.conv1.bias'):
        detector().load_state_dict({k: v for k, v in published.items() if k != 'backbone.patch_embed.0.bias'})


@pytest.mark.parametrize('name', ['test_vmamba2d', 'test_spatial_mamba', 'test_groupmamba', 'test_mambavision'])
def test_frozen_stages_and_norms(name):
    images = torch.randn(2, 3, 64, 64)
    for frozen_stages in (-1, 0, 2, 4):
        module = mm.TimmFeatures(name, frozen_stages=frozen_stages, norm_eval=True, drop_path_rate=0.5).train()
        assert all(not m.training for m in module.modules() if isinstance(m, nn.BatchNorm2d))
        before = {k: v.clone() for k, v in module.state_dict().items()}
        sum(f.square().mean() for f in module(images)).backward()
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())  # no statistics moved
        frozen = [*['stem'] * (frozen_stages >= 0), *[f'stages.{i}' for i in range(frozen_stages)]]
        for key, parameter in module.model.model.named_parameters():
            assert (parameter.grad is None) == any(key.startswith(f'{part}.') for part in frozen), key
        for i, stage in enumerate(module.model.model.stages):
            assert stage.blocks[0].training == (i >= frozen_stages)
    module = mm.TimmFeatures('test_spatial_mamba').train()
    module(images)
    assert module.model.model.stem.norm1.num_batches_tracked == 1


@pytest.mark.parametrize(
    'name, frozen_stages, frozen',
    [
        ('test_resnet', 0, ('conv1', 'bn1')),
        ('test_resnet', 2, ('conv1', 'bn1', 'layer1', 'layer2')),
        ('test_efficientnet', 1, ('conv_stem', 'bn1', 'blocks.0')),
        ('test_vit', 2, ('cls_token', 'pos_embed', 'patch_embed', 'blocks.0', 'blocks.1')),
        ('test_vmamba', 1, ('stem', 'stages.0')),
    ],
)
def test_stages_of_any_timm_model_are_frozen(name, frozen_stages, frozen):
    """By the groups that its `group_matcher()` tells, where it has no `stages`."""
    module = mm.TimmFeatures(name, out_indices=(-1,), frozen_stages=frozen_stages).train()
    size = module.model.model.pretrained_cfg['input_size'][-1]
    before = {k: v.clone() for k, v in module.model.model.named_buffers()}
    module(torch.randn(2, 3, size, size))[0].square().mean().backward()

    def is_frozen(key):
        return key.startswith(tuple(f'{part}.' for part in frozen)) or key in frozen

    for key, parameter in module.model.model.named_parameters():
        assert (parameter.grad is None) == is_frozen(key), key
    for key, value in module.model.model.named_buffers():
        assert torch.equal(value, before[key]) == is_frozen(key), key
    for key, part in module.model.model.named_modules():
        if key.startswith(tuple(frozen)) and 'drop' not in key.split('.')[0]:
            assert not part.training, key


def test_more_stages_than_there_are_cannot_be_frozen():
    with pytest.raises(ValueError, match='frozen_stages must be -1, or 0 to 3 for test_resnet, got 5'):
        mm.TimmFeatures('test_resnet', frozen_stages=5)
    with pytest.raises(ValueError, match=r'frozen_stages must be -1, without stages and group_matcher\(\) for pit_ti'):
        mm.TimmFeatures('pit_ti_224', out_indices=(0,), frozen_stages=1)


@pytest.mark.parametrize('name, args', [('test_vmamba', dict(dims=[32] * 4)), ('test_vit', {})])
def test_maps_come_in_the_order_that_was_asked(name, args):
    """Where all maps have one width, nothing else would tell a map of another level or norm."""
    first = randomise(mm.TimmFeatures(name, out_indices=(1, 3), **args)).eval()
    size = first.model.model.pretrained_cfg['input_size'][-1]
    images = torch.randn(1, 3, size, size)
    expected = dict(zip((1, 3), first(images), strict=True))
    assert not torch.equal(first.outnorm1.weight, first.outnorm3.weight)
    for out_indices in ((3, 1), (3, 1 - len(first.model.feature_info.info))):
        module = mm.TimmFeatures(name, out_indices=out_indices, **args).eval()
        module.load_state_dict(first.state_dict())
        assert module.levels == (3, 1)
        for level, feature in zip((3, 1), module(images), strict=True):
            assert torch.equal(feature, expected[level])


@pytest.mark.parametrize('out_norm', [True, False])
@pytest.mark.parametrize('used', [(0,), (1, 2), (3,)], ids=str)
def test_every_parameter_gets_a_gradient_whatever_levels_a_neck_leaves_out(used, out_norm):
    """Zeros where the loss does not depend on it; elsewhere, and for maps, the numbers are as without it."""
    module = mm.TimmFeatures('test_vmamba', out_norm=out_norm)
    images = torch.randn(1, 3, 64, 64)
    maps, gradients = [], []
    for training in (False, True):
        module.train(training).zero_grad()
        maps.append(module(images))
        sum(maps[-1][i].square().mean() for i in used).backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    assert all(torch.equal(a, b) for a, b in zip(*maps, strict=True))
    plain, tied = gradients
    assert any(gradient is None for gradient in plain.values()) == (out_norm or 3 not in used)
    for name, gradient in tied.items():
        if plain[name] is None:
            assert torch.equal(gradient, torch.zeros_like(gradient)), name
        else:
            torch.testing.assert_close(gradient, plain[name], msg=name)


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone, which DistributedDataParallel watches as it does many."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('base', ['retinanet/retinanet_r50_fpn_1x_coco', 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco'])
def test_detectors_that_leave_out_a_level_train_in_several_processes(base, process_group):
    """mmdetection's own, with start_level=1: PyTorch misses gradients of the first iteration in the second."""
    cfg = Config.fromfile(Path(mmdet.__file__).parent / '.mim' / 'configs' / f'{base}.py').model
    cfg.backbone = dict(type='TimmFeatures', model_name='test_vmamba')
    cfg.neck.update(in_channels=[32, 48, 64, 96], out_channels=32)
    assert cfg.neck.start_level == 1
    cfg.bbox_head.update(in_channels=32, feat_channels=32, stacked_convs=1)
    init_default_scope('mmdet')
    model = torch.nn.parallel.DistributedDataParallel(MODELS.build(cfg)).train()
    shapes = dict.fromkeys(('img_shape', 'pad_shape', 'batch_input_shape'), (64, 64))
    sample = mmdet.structures.DetDataSample(metainfo=shapes)
    sample.gt_instances = InstanceData(bboxes=torch.tensor([[8.0, 8, 40, 48]]), labels=torch.tensor([3]))
    for _ in range(2):
        losses = model(torch.randn(2, 3, 64, 64), [sample] * 2, mode='loss')
        model.module.parse_losses(losses)[0].backward()
    norm = model.module.backbone.outnorm0
    assert torch.equal(norm.weight.grad, torch.zeros_like(norm.weight))


def test_gradient_checkpointing_changes_no_gradient():
    images = torch.randn(1, 3, 64, 64)
    for frozen_stages in (-1, 1):
        plain = mm.TimmFeatures('test_vmamba', frozen_stages=frozen_stages)
        saving = mm.TimmFeatures('test_vmamba', frozen_stages=frozen_stages, with_cp=True)
        saving.load_state_dict(plain.state_dict())
        assert all(stage.grad_checkpointing for stage in saving.model.model.stages)
        for module in (plain, saving):
            sum((f * f).sum() for f in module(images)).backward()
        for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize('registry', [MODELS, mmdet.registry.MODELS, mmseg.registry.MODELS], ids=lambda r: r.scope)
@pytest.mark.parametrize('name', ['vmamba_tiny_s1l8', 'resnet18', 'swin_tiny_patch4_window7_224'])
def test_it_is_found_from_every_registry_and_takes_any_model(registry, name):
    cfg = dict(type='TimmFeatures', model_name=name, out_indices=(1, 3))
    with torch.device('meta' if 'vmamba' in name else 'cpu'):
        module = registry.build(cfg)
    images = torch.empty(1, 3, 224, 224, device=next(module.parameters()).device).fill_(0.5)
    features = module(images)
    assert [f.shape[1] for f in features] == module.model.feature_info.channels()
    assert [224 // f.shape[2] for f in features] == module.model.feature_info.reduction()
    assert module.outnorm1.eps == module.outnorm3.eps == 1e-5
    assert len(registry.build(cfg | dict(out_norm=False)).state_dict()) == len(module.state_dict()) - 4


def test_a_network_of_one_scale_is_no_pyramid():
    """It says so where the configs ask for one; the maps themselves are to be had."""
    images = torch.randn(1, 3, 64, 96)
    assert [tuple(f.shape) for f in mm.TimmFeatures('test_vim')(images)] == [(1, 32, 4, 6)] * 4
    for name in (COCO_1X[0], ADE20K[0]):
        cfg = Config.fromfile(find_config(name)).model.backbone
        said = (
            r'stages reduce the image by \[4, 8, 16, 32\], got test_vim, whose stages reduce it by \[16, 16, 16, 16\]'
        )
        with pytest.raises(ValueError, match=said):
            MODELS.build({**cfg, 'model_name': 'test_vim'})


# ---- configs ---------------------------------------------------------------------------------------------------------


def load_config(name, data, work_dir, **options):
    """A config on the miniature data, read by this process."""
    cfg = Config.fromfile(find_config(name))
    root = str(data / 'ADEChallengeData2016') if name.startswith('ade20k') else f'{data / "coco"}/'
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(data_root=root, serialize_data=False)
    if name.startswith('coco'):
        for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
            evaluator.ann_file = f'{root}annotations/instances_val2017.json'
    cfg.merge_from_dict(options)
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = uuid.uuid4().hex  # mmengine hands out loggers and histories by it
    return cfg


@functools.cache
def meta_model(name):
    """The model of a config without numbers; the long COCO configs have those of the short ones."""
    cfg = Config.fromfile(find_config(name))
    init_default_scope(cfg.default_scope)
    with torch.device('meta'), pytest.MonkeyPatch.context() as patch:
        patch.setattr('vssm.models.backbone.trunc_normal_', lambda *args, **kwargs: None)  # slow, and of no effect here
        return MODELS.build(cfg.model)


def model_of(name):
    return next(size for size in SIZES if f'_{size}_' in name)


PUBLISHED = {  # millions of parameters and billions of multiply-adds: Mask R-CNN at 1280x800, UPerNet at 512x2048
    'vmamba_tiny': ((50, 271), (62, 949)),
    'vmamba_small': ((70, 384), (82, 1028)),
    'vmamba_base': ((108, 485), (122, 1170)),
    'spatial_mamba_tiny': ((46, 261), (57, 936)),
    'spatial_mamba_small': ((63, 315), (73, 992)),
    'spatial_mamba_base': ((115, 494), (127, 1176)),
}


def test_every_model_has_its_configs():
    assert [model_of(name) for name in ADE20K] == SIZES
    assert ADE20K == [f'ade20k/upernet_{size}_4xb4-160k_ade20k-512x512' for size in SIZES]
    assert COCO_1X == [f'coco/mask-rcnn_{size}_fpn_8xb2-1x_coco' for size in SIZES]
    assert COCO_3X == [f'coco/mask-rcnn_{size}_fpn_8xb2-ms-3x_coco' for size in SIZES]


def assert_decays(wrapper, model, weight_decay):
    """As the authors have it, names with "norm" alone are exempt; where theirs have none, ours do not count.

    Of GroupMamba and MambaVision nothing is published: their blocks' and output norms are exempt.
    """
    spatial = model.backbone.architecture.startswith('spatial')
    vmamba = model.backbone.architecture.startswith('vmamba')
    unnamed = r'\.blocks\.\d+\.norm' if spatial else r'\.(stem|downsample)\.norm'
    unnamed = unnamed if spatial or vmamba else r'\.(stem|downsample|stages\.\d)\.norm'
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays = {names[p]: group['weight_decay'] for group in wrapper.optimizer.param_groups for p in group['params']}
    assert decays.keys() == set(names.values())
    for name, value in decays.items():
        exempt = name.startswith('backbone.') and 'norm' in name and not re.search(unnamed, name)
        assert value == (0.0 if exempt else weight_decay), name


@pytest.mark.parametrize(
    'name',
    [pytest.param(n, marks=[] if '_tiny_' in n else pytest.mark.slow) for n in ADE20K + COCO_1X + COCO_3X],
)
def test_a_dense_config_builds_its_whole_run(name, data, tmp_path, monkeypatch):
    segments = name in ADE20K
    cfg = load_config(name, data, tmp_path, **{'auto_scale_lr.enable': True})
    short = name.replace('-ms-3x_', '-1x_')
    assert cfg.model == Config.fromfile(find_config(short)).model
    monkeypatch.setattr(Runner, 'build_model', lambda runner, model: meta_model(short))
    monkeypatch.setattr('mmengine.runner.runner.get_device', lambda: torch.device('meta'))
    runner = Runner.from_cfg(cfg)
    model, wanted = runner.model, model_of(name)
    assert not [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert model.backbone.architecture == wanted and model.backbone.levels == (0, 1, 2, 3)
    heads = (
        [model.decode_head, model.auxiliary_head] if segments else [model.roi_head.bbox_head, model.roi_head.mask_head]
    )
    assert {head.num_classes for head in heads} == {150 if segments else 80}
    millions = round(sum(p.numel() for p in model.parameters()) / 1e6)
    if '2d' not in wanted:
        assert wanted not in PUBLISHED or millions == PUBLISHED[wanted][segments][0]
        assert model.backbone.pretrained
    else:
        assert millions == PUBLISHED[wanted.replace('2d', '')][segments][0]
        assert wanted in model.backbone.init_cfg['checkpoint']

    loop, batch_size = runner.build_train_loop(runner._train_loop), runner.cfg.train_dataloader.batch_size
    sample = loop.dataloader.dataset[0]
    if segments:
        assert (loop.max_iters, batch_size) == (160000, 4)
        assert max(sample['inputs'].shape[1:]) <= 512 and model.data_preprocessor.size == (512, 512)
        labels = sample['data_samples'].gt_sem_seg.data
        assert labels.shape[1:] == sample['inputs'].shape[1:] and ((labels < 150) | (labels == 255)).all()
    else:
        assert (loop.max_epochs, batch_size) == (12 if name in COCO_1X else 36, 2)
        assert sample['inputs'].shape[0] == 3 and len(sample['data_samples'].gt_instances)
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    assert type(wrapper.optimizer) is torch.optim.AdamW
    assert_decays(wrapper, model, 0.01 if segments else 0.05)
    rate = 6e-5 if segments else 1e-4
    assert {(group['lr'], *group['betas']) for group in wrapper.optimizer.param_groups} == {(rate, 0.9, 0.999)}
    assert runner.auto_scale_lr.base_batch_size == 16
    runner.scale_lr(wrapper, runner.auto_scale_lr)  # one process here
    assert {group['lr'] for group in wrapper.optimizer.param_groups} == {rate * batch_size / 16}
    runner.optim_wrapper, runner._train_loop = wrapper, loop
    assert len(runner.build_param_scheduler(runner.param_schedulers)) == 2
    for loop in (runner.build_val_loop(runner._val_loop), runner.build_test_loop(runner._test_loop)):
        assert len(loop.dataloader.dataset) == 4 and loop.evaluator.metrics


@pytest.mark.parametrize(
    'name, steps, expected',
    [
        (ADE20K[0], 3001, {0: 6e-11, 750: 3e-5, 1500: 6e-5, 3000: 6e-5 * (1 - 1500 / 158500)}),
        (COCO_1X[0], 13, {0: 1e-7, 7: 1e-4, 8: 1e-5, 10: 1e-5, 11: 1e-6, 12: 1e-6}),
        (COCO_3X[0], 37, {0: 1e-7, 26: 1e-4, 27: 1e-5, 33: 1e-6, 36: 1e-6}),
    ],
    ids=['ade20k', 'coco-1x', 'coco-3x'],
)
def test_the_schedule(name, steps, expected):
    """By iterations on ADE20K; on COCO by epochs, with a warm-up within the first."""
    cfg = Config.fromfile(find_config(name))
    init_default_scope(cfg.default_scope)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = [PARAM_SCHEDULERS.build(dict(s, optimizer=optimizer)) for s in cfg.param_scheduler]
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            for _ in range(1 if name in ADE20K or scheduler.by_epoch else 1000):
                scheduler.step()
    for step, rate in expected.items():
        assert rates[step] == pytest.approx(rate, rel=2e-3), step


# ---- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[] if '_tiny_' in name else pytest.mark.slow)
        for name in ADE20K + COCO_1X
        if model_of(name) in PUBLISHED
    ],
)
def test_published_cost(name):
    published = PUBLISHED[model_of(name)][name in ADE20K][1]
    # 384 is not what the small VMamba can need: by their own UPerNets it needs (1028 - 949) * (1280 * 800) / (512 *
    # 2048) = 77 more than the tiny one's 271. The digits seem to have changed places, of 348.
    published = 348 if published == 384 else published
    shape = (512, 2048) if name in ADE20K else (800, 1280)
    assert multiply_adds(meta_model(name).eval(), shape) / 1e9 == pytest.approx(published, rel=0.005)


# ---- a step of each task ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_run(small_config, data, tmp_path):
    """A config with a test model, small images, and two steps, on the miniature data."""

    def small_run(task, model_name):
        name, options = small_config(task, model_name)
        return load_config(name, data, tmp_path, **options)

    return small_run


METRICS = dict(ade20k={'mIoU', 'aAcc', 'mAcc'}, coco={'coco/bbox_mAP', 'coco/segm_mAP'})


@pytest.mark.parametrize(
    'task, model_name',
    [
        ('ade20k', 'test_spatial_mamba'),
        ('coco', 'test_vmamba2d'),
        pytest.param('ade20k', 'test_groupmamba', marks=pytest.mark.slow),
        pytest.param('coco', 'test_mambavision', marks=pytest.mark.slow),
    ],
)
def test_a_run_trains_evaluates_and_its_checkpoint_starts_another(task, model_name, small_run, tmp_path):
    runner = Runner.from_cfg(small_run(task, model_name))
    before = {name: value.detach().clone() for name, value in runner.model.named_parameters()}
    runner.train()
    still = {name for name, value in runner.model.named_parameters() if torch.equal(value, before[name])}
    # Where the map is one position nothing decays, and its neighbourhood is it alone.
    assert not [name for name in still if name.startswith('backbone') and not name.endswith(('A_log', '.D'))]
    assert all(value.isfinite().all() for value in runner.model.parameters())
    assert math.isfinite(runner.message_hub.get_scalar('train/loss').current())
    assert METRICS[task] <= {k.removeprefix('val/') for k in runner.message_hub.log_scalars}

    path = next(tmp_path.glob('*_[12].pth'))
    started = mm.TimmFeatures(model_name, **from_file(path))
    started.init_weights()
    for name, value in runner.model.backbone.state_dict().items():
        assert torch.equal(started.state_dict()[name], value), name
    runner.model.eval()
    with torch.no_grad():
        batch = next(iter(runner.test_dataloader))
        first, again = (runner.model.test_step(batch)[0] for _ in range(2))
    if task == 'ade20k':
        assert torch.equal(first.pred_sem_seg.data, again.pred_sem_seg.data)
        assert first.pred_sem_seg.data.shape[1:] == first.ori_shape and first.pred_sem_seg.data.max() < 150
    else:
        instances = first.pred_instances
        assert 0 < len(instances) <= 100 and instances.masks.shape == (len(instances), *first.ori_shape)
        assert torch.equal(instances.bboxes, again.pred_instances.bboxes)


def test_several_scales_and_flips_are_merged(small_run):
    """As `--tta` of mmseg's test script: the mean of the softmax of every version."""
    cfg = small_run('ade20k', 'test_vmamba')
    cfg.tta_pipeline[1].transforms[0] = [dict(type='Resize', scale_factor=r, keep_ratio=True) for r in (1.0, 1.5)]
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(**cfg.tta_model, module=cfg.model)
    runner = Runner.from_cfg(cfg)
    metrics = runner.test()
    assert METRICS['ade20k'] <= metrics.keys() and all(math.isfinite(v) for v in metrics.values())
    batch = next(iter(runner.test_dataloader))
    assert len(batch['inputs']) == 4


@pytest.mark.slow
@pytest.mark.parametrize('package, task', [('mmseg', 'ade20k'), ('mmdet', 'coco')])
def test_scripts_of_the_packages_train_and_test(package, task, small_run, tmp_path):
    """Their own, with our configs, on the stand-in, as they import mmcv's operators before they read a config."""
    config = tmp_path / 'config.py'
    small_run(task, 'test_vmamba').dump(config)
    scripts = Path(importlib.import_module(package).__file__).parent / '.mim' / 'tools'

    def run(script, *arguments):
        finish(start('vssm.tools.mm', scripts / script, config, *arguments, cwd=tmp_path))

    run('train.py', '--work-dir', tmp_path / 'work')
    checkpoint = next((tmp_path / 'work').glob('*_[12].pth'))
    run('test.py', checkpoint, '--work-dir', tmp_path / 'test')
    metrics = json.loads(next((tmp_path / 'test').glob('*/*.json')).read_text())
    assert METRICS[task] <= metrics.keys()


def test_a_script_that_is_none(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['mm', 'none.py'])
    with pytest.raises(SystemExit, match="SCRIPT must be a Python file, got 'none.py'"):
        runpy.run_module('vssm.tools.mm', run_name='__main__')
