# SPDX-License-Identifier: Apache-2.0
"""The recipes against those of the authors, value by value; what decays; and averages of a whole state."""

import copy
import functools
import re

import pytest
import timm
import torch
from golden_files import KEY_FILES
from mmengine.config import Config
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from vssm.models import mm
from vssm.models.weights import rename_fn
from vssm.tools._common import find_config, list_configs

pytestmark = pytest.mark.usefixtures('one_thread')

# As published: none of these is read from our configs. 2DVMamba's drop path on COCO, and that of its small and base
# models, are not published; they are VMamba's. GroupMamba's are a choice by size, and MambaVision's in dense models
# those of its classifiers.
_VMAMBA, _SPATIAL = dict(tiny=0.2, small=0.3, base=0.6), dict(tiny=0.2, small=0.3, base=0.5)
_MAMBAVISION = dict(tiny=0.2, tiny2=0.2, small=0.2, base=0.3, large=0.3, large2=0.3)
DROP_PATH = {
    'vmamba': _VMAMBA | dict(tiny_s2l5=0.2, small_s1l20=0.3, base_s1l20=0.5),
    'vmamba2d': _VMAMBA,
    'vanilla_vmamba': _VMAMBA,
    'spatial_mamba': _SPATIAL,
    'groupmamba': _SPATIAL,
    'vim': dict(tiny_patch16_224=None, small_patch16_224=0.05, base_patch16_224=0.4),
    'mambavision': _MAMBAVISION,
}
DENSE_FAMILIES = ('vmamba', 'vmamba2d', 'spatial_mamba', 'groupmamba', 'mambavision')
MESA = dict(tiny=1.0, small=1.5, base=2.0)
OPTIMIZERS = dict(
    imagenet=dict(type='adamw', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),  # for 1,024 images a step
    ade20k=dict(type='adamw', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    coco=dict(type='adamw', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
BATCHES = dict(imagenet=(8, 128), ade20k=(4, 4), coco=(8, 2))  # processes and images of each
WARM_UP = dict(imagenet=(1e-3, 20), ade20k=(1e-6, 1500), coco=(1e-3, 1000))  # first share of the rate, and length
FALL = {
    'imagenet': dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, begin=20, end=300, T_max=280),
    'ade20k': dict(type='PolyLR', power=1.0, eta_min=0.0, begin=1500, end=160000),
    'coco-1x': dict(type='MultiStepLR', gamma=0.1, milestones=[8, 11], begin=0, end=12),
    'coco-3x': dict(type='MultiStepLR', gamma=0.1, milestones=[27, 33], begin=0, end=36),
}
LENGTHS = {'imagenet': 300, 'ade20k': 160000, 'coco-1x': 12, 'coco-3x': 36}

# Where a family differs on ImageNet-1K from what stands above, which is VMamba's.
DEIT = dict(
    clip_grad=None,
    warm_up=(1e-3, 5),
    fall=dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, begin=5, end=300, T_max=295),
    momentum=4e-5,
)
ADAMW = OPTIMIZERS['imagenet']
OTHERWISE = {
    'vim_tiny_patch16_224': dict(DEIT, optimizer=ADAMW | dict(weight_decay=0.1)),
    'vim_small_patch16_224': dict(DEIT, batch=(8, 64)),
    'vim_base_patch16_224': dict(DEIT, optimizer=ADAMW | dict(weight_decay=0.1)),
    **{
        f'mambavision_{size}': dict(
            optimizer=dict(type='lamb', lr=5e-3, weight_decay=0.05),
            batch=(32, 128),
            fall=dict(type='CosineAnnealingLR', eta_min_ratio=1e-3, begin=20, end=300, T_max=280),
            length=310,
            mesa=0.5,
        )
        for size in _MAMBAVISION
    },
    **{f'spatial_mamba_{size}': dict(mesa=mesa) for size, mesa in MESA.items()},
}

NAMES = [name for name in list_configs() if name.partition('/')[0] in OPTIMIZERS]
DENSE = [name for name in NAMES if not name.startswith('imagenet')]
IMAGENET = [f'{family}_{size}' for family, sizes in DROP_PATH.items() for size in sizes]
PUBLISHED = {model: file for file, model in KEY_FILES.items() if '2dvmamba' not in file}
PUBLISHED |= {
    model.replace('vmamba', 'vmamba2d', 1): file
    for model, file in PUBLISHED.items()
    if model in ('vmamba_tiny', 'vmamba_small', 'vmamba_base')
}


@pytest.fixture(scope='module')
def read(quick_configs):
    """read(name): a shipped config."""
    for package in ('mmdet', 'mmseg'):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[mmlab]'")
    return functools.cache(lambda name: Config.fromfile(find_config(name)))


def parts(name):
    """('coco', '3x', 'vmamba', 'tiny') of a config's name, and the like."""
    task, _, rest = name.partition('/')
    model = re.fullmatch(r'(?:upernet_|mask-rcnn_)?(.*?)(?:_fpn)?_\d+xb\d+-.*', rest)[1]
    family = next(family for family in DROP_PATH if model.startswith(f'{family}_'))
    return (
        task,
        next((length for length in ('1x', '3x') if f'-{length}_' in name), ''),
        family,
        model[len(family) + 1 :],
    )


def test_every_recipe_is_looked_at():
    dense = [(task, '', f'{family}_{size}') for task in OPTIMIZERS for family in DENSE_FAMILIES for size in MESA]
    found = [(task, length, f'{family}_{size}') for task, length, family, size in map(parts, NAMES)]
    expected = [
        (task, length, model) for task, _, model in dense for length in (('1x', '3x') if task == 'coco' else [''])
    ]
    expected = [entry for entry in expected if entry[0] != 'imagenet'] + [('imagenet', '', model) for model in IMAGENET]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_is_the_published_one(name, read):
    cfg = read(name)
    task, length, family, size = parts(name)
    whole = f'{task}-{length}' if length else task
    network = cfg.model if task == 'imagenet' else cfg.model.backbone
    assert network.model_name == f'{family}_{size}'
    assert network.get('drop_path_rate') == DROP_PATH[family][size]
    other = OTHERWISE.get(network.model_name, {}) if task == 'imagenet' else {}

    assert cfg.optim_wrapper.optimizer == other.get('optimizer', OPTIMIZERS[task])
    clip_grad = dict(max_norm=5.0) if task == 'imagenet' else None
    assert cfg.optim_wrapper.get('clip_grad') == other.get('clip_grad', clip_grad)
    processes, images = other.get('batch', BATCHES[task])
    assert f'_{processes}xb{images}-' in name and cfg.train_dataloader.batch_size == images
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=processes * images)
    warm_up, fall = cfg.param_scheduler
    by_epoch = task != 'ade20k'
    assert (warm_up.type, warm_up.begin) == ('LinearLR', 0)
    assert (warm_up.start_factor, warm_up.end) == other.get('warm_up', WARM_UP[task])
    assert warm_up.get('by_epoch', True) == (task == 'imagenet') and fall.get('by_epoch', True) == by_epoch
    expected = other.get('fall', FALL[whole])
    assert {key: fall[key] for key in expected} == expected
    assert cfg.train_cfg['max_epochs' if by_epoch else 'max_iters'] == other.get('length', LENGTHS[whole])

    hooks = [hook for hook in cfg.get('custom_hooks', []) if hook.type in ('EMAHook', 'MESAHook')]
    average = dict(type='EMAHook', ema_type='StateAverage', momentum=other.get('momentum', 1e-4))
    expected = [average] if task == 'imagenet' else []
    if 'mesa' in other:
        expected.append(dict(type='MESAHook', weight=other['mesa']))
    assert hooks == expected


