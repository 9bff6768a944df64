# SPDX-License-Identifier: Apache-2.0
"""Whole runs through the command line: killed and resumed, in several processes, on broken data, at the disk's end."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import finish, losses, options, start, wait_for

from vssm.models.weights import read_checkpoint
from vssm.tools._common import find_config

pytest.importorskip('mmengine', reason="mmengine is not installed: pip install '.[train]'")
from vssm.models.mm.utils import RunError, check_interface  # noqa: E402  # which needs it

ROOTS = dict(imagenet='imagenet', ade20k='ADEChallengeData2016', coco='coco')


@pytest.fixture
def command(small_config, data):
    """The config of a small run and its options: four epochs of two iterations, or eight iterations."""

    def command(task, model_name, **changes):
        name, changed = small_config(task, model_name)
        changed.update({'num_threads': 1, 'default_hooks.logger.interval': 1, 'log_processor.window_size': 1})
        if task == 'ade20k':
            changed['train_cfg'] = dict(max_iters=8, val_interval=8)
        else:
            changed.update({'train_cfg.max_epochs': 4, 'train_cfg.val_interval': 4})
        return [name, '--data-root', data / ROOTS[task], *options(**changed | changes)]

    return command


# The way from file to loss differs by task. Of the families, those have a turn that keep more than weights: MambaVision
# the averages of batch norms, Spatial-Mamba the second network of MESA.
@pytest.mark.slow
@pytest.mark.parametrize(
    'task, model_name',
    [
        ('imagenet', 'test_spatial_mamba'),
        ('imagenet', 'test_mambavision'),
        ('ade20k', 'test_vmamba2d'),
        ('coco', 'test_vmamba'),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(task, model_name, command, tmp_path):
    """Bit for bit, although other workers make its samples."""
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    loader = {'train_dataloader.num_workers': 2, 'train_dataloader.persistent_workers': True}
    arguments = command(task, model_name, **loader)
    unbroken = start('vssm.tools.train', *arguments, '--work-dir', whole)
    first, last = ('iter_2.pth', 'iter_8.pth') if task == 'ade20k' else ('epoch_1.pth', 'epoch_4.pth')
    process = start('vssm.tools.train', *arguments, '--work-dir', killed)
    wait_for(killed / first, process)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / last).exists()
    arguments = command(task, model_name, **dict.fromkeys(loader, 0))
    said = finish(start('vssm.tools.train', *arguments, '--work-dir', killed, '--resume'))
    assert 'beginning' not in said
    finish(unbroken)

    assert losses(killed) == losses(whole) and set(losses(whole)) == set(range(1, 9))
    (expected, _), (weights, _) = (read_checkpoint(folder / last) for folder in (whole, killed))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    if task == 'imagenet':  # the others' is for test_own_data.py
        checkpoint = killed / 'checkpoint.safetensors'
        tested = start('vssm.tools.test', arguments[0], checkpoint, *arguments[1:], '--work-dir', tmp_path / 'test')
        assert 'accuracy/top2' in finish(tested)


@pytest.mark.slow
def test_a_run_killed_at_any_moment():
    """While it trains, evaluates or writes; each time it goes on from its last complete checkpoint."""
    script = Path(__file__).parent / 'kill_loop.py'
    result = subprocess.run([sys.executable, script, '--kills', '4'], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and result.stdout.startswith('4 kills of '), result.stdout + result.stderr


def torchrun(processes):
    """The launcher of several processes, which finds a free port by itself."""
    return ('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes))


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path):
    """And resume together. The digits' network knows no batch norm."""

    def train(processes, epochs, work_dir, *arguments):
        launcher = ()
        if processes > 1:
            launcher = torchrun(processes)
            arguments += ('--launcher', 'pytorch')
        changes = {
            'train_cfg.max_epochs': epochs,
            'train_dataloader.batch_size': 64 // processes,
            'train_dataloader.num_batch_per_epoch': 5,
            'param_scheduler': [dict(type='CosineAnnealingLR', T_max=2, end=2, convert_to_iter_based=True)],
            'default_hooks.checkpoint.interval': 1,
        }
        return start(
            *('vssm.tools.train', 'digits/vmamba2d_test', '--work-dir', work_dir, *arguments, *options(**changes)),
            launcher=launcher,
        )

    single = train(1, 2, tmp_path / 'single')
    finish(train(2, 1, tmp_path / 'double'))
    finish(train(2, 2, tmp_path / 'double', '--resume'))
    finish(single)
    expected, _ = read_checkpoint(tmp_path / 'single' / 'checkpoint.safetensors')
    weights, metadata = read_checkpoint(tmp_path / 'double' / 'checkpoint.safetensors')
    assert metadata['epoch'] == '2'
    first, _ = read_checkpoint(tmp_path / 'double' / 'epoch_1.pth')
    for name, value in weights.items():
        assert not torch.equal(value, first[f'model.{name}']) or name.endswith('stages.3.blocks.0.mixer.A_log'), name
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_resume_what_each_knows_alone(command, tmp_path):
    """Statistics of batch norms, averages that teach, accumulated gradients: bit for bit."""

    def train(work_dir, *arguments):
        changes = {
            'train_dataloader.batch_size': 2,
            'optim_wrapper.accumulative_counts': 2,
            'train_cfg.max_epochs': 7,
            'default_hooks.checkpoint.max_keep_ckpts': -1,
        }
        name, *rest = command('imagenet', 'test_spatial_mamba', **changes)
        return start(
            *('vssm.tools.train', name, '--work-dir', work_dir, '--launcher', 'pytorch', *arguments, *rest),
            launcher=torchrun(2),
        )

    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    finish(train(whole))
    resumed.mkdir()
    shutil.copy(whole / 'epoch_3.pth', resumed)
    finish(train(resumed, '--resume'))
    expected = losses(whole)
    assert len(expected) == 7 and losses(resumed) == {step: expected[step] for step in range(4, 8)}
    (expected, _), (weights, _) = (read_checkpoint(f / 'epoch_7.pth') for f in (whole, resumed))
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


