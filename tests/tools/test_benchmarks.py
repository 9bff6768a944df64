# SPDX-License-Identifier: Apache-2.0
"""The benchmark scripts run and write what their tables show. No figure is judged here."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fresh_processes import run_script

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'

slow = pytest.mark.slow  # a process each, which imports everything

TINY = ['test_vit', 'test_vmamba2d', '--size', '160', '--batch-size', '1']
FROZEN = ['test_vit', '--batch-size', '1', '--compile', '--freeze', '--layouts', 'contiguous']


@slow
@pytest.mark.parametrize(
    ('script', 'options', 'rows', 'key'),
    [
        pytest.param('op_cpu.py', ['--batch-size', '1', '--no-reference'], 9, 'step_linear_ms', id='op'),
        pytest.param('fusion_cpu.py', ['--batch-size', '1'], 4, 'step_merged_ms', id='fusion'),
        pytest.param('readout_cpu.py', ['--batch-size', '1'], 4, 'step_operations_ms', id='readout'),
        pytest.param('model_cpu.py', TINY, 2, 'products', id='model'),
        pytest.param('model_cpu.py', [*TINY, '--train'], 2, 'images_per_s', id='model-train'),
        pytest.param('model_cpu.py', [*TINY, '--dtype', 'bfloat16'], 2, 'ratio', id='model-bfloat16'),
        pytest.param('model_cpu.py', [*FROZEN, '--size', '160'], 1, 'compile_s', id='model-frozen'),
        pytest.param('model_cpu.py', [*TINY, '--table', 'float32-one'], 2, 'ratio', id='model-table'),
        pytest.param('size_cpu.py', ['test_vit', 'test_vmamba', '--sizes', '160', '192'], 2, 'per_pixel', id='size'),
        pytest.param('memory.py', ['test_vmamba', '--sizes', '64'], 1, 'train_mb', id='memory'),
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
    result = run_script(BENCHMARKS / script, '--rounds', '1', '--json', file, *options)
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


@pytest.fixture
def model_cpu(monkeypatch, tmp_path):
    """benchmarks/model_cpu.py, asked for its whole table, of which each row is made up."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    model_cpu = importlib.import_module('model_cpu')
    monkeypatch.setattr(model_cpu, 'run_alone', lambda *words, **_: leave_rows(words))
    options = ['--table', '--limit', '100000', '--json', str(tmp_path / 'table.json')]  # from the import on
    monkeypatch.setattr(sys, 'argv', ['model_cpu.py', 'a', 'b', *options])
    return model_cpu


def leave_rows(words):
    if '--train' in words:
        raise subprocess.CalledProcessError(3, words)
    if '--freeze' in words:
        raise subprocess.TimeoutExpired(words, 1)
    row = dict(ratio=1.25, ratio_spread=0.02, products=0.5, images_per_s=8.0)
    Path(words[words.index('--json') + 1]).write_text(json.dumps(dict(rows=[dict(row, name=name) for name in 'ab'])))


@pytest.mark.parametrize('is_native', [False, True])
def test_the_table_says_what_it_leaves_out(is_native, model_cpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(model_cpu, 'multiplies_bfloat16', lambda: is_native)
    model_cpu.main()
    written = json.loads((tmp_path / 'table.json').read_text())
    halves = {'bfloat16', 'autocast', 'compiled-bfloat16'}
    left_out = {'training', 'training-autocast', 'frozen', 'frozen-one'} | (set() if is_native else halves)
    assert written['left_out'].keys() == left_out
    assert [row['row'] for row in written['rows'][::2]] == [name for name in model_cpu.ROWS if name not in left_out]
    assert written['left_out']['training'] == 'it failed with exit status 3'
    shown = capsys.readouterr().out
    assert '1.25 ±0.02, 50%' in shown and 'frozen: not measured, no time was left' in shown
    assert ('bfloat16: not measured, the processor has neither AVX512-BF16 nor AMX' in shown) != is_native


@slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='says what is missing where there is no GPU')
@pytest.mark.parametrize(
    ('script', 'options'), [('op_cuda.py', []), ('model_cuda.py', ['test_vit', 'test_vmamba2d', '--size', '160'])]
)
def test_cuda_script_without_a_gpu(script, options):
    result = run_script(BENCHMARKS / script, *options)
    assert result.returncode == 2 and 'needs a CUDA GPU' in result.stderr