# ---- what decays -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def published(golden):
    """published(model): our names of its parameters, each with the published name and number of dimensions."""

    def published(model):
        keys = golden(f'keys_{PUBLISHED[model]}.json')
        buffers = re.compile(r'\.(running_mean|running_var|num_batches_tracked)$')
        shapes = {name: shape for name, shape in keys['state_dict'].items() if not buffers.search(name)}
        with torch.device('meta'), pytest.MonkeyPatch.context() as patch:
            patch.setattr('vssm.models.backbone.trunc_normal_', lambda *args, **kwargs: None)  # slow, of no effect here
            network = timm.create_model(model)
        ours = rename_fn(model)({name: torch.empty(shape, device='meta') for name, shape in shapes.items()}, network)
        assert ours.keys() == dict(network.named_parameters()).keys()
        return network, {mine: (name, len(shapes[name])) for mine, name in zip(ours, shapes, strict=True)}

    return published


def decays(cfg, model):
    """Full names of the parameters that decay."""
    wrapper = dict(cfg.optim_wrapper, type='OptimWrapper')
    rule = wrapper.pop('paramwise_cfg', None)
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.get(wrapper.pop('constructor'))(wrapper, rule)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = constructor(model).optimizer.param_groups
    assert {group['weight_decay'] for group in groups} == {0.0, wrapper['optimizer']['weight_decay']}
    assert sum(len(group['params']) for group in groups) == len(names)
    return {names[p] for group in groups if group['weight_decay'] for p in group['params']}


