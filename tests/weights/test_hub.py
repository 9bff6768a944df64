# SPDX-License-Identifier: Apache-2.0
"""Published weights on the Hugging Face Hub, for which a folder stands in here; and the files of Vim."""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vssm.models.weights import convert, identify
from vssm.tools.main import main

NAME, REPOSITORY = 'test_vim', 'someone/Vim-test'


def random_state(name=NAME, **kwargs):
    state = timm.create_model(name, device='meta', **kwargs).state_dict()
    return {key: torch.randn(t.shape) for key, t in state.items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def metadata_of(path):
    with safe_open(path, framework='pt') as file:
        return file.metadata()


class Hub(types.ModuleType):
    """Stands in for huggingface_hub: repositories are {file: checkpoint}."""

    def __init__(self):
        super().__init__('huggingface_hub')
        self.repositories, self.calls = {}, []

    def list_repo_files(self, repo_id, revision=None):
        self.calls.append(('list', repo_id, revision))
        if repo_id not in self.repositories:
            raise KeyError(f'no repository {repo_id}')  # the package's own kinds differ between releases
        return list(self.repositories[repo_id])

    def hf_hub_download(self, repo_id, filename, revision=None, local_dir=None):
        self.calls.append(('get', filename, revision))
        path = Path(local_dir, filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = self.repositories[repo_id][filename]
        if content is None:
            raise KeyError('broke off')
        save_file(content, path) if filename.endswith('.safetensors') else torch.save(content, path)
        return str(path)


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
    return hub


@pytest.fixture
def on_hub(monkeypatch):
    """on_hub(pattern): the test model's weights are published on the Hub, says the registry."""

    def on_hub(pattern=None, repository=REPOSITORY):
        cfg = replace(timm.get_pretrained_cfg(NAME), hf_hub_id=repository, hf_hub_filename=pattern)
        monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, NAME, cfg)

    return on_hub


@pytest.mark.parametrize('pattern', [None, 'weights_??p?acc.pth', 'sub/weights_76p1acc.pth'])
def test_the_one_file_is_found_converted_and_kept(pattern, hub, on_hub, tmp_path, capsys):
    state, folder = random_state(), 'sub/' if pattern and '/' in pattern else ''
    hub.repositories[REPOSITORY] = {'README.md': {}, f'{folder}weights_76p1acc.pth': {'model': state}}
    if pattern:
        hub.repositories[REPOSITORY][f'{folder}weights_ft_78p3acc.pth'] = {'model': random_state()}
    on_hub(pattern)
    assert_same(timm.create_model(NAME, pretrained=True, cache_dir=tmp_path).state_dict(), state)
    (file,) = tmp_path.iterdir()
    source = f'https://huggingface.co/{REPOSITORY}/resolve/main/{folder}weights_76p1acc.pth'
    assert metadata_of(file)['source'] == source
    assert hub.calls == [('list', REPOSITORY, None), ('get', f'{folder}weights_76p1acc.pth', None)]

    hub.repositories.clear()
    model = timm.create_model(NAME, pretrained=True, cache_dir=tmp_path, num_classes=5, in_chans=1, img_size=(64, 96))
    assert model.head.weight.shape == (5, 32) and len(hub.calls) == 2
    assert main(['download', NAME, '--cache-dir', str(tmp_path)]) == 0
    assert 'already there' in capsys.readouterr().out


def test_vssm_download_and_a_revision(hub, on_hub, tmp_path, capsys):
    state = random_state()
    hub.repositories[REPOSITORY] = {'model.safetensors': state}
    on_hub(repository=f'{REPOSITORY}@v2')
    assert main(['download', NAME, '--cache-dir', str(tmp_path)]) == 0
    assert 'downloaded and converted' in capsys.readouterr().out
    assert hub.calls == [('list', REPOSITORY, 'v2'), ('get', 'model.safetensors', 'v2')]
    assert_same(timm.create_model(NAME, pretrained=True, cache_dir=tmp_path).state_dict(), state)
    (file,) = tmp_path.iterdir()
    assert metadata_of(file)['source'] == f'https://huggingface.co/{REPOSITORY}/resolve/v2/model.safetensors'


FAILURES = {
    'no such repository': ({}, None, 'no repository someone/Vim-test'),
    'no weights': ({'README.md': {}}, None, r'must hold one file \*\.safetensors or .*, got README.md\.'),
    'no such file': ({'a.pth': {}, 'b.pth': {}}, 'c_*.pth', r'must hold one file c_\*\.pth, got a\.pth, b\.pth\.'),
    'two files': ({'a.pth': {}, 'b.bin': {}, 'c.md': {}}, None, r'must hold one file .*, got a\.pth, b\.bin\.'),
    'breaks off': ({'a.pth': None}, None, 'broke off'),
    'no tensors': ({'a.pth': {'model': 3}}, None, 'must map names to tensors'),
    'another depth': (lambda: {'a.pth': random_state(depth=2)}, None, "got one with .*'depth': 2"),
    'another grid': (lambda: {'a.pth': random_state(img_size=96)}, None, "got one with .*'img_size': 96"),
}


@pytest.mark.parametrize('failure', FAILURES)
def test_a_bad_download_from_the_hub_leaves_nothing(failure, hub, on_hub, tmp_path):
    files, pattern, said = FAILURES[failure]
    files = files() if callable(files) else files
    if files:
        hub.repositories[REPOSITORY] = files
    on_hub(pattern)
    with pytest.raises(RuntimeError, match=f'test_vim: no weights from https://huggingface.co/.*{said}'):
        timm.create_model(NAME, pretrained=True, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_huggingface_hub(on_hub, tmp_path, monkeypatch, capsys):
    on_hub()
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(RuntimeError, match=r'needs the package huggingface_hub: run `pip install "\.\[hub\]"`'):
        timm.create_model(NAME, pretrained=True, cache_dir=tmp_path)
    assert main(['download', NAME, '--cache-dir', str(tmp_path)]) == 2
    assert 'needs the package huggingface_hub' in capsys.readouterr().err


def test_a_repository_of_the_user_is_left_to_timm(hub, on_hub, tmp_path, monkeypatch):
    state, on_timm = random_state(), []
    monkeypatch.setattr(timm.models._builder, 'load_state_dict_from_hf', lambda *a, **k: on_timm.append(a) or state)
    on_hub('weights.pth')
    overlay = dict(hf_hub_id='me/mine', hf_hub_filename=None)
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
    assert_same(model.state_dict(), state)
    assert len(on_timm) == 1 and not hub.calls


# ---- the files of Vim ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'args',
    [
        dict(depth=2, num_classes=0, in_chans=1),
        dict(embed_dim=48, d_state=4, ssm_ratio=1.5),
        dict(patch_size=8, img_size=40, patch_stride=8),
        dict(patch_stride=4, img_size=224),
        dict(img_size=96),
    ],
    ids=str,
)
def test_other_shapes_of_vim_are_told_by_their_arguments(args):
    name, told, _ = identify(random_state(**args))
    assert (name, told) == (NAME, args)


@pytest.mark.parametrize('case', ['square', 'nonsquare', 'stride8'])
def test_convert(case, golden, tmp_path):
    tensors, metadata = golden(f'vim_micro_{case}')
    published = {name[11:]: t for name, t in tensors.items() if name.startswith('state_dict.')}
    torch.save({'model': published}, tmp_path / 'in.pth')
    source, target = tmp_path / 'in.pth', tmp_path / 'out.safetensors'
    if case == 'nonsquare':  # 24 patches, of which the shape does not tell the grid
        with pytest.raises(ValueError, match=r'1 misshapen \(pos_embed\)'):
            convert(source, target)
        return
    convert(source, target)
    noted = metadata_of(target)
    model = timm.create_model(noted['model'], checkpoint_path=str(target), **json.loads(noted['model_args']))
    assert torch.equal(model.pos_embed, published['pos_embed'])
    config = metadata['config']
    if config['stride'] == 16:
        assert model.patch_embed.img_size == tuple(config['img_size'])


@pytest.mark.parametrize('grid', [dict(img_size=[64, 96]), dict(img_size=64, patch_stride=8), dict(patch_stride=4)])
def test_what_a_file_notes_of_its_grid_goes_before(grid, tmp_path):
    grid = {'img_size': 224, **grid} if 'patch_stride' in grid else grid
    state = random_state(**grid)
    notes = dict(model=NAME, model_args=json.dumps(grid))
    save_file(state, tmp_path / 'in.safetensors', notes)
    convert(tmp_path / 'in.safetensors', tmp_path / 'out.safetensors')
    assert json.loads(metadata_of(tmp_path / 'out.safetensors')['model_args']) == grid

    notes['model_args'] = json.dumps(dict(img_size=128, patch_stride=16))
    save_file(state, tmp_path / 'in.safetensors', notes)
    with pytest.raises(ValueError, match='pos_embed'):  # it is not resampled in passing
        convert(tmp_path / 'in.safetensors', tmp_path / 'other.safetensors')
