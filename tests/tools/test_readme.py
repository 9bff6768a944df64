# SPDX-License-Identifier: Apache-2.0
"""The README's Python lines work when pasted; the commands of all documents are ones that exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vssm.tools._common import find_config
from vssm.tools.main import make_parser

ROOT = Path(__file__).parents[2]
README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'^```python\n(.*?)^```', README, flags=re.DOTALL | re.MULTILINE)


# What PyTorch says of itself.
IGNORED = (
    'ignore:torch.ao.quantization:DeprecationWarning',
    'ignore:`torch.jit.script_method` is deprecated:DeprecationWarning',
    'ignore::FutureWarning',
    'ignore::UserWarning',
)


def param(i, code):
    slow = re.search('export_onnx|aoti_', code)
    return pytest.param(code, id=f'block{i}', marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize('code', [param(i, code) for i, code in enumerate(BLOCKS)])
def test_python_block_runs_alone(code, tmp_path):
    warnings = ['-W', 'error', *(f'-W{ignored}' for ignored in IGNORED)]
    result = subprocess.run([sys.executable, *warnings, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_readme_has_python_blocks():
    assert len(BLOCKS) >= 9


def commands():
    """Every call of `vssm` in a document or an example, by whatever launcher."""
    for path in (ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'), *(ROOT / 'examples').glob('*.py')):
        text = path.read_text().replace('\\\n', ' ')
        for line in re.findall(r'^ *(?:vssm |torchrun .*vssm\.tools|srun .*vssm ).*', text, flags=re.MULTILINE):
            yield pytest.param(line.strip(), id=line.split('#')[0].strip())


@pytest.mark.parametrize('command', list(commands()))
def test_a_command_is_one_that_exists(command):
    """Its options parse, and its config is there; what it does is for other tests."""
    words = shlex.split(command, comments=True)
    start = next(i for i, word in enumerate(words) if word == 'vssm' or word.startswith('vssm.tools'))
    words[start] = words[start].removeprefix('vssm.tools.')
    args = make_parser().parse_args(words[start + (words[start] == 'vssm') :])
    if getattr(args, 'config', None) and not args.config.startswith('$'):
        find_config(args.config)
