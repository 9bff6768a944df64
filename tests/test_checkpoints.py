# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints: every name and shape of every release loads, and each number lands where it belongs."""

import re

import pytest
import timm
import torch
from vssm.models.vmamba import checkpoint_filter_fn

VARIANTS = {  # key file of the golden folder: our model
    'vmamba_tiny_s1l8': 'vmamba_tiny',
    'vmamba_small_s2l15': 'vmamba_small',
    'vmamba_base_s2l15': 'vmamba_base',
    '2dvmamba_tiny': 'vmamba2d_tiny',
    '2dvmamba_small': 'vmamba2d_small',
    '2dvmamba_base': 'vmamba2d_base',
}
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
NAMINGS = {
    'current': {},
    'alternative': {'op.x_proj_weight': 'op.x_proj.weight', 'op.dt_projs_weight': 'op.dt_projs.weight'},
    'older': {'classifier.norm': 'norm', 'classifier.head': 'head', 'norm': 'ln_1', 'op.': 'self_attention.'},
}


def create(name, device='meta', **kwargs):
    return timm.create_model(name, device=device, **kwargs).eval()


def publish(state, naming='current'):
    """Our state dict under published names and in published shapes, written down independently of the filter."""
    renames = NAMINGS[naming]

    def published_name(ours):
        ours = re.sub(r'^stages\.(\d+)\.downsample', lambda m: f'layers.{int(m[1]) - 1}.downsample', ours)
        ours = re.sub(r'^stages\.', 'layers.', ours)
        block = re.match(r'^(layers\.\d+\.blocks\.\d+\.)(.*)$', ours)
        prefix, rest = block.groups() if block else ('', ours)
        table = BLOCK if block else OUTSIDE
        (old,) = [key for key in table if re.search(rf'(^|\.){re.escape(key)}(\.|$)', rest)]
        published = table[old]
        for key, other in renames.items():
            if published == key or key.endswith('.') and published.startswith(key):
                published = published.replace(key, other)
                break
        return prefix + rest.replace(old, published)

    def published_value(ours, t):
        if ours.endswith('.x_proj.weight'):  # (K (R + 2N), E)
            return t if naming == 'alternative' else t.unflatten(0, (4, -1))
        if ours.endswith('.dt_weight'):  # (K, E, R)
            return t.flatten(0, 1) if naming == 'alternative' else t
        return t.flatten(0, 1) if ours.endswith(('.A_log', '.D')) else t

    return {published_name(name): published_value(name, t) for name, t in state.items()}


def random_state(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=g) for name, t in model.state_dict().items()}


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
    assert not keys['buffers']
    assert_loads(keys['state_dict'], keys['variant'])


@pytest.mark.parametrize('variant', [v for v in VARIANTS if not v.startswith('2d')])  # which was released once
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


@pytest.mark.parametrize('naming', NAMINGS)
def test_what_is_published_here_has_the_published_names(keys, naming):
    """The tables of this file, from which the tests below are made, against the golden files."""
    published = {n: list(t.shape) for n, t in publish(create(VARIANTS[keys['variant']]).state_dict(), naming).items()}
    if naming == 'current':
        assert published == keys['state_dict']
    elif naming == 'alternative' and 'alternative_naming' in keys:
        assert published == alternative_shapes(keys)
    else:
        assert published.keys() != keys['state_dict'].keys() and len(published) == len(keys['state_dict'])


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('wrapper', WRAPPERS, ids=str)
@pytest.mark.parametrize('naming', NAMINGS)
@pytest.mark.parametrize('name', ('test_vmamba', 'test_vmamba2d'))
def test_every_value_lands_in_its_place(name, naming, wrapper):
    model = create(name, d_state=2, ssm_ratio=2.0)
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
def test_own_state_dict_passes_unchanged(wrapper):
    model = create('test_vmamba2d')
    own = random_state(model)
    state = checkpoint_filter_fn(own if wrapper is None else {wrapper: own}, model)
    assert state.keys() == own.keys()
    assert all(state[name] is own[name] for name in own)
    again = checkpoint_filter_fn(checkpoint_filter_fn(publish(own), model), model)
    assert again.keys() == own.keys()


def test_published_checkpoint_computes_the_same():
    model, other = create('test_vmamba2d', 'cpu'), create('test_vmamba2d', 'cpu')
    x = torch.randn(2, 3, 64, 96)
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(checkpoint_filter_fn({'model': publish(model.state_dict())}, other))
    assert torch.equal(model(x), other(x))


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


@pytest.mark.parametrize('naming', NAMINGS)
@pytest.mark.parametrize('name', ('test_vmamba', 'test_vmamba2d'))
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
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 5)

    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=4, num_classes=0)
    assert model.state_dict()['stem.conv1.weight'].shape[1] == 4
    assert model(torch.randn(1, 4, 32, 32)).shape == (1, model.num_features)

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