@pytest.mark.parametrize(
    'model',
    [pytest.param(model, marks=[] if re.search('tiny$|tiny_patch', model) else pytest.mark.slow) for model in IMAGENET],
)
def test_what_decays_is_what_the_authors_let_decay(model, published, read):
    """By the names and shapes of the published files, on which the authors' rules look."""
    network, names = published(model)
    whole = nn.ModuleDict(dict(model=network))
    (config,) = (name for name in NAMES if parts(name)[0] == 'imagenet' and '_'.join(parts(name)[2:]) == model)
    exempt = r'\.bias$' + ('|A(_b)?_log$|^pos_embed$|^cls_token$' if model.startswith('vim') else '')
    expected = {f'model.{ours}' for ours, (name, ndim) in names.items() if ndim > 1 and not re.search(exempt, name)}
    assert decays(read(config), whole) == expected
    kinds = {name.rpartition('.')[2] for name in expected}
    assert ('dt_bias' in kinds) == (not re.match('spatial|vim|mambavision', model)) and 'D' not in kinds
    if not model.startswith(('vmamba', 'spatial')):
        return  # of detectors and segmentors of the others nothing is published

    inner = nn.ModuleDict(dict(model=nn.ModuleDict(dict(model=network)), outnorm0=nn.LayerNorm(4, device='meta')))
    head = nn.Sequential(nn.Conv2d(4, 4, 1, device='meta'), nn.BatchNorm2d(4, device='meta'))
    dense = nn.ModuleDict(dict(backbone=inner, head=nn.ModuleDict(dict(conv=head[0], bn=head[1]))))
    expected = {f'backbone.model.model.{ours}' for ours, (name, _) in names.items() if 'norm' not in name}
    expected |= {'head.conv.weight', 'head.conv.bias', 'head.bn.weight', 'head.bn.bias'}
    # The norm of the head is none of a backbone, where there is no head.
    for name in (name for name in DENSE if f'_{model}_' in name):
        found = decays(read(name), dense)
        assert {n for n in found if '.head.norm.' not in n} == {n for n in expected if '.head.norm.' not in n}, name


@pytest.mark.parametrize('name', ['imagenet/vmamba_tiny_8xb128-300e_in1k', *DENSE[:1]])
def test_an_option_chooses_the_rule_of_timm(name, read):
    cfg = copy.deepcopy(read(name))
    cfg.merge_from_dict({'optim_wrapper.paramwise_cfg': None})
    found = decays(cfg, nn.ModuleDict(dict(model=timm.create_model('test_vmamba'))))
    assert {name.rpartition('.')[2] for name in found} == {'weight', 'dt_weight'}
    assert not [name for name in found if 'norm' in name]


@pytest.mark.parametrize('name', [name for name in list_configs() if name.partition('/')[0] not in OPTIMIZERS])
def test_recipes_of_our_own_follow_timm(name):
    """Those for fine-tuning, the digits and slides."""
    assert Config.fromfile(find_config(name)).optim_wrapper.get('paramwise_cfg') is None


def test_rates_of_layers_go_with_any_rule():
    cfg = dict(optimizer=dict(type='sgd', lr=0.5, weight_decay=0.1, layer_decay=0.5))
    model = timm.create_model('test_vmamba')
    groups = mm.TimmOptimWrapperConstructor(cfg, dict(no_decay=['*.D'], vectors_decay=True))(model).optimizer
    still = {id(p) for group in groups.param_groups if not group['weight_decay'] for p in group['params']}
    assert still == {id(p) for name, p in model.named_parameters() if name.endswith('.D')}
    assert len({group['lr'] for group in groups.param_groups}) > 4


@pytest.mark.parametrize(
    'rule', [dict(norm_decay_mult=0.0), dict(no_decay='*.D'), dict(vectors_decay=True), dict(no_decay=['a'], b=1), {}]
)
def test_other_rules_are_refused(rule):
    with pytest.raises(ValueError, match="paramwise_cfg must be None for timm's rule, or dict\\(no_decay=PATTERNS"):
        mm.TimmOptimWrapperConstructor(dict(optimizer=dict(type='sgd')), rule)


# ---- averages --------------------------------------------------------------------------------------------------------


def test_the_average_is_of_all_numbers_and_counters_are_copied():
    """As of timm's ModelEma, but for the counters, from which that takes digits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    average = MODELS.build(dict(type='StateAverage', momentum=0.25), default_args=dict(model=model))
    expected = None
    for _ in range(5):
        model(torch.randn(8, 3) * 3 + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update_parameters(model)
        state = copy.deepcopy(model.state_dict())
        expected = state if expected is None else {k: 0.75 * expected[k] + 0.25 * v for k, v in state.items()}
        expected['1.num_batches_tracked'] = state['1.num_batches_tracked']
    for name, value in average.module.state_dict().items():
        assert value.dtype == state[name].dtype
        torch.testing.assert_close(value, expected[name], msg=name)
    assert average.module[1].num_batches_tracked == 5
    assert not torch.allclose(average.module[1].running_var, model[1].running_var)
    assert isinstance(average, ExponentialMovingAverage)
