# SPDX-License-Identifier: Apache-2.0
"""Processes of tests end with their tests."""

import os
import signal

import pytest
from fresh_processes import Process


def test_a_process_that_takes_too_long_is_killed():
    process = Process('import time; print("began", flush=True); time.sleep(60)')
    try:
        with pytest.raises(AssertionError, match='it still runs after 1 s: began'):
            process.wait(timeout=1)
        assert process.wait(timeout=10) == -signal.SIGKILL
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
