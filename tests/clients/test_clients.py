# SPDX-License-Identifier: Apache-2.0
"""Programs of others over our networks, in environments and processes of their own: see tests/README.md."""

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
from PIL import Image

from vssm.models.weights import list_models

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Forks of OpenMMLab that are source alone. That of mmcv would compile for ten minutes what our operators stand in for.
FORKS = dict(mmcv='onedl-mmcv==2.3.6', mmdet='onedl-mmdetection==3.5.1', mmseg='onedl-mmsegmentation==1.4.2')
CLIENTS = sorted(path.stem.removeprefix('with_') for path in HERE.glob('with_*.py'))
PAGE = (ROOT / 'docs' / 'libraries.md').read_text()
TRITONS = ('3.7.0', '3.7.1', '3.8.0', '3.9.0')  # of PyTorch 2.12 to 2.15; that of 2.10 and 2.11 is tested by itself
BLOCKS = re.findall(r'^```python\n(.*?)^```', PAGE, flags=re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.clients


@pytest.fixture
def python_of(kept_once):
    """python_of(client): the interpreter of an environment that adds a client to all that this one has."""

    def fill(folder, requirements):
        venv.create(folder, with_pip=False)
        (installed,) = folder.glob('lib/*/site-packages')
        paths = [path for path in sys.path if Path(path).name == 'site-packages']
        (installed / 'others.pth').write_text(''.join(f'import site; site.addsitedir({path!r})\n' for path in paths))
        forks = FORKS if requirements.stem == 'onedl' else {}
        versions = ('--no-deps',) if forks else ('-c', ROOT / 'constraints.txt')
        python = ('--python', folder / 'bin' / 'python')
        pip(*python, 'install', '--no-compile', *versions, '-r', requirements)
        for package, source in forks.items():
            pip('download', '--no-deps', '--no-build-isolation', '--no-binary', ':all:', '-d', folder, source)
            (archive,) = folder.glob(f'{source.partition("==")[0].replace("-", "_")}*.tar.gz')
            with tarfile.open(archive) as opened:
                opened.extractall(folder, filter='data')
            unpacked = folder / archive.name.removesuffix('.tar.gz')
            (unpacked / package).rename(installed / package)
            (metadata,) = unpacked.glob('*.egg-info')
            metadata.rename(installed / metadata.name)

    def python_of(client):
        own = HERE / 'environments' / f'{client}.txt'
        requirements = own if own.is_file() else own.with_name('shared.txt')
        versions = hashlib.sha256((ROOT / 'constraints.txt').read_bytes() + requirements.read_bytes()).hexdigest()
        folder = kept_once(f'{requirements.stem}-{versions[:8]}', lambda folder: fill(folder, requirements))
        return folder / 'bin' / 'python'

    return python_of


def pip(*arguments):
    command = [sys.executable, '-m', 'pip', '--quiet', *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def run_tests(python, *arguments, **env):
    command = [python, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-W', 'ignore', *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env})
    assert result.returncode == 0, result.stdout + result.stderr
    return {what: int(number) for number, what in re.findall(r'(\d+) (\w+)', result.stdout.splitlines()[-1])}


@pytest.mark.parametrize('client', CLIENTS)
def test_client(client, python_of):
    """What a library gets from a network is what it gets from plain layers."""
    counts = run_tests(python_of(client), HERE / f'with_{client}.py')
    assert counts['passed'] and 'skipped' not in counts


@pytest.mark.parametrize('number', range(len(BLOCKS)))
def test_a_block_of_the_page_runs_alone(number, python_of, tmp_path):
    """With a small network in the place of one whose weights would be downloaded."""
    code = BLOCKS[number]
    client = next((name for name in ('anomalib', 'fastai') if name in code), 'shared')
    code = code.replace("(data, 'vmamba_tiny'", "(data, 'test_vmamba', pretrained=False")
    code = code.replace("valid='val',", "valid='val', bs=2,").replace('fine_tune(5)', 'fine_tune(1)')
    code = code.replace("backbone='vmamba_tiny'", "backbone='test_vmamba', pre_trained=False")
    for i, folder in enumerate(('train/a', 'train/b', 'val/a', 'val/b')):
        (tmp_path / 'data/leaves' / folder).mkdir(parents=True)
        for n in range(2):
            Image.new('RGB', (40, 30), (60 * i, 90, 100 * n)).save(tmp_path / 'data/leaves' / folder / f'{n}.png')
    done = subprocess.run([python_of(client), '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_forks_of_openmmlab(python_of):
    """A detector and a segmentor train, and no loader runs what a file holds."""
    python = python_of('onedl')
    where = f'import {", ".join(FORKS)}, mmengine; print(*(m.__file__ for m in ({", ".join(FORKS)}, mmengine)))'
    found = subprocess.run([python, '-c', where], capture_output=True, text=True).stdout.split()
    assert len(found) == 4 and all(Path(path).is_relative_to(python.parents[1]) for path in found)
    tests = ('tests/mm/test_dense.py', 'tests/mm/test_loading.py')
    which = 'trains_evaluates and (vmamba2d or spatial) or no_path_runs or refused_file'
    counts = run_tests(python, *tests, '-k', which)
    assert counts['passed'] > 20 and 'skipped' not in counts


def test_timms_own_tests(timm_source):
    small = ' or '.join(name for name in list_models() if name.startswith('test_'))
    ours = ('-p', 'timm_models', '-k', small)
    counts = run_tests(sys.executable, *ours, timm_source / 'tests' / 'test_models.py', PYTHONPATH=str(HERE))
    assert counts['passed'] >= 30 and 'skipped' not in counts


def test_timms_own_scripts(timm_scripts, image_folder, tmp_path):
    """An epoch of a training, an evaluation of its checkpoint, timings, and ONNX, as docs/libraries.md has them."""

    def run(script, *arguments, **env):
        command = [sys.executable, '-W', 'ignore', '-m', 'vssm.run', timm_scripts / script, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **env})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    network = ('--model', 'test_vmamba', '--num-classes', 2)
    small = ('--img-size', 32, '--device', 'cpu', '--batch-size', 2)
    data = (*network, *small, '--data-dir', image_folder, '--workers', 0)
    run('train.py', *data, '--epochs', 1, '--warmup-epochs', 0, '--output', tmp_path, '--experiment', 'run')
    checkpoint = tmp_path / 'run' / 'last.pth.tar'
    assert 'Acc@1' in run('validate.py', *data, '--checkpoint', checkpoint)
    run('benchmark.py', '--model', 'test_vmamba', *small, '--bench', 'inference', '--num-bench-iter', 2)
    run('onnx_export.py', 'model.onnx', *network, '--img-size', 32, '--checkpoint', checkpoint, VSSM_REFERENCE='1')
    assert (tmp_path / 'model.onnx').stat().st_size > 100_000


@pytest.mark.parametrize('version', TRITONS)
def test_cuda_kernels_compile_with_the_triton_of_other_pytorchs(version, kept_once):
    def fetch(folder):
        pip('install', '--no-deps', '--no-compile', '--target', folder, f'triton=={version}')

    folder = kept_once(f'triton-{version}', fetch)
    env = {**os.environ, 'PYTHONPATH': f'{folder}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'}
    script = 'import compile_cuda, sys, triton; print(triton.__version__); sys.exit(compile_cuda.main())'
    options = ('--capability', '9.0', '--dtype', 'bfloat16', '--options', 'models')
    command = [sys.executable, '-c', script, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / 'benchmarks', env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(version) and 'fusion_backward' in done.stdout
