# SPDX-License-Identifier: Apache-2.0
"""What every test shares: how errors are measured, what is made once for all, and the state of the process.

The golden files and the ways to compute the ops are fixtures too, in files of their own.
"""

import fcntl
import os
import shutil

import pytest

IN_WORKER = 'PYTEST_XDIST_WORKER' in os.environ
if IN_WORKER:  # which shares the cores with others: OpenMP reads these when it is loaded, in processes of a test too
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # which deterministic products need on CUDA

import torch  # noqa: E402

pytest_plugins = ('backends', 'golden_files')


# These take minutes, and come first: in the end no worker of pytest-xdist waits for another that has just begun one.
FIRST = {
    'test_a_killed_run_goes_on_as_if_nothing_had_happened',
    'test_ahead_of_time',
    'test_all_costs_are_up_to_date',
    'test_demo',
    'test_eight_images_are_learnt',
    'test_kernels_compile_for_every_card',
    'test_survival_with_a_known_risk',
    'test_the_address_sanitizer_finds_nothing',
    'test_tissues_that_touch_need_the_grid',
    'test_wheel_runs_in_clean_environment',
}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.originalname not in FIRST)


def pytest_addoption(parser):  # which pytest takes from this folder alone
    parser.addoption('--draws', type=int, default=300, help='random cases of the property tests of the scan')


# ---- how errors are measured -----------------------------------------------------------------------------------------


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual - expected| / max |expected|, absolute where the expected values are zero by symmetry."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    scale = expected.double().abs().max().item()
    error = (actual.double() - expected.double()).abs().max().item()
    return error if scale < 1e-12 else error / scale


@pytest.fixture(scope='session')
def assert_close():
    """assert_close(actual, expected, tolerance, what): `relative_error` within tolerance; NaN never is."""

    def check(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = '') -> None:
        error = relative_error(actual, expected)
        assert error <= tolerance, f'{what}: relative error {error:.2e} exceeds {tolerance:.0e}'

    return check


# ---- what is made once -----------------------------------------------------------------------------------------------


@pytest.fixture(scope='session')
def made_once(tmp_path_factory):
    """made_once(name, make): a folder that `make(folder)` has filled, for all workers of pytest-xdist alike.

    It lies in a folder of this run, or in `root`, where it stays for later ones.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if IN_WORKER else base

    def made_once(name, make, root=base):
        folder, done = root / name, root / f'{name}.done'
        with open(root / f'{name}.lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made_once


# ---- state of the process --------------------------------------------------------------------------------------------


@pytest.fixture(scope='session')
def number_of_threads():
    """Two, or one where the workers of pytest-xdist share the cores: threads that wait would take the others' time."""
    return 1 if IN_WORKER else 2


@pytest.fixture(autouse=True)
def _threads(number_of_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(number_of_threads)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(_threads):
    """For maps this small: threads would wait for one another more than they work."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill every newly allocated tensor with NaN: a kernel that leaves an element of its output unwritten is seen."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
