# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints: every name and shape of every release loads, and each number lands where it belongs."""

import re
import sys

import pytest
import timm
import torch
from fresh_processes import run_fresh
from golden_files import KEY_FILES
from torch import nn

import vssm  # noqa: F401  registers the models

# Of the families whose tables are below; those of the others are held by the tests of their networks.
VARIANTS = {name: KEY_FILES[name] for name in KEY_FILES if re.match('2dvmamba|spatialmamba|vmamba.*(s1l8|s2l15)', name)}
WRAPPERS = (None, 'model', 'model_ema', 'state_dict', 'state_dict_ema')

# Our names of one block and of what surrounds the blocks, as the three publications of VMamba have them.
BLOCK = {
    'norm1': 'norm',
    'norm2': 'norm2',
    'mlp.fc1': 'mlp.fc1',
    'mlp.fc2': 'mlp.fc2',
    'mixer.in_proj': 'op.in_proj',
    'mixer.conv': 'op.conv2d',
    'mixer.norm': 'op.out_norm',
    'mixer.out_proj': 'op.out_proj',
    'mixer.x_proj.weight': 'op.x_proj_weight',
    'mixer.dt_weight': 'op.dt_projs_weight',
    'mixer.dt_bias': 'op.dt_projs_bias',
    'mixer.A_log': 'op.A_logs',
    'mixer.D': 'op.Ds',
}
OUTSIDE = {
    'stem.conv1': 'patch_embed.0',
    'stem.norm1': 'patch_embed.2',
    'stem.conv2': 'patch_embed.5',
    'stem.norm2': 'patch_embed.7',
    'downsample.conv': 'downsample.1',
    'downsample.norm': 'downsample.3',
    'head.norm': 'classifier.norm',
    'head.fc': 'classifier.head',
}
# The same of Spatial-Mamba's one publication.
SPATIAL_BLOCK = {
    'norm1': 'ln_1',
    'norm2': 'ln_2',
    'cpe1': 'cpe1',
    'cpe2': 'cpe2',
    'mlp.fc1': 'mlp.fc1',
    'mlp.fc2': 'mlp.fc2',
    'mixer.in_proj': 'self_attention.in_proj',
    'mixer.conv': 'self_attention.conv2d',
    'mixer.norm': 'self_attention.out_norm',
    'mixer.out_proj': 'self_attention.out_proj',
    'mixer.fusion': 'self_attention.state_fusion',
    'mixer.x_proj.weight': 'self_attention.x_proj_weight',
    'mixer.dt_weight': 'self_attention.dt_projs_weight',
    'mixer.dt_bias': 'self_attention.dt_projs_bias',
    'mixer.A_log': 'self_attention.A_logs',
    'mixer.D': 'self_attention.Ds',
}
SPATIAL_OUTSIDE = {
    'stem.conv1': 'patch_embed.conv1.conv',
    'stem.norm1': 'patch_embed.conv1.norm',
    'stem.conv2': 'patch_embed.conv2.0.conv',
    'stem.norm2': 'patch_embed.conv2.0.norm',
    'stem.conv3': 'patch_embed.conv2.1.conv',
    'stem.norm3': 'patch_embed.conv2.1.norm',
    'stem.conv4': 'patch_embed.conv3.0.conv',
    'stem.norm4': 'patch_embed.conv3.0.norm',
    'stem.conv5': 'patch_embed.conv3.1.conv',
    'stem.norm5': 'patch_embed.conv3.1.norm',
    'downsample.conv1': 'downsample.conv.0.conv',
    'downsample.conv2': 'downsample.conv.1.conv',
    'downsample.conv3': 'downsample.conv.2.conv',
    'downsample.norm': 'downsample.conv.2.norm',
    'head.norm': 'norm',
    'head.fc': 'head',
}
NAMINGS = {
    'current': {},
    'alternative': {'op.x_proj_weight': 'op.x_proj.weight', 'op.dt_projs_weight': 'op.dt_projs.weight'},
    'spatial': {},
    'older': {'classifier.norm': 'norm', 'classifier.head': 'head', 'norm': 'ln_1', 'op.': 'self_attention.'},
}


