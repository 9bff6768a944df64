# SPDX-License-Identifier: Apache-2.0
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest


@pytest.fixture(scope='session')
def emulated(made_once):
    """emulated(function, ...): what a function of `cases` returns, in a process where kernels run in the emulator."""
    pytest.importorskip('triton')
    from sass.cases import start

    cache = made_once('triton-cache', lambda folder: None)
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, context, initializer=start, initargs=(str(cache),)) as process:
        yield lambda function, *args, **kwargs: process.submit(function, *args, **kwargs).result()
