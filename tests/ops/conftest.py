# SPDX-License-Identifier: Apache-2.0
"""What the tests of the ops share: stored cases, random cases, and two threads."""

import pytest
from golden_files import GOLDEN, need_golden, read_tensors, under


@pytest.fixture(scope='session')
def number_of_threads():
    """Two, beside other workers too: the kernels divide their work among threads."""
    return 2


def pytest_generate_tests(metafunc):
    if 'draw' in metafunc.fixturenames:
        draws = range(metafunc.config.getoption('draws'))
        metafunc.parametrize('draw', draws, ids=[f'draw{i}' for i in draws])
    if 'golden_scan' in metafunc.fixturenames:
        metafunc.parametrize('golden_scan', golden_scans())


def golden_scans() -> list:
    """(tensors, sizes and options) of every golden case of the op; without the folder one skipped placeholder."""
    if not GOLDEN.is_dir():
        return [pytest.param(None, id='absent', marks=need_golden)]
    params = []
    for ndim in (1, 2):
        tensors, metadata = read_tensors(GOLDEN / f'scan_{ndim}d_cases.safetensors')
        for name, options in metadata['cases'].items():
            case = under(tensors, f'{name}.'), dict(options, ndim=ndim)
            params.append(pytest.param(case, id=f'{ndim}d-{name}'))
    return params