def create(name, device='meta', **kwargs):
    return timm.create_model(name, device=device, **kwargs).eval()


def checkpoint_filter_fn(state_dict, model):
    return sys.modules[type(model).__module__].checkpoint_filter_fn(state_dict, model)


def naming_of(name):
    return 'spatial' if 'spatial' in name else 'current'


def publish(state, naming='current'):
    """Our state dict under published names and in published shapes, written down independently of the filter."""
    renames = NAMINGS[naming]

    def published_name(ours):
        ours = re.sub(r'^stages\.(\d+)\.downsample', lambda m: f'layers.{int(m[1]) - 1}.downsample', ours)
        ours = re.sub(r'^stages\.', 'layers.', ours)
        block = re.match(r'^(layers\.\d+\.blocks\.\d+\.)(.*)$', ours)
        prefix, rest = block.groups() if block else ('', ours)
        if naming == 'spatial':
            table = SPATIAL_BLOCK if block else SPATIAL_OUTSIDE
        else:
            table = BLOCK if block else OUTSIDE
        (old,) = [key for key in table if re.search(rf'(^|\.){re.escape(key)}(\.|$)', rest)]
        published = table[old]
        for key, other in renames.items():
            if published == key or key.endswith('.') and published.startswith(key):
                published = published.replace(key, other)
                break
        return prefix + rest.replace(old, published)

    def published_value(ours, t):
        if naming == 'spatial':  # one order, whose axis is left out
            return t.squeeze(0) if ours.endswith(('.dt_weight', '.dt_bias', '.A_log', '.D')) else t
        if ours.endswith('.x_proj.weight'):  # (K (R + 2N), E)
            return t if naming == 'alternative' else t.unflatten(0, (4, -1))
        if ours.endswith('.dt_weight'):  # (K, E, R)
            return t.flatten(0, 1) if naming == 'alternative' else t
        return t.flatten(0, 1) if ours.endswith(('.A_log', '.D')) else t

    return {published_name(name): published_value(name, t) for name, t in state.items()}


def random_state(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(t.shape, generator=g) if t.is_floating_point() else torch.tensor(7)  # batches seen
        for name, t in model.state_dict().items()
    }


def meta_tensors(shapes):
    return {name: torch.empty(shape, device='meta') for name, shape in shapes.items()}


def alternative_shapes(keys):
    """The shapes of the newer single-file release: its two renamed projections in place of the stacked ones."""
    shapes = dict(keys['state_dict'])
    for name, shape in keys['alternative_naming'].items():
        stem, _, last = name.rpartition('.')
        del shapes[f'{stem}_{last}']
        shapes[name] = shape
    return shapes


@pytest.fixture(params=VARIANTS)
def keys(request, golden):
    return golden(f'keys_{request.param}.json')


# ---- names and shapes ------------------------------------------------------------------------------------------------


def assert_loads(shapes, variant):
    model = create(VARIANTS[variant])
    state = checkpoint_filter_fn(meta_tensors(shapes), model)
    assert state.keys() == model.state_dict().keys()
    model.load_state_dict(state, strict=True, assign=True)


def test_published_names_load(keys):
    assert bool(keys['buffers']) == ('spatial' in keys['variant'])
    assert_loads(keys['state_dict'], keys['variant'])


@pytest.mark.parametrize('variant', [v for v in VARIANTS if v.startswith('vmamba')])  # the others were released once
def test_names_of_the_newer_release_load(golden, variant):
    assert_loads(alternative_shapes(golden(f'keys_{variant}.json')), variant)


