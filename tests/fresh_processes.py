# SPDX-License-Identifier: Apache-2.0
"""Processes that have yet to import this package, without the seconds in which they would import PyTorch and timm."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# It has imported what takes long, and for each task splits off a process that becomes as if Python had just started;
# and before that another, which waits for the end of the first and tells its status.
SERVER = """
import json, os, signal, sys, types
import timm, torch
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    if not os.fork():
        break
else:
    sys.exit()
task = json.loads(line)
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
child = os.fork()
if child:
    print(child, flush=True)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(task['status'] + '.tmp', 'w') as file:
        file.write(str(status))
    os.rename(file.name, task['status'])
    os._exit(0)
os.setsid()
for number, path in enumerate((os.devnull, *task['outputs'])):
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT if number else os.O_RDONLY)
    os.dup2(file, number)
    os.close(file)
os.chdir(task['cwd'])
os.environ.clear()
os.environ.update(task['environment'])
sys.path[1:1] = filter(None, os.environ.get('PYTHONPATH', '').split(os.pathsep))
sys.argv = ['-c', *task['arguments']]
sys.modules['__main__'] = main = types.ModuleType('__main__')
exec(task['code'], vars(main))
"""


@functools.cache
def server() -> subprocess.Popen:
    """It ends when this process does. OpenMP reads the number of threads when PyTorch is imported."""
    command, environment = [sys.executable, '-c', SERVER], dict(os.environ, OMP_NUM_THREADS='1')
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


@contextlib.contextmanager
def killed_on_failure(session: int):
    """Kill a session of processes where what waits for them fails, or is interrupted, which does not reach them."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(ProcessLookupError):  # they have ended
            os.killpg(session, signal.SIGKILL)
        raise


class Process:
    """A process in a session of its own that runs code as `python -c` does; to use like subprocess.Popen.

    Args:
        code: The code.
        arguments: Its arguments.
        cwd: Its working directory, by default that of this process.
        merged: Whether what it says of errors stands amid its output.
        environment: What differs from the environment of this process.
    """

    def __init__(self, code: str, *arguments: object, cwd: Path | None = None, merged: bool = False, **environment):
        self._folder = tempfile.TemporaryDirectory()
        output, errors, self._status = (Path(self._folder.name, name) for name in ('output', 'errors', 'status'))
        self._outputs = (output, output if merged else errors)
        self.returncode: int | None = None
        task = dict(
            code=code,
            arguments=list(map(str, arguments)),
            cwd=str(cwd or Path.cwd()),
            environment={**os.environ, **environment},
            outputs=list(map(str, self._outputs)),
            status=str(self._status),
        )
        print(json.dumps(task), file=server().stdin, flush=True)
        self.pid = int(server().stdout.readline())

    def poll(self) -> int | None:
        if self.returncode is None and self._status.exists():
            self.returncode = int(self._status.read_text())
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        end = time.monotonic() + timeout
        with killed_on_failure(self.pid):
            while self.poll() is None:
                assert time.monotonic() < end, f'it still runs after {timeout} s: {self._outputs[0].read_text()}'
                time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        self.wait(timeout)
        output, errors = (path.read_text() for path in self._outputs)
        return output, errors


def run_fresh(code: str, *arguments: object, **kwargs) -> subprocess.CompletedProcess:
    """A process that has ended."""
    process = Process(code, *arguments, **kwargs)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(code, process.returncode, output, errors)


def run_script(file: Path, *arguments: object) -> subprocess.CompletedProcess:
    """The same for a file, which runs as `python file` does."""
    code = 'import os, runpy, sys; del sys.argv[0]; sys.path[0] = os.path.dirname(sys.argv[0])'
    return run_fresh(f'{code}; runpy.run_path(sys.argv[0], run_name="__main__")', file, *arguments)


AS_MODULE = 'import runpy, sys; del sys.argv[0]; runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)'
