# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/ do what they say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vssm.models.weights import read_checkpoint

pytest.importorskip('mmengine', reason="mmengine is not installed: pip install '.[train]'")
pytest.importorskip('sklearn', reason='scikit-learn is not installed')

FSDP = Path(__file__).parents[2] / 'examples' / 'fsdp.py'
CONFIG = 'digits/vmamba2d_test'  # its network has no batch norm, which would depend on the batch's division
pytestmark = pytest.mark.slow


def run(*arguments):
    """Run a Python process that must end well, and return what it prints."""
    process = subprocess.run(
        [sys.executable, '-m', *map(str, arguments)],
        env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore'),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def options(processes, epochs):
    """Options for two epochs, or the first of them, of five iterations of 64 images that all clip their gradients."""
    changes = {
        'train_cfg.max_epochs': epochs,
        'train_dataloader.batch_size': 64 // processes,
        'train_dataloader.num_batch_per_epoch': 5,
        'optim_wrapper.clip_grad.max_norm': 0.1,
        'param_scheduler.0.end': 1,
        'param_scheduler.1.end': 2,  # the cosine would else end with the run
        'default_hooks.logger.interval': 1,
        'log_processor.window_size': 1,
        'log_processor.custom_cfg': [],
    }
    return ['--cfg-options', *(f'{key}={value!r}' for key, value in changes.items())]


def fsdp(work_dir, epochs, *arguments):
    """Train with two processes, and return the losses and the rates."""
    launcher = ('torch.distributed.run', '--standalone', '--nproc-per-node', 2)
    said = run(*launcher, FSDP, CONFIG, '--work-dir', work_dir, *arguments, *options(2, epochs))
    return [tuple(map(float, numbers)) for numbers in re.findall(r'loss (\S+)  lr (\S+)', said)]


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    """Work dir, losses and rates."""
    work_dir = tmp_path_factory.mktemp('unbroken')
    return work_dir, fsdp(work_dir, 2)


def test_two_fsdp_processes_train_as_one_of_vssm_train_with_the_doubled_batch(unbroken, tmp_path):
    work_dir, numbers = unbroken
    run('vssm.tools.train', CONFIG, '--work-dir', tmp_path, *options(1, 2))
    (curves,) = tmp_path.glob('*/vis_data/scalars.json')
    records = [record for record in map(json.loads, curves.read_text().splitlines()) if 'loss' in record]
    assert min(record['grad_norm'] for record in records) > 0.1
    assert [loss for loss, _ in numbers] == pytest.approx([record['loss'] for record in records], abs=2e-4)
    assert [rate for _, rate in numbers] == pytest.approx([record['lr'] for record in records], rel=0.01)
    assert len(numbers) == 10

    weights, metadata = read_checkpoint(work_dir / 'checkpoint.safetensors')
    expected, expected_metadata = read_checkpoint(tmp_path / 'checkpoint.safetensors')
    assert metadata == {key: value for key, value in expected_metadata.items() if key != 'run'}
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_a_resumed_fsdp_run_goes_on_as_if_nothing_had_happened(unbroken, tmp_path):
    work_dir, numbers = unbroken
    assert fsdp(tmp_path, 1) + fsdp(tmp_path, 2, '--resume') == numbers
    (weights, _), (expected, _) = (read_checkpoint(path / 'checkpoint.safetensors') for path in (tmp_path, work_dir))
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


def test_vssm_test_evaluates_what_fsdp_trained(unbroken, tmp_path):
    work_dir, _ = unbroken
    said = run('vssm.tools.test', CONFIG, work_dir / 'checkpoint.safetensors', '--work-dir', tmp_path)
    assert float(re.search(r'accuracy/top1\s+([\d.]+)', said)[1]) > 20  # chance is 10, for ten digits