def test_published_backbone_names_load(keys):
    backbone = create(VARIANTS[keys['variant']], features_only=True).model
    shapes = dict(keys['state_dict'])
    for name in keys['backbone_state_dict_missing']:
        del shapes[name]
    state = checkpoint_filter_fn(meta_tensors(shapes), backbone)
    backbone.load_state_dict(state, strict=True, assign=True)
    # The output norms belong to a detector: their names stay, so that a strict load reports them.
    shapes |= {name: [1] for name in keys['backbone_state_dict_extra']}
    state = checkpoint_filter_fn(meta_tensors(shapes), backbone)
    with pytest.raises(RuntimeError, match='Unexpected key.*"outnorm0.weight"'):
        backbone.load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize(
    'variant, naming', [(v, n) for v in VARIANTS for n in NAMINGS if (n == 'spatial') == ('spatial' in v)]
)
def test_what_is_published_here_has_the_published_names(golden, variant, naming):
    """The tables of this file, from which the tests below are made, against the golden files."""
    keys = golden(f'keys_{variant}.json')
    published = {n: list(t.shape) for n, t in publish(create(VARIANTS[keys['variant']]).state_dict(), naming).items()}
    if naming in ('current', 'spatial'):
        assert published == keys['state_dict']
    elif naming == 'alternative' and 'alternative_naming' in keys:
        assert published == alternative_shapes(keys)
    else:
        assert published.keys() != keys['state_dict'].keys() and len(published) == len(keys['state_dict'])


# ---- values ----------------------------------------------------------------------------------------------------------


every_naming = pytest.mark.parametrize(
    'name, naming',
    [
        *[(name, naming) for name in ('test_vmamba', 'test_vmamba2d') for naming in NAMINGS if naming != 'spatial'],
        ('test_spatial_mamba', 'spatial'),
    ],
)


@pytest.mark.parametrize('wrapper', WRAPPERS, ids=str)
@every_naming
def test_every_value_lands_in_its_place(name, naming, wrapper):
    model = create(name, **({} if naming == 'spatial' else dict(d_state=2, ssm_ratio=2.0)))
    expected = random_state(model)
    checkpoint = publish(expected, naming)
    assert not checkpoint.keys() & expected.keys()
    if wrapper is not None:
        checkpoint = {'epoch': 3, wrapper: checkpoint, 'optimizer': {}}
    state = checkpoint_filter_fn(checkpoint, model)
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize('proj, norm', [('0', '2'), ('proj', 'norm')])
def test_patch_embedding_of_older_files(proj, norm):
    """Its first convolution and norm had names before they had numbers."""
    model = create('test_vmamba')
    expected = random_state(model)
    renames = {'patch_embed.0.': f'patch_embed.{proj}.', 'patch_embed.2.': f'patch_embed.{norm}.'}
    checkpoint = {}
    for name, value in publish(expected, 'older').items():
        for old, new in renames.items():
            name = name.replace(old, new)
        checkpoint[name] = value
    state = checkpoint_filter_fn(checkpoint, model)
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


