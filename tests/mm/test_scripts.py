# SPDX-License-Identifier: Apache-2.0
"""mmdetection's and mmsegmentation's own scripts and apis, and mmengine's analysis, beside our package."""

import importlib
import subprocess
import sys
import time

import pytest
import timm
import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

from vssm import run as script
from vssm.models.mm import mmcv_ext
from vssm.tools import _count
from vssm.tools._common import load_config
from vssm.tools._count import RULES, build_dense, count_fvcore, multiply_adds

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def run(monkeypatch):
    """run(*arguments): what `python -m vssm.run ARGUMENTS` does."""

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['run', *map(str, arguments)])
        monkeypatch.setattr(sys, 'path', [*sys.path])
        script.main()

    return run


@pytest.mark.parametrize('package', ['mmdet', 'mmseg'])
def test_a_checkpoint_with_histories_is_published(package, run, tmp_path):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[mmlab]'")
    hub = MessageHub.get_instance(f'published by {package}')
    hub.update_scalar('train/loss', torch.tensor(1.5))
    hub.update_info('iter', 3)
    states = dict(meta=dict(epoch=1), message_hub=hub.state_dict(), optimizer={})
    torch.save(dict(states, state_dict=dict(weight=torch.arange(3.0))), tmp_path / 'epoch_1.pth')
    run(f'{package}/publish_model.py', tmp_path / 'epoch_1.pth', tmp_path / 'published')
    while not (found := list(tmp_path.glob('published-*.pth'))):  # the script lets another process rename it
        time.sleep(0.01)
    published = torch.load(found[0])
    assert torch.equal(published['state_dict']['weight'], torch.arange(3.0)) and 'optimizer' not in published


def test_a_script_is_found_by_its_name(tmp_path, monkeypatch):
    for package in script.PACKAGES:
        folder = tmp_path / package / '.mim' / 'tools' / 'some'
        folder.mkdir(parents=True)
        (tmp_path / package / '__init__.py').touch()
        for name in ('both.py', f'only_{package}.py'):
            (folder / name).touch()
    monkeypatch.setattr(
        script.importlib.util,
        'find_spec',
        lambda name: type('Spec', (), dict(origin=str(tmp_path / name / '__init__.py'))),
    )
    tools = {package: tmp_path / package / '.mim' / 'tools' / 'some' for package in script.PACKAGES}
    assert script.find('only_mmseg.py') == tools['mmseg'] / 'only_mmseg.py'
    assert script.find('mmdet/both.py') == tools['mmdet'] / 'both.py'
    assert script.find(str(tools['mmseg'] / 'both.py')) == tools['mmseg'] / 'both.py'
    for wrong, said in (
        ('both.py', 'could be .*mmdet.*or.*mmseg'),
        ('mmseg/only_mmdet.py', 'is none'),
        ('', 'is none'),
    ):
        with pytest.raises(SystemExit, match=f"SCRIPT must be a Python file, got '{wrong}', which {said}"):
            script.find(wrong)


def test_a_script_gets_what_it_needs(run, tmp_path, monkeypatch):
    """The models, its arguments, the files beside it; and the adapters where it imports what they are for."""
    (tmp_path / 'beside.py').touch()
    (tmp_path / 'plain.py').write_text("""
import sys, timm, beside
assert __name__ == '__main__' and timm.is_model('test_vmamba'), 'models are missing'
sys.exit(' '.join(sys.argv[1:]))
""")
    (tmp_path / 'theirs.py').write_text('if True:\n    from mmengine.config import Config\n')
    monkeypatch.setitem(sys.modules, 'vssm.models.mm', None)  # so that importing it fails
    monkeypatch.delattr('vssm.models.mm')
    with pytest.raises(SystemExit, match='--model test_vmamba'):
        run(tmp_path / 'plain.py', '--model', 'test_vmamba')
    with pytest.raises(ImportError, match='mm'):
        run(tmp_path / 'theirs.py')


@pytest.mark.parametrize('name', ['test_vmamba2d', 'test_spatial_mamba'])
def test_mmengine_counts_our_ops(name, monkeypatch):
    monkeypatch.setattr(_count, 'rules_of', lambda model: RULES)  # mmengine has fvcore's rules for all models
    model, image = timm.create_model(name).eval(), torch.zeros(1, 3, 64, 64)
    found = get_model_complexity_info(model, inputs=image, show_table=False, show_arch=False)
    cost = count_fvcore(model, image)
    assert found['flops'] == cost.macs and found['activations'] == cost.activations and found['params'] == cost.params


@pytest.mark.slow
def test_mmengine_counts_a_whole_segmentor():
    pytest.importorskip('mmseg', reason="mmseg is not installed: pip install '.[mmlab]'")
    cfg = load_config('ade20k/upernet_spatial_mamba_tiny_4xb4-160k_ade20k-512x512')
    cfg.model.update(auxiliary_head=None)
    cfg.model.backbone.pretrained = False
    init_default_scope(cfg.default_scope)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    found = get_model_complexity_info(model, inputs=torch.zeros(1, 3, 64, 64), show_table=False, show_arch=False)
    assert found['flops'] == pytest.approx(multiply_adds(build_dense(cfg), (64, 64)), rel=0.01)


@pytest.mark.slow
def test_apis_come_behind_our_import():
    """Without compiled operators they need the stand-in; whoever met the error may import ours and try again."""
    for package in script.PACKAGES:
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[mmlab]'")
    if importlib.import_module('mmcv._ext').__spec__.loader is not mmcv_ext._Finder:
        pytest.skip('mmcv is compiled')
    code = """
for _ in range(2):
    try:
        from mmdet.apis import init_detector
    except ModuleNotFoundError as error:
        assert error.name == 'mmcv._ext', error
        import vssm.models.mm
    else:
        break
assert vssm
from mmseg.apis import init_model
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
