# SPDX-License-Identifier: Apache-2.0
"""What is installed: every module in the wheel, one library for all versions, one sentence where a part is missing."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from fresh_processes import run_fresh

import vssm

ROOT = Path(__file__).parent.parent
PACKAGES = {
    'vssm': 'src/vssm',
    'vssm/configs': 'configs',
    'vssm/models': 'models',
    'vssm/ops': 'ops',
    'vssm/tools': 'tools',
}

# A model's output and its input's gradient from fixed numbers: the same in every environment.
SCRIPT = """
import json, timm, torch, vssm
ys, grads = [], []
for name in ('test_vmamba2d', 'test_spatial_mamba'):
    model = timm.create_model(name, num_classes=10).eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.1 * torch.sin(torch.arange(p.numel()) + i).reshape(p.shape))
    x = torch.cos(torch.arange(3 * 40 * 56.)).reshape(1, 3, 40, 56).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    ys += y.flatten().tolist()
    grads.append(x.grad.abs().sum().item())
print(json.dumps([vssm.__file__, torch.__version__, ys, grads]))
"""


# Of every build, so that the same source gives the same bytes.
os.environ.setdefault('SOURCE_DATE_EPOCH', '1700000000')


def run(*command, **kwargs):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)


@pytest.fixture(scope='session')
def source(made_once):
    """A copy of what a clone holds, so that building leaves nothing in the working tree."""

    def copy(target):
        names = run('git', 'ls-files', '--cached', '--others', '--exclude-standard', cwd=ROOT, check=True).stdout
        for name in names.splitlines():
            if (ROOT / name).is_file():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target / name)

    return made_once('source', copy)


@pytest.fixture(scope='session')
def wheel(source, made_once):
    """Built from the source distribution, which thereby proves to hold what building needs."""

    def build(folder):
        build_sdist = f'from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})'
        run(sys.executable, '-c', build_sdist, cwd=source, check=True)
        sdist = next(folder.glob('*.tar.gz'))
        with tarfile.open(sdist) as archive:
            names = {name.partition('/')[2] for name in archive.getnames()}
        needed = {'Makefile', 'constraints.txt', 'ops/csrc/scan.h', 'configs/digits/vmamba_test.py'}
        needed |= {'tests/conftest.py', 'tests/ops/kernels_main.cpp'}
        assert needed <= names
        result = run(sys.executable, '-m', 'pip', 'wheel', '--no-build-isolation', '--no-deps', '-w', folder, sdist)
        assert result.returncode == 0, result.stderr

    return next(made_once('wheel', build).glob('*.whl'))


@pytest.mark.slow
def test_wheel_holds_every_file(wheel):
    assert re.search('-py3-none-(linux|macosx)', wheel.name)
    expected = {'vssm/py.typed', 'vssm/ops/_C.so'}
    for package, folder in PACKAGES.items():
        expected |= {f'{package}/{p.relative_to(ROOT / folder)}' for p in (ROOT / folder).glob('**/*.py')}
    names = {n for n in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in n}
    assert names == expected


@pytest.mark.slow
def test_library_in_the_wheel(wheel):
    """It calls nothing of Python's, which its tag promises; it is stripped, and names no folder of this machine."""
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read('vssm/ops/_C.so')
    assert len(library) < 1_000_000
    assert not re.search(rb'\0_?Py[A-Z_]\w+\0', library)
    for folder in (ROOT, Path(torch.__file__).parent, wheel.parent.parent):
        assert str(folder).encode() not in library


@pytest.mark.slow
def test_two_builds_give_the_same_bytes(wheel, tmp_path):
    with tarfile.open(next(wheel.parent.glob('*.tar.gz'))) as archive:
        archive.extractall(tmp_path / 'elsewhere', filter='data')
    (folder,) = (tmp_path / 'elsewhere').iterdir()
    for path in folder.rglob('*'):
        os.utime(path)  # and at another time
    result = run(sys.executable, '-m', 'pip', 'wheel', '--no-build-isolation', '--no-deps', '-w', tmp_path, folder)
    assert result.returncode == 0, result.stderr
    (again,) = tmp_path.glob('*.whl')
    assert again.name == wheel.name and again.read_bytes() == wheel.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    'requirements',
    [
        pytest.param(['torch==2.10.0', 'torchvision==0.25.0', 'timm==1.0.26'], id='oldest'),
        pytest.param(['torch==2.14.1', 'torchvision==0.29.1', 'timm==1.0.31'], id='later'),
    ],
)
def test_wheel_runs_in_clean_environment(wheel, requirements, tmp_path):
    venv.create(tmp_path / 'venv', with_pip=False)
    python = tmp_path / 'venv' / 'bin' / 'python'
    # Bytecode of every module of torch and its libraries would take longer than what is imported of them.
    install = (sys.executable, '-m', 'pip', '--python', python, 'install', '--no-compile')
    result = run(*install, *requirements, wheel)
    assert result.returncode == 0, result.stderr
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    clean = run(python, '-c', SCRIPT, cwd=tmp_path, env=env)
    assert clean.returncode == 0, clean.stderr
    here = run_fresh(SCRIPT, cwd=tmp_path)
    (file, version, y, grad), (*_, y_here, grad_here) = json.loads(clean.stdout), json.loads(here.stdout)
    assert file.startswith(str(tmp_path)) and version.startswith(requirements[0].removeprefix('torch=='))
    assert y == pytest.approx(y_here, rel=1e-4, abs=1e-6)
    assert grad == pytest.approx(grad_here, rel=1e-4)
    assert run(python.parent / 'vssm', 'configs', cwd=tmp_path, env=env).stdout.count('digits/') >= 2
    shutil.rmtree(tmp_path / 'venv')