def test_averaged_weights_come_first(tmp_path):
    """As where timm unwraps the file itself."""
    model, averaged = (timm.create_model('test_vmamba') for _ in range(2))
    file = tmp_path / 'both.pth'
    torch.save({'model': model.state_dict(), 'model_ema': averaged.state_dict()}, file)
    state = checkpoint_filter_fn(torch.load(file, weights_only=True), model)
    loaded = timm.create_model('test_vmamba', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    for name, value in averaged.state_dict().items():
        assert torch.equal(state[name], value) and torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize('wrapper', WRAPPERS, ids=str)
@pytest.mark.parametrize('name', ('test_vmamba2d', 'test_spatial_mamba'))
def test_own_state_dict_passes_unchanged(name, wrapper):
    model = create(name)
    own = random_state(model)
    state = checkpoint_filter_fn(own if wrapper is None else {wrapper: own}, model)
    assert state.keys() == own.keys()
    assert all(state[name] is own[name] for name in own)
    again = checkpoint_filter_fn(checkpoint_filter_fn(publish(own, naming_of(name)), model), model)
    assert again.keys() == own.keys()
    for key, value in own.items():  # alone, too
        assert checkpoint_filter_fn({key: value}, model) == {key: value}


@pytest.mark.parametrize('name', ('test_vmamba2d', 'test_spatial_mamba'))
def test_published_checkpoint_computes_the_same(name):
    model, other = create(name, 'cpu'), create(name, 'cpu')
    x = torch.randn(2, 3, 64, 96)
    assert not torch.equal(model(x), other(x))
    other.load_state_dict({'model': publish(model.state_dict(), naming_of(name))})
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize('name', ('test_vmamba2d', 'test_spatial_mamba'))
def test_a_changed_model_loads_its_own_state(name):
    """Whatever it was changed into, its names are its own, even those that are published ones elsewhere."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantised = create(name, 'cpu')
    quantize_(quantised, Int8DynamicActivationInt8WeightConfig())
    replaced = create(name, 'cpu')
    replaced.head = nn.Linear(96, 3)
    extended = create(name, 'cpu')
    extended.norm = nn.LayerNorm(4)
    for model in (quantised, replaced, extended):
        state = model.state_dict()
        assert not any(model.load_state_dict(state))


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('missing', ('layers.2.blocks.1.op.Ds', 'patch_embed.5.bias', 'classifier.norm.weight'))
def test_missing_tensor_is_named(missing):
    model = create('test_vmamba')
    checkpoint = publish(random_state(model))
    (ours,) = checkpoint_filter_fn({missing: checkpoint.pop(missing)}, model)
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{re.escape(ours)}"'):
        model.load_state_dict(checkpoint_filter_fn(checkpoint, model), assign=True)


@pytest.mark.parametrize('odd', ('layers.9.blocks.0.op.Ds', 'layers.0.blocks.0.op.x_proj_bias', 'pos_embed'))
def test_unknown_tensor_is_named(odd):
    model = create('test_vmamba')
    checkpoint = publish(random_state(model)) | {odd: torch.zeros(3)}
    (ours,) = checkpoint_filter_fn({odd: torch.zeros(3)}, model)
    with pytest.raises(RuntimeError, match=rf'Unexpected key.*"{re.escape(ours)}"'):
        model.load_state_dict(checkpoint_filter_fn(checkpoint, model), assign=True)


def test_two_names_of_one_tensor_are_told():
    model = create('test_vmamba', 'cpu')
    both = {**model.state_dict(), 'norm.weight': torch.zeros(96)}
    for state in (both, dict(reversed(both.items()))):
        with pytest.raises(RuntimeError, match='Unexpected key.*"norm.weight"'):
            model.load_state_dict(state)


def test_missing_counters_are_told():
    model = create('test_spatial_mamba', 'cpu')
    state = model.state_dict()
    del state['stem.norm1.num_batches_tracked']
    with pytest.raises(RuntimeError, match='Missing key.*num_batches_tracked'):
        model.load_state_dict(state)


SCAN_TENSORS = ('x_proj_weight', 'dt_projs_weight', 'dt_projs_bias', 'A_logs', 'Ds')


@pytest.mark.parametrize('name', SCAN_TENSORS)
def test_scan_tensor_of_another_size_is_named(name):
    model = create('test_vmamba')
    checkpoint = publish(random_state(model))
    key = f'layers.1.blocks.0.op.{name}'
    checkpoint[key] = torch.cat([checkpoint[key], checkpoint[key][:1]])
    with pytest.raises(ValueError) as error:
        checkpoint_filter_fn(checkpoint, model)
    for part in (key, 'stages.1.blocks.0.mixer.', str(tuple(checkpoint[key].shape))):
        assert part in str(error.value)


def test_other_tensor_of_another_size_is_named():
    model = create('test_vmamba')
    checkpoint = publish(random_state(model))
    checkpoint['layers.0.blocks.0.norm.weight'] = torch.zeros(7)
    with pytest.raises(RuntimeError, match=r'size mismatch for stages\.0\.blocks\.0\.norm1\.weight'):
        model.load_state_dict(checkpoint_filter_fn(checkpoint, model), assign=True)


@pytest.mark.parametrize('kwargs', (dict(ssm_ratio=2.0), dict(d_state=2)), ids=str)
def test_checkpoint_of_another_configuration_is_refused(kwargs):
    checkpoint = publish(random_state(create('test_vmamba', **kwargs)))
    with pytest.raises(ValueError, match='checkpoint: layers'):
        checkpoint_filter_fn(checkpoint, create('test_vmamba'))


# ---- through timm ----------------------------------------------------------------------------------------------------


@every_naming
def test_create_model_adapts_a_published_file(name, naming, tmp_path):
    full = random_state(create(name))
    path = tmp_path / 'published.pth'
    torch.save({'model': publish(full, naming)}, path)
    overlay = dict(file=str(path))

    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(t, full[n]) for n, t in model.state_dict().items())

    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=5)
    for n, t in model.state_dict().items():
        if n == 'stem.conv1.weight':
            torch.testing.assert_close(t, full[n].sum(1, keepdim=True))
        elif n.startswith('head.fc.'):
            assert t.shape[0] == 5
        else:
            assert torch.equal(t, full[n]), n
    assert model.eval()(torch.randn(1, 1, 32, 32)).shape == (1, 5)

    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=4, num_classes=0)
    assert model.state_dict()['stem.conv1.weight'].shape[1] == 4
    assert model.eval()(torch.randn(1, 4, 32, 32)).shape == (1, model.num_features)

    backbone = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    state = backbone.model.state_dict()
    assert len(state) == len(full) - 4  # without the head's norm and classifier
    assert all(torch.equal(t, full[n]) for n, t in state.items())


def test_load_checkpoint(tmp_path):
    full = random_state(create('test_vmamba'))
    own, published = tmp_path / 'own.pth', tmp_path / 'published.pth'
    torch.save({'state_dict': full}, own)
    torch.save({'model_ema': publish(full)}, published)
    model = create('test_vmamba', 'cpu', checkpoint_path=str(own))
    assert all(torch.equal(t, full[n]) for n, t in model.state_dict().items())
    model = create('test_vmamba', 'cpu')
    timm.models.load_checkpoint(model, str(published), filter_fn=checkpoint_filter_fn)
    assert all(torch.equal(t, full[n]) for n, t in model.state_dict().items())


@every_naming
def test_checkpoint_path_takes_a_published_file(name, naming, tmp_path):
    full = random_state(create(name))
    path = tmp_path / 'published.pth'
    torch.save({'model': publish(full, naming), 'epoch': 299}, path)
    model = timm.create_model(name, checkpoint_path=str(path))
    assert all(torch.equal(t, full[n]) for n, t in model.state_dict().items())


@pytest.mark.filterwarnings('ignore:Mapping deprecated')  # which pytest brings back
@pytest.mark.parametrize(
    'alias, name',
    [
        *[(f'2dvmamba_{size}', f'vmamba2d_{size}') for size in ('tiny', 'small', 'base')],
        *[(f'spatialmamba_{size}', f'spatial_mamba_{size}') for size in ('tiny', 'small', 'base')],
        ('vmamba_tiny_s1l8', 'vmamba_tiny'),
        ('vmamba_small_s2l15', 'vmamba_small'),
        ('vmamba_base_s2l15', 'vmamba_base'),
    ],
)
def test_the_names_of_the_papers_code(alias, name):
    for given in (alias, f'{alias}.in1k'):
        model = create(given, num_classes=7, depths=(1, 1, 1, 1))  # the others of its arguments are the name's
        assert model.pretrained_cfg['architecture'] == name and model.num_classes == 7
        assert model.num_features == create(name, depths=(1, 1, 1, 1)).num_features
    assert alias not in timm.list_models()


def test_aliases_do_not_warn():
    code = "import warnings; warnings.simplefilter('error'); import timm, vssm"
    result = run_fresh(f"{code}; timm.create_model('2dvmamba_tiny', device='meta')")
    assert result.returncode == 0, result.stderr
