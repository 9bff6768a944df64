# SPDX-License-Identifier: Apache-2.0
"""Programs of others over our networks, in environments and processes of their own: see tests/README.md."""

import hashlib
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from vssm.models.weights import list_models

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CLIENTS = sorted(path.stem.removeprefix('with_') for path in HERE.glob('with_*.py'))

pytestmark = pytest.mark.clients


@pytest.fixture
def python_of(kept_once):
    """python_of(client): the interpreter of an environment that adds a client to all that this one has."""

    def fill(folder, requirements):
        venv.create(folder, with_pip=False)
        (installed,) = folder.glob('lib/*/site-packages')
        paths = [path for path in sys.path if Path(path).name == 'site-packages']
        (installed / 'others.pth').write_text(''.join(f'import site; site.addsitedir({path!r})\n' for path in paths))
        install = (sys.executable, '-m', 'pip', '--python', folder / 'bin' / 'python', 'install', '--quiet')
        versions = ('-c', ROOT / 'constraints.txt', '-r', requirements)
        result = subprocess.run([*install, '--no-compile', *versions], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    def python_of(client):
        own = HERE / 'environments' / f'{client}.txt'
        requirements = own if own.is_file() else own.with_name('shared.txt')
        versions = hashlib.sha256((ROOT / 'constraints.txt').read_bytes() + requirements.read_bytes()).hexdigest()
        folder = kept_once(f'{requirements.stem}-{versions[:8]}', lambda folder: fill(folder, requirements))
        return folder / 'bin' / 'python'

    return python_of


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


def test_timms_own_tests(timm_source):
    small = ' or '.join(name for name in list_models() if name.startswith('test_'))
    ours = ('-p', 'timm_models', '-k', small)
    counts = run_tests(sys.executable, *ours, timm_source / 'tests' / 'test_models.py', PYTHONPATH=str(HERE))
    assert counts['passed'] >= 30 and 'skipped' not in counts
