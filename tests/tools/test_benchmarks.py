# SPDX-License-Identifier: Apache-2.0
"""The benchmark scripts run and write what their tables show. No figure is judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'

pytestmark = pytest.mark.slow  # a process each, which imports everything

TINY = ['test_vit', 'test_vmamba2d', '--size', '160', '--batch-size', '1']


@pytest.mark.parametrize(
    ('script', 'options', 'rows', 'key'),
    [
        pytest.param('op_cpu.py', ['--batch-size', '1', '--no-reference'], 4, 'step_scan_2d_ms', id='op'),
        pytest.param('fusion_cpu.py', ['--batch-size', '1'], 4, 'step_merged_ms', id='fusion'),
        pytest.param('readout_cpu.py', ['--batch-size', '1'], 4, 'step_operations_ms', id='readout'),
        pytest.param('model_cpu.py', TINY, 2, 'products', id='model'),
        pytest.param('model_cpu.py', [*TINY, '--train'], 2, 'images_per_s', id='model-train'),
        pytest.param('size_cpu.py', ['test_vit', 'test_vmamba', '--sizes', '160', '192'], 2, 'per_pixel', id='size'),
        pytest.param('memory.py', ['test_vmamba', '--sizes', '64', '96'], 2, 'train_mb', id='memory'),
        pytest.param('memory.py', ['test_vmamba', '--sizes', '64', '--inference'], 1, 'inference_mb', id='inference'),
        pytest.param(
            'report_check.py',
            ['test_vmamba', '--batch-size', '1', '--steps', '2'],
            1,
            'report_images_per_s',
            id='report',
        ),
    ],
)
def test_script_writes_its_figures(script, options, rows, key, tmp_path):
    file = tmp_path / 'figures.json'
    command = [sys.executable, BENCHMARKS / script, '--rounds', '1', '--json', file, *options]
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    written = json.loads(file.read_text())
    assert len(written['rows']) == rows
    assert all(row[key] > 0 for row in written['rows'])
    assert written['conditions']['threads'] >= 1
    assert (
        written['command'].startswith(f'python benchmarks/{script} --rounds 1') and '--json' not in written['command']
    )
    assert list(tmp_path.iterdir()) == [file]
    assert f'processor {written["conditions"]["processor"]}' in result.stdout  # below the table


@pytest.mark.parametrize(
    ('script', 'options'), [('op_cuda.py', []), ('model_cuda.py', ['test_vit', 'test_vmamba2d', '--size', '160'])]
)
def test_cuda_script_without_a_gpu(script, options):
    command = [sys.executable, str(BENCHMARKS / script), *options]
    result = subprocess.run([*command, '--dry-run'], capture_output=True, text=True)
    assert result.returncode == 0 and 'dry run' in result.stdout and 'nothing timed' in result.stdout, result.stderr
    if not torch.cuda.is_available():
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2 and 'needs a CUDA GPU' in result.stderr
