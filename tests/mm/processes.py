# SPDX-License-Identifier: Apache-2.0
"""Runs as processes of their own: start, wait, kill, and what they wrote."""

import json
import os
import subprocess
import sys
import time

from fresh_processes import AS_MODULE, Process, killed_on_failure


def start(*arguments, launcher=(), host=(), **kwargs):
    """A process with one thread whose output is read by `finish`; `host` is the command that runs it somewhere else."""
    if not launcher and not host:
        code = f'import warnings; warnings.simplefilter("ignore"); {AS_MODULE}'
        return Process(code, *arguments, merged=True, PYTHONWARNINGS='ignore', **kwargs)
    environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    return subprocess.Popen(
        [*host, sys.executable, *launcher, '-m', *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **kwargs,
    )


def finish(process, status=0):
    with killed_on_failure(process.pid):
        output, _ = process.communicate(timeout=600)
    assert process.returncode == status, output
    return output


def options(**changes):
    return ['--cfg-options', *(f'{key}={value!r}' for key, value in changes.items())]


def losses(work_dir):
    """What every iteration reported; of those that were done twice, the later."""
    records = {}
    for file in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for record in map(json.loads, file.read_text().splitlines()):
            if 'loss' in record:
                step = record.get('iter', record['step'])
                records[step] = [record['loss'], record['lr'], record.get('grad_norm')]
    return records


def wait_for(path, process):
    end = time.monotonic() + 120
    with killed_on_failure(process.pid):
        while not path.exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.002)