# ---- all that a card is asked for ------------------------------------------------------------------------------------

FOUND = {  # what steps may leave
    'tests': dict(chosen=4, passed=1, failed=1, skipped=1, failures=['a.py::breaks'], reasons={'no second card': 1}),
    'op': dict(
        rows=[
            dict(batch=128, size=56, dim=96, states=1, dtype='bfloat16', copy_gb_per_s=3000.4)
            | dict(forward_2d_ms=1.5, forward_1d_ms=1.0, forward_of_copy=0.25)
            | dict(backward_2d_ms=4.0, backward_1d_ms=3.2, backward_of_copy=0.125)
        ],
        left_out={'float32 1 14 96 1': 'no time was left'},
    ),
    'models': dict(
        rows=[
            dict(name='swin', batch_size=128, size=224, inference_images_per_s=4000.0, train_images_per_s=1000.0),
            dict(name='ours', batch_size=128, size=224, inference_images_per_s=5000.0, train_peak_mb=12340.0),
        ]
    ),
    'compiled': dict(rows=[dict(name='ours', batch_size=128, size=224, train_images_per_s=1500.0, train_peak_mb=9e3)]),
}
LINES = (
    ' | 1 passed, 1 failed, 1 skipped, 1 not run | ',
    '| 128x56x56x96 | 1 | bfloat16 | 1.500 | 25% | 1.50 | 4.000 | 12% | 1.25 |',
    '| `swin` | 4000 | 1.00 | - | - | 1000 | 1.00 | - | - | - | - |',
    '| `ours` | 5000 | 1.25 | - | - | - | - | 1500 | - | 12.3 | 9.0 |',  # no ratio to what was not measured
    '- op, float32 1 14 96 1: no time was left',
    '- tests, 1 tests skipped: no second card',
    '- a.py::breaks',
)
MODELLED = {
    'networks': [dict(name='swin', batch_size=128, size=224, train=False, modelled_ms=20.0)],
    'launches': [
        dict(op='scan', passes='backward', kernel=kernel, shape=[128, 56, 56, 96], dtype='bfloat16', call_ms=ms)
        for kernel, ms in (('scan_forward_2d', 0.5), ('scan_backward_2d', 2.0), ('scan_backward_1d', 9.0))
    ],
}
BESIDE_MODEL = (
    '| `swin`, inference, eager | 32.00 | 20.00 | 1.60 |',
    '| scan, 128x56x56x96, bfloat16, backward | 4.00 | 2.50 | 1.60 |',
)
ENDS = {  # how a step that has left its figures ends
    'well': ('', 'done'),
    'failing': ('print("the last words"); sys.exit(3)', 'failed with exit status 3'),
    'late': ('print("the last words", flush=True); time.sleep(600)', 'ended at its limit of'),
}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """benchmarks/gpu.py, as it was started just now, with its results in a folder of their own."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    gpu = importlib.import_module('gpu')
    monkeypatch.setattr(gpu, 'STARTED', time.monotonic())
    monkeypatch.setattr(gpu, 'machine', lambda device: dict(processor='a card', driver='580.1', triton=None))
    monkeypatch.setattr(sys, 'argv', ['benchmarks/gpu.py', '--dry-run', '--out', str(tmp_path)])
    return gpu


def test_what_was_modelled_stands_beside_what_was_measured(gpu, tmp_path):
    file = tmp_path / 'model.json'
    file.write_text(json.dumps(dict(rows=MODELLED)))
    figures = dict(command='', date='', dry_run=False, conditions={}, modelled=gpu.modelled(file))
    text = gpu.page(
        figures | dict(steps={name: dict(found, status='done', seconds=1) for name, found in FOUND.items()})
    )
    lines = text.partition('## Beside the model')[2].splitlines()
    assert set(BESIDE_MODEL) < set(lines)
    assert len([line for line in lines if line.startswith('|')]) == 2 + len(BESIDE_MODEL)  # no other was modelled
    assert 'Beside the model' not in gpu.page(figures | dict(steps={}))


@pytest.mark.parametrize(('step', 'end'), [('op', 'well'), ('op', 'late'), *((step, 'failing') for step in FOUND)])
def test_a_step_leaves_its_figures_whatever_becomes_of_it(step, end, gpu, monkeypatch, tmp_path):
    """And those of the others; the page is made from the json, and says how it ended."""
    ending, status = ENDS[end]
    called = []

    def command(args, name, seconds):
        called.append(name)
        file, text = str(args.out / f'{name}.json'), json.dumps(FOUND[name])
        script = f'import sys, time\nopen({file!r}, "w").write({text!r})\n{ending if name == step else ""}'
        return ['-S', '-c', script]

    monkeypatch.setattr(gpu, 'step_command', command)
    if end == 'late':
        monkeypatch.setattr(gpu, 'GRACE', 1)
        monkeypatch.setattr(gpu, 'WEIGHTS', dict.fromkeys(FOUND, 1000) | {step: 12})
        sys.argv += ['--minutes', '20', '--steps', step, *(name for name in FOUND if name != step)]
    assert gpu.main() == (end != 'well')

    assert sorted(called) == sorted(FOUND)
    written, text = json.loads((tmp_path / 'gpu.json').read_text()), (tmp_path / 'gpu.md').read_text()
    assert text == gpu.page(written)
    for name, result in written['steps'].items():
        assert result['status'].startswith(status if name == step else 'done')
        assert f'| {name} | {result["status"]} |' in text
        assert json.loads((tmp_path / f'{name}.json').read_text()).items() <= result.items()
    lines = text.splitlines()
    assert [line for line in LINES if line not in text] == []
    assert '| card | a card |' in lines and '| driver | 580.1 |' in lines and 'Triton' not in text
    assert lines[2].startswith('`python benchmarks/gpu.py --dry-run') and str(tmp_path) not in text
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {'gpu.json', 'gpu.md', *(f'{name}.json' for name in FOUND)} | ({f'{step}.log'} & files)
    assert (end == 'well') != (tmp_path / f'{step}.log').exists()
    assert end == 'well' or (tmp_path / f'{step}.log').read_text().startswith('the last words\n')


@slow
def test_a_test_that_was_only_begun_has_not_passed(gpu, tmp_path):
    (tmp_path / 'test_some.py').write_text(
        'import os, pytest\n'
        'def test_passes(): pass\n'
        'def test_skipped(): pytest.skip("a reason")\n'
        'def test_fails(): raise ValueError\n'
        'def test_ends_all(): os._exit(9)\n'
        'def test_never_run(): pass\n'
    )
    file = tmp_path / 'tests.json'
    command = [str(BENCHMARKS / '_gpu_tests.py'), str(file), str(tmp_path / 'test_some.py'), '-p', 'no:cacheprovider']
    result = gpu.run_step(command, 300, tmp_path / 'tests.log')
    assert result['status'] == 'failed with exit status 9'
    written = json.loads(file.read_text())
    assert written.pop('failures')[0].endswith('test_some.py::test_fails')
    assert written == dict(chosen=5, passed=1, failed=1, skipped=1, reasons={'Skipped: a reason': 1})


def test_a_step_that_leaves_nothing_has_no_figures(gpu, monkeypatch, tmp_path):
    for old in ('op.json', 'op.log'):
        (tmp_path / old).write_text('{"rows": [{}]}')  # of an earlier run
    monkeypatch.setattr(gpu, 'step_command', lambda *_: ['-S', '-c', ''])
    assert gpu.main() == 0
    text = (tmp_path / 'gpu.md').read_text()
    assert all(f'| {name} | done | - | 0 |' in text for name in FOUND)
    assert '##' not in text and 'nothing was measured' in text
    assert {path.name for path in tmp_path.iterdir()} == {'gpu.json', 'gpu.md'}


@slow
def test_a_dry_run_calls_every_step(tmp_path):
    command = [sys.executable, str(BENCHMARKS / 'gpu.py'), '--dry-run', '--minutes', '30', '--out', str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, (
        result.stdout + result.stderr + ''.join(p.read_text() for p in tmp_path.glob('*.log'))
    )
    steps = json.loads((tmp_path / 'gpu.json').read_text())['steps']
    assert {name: step['status'] for name, step in steps.items()} == dict.fromkeys(FOUND, 'done')
    assert steps['tests']['passed'] > 0 and not any('rows' in step for step in steps.values())
