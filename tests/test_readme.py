# SPDX-License-Identifier: Apache-2.0
"""The README's Python lines work when pasted."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / 'README.md').read_text()
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