@pytest.mark.slow
def test_an_unreadable_image_of_any_process_is_named(command, tmp_path):
    data = tmp_path / 'data'
    name, _, root, *rest = command('imagenet', 'test_vmamba', unreadable='skip')
    shutil.copytree(root, data)
    for path in sorted((data / 'train').glob('*/*'))[:2]:  # of four, so that each process meets one or more
        path.write_bytes(path.read_bytes()[:500])
    arguments = ('--data-root', data, '--work-dir', tmp_path / 'run', '--launcher', 'pytorch', *rest)
    finish(start('vssm.tools.train', name, *arguments, launcher=torchrun(2)))
    log = next((tmp_path / 'run').glob('*/*.log')).read_text()
    assert '2 of 4 images are unreadable' in log and log.count('Unreadable, replaced by another image') == 2


@pytest.fixture
def hosts():
    """Two hosts with a cable between them, as network namespaces: the command that runs something on each."""
    if shutil.which('ip') is None:
        pytest.skip('no network namespaces can be made without the command `ip`')
    names = [f'vssm-{os.getpid()}-{i}' for i in range(2)]

    def ip(*arguments, check=True):
        subprocess.run(['ip', *arguments], check=check, capture_output=True, text=True)

    try:
        for name in names:
            ip('netns', 'add', name)
        ip(*('link', 'add', 'eth0', 'netns', names[0], 'type', 'veth', 'peer', 'name', 'eth0', 'netns', names[1]))
        for i, name in enumerate(names):
            ip('-n', name, 'address', 'add', f'10.77.0.{i + 1}/24', 'dev', 'eth0')
            for link in ('lo', 'eth0'):
                ip('-n', name, 'link', 'set', link, 'up')
        yield [('ip', 'netns', 'exec', name) for name in names]
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f'no network namespaces can be made here: {getattr(error, "stderr", None) or error}')
    finally:
        for name in names:
            ip('netns', 'delete', name, check=False)


