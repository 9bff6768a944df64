# SPDX-License-Identifier: Apache-2.0
"""The README's Python lines work when pasted."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / 'README.md').read_text()
BLOCKS = re.findall(r'^```python\n(.*?)^```', README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize('code', BLOCKS, ids=[f'block{i}' for i in range(len(BLOCKS))])
def test_python_block_runs_alone(code, tmp_path):
    result = subprocess.run([sys.executable, '-W', 'error', '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_readme_has_python_blocks():
    assert len(BLOCKS) >= 4
