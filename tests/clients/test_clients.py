# SPDX-License-Identifier: Apache-2.0
"""Programs of others over our networks, in processes of their own: see tests/README.md."""

import os
import re
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import timm

from vssm.models.weights import list_models

HERE = Path(__file__).parent
CLIENTS = sorted(path.stem.removeprefix('with_') for path in HERE.glob('with_*.py'))


@pytest.fixture(scope='session')
def python(made_once):
    """The interpreter of an environment that adds the clients to all that this one has."""

    def make(folder):
        venv.create(folder, with_pip=False)
        (installed,) = folder.glob('lib/*/site-packages')
        paths = [path for path in sys.path if Path(path).name == 'site-packages']
        (installed / 'others.pth').write_text(''.join(f'import site; site.addsitedir({path!r})\n' for path in paths))
        install = (sys.executable, '-m', 'pip', '--python', folder / 'bin' / 'python', 'install', '--quiet')
        result = subprocess.run(
            [*install, '--no-compile', '--no-deps', '-r', HERE / 'requirements.txt'], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr

    return made_once('clients', make) / 'bin' / 'python'


def run_tests(python, *arguments, **env):
    command = [python, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-W', 'ignore', *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent.parent, env={**os.environ, **env})
    assert result.returncode == 0, result.stdout + result.stderr
    return {what: int(number) for number, what in re.findall(r'(\d+) (\w+)', result.stdout.splitlines()[-1])}


@pytest.mark.slow
@pytest.mark.parametrize('client', CLIENTS)
def test_client(client, python):
    """What a library gets from a network is what it gets from plain layers."""
    counts = run_tests(python, HERE / f'with_{client}.py')
    assert counts['passed'] and 'skipped' not in counts


@pytest.mark.slow
def test_timms_own_tests(tmp_path):
    source = f'timm=={timm.__version__}'
    download = (sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm', '-d', tmp_path)
    result = subprocess.run([*download, source], capture_output=True, text=True)
    archives = list(tmp_path.glob('*.tar.gz'))
    if not archives:
        pytest.skip(f'the tests of {source} cannot be fetched: {result.stderr.strip().splitlines()[-1:]}')
    with tarfile.open(archives[0]) as archive:
        archive.extractall(tmp_path, filter='data')
    (tests,) = tmp_path.glob('*/tests/test_models.py')
    small = ' or '.join(name for name in list_models() if name.startswith('test_'))
    ours = ('-p', 'timm_models', '-k', small)
    counts = run_tests(sys.executable, *ours, tests, PYTHONPATH=str(HERE))
    assert counts['passed'] >= 30 and 'skipped' not in counts
