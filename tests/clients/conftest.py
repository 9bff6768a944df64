# SPDX-License-Identifier: Apache-2.0
"""The networks that clients get, with shortcuts that are taken at small sizes, and the way past them."""

import functools
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from vssm.models import layers

BUILD = Path(__file__).parents[2] / 'build' / 'clients'
NAMES = timm.list_models('test_*', module=['vmamba', 'spatial_mamba'])


@pytest.fixture(params=NAMES)
def model(request):
    """A network in evaluation mode, each of whose parameters moves the output."""
    model = timm.create_model(request.param, num_classes=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 48)


@pytest.fixture(autouse=True)
def low_thresholds(monkeypatch, one_thread):
    monkeypatch.setattr(layers, '_GROUP_BYTES', 20_000)
    monkeypatch.setattr(layers, '_CONV_LEAST', (0, 0))
    monkeypatch.setattr(layers, '_FUSED_LEAST', (0, 0))


@pytest.fixture
def plainly(monkeypatch):
    """plainly(f, *args): what f returns where no shortcut is taken."""

    def call(f, *args):
        with monkeypatch.context() as patch:
            patch.setattr(layers, '_is_eager_on_cpu', lambda *tensors: False)
            return f(*args)

    return call


@pytest.fixture(scope='session')
def kept_once(made_once):
    """kept_once(name, make): a folder that `make(folder)` has filled, kept in build/clients until `make clean`."""
    BUILD.mkdir(parents=True, exist_ok=True)
    return functools.partial(made_once, root=BUILD)


@pytest.fixture(scope='session')
def timm_source(kept_once):
    """The folder of timm's source distribution, which has its scripts and tests; of the version that is installed."""
    source = f'timm=={timm.__version__}'

    def fetch(folder):
        download = (sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm')
        result = subprocess.run([*download, '-d', folder, source], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        (archive,) = folder.glob('*.tar.gz')
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter='data')

    (found,) = (path for path in kept_once(source, fetch).iterdir() if path.is_dir())
    return found


@pytest.fixture
def train(tmp_path):
    """train(epochs, options): the weights after a small training of a config; one that resumes does its last epoch."""
    from mmengine.config import Config
    from mmengine.registry import RUNNERS

    from vssm.tools._common import find_config

    def train(epochs, options, resume=False, config=None):
        last = tmp_path / 'run' / f'epoch_{epochs}.pth'
        last.unlink(missing_ok=True)
        cfg = Config.fromfile(config or find_config('finetune/vmamba_tiny_1xb64-50e_folder'))
        small = {'model.model_name': 'test_vmamba', 'model.pretrained': False, 'train_dataloader.batch_size': 4}
        few = {f'{loader}_dataloader.num_workers': 1 for loader in ('train', 'val')}
        for loader in ('train_dataloader', 'val_dataloader'):
            if f'{loader}.dataset' in options:
                cfg[loader].pop('dataset')
        changes = {'train_cfg.max_epochs': epochs, 'default_hooks.checkpoint.interval': 1, 'resume': resume}
        cfg.merge_from_dict({**small, **few, **changes, **options})
        cfg.work_dir, cfg.experiment_name = str(tmp_path / 'run'), f'{tmp_path.name}-{resume}'
        RUNNERS.build(cfg).train()
        return torch.load(last, weights_only=True)['state_dict']

    return train


@pytest.fixture(scope='session')
def timm_scripts(kept_once):
    """The folder of timm's scripts, of the version that is installed; its package and source distribution lack them."""
    root = f'https://raw.githubusercontent.com/huggingface/pytorch-image-models/v{timm.__version__}'

    def fetch(folder):
        for name in ('train.py', 'validate.py', 'benchmark.py', 'onnx_export.py'):
            try:
                with urllib.request.urlopen(f'{root}/{name}', timeout=30) as response:
                    (folder / name).write_bytes(response.read())
            except OSError as error:
                pytest.skip(f'{root}/{name} cannot be fetched: {error}')

    return kept_once(f'timm-scripts-{timm.__version__}', fetch)


@pytest.fixture
def image_folder(tmp_path):
    """Four images of two classes in train and in validation."""
    for split in ('train', 'validation'):
        for i in range(4):
            path = tmp_path / 'images' / split / 'ab'[i % 2] / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (40, 40), (200 * (i % 2), 90, 60 * i)).save(path)
    return tmp_path / 'images'