def test_a_clone_of_that_name_does_not_hide_the_package(tmp_path):
    """Python takes a folder in the working directory for a namespace package unless it finds a real one on its path."""
    (tmp_path / 'vssm' / 'models').mkdir(parents=True)
    script = 'import timm, vssm; print(vssm.__version__, timm.is_model("test_vmamba2d"))'
    assert run_fresh(script, cwd=tmp_path).stdout.split() == [vssm.__version__, 'True']


def test_missing_library_says_how_to_build_it(source, tmp_path):
    """A source tree that was never built, put on the path as it is."""
    package = tmp_path / 'vssm'
    package.mkdir()
    shutil.copytree(source / 'ops', package / 'ops')
    (package / '__init__.py').touch()
    result = run_fresh(f'import sys; sys.path.insert(0, {str(tmp_path)!r}); import vssm.ops')
    assert result.returncode != 0
    assert 'pip install --no-build-isolation -e .' in result.stderr.splitlines()[-1]


SPOILT = {
    'empty': lambda library: b'',
    'another-architecture': lambda library: library[:18] + b'\xf3\x7f' + library[20:],  # ELF's e_machine
    'newer-torch': lambda library: library.replace(b'torch_get_thread_idx', b'torch_get_thread_new'),
}


@pytest.mark.skipif(sys.platform != 'linux', reason='its libraries have another format')
@pytest.mark.parametrize('spoil', SPOILT.values(), ids=SPOILT)
def test_library_that_cannot_be_loaded_says_what_it_needs(spoil, tmp_path):
    shutil.copy(ROOT / 'ops' / 'backend.py', tmp_path)
    library = (ROOT / 'ops' / '_C.so').read_bytes()
    assert spoil(library) != library
    (tmp_path / '_C.so').write_bytes(spoil(library))
    spec = importlib.util.spec_from_file_location('backend_of_a_spoilt_library', tmp_path / 'backend.py')
    with pytest.raises(ImportError) as error:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    for part in (str(tmp_path), 'PyTorch 2.10 or newer', f'got PyTorch {torch.__version__}', sysconfig.get_platform()):
        assert part in str(error.value)


def test_old_setuptools_says_which_is_needed(source, tmp_path):
    (tmp_path / 'setuptools').mkdir()
    (tmp_path / 'setuptools' / '__init__.py').write_text('__version__ = "69.5.1"')
    env = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    result = run(sys.executable, 'setup.py', 'build_ext', cwd=source, env=env)
    assert result.returncode != 0
    assert 'setuptools 77 or newer, got 69.5.1' in result.stderr.splitlines()[-1]


def test_missing_compiler_says_how_to_get_one(source, tmp_path):
    env = {**os.environ, 'CXX': str(tmp_path / 'no-such-compiler'), 'CC': str(tmp_path / 'no-such-compiler')}
    result = run(
        sys.executable, 'setup.py', 'build_ext', '--build-lib', tmp_path, '--build-temp', tmp_path, cwd=source, env=env
    )
    assert result.returncode != 0
    assert 'apt-get install g++' in result.stderr.splitlines()[-1]


def test_missing_torch_says_how_to_get_it(source, tmp_path):
    (tmp_path / 'torch').mkdir()
    (tmp_path / 'torch' / '__init__.py').write_text('raise ImportError("No module named torch")')
    env = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    result = run(sys.executable, 'setup.py', 'build_ext', cwd=source, env=env)
    assert result.returncode != 0
    assert 'pip install "torch>=2.10"' in result.stderr.splitlines()[-1]
