# SPDX-License-Identifier: Apache-2.0
"""Processes that have yet to import this package, without the seconds in which they would import PyTorch and timm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# It has imported what takes long, and splits off a process for each task, which becomes as if Python had just started.
SERVER = """
import json, os, sys, types
import timm, torch
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
for number, path in enumerate((os.devnull, *task['outputs'])):
    os.dup2(os.open(path, os.O_WRONLY if number else os.O_RDONLY), number)
os.chdir(task['cwd'])
os.environ.clear()
os.environ.update(task['environment'])
sys.argv = ['-c', *task['arguments']]
sys.modules['__main__'] = main = types.ModuleType('__main__')
exec(task['code'], vars(main))
"""


@pytest.fixture(scope='session')
def _server():
    server = subprocess.Popen([sys.executable, '-c', SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with server:
        yield server
        server.stdin.close()


@pytest.fixture
def run_fresh(_server, tmp_path_factory):
    """run_fresh(code, *arguments): a completed process that ran the code as `python -c` does."""

    def run_fresh(code: str, *arguments: object, cwd: Path | None = None, **environment: str):
        outputs = [tmp_path_factory.mktemp('fresh') / 'output' for _ in range(2)]
        for path in outputs:
            path.touch()
        task = dict(
            code=code,
            arguments=list(map(str, arguments)),
            cwd=str(cwd or Path.cwd()),
            environment={**os.environ, **environment},
            outputs=list(map(str, outputs)),
        )
        print(json.dumps(task), file=_server.stdin, flush=True)
        status = int(_server.stdout.readline())
        return subprocess.CompletedProcess(code, status, *(path.read_text() for path in outputs))

    return run_fresh


@pytest.fixture
def run_script(run_fresh):
    """run_script(file, *arguments): the same for a file, as `python file` does."""

    def run_script(file, *arguments, **kwargs):
        code = 'import os, runpy, sys; del sys.argv[0]; sys.path[0] = os.path.dirname(sys.argv[0])'
        return run_fresh(f'{code}; runpy.run_path(sys.argv[0], run_name="__main__")', file, *arguments, **kwargs)

    return run_script
