# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels without torch, under the sanitizers and valgrind; kernels_main.cpp says what runs and is checked."""

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from backends import CPU_PATHS

TESTS = Path(__file__).parent
CSRC = TESTS.parents[1] / 'ops' / 'csrc'
# As setup.py has it, but -O1: the sanitizers' checks take long to optimize.
FLAGS = ('-std=c++17', '-O1', '-g', '-ffp-contract=fast', '-Wno-psabi', '-pthread', f'-I{CSRC}')
BUILDS = {
    'address': (  # which finds null pointers and ends of objects without the checks left out
        *('-fsanitize=address,undefined', '-fno-sanitize=null,object-size', '-fno-sanitize-recover=all'),
        '-fno-omit-frame-pointer',
    ),
    'thread': ('-fsanitize=thread',),
    'plain': (),
}
VALGRIND = ('valgrind', '--quiet', '--error-exitcode=3', '--leak-check=full', '--errors-for-leak-kinds=all')
UNSUPPORTED = 77

pytestmark = pytest.mark.slow


def run(*command, **kwargs):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)


@pytest.fixture(scope='session')
def build(made_once):
    """build(name): the program of a build, compiled when first needed."""
    compiler = shlex.split(os.environ.get('CXX', 'g++'))
    sources = [TESTS / 'kernels_main.cpp', *sorted(CSRC.glob('kernels_*.cpp'))]  # kernels.cpp is torch's side

    def build(name):
        def make(target, *arguments):
            result = run(*compiler, *FLAGS, *BUILDS[name], *arguments, '-o', target)
            assert result.returncode == 0, result.stderr
            return target

        def compile_all(folder):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda source: make(folder / f'{source.stem}.o', '-c', source), sources))
            make(folder / 'kernels_main', *objects)

        return made_once(f'kernels-{name}', compile_all) / 'kernels_main'

    return build


def check(*command):
    result = run(*command)
    if result.returncode == UNSUPPORTED:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'all results right' in result.stdout
    assert not result.stderr, result.stderr


@pytest.mark.parametrize('path', ['avx512', 'avx2', 'portable'])
def test_the_address_sanitizer_finds_nothing(path, build):
    check(build('address'), path, 3)


def test_the_thread_sanitizer_finds_nothing(build):
    check(build('thread'), CPU_PATHS[0], 3)  # the other paths, which are slower, have the same tasks


@pytest.mark.skipif(not shutil.which('valgrind'), reason='valgrind is not installed')
def test_valgrind_finds_nothing(build):
    """Least of all numbers that nobody wrote, which are all that the address sanitizer cannot see."""
    check(*VALGRIND, build('plain'), 'avx2', 3, 4)  # it knows no AVX-512
