# SPDX-License-Identifier: Apache-2.0
"""MambaVision: names, windows, initialisation, and published files."""

import argparse
import json
import pickle
import re
import sys
import types

import pytest
import timm
import torch
from golden_files import under

from vssm.models.mambavision import Attention, MambaVisionMixer, WindowStage, default_cfgs
from vssm.models.weights import convert, identify

KEY_FILES = {  # of the golden folder: our model
    'mambavision_T': 'mambavision_tiny',
    'mambavision_T2': 'mambavision_tiny2',
    'mambavision_S': 'mambavision_small',
    'mambavision_B': 'mambavision_base',
    'mambavision_L': 'mambavision_large',
    'mambavision_L2': 'mambavision_large2',
    'mambavision_L3_256_21k': 'mambavision_large3',
}


# ---- names and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('alias, name', [*KEY_FILES.items()])
def test_published_names_of_mambavision_create(alias, name):
    alias = alias.replace('mambavision', 'mamba_vision')
    assert timm.create_model(alias, device='meta').pretrained_cfg['architecture'] == name


@pytest.mark.parametrize('name', timm.list_models('mambavision_*', name_matches_cfg=True))
def test_windows_tile_the_map_of_the_configured_size(name):
    model = timm.create_model(name, device='meta')
    size = model.pretrained_cfg['input_size'][1]
    for stage, info in zip(model.stages[2:], model.feature_info[2:], strict=True):
        assert size // info['reduction'] % stage.window_size == 0
    assert {cfg.license for cfg in default_cfgs[name].cfgs.values()} == {'cc-by-nc-sa-4.0'}


# ---- windows ---------------------------------------------------------------------------------------------------------


def test_a_window_sees_nothing_of_the_others():
    """Of a map of 2x3 windows, the last row and column padded: a change at one position changes its window alone."""
    blocks = timm.create_model('test_mambavision', dims=16, dtype=torch.float64).eval().stages[2].blocks
    stage = WindowStage(torch.nn.Identity(), blocks, window_size=4)
    x = torch.randn(2, 64, 7, 10, dtype=torch.float64)
    y = stage(x)
    assert y.shape == x.shape
    x[1, 0, 5, 6] += 1
    changed = (stage(x) != y).any(1)
    window = torch.zeros(2, 7, 10, dtype=torch.bool)
    window[1, 4:, 4:8] = True
    assert torch.equal(changed, window)


def test_padding_is_zeros_that_take_part(assert_close):
    blocks = timm.create_model('test_mambavision', dims=16, dtype=torch.float64).eval().stages[2].blocks
    stage = WindowStage(torch.nn.Identity(), blocks, window_size=4)
    x = torch.randn(1, 64, 3, 4, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1))
    assert_close(stage(x), stage(padded)[:, :, :3], 1e-12)
    assert (blocks(x.flatten(2).mT) - stage(x).flatten(2).mT).abs().max() > 1e-6  # as without any padding


def test_the_second_half_of_the_blocks_has_attention():
    for depth, mixers in ((1, 1), (4, 2), (5, 3), (12, 6)):
        model = timm.create_model('test_mambavision', device='meta', depths=(1, 1, depth, 2))
        kinds = [type(block.mixer) for block in model.stages[2].blocks]
        assert kinds == [MambaVisionMixer] * mixers + [Attention] * (depth - mixers)


@pytest.mark.parametrize('name', ('num_heads', 'window_size'))
def test_wrong_number_of_heads_or_windows(name):
    with pytest.raises(ValueError, match=rf'{name} must give one number for each of the 4 depths, got \(2, 2\)'):
        timm.create_model('test_mambavision', device='meta', **{name: (2, 2)})


# ---- initialisation --------------------------------------------------------------------------------------------------


def test_the_steps_are_initialised_as_other_linear_layers():
    model = timm.create_model('test_mambavision', dims=64)
    for block in [block for stage in model.stages[2:] for block in stage.blocks]:
        weights = [m.weight for m in block.modules() if isinstance(m, torch.nn.Linear)]
        assert not any(m.bias.any() for m in block.modules() if getattr(m, 'bias', None) is not None)
        if isinstance(block.mixer, MambaVisionMixer):
            weights.append(block.mixer.dt_weight)
            rates = torch.arange(1.0, 9).expand_as(block.mixer.A_log)
            torch.testing.assert_close(block.mixer.A_log.exp(), rates)
            assert (block.mixer.D == 1).all() and not block.mixer.dt_bias.any()
        assert all(abs(weight.std() / 0.02 - 1) < 0.1 for weight in weights)
        assert (block.ls1.gamma == 1e-2).all() and (block.ls2.gamma == 1e-2).all()
    norms = {m.eps for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d) and n.startswith('stem')}
    assert norms == {1e-4}


# ---- published files -------------------------------------------------------------------------------------------------


@pytest.fixture
def published(golden, tmp_path, monkeypatch):
    """A file as the authors' are: weights under a key, beside objects of classes that are not there any more."""
    tensors, metadata = golden('mambavision_micro')
    path = tmp_path / 'mambavision_micro.pth.tar'
    with monkeypatch.context() as patch:
        module = types.ModuleType('stranger')
        module.Settings = type('Settings', (), {'__module__': 'stranger'})
        patch.setitem(sys.modules, 'stranger', module)
        beside = dict(arch='mamba_vision_T', epoch=310, args=argparse.Namespace(lr=5e-3), settings=module.Settings())
        torch.save({'state_dict': under(tensors, 'state_dict.'), **beside}, path)
    return path, tensors, metadata['config']


def test_a_published_mambavision_file_is_converted(published, tmp_path, assert_close):
    path, tensors, config = published
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    converted = convert(path, tmp_path / 'micro.safetensors', 'mambavision_tiny')
    args = json.loads(converted.metadata['model_args'])
    told = dict(stem_dim=8, dims=[16, 32, 64, 128], depths=[1, 1, 3, 2], num_classes=7, layer_scale=1e-5)
    assert args == told and not converted.left_out
    untold = dict(num_heads=tuple(config['num_heads']), window_size=tuple(config['window_size']))
    model = timm.create_model('mambavision_tiny', checkpoint_path=tmp_path / 'micro.safetensors', **args, **untold)
    model.eval()
    assert_close(model(tensors['odd.input']), tensors['odd.logits'], 1e-5)


def test_a_mambavision_without_layer_scale_or_head_is_told(golden):
    tensors, _ = golden('mambavision_micro')
    state = under(tensors, 'state_dict.')
    state = {name: t for name, t in state.items() if 'gamma' not in name and not re.match(r'(norm|head)\.', name)}
    name, args, _ = identify(state, 'mambavision_base')
    assert args['layer_scale'] is None and args['features_only'] and args['dims'] == [16, 32, 64, 128]


@pytest.mark.slow  # all models are built
@pytest.mark.parametrize('file', KEY_FILES)
def test_a_full_size_mambavision_is_identified(golden, file):
    keys = golden(f'keys_{file}.json')
    state = {name: torch.empty(shape, device='meta') for name, shape in keys['state_dict'].items()}
    name, args, twins = identify(state)
    assert (name, args) == (KEY_FILES[file], {})
    assert twins == [f'{name}_512'] * (name in ('mambavision_large2', 'mambavision_large3'))