@pytest.mark.parametrize(
    'address, interface, local, refused',
    [
        ('127.0.1.1', None, '4', True),
        ('203.0.113.9', None, '4', True),  # which no machine has
        (None, None, '4', True),
        ('127.0.1.1', 'eth0', '4', False),
        ('127.0.1.1', None, '8', False),
        ('0.0.0.0', None, '4', False),
    ],
    ids=['loopback', 'elsewhere', 'nameless', 'interface', 'one machine', 'reached'],
)
def test_a_machine_that_others_cannot_reach_is_told_so(address, interface, local, refused, monkeypatch):
    def found(name, port, type):
        if address is None:
            raise socket.gaierror
        return [(socket.AF_INET, type, 6, '', (address, 0))]

    for name, value in dict(WORLD_SIZE='8', LOCAL_WORLD_SIZE=local, GLOO_SOCKET_IFNAME=interface).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, 'getaddrinfo', found)
    with pytest.raises(RunError, match='GLOO_SOCKET_IFNAME must name') if refused else contextlib.nullcontext():
        check_interface()


@pytest.mark.slow
def test_two_hosts_train_as_one_process_although_one_is_killed(hosts, tmp_path, monkeypatch):
    """By the commands of docs/several-machines.md; one of the two processes dies in the second of three epochs."""
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parent))
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'eth0')
    monkeypatch.setenv('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')

    def train(work_dir, images, *arguments, kill=None, **kwargs):
        config = tmp_path / f'{work_dir.name}.py'
        config.write_text(
            f"""_base_ = {str(find_config('digits/vmamba2d_test'))!r}
custom_imports = dict(imports=['vssm.models.mm', 'recording'])
custom_hooks = [dict(type='RecordingHook', kill={kill})]
train_cfg = dict(max_epochs=3, val_interval=3)
train_dataloader = dict(batch_size={images}, num_batch_per_epoch=2)
val_dataloader = dict(num_batch_per_epoch=1)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=3))
"""
        )
        return start('vssm.tools.train', config, '--work-dir', work_dir, *arguments, **kwargs)

    def recorded(work_dir, rank=0):
        """The last loss of every iteration, and how many there were."""
        lines = (work_dir / f'losses_{rank}.txt').read_text().splitlines()
        return {int(number): float(loss) for number, loss in map(str.split, lines)}, len(lines)

    def on(node):
        launcher = '-m torch.distributed.run --nnodes 2 --rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29500'
        launcher += f' --rdzv-id run --rdzv-conf is_host={int(node == 0)} --local-addr 10.77.0.{node + 1}'
        launcher += ' --nproc-per-node 1 --max-restarts 1'  # and these hosts have no names
        return dict(host=hosts[node], launcher=launcher.split(), kill=[1, 2])

    double, single = tmp_path / 'double', tmp_path / 'single'
    finish(train(single, 8))
    nodes = [train(double, 4, '--launcher', 'pytorch', '--resume', **on(node)) for node in range(2)]
    try:
        while all(node.poll() is None for node in nodes):
            time.sleep(0.1)
        for node in sorted(nodes, key=lambda node: node.returncode is None):  # a failed one leaves the other waiting
            finish(node)
    finally:
        for node in nodes:
            node.terminate()  # which would wait for half an hour for another that has failed

    (expected, _), (first, _), (second, count) = recorded(single), recorded(double), recorded(double, rank=1)
    assert expected.keys() == first.keys() == second.keys() == set(range(6))
    assert count == 7  # the second epoch began twice
    for number, loss in expected.items():
        assert (first[number] + second[number]) / 2 == pytest.approx(loss, rel=1e-4), number
    expected, _ = read_checkpoint(single / 'epoch_3.pth')
    weights, _ = read_checkpoint(double / 'epoch_3.pth')
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_all_processes_stop_when_the_first_cannot_write(tmp_path):
    """It alone writes; the others do not wait for it until somebody kills them."""
    work_dir = tmp_path / 'run'
    changes = {'train_cfg.max_epochs': 500, 'default_hooks.checkpoint.interval': 1}
    for loader in ('train_dataloader', 'val_dataloader'):
        changes |= {f'{loader}.batch_size': 8, f'{loader}.num_batch_per_epoch': 2}
    arguments = ('--work-dir', work_dir, '--launcher', 'pytorch', *options(**changes))
    process = start('vssm.tools.train', 'digits/vmamba2d_test', *arguments, launcher=torchrun(2))
    wait_for(work_dir / 'epoch_1.pth', process)
    work_dir.rename(tmp_path / 'elsewhere')
    said = finish(process, 1)
    assert f'vssm train: {work_dir} cannot be written to any more' in said and 'exitcode  : 2 ' in said, said
