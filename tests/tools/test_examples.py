# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/ do what they say."""

import json
import os
import re
import signal
import warnings
from pathlib import Path

import pytest
import torch
from mm.processes import finish, start, wait_for

from vssm.models.weights import read_checkpoint

pytest.importorskip('mmengine', reason="mmengine is not installed: pip install '.[train]'")
pytest.importorskip('sklearn', reason='scikit-learn is not installed')

FSDP = Path(__file__).parents[2] / 'examples' / 'fsdp.py'
CONFIG = 'digits/vmamba2d_test'  # its network has no batch norm, which would depend on the batch's division
pytestmark = pytest.mark.slow


def options(processes):
    """Options for two epochs of five iterations of 64 images that all clip their gradients."""
    changes = {
        'train_cfg.max_epochs': 2,
        'train_dataloader.batch_size': 64 // processes,
        'train_dataloader.num_batch_per_epoch': 5,
        'optim_wrapper.clip_grad.max_norm': 0.1,
        'param_scheduler.0.end': 1,
        'default_hooks.logger.interval': 1,
        'log_processor.window_size': 1,
        'log_processor.custom_cfg': [],
    }
    return ['--cfg-options', *(f'{key}={value!r}' for key, value in changes.items())]


def start_fsdp(work_dir):
    """Train with two processes, which torchrun starts again where one has died: one did, once, while gloo gathered."""
    launcher = ('torch.distributed.run', '--standalone', '--nproc-per-node', 2, '--max-restarts', 2)
    variable = ('env', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1')  # for torchrun, as docs/several-machines.md says
    return start(*launcher, FSDP, CONFIG, '--work-dir', work_dir, '--resume', *options(2), host=variable)


def iterations(said):
    """Epoch, iteration, loss and rate of all that were done."""
    return [tuple(map(float, n)) for n in re.findall(r'epoch (\d)/2  (\d)/5  loss (\S+)  lr (\S+)', said)]


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    """Work dir and iterations."""
    work_dir = tmp_path_factory.mktemp('unbroken')
    said = finish(start_fsdp(work_dir))
    done = iterations(said)
    if len(done) > 10:
        warnings.warn(f'a process died, and all were started again:\n{said}', stacklevel=1)
    return work_dir, sorted(set(done))


def test_two_fsdp_processes_train_as_one_of_vssm_train_with_the_doubled_batch(unbroken, tmp_path):
    work_dir, done = unbroken
    finish(start('vssm.tools.train', CONFIG, '--work-dir', tmp_path, *options(1)))
    (curves,) = tmp_path.glob('*/vis_data/scalars.json')
    records = [record for record in map(json.loads, curves.read_text().splitlines()) if 'loss' in record]
    assert min(record['grad_norm'] for record in records) > 0.1
    assert [loss for *_, loss, _ in done] == pytest.approx([record['loss'] for record in records], abs=2e-4)
    assert [rate for *_, rate in done] == pytest.approx([record['lr'] for record in records], rel=0.01)
    assert len(done) == 10

    weights, metadata = read_checkpoint(work_dir / 'checkpoint.safetensors')
    expected, expected_metadata = read_checkpoint(tmp_path / 'checkpoint.safetensors')
    assert metadata == {key: value for key, value in expected_metadata.items() if key != 'run'}
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_fsdp_goes_on_where_a_process_was_killed_as_if_nothing_had_happened(unbroken, tmp_path):
    work_dir, done = unbroken
    torchrun = start_fsdp(tmp_path)
    wait_for(tmp_path / 'resume.pt', torchrun)  # of the first of two epochs
    first = int(Path(f'/proc/{torchrun.pid}/task/{torchrun.pid}/children').read_text().split()[0])
    os.kill(first, signal.SIGKILL)
    said = finish(torchrun)
    assert sorted(set(iterations(said))) == done and 'exitcode: -9' in said
    (weights, _), (expected, _) = (read_checkpoint(path / 'checkpoint.safetensors') for path in (tmp_path, work_dir))
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


def test_vssm_test_evaluates_what_fsdp_trained(unbroken, tmp_path):
    work_dir, _ = unbroken
    said = finish(start('vssm.tools.test', CONFIG, work_dir / 'checkpoint.safetensors', '--work-dir', tmp_path))
    assert float(re.search(r'accuracy/top1\s+([\d.]+)', said)[1]) > 20  # chance is 10, for ten digits
