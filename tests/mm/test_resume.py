# SPDX-License-Identifier: Apache-2.0
"""What a run goes on from: its own last checkpoint, under the config that it began with, or a sentence says why not."""

import errno
import math
import os
import shutil
import signal
import time
import types
import uuid
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip('mmengine', reason="mmengine is not installed: pip install '.[train]'")

from mmengine.config import Config  # noqa: E402
from mmengine.registry import RUNNERS  # noqa: E402

from vssm.models import mm  # noqa: E402
from vssm.models.mm import compare, content, identity, saved, utils  # noqa: E402
from vssm.tools._common import find_config  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread')

EMA = dict(type='EMAHook', momentum=0.1)
BATCHES = 2  # in an epoch


def build(work_dir, name='digits/vmamba2d_test', **options):
    """Runner of a config cut down to an epoch of two iterations of eight images."""
    cfg = Config.fromfile(find_config(name))
    changes = {'train_cfg.max_epochs': 1, 'default_hooks.checkpoint.interval': 1, 'custom_hooks': [EMA]}
    for loader, batches in dict(train=BATCHES, val=1, test=1).items():
        changes |= {f'{loader}_dataloader.batch_size': 8, f'{loader}_dataloader.num_batch_per_epoch': batches}
    cfg.merge_from_dict({**changes, **options})
    cfg.work_dir, cfg.experiment_name = str(work_dir), uuid.uuid4().hex  # by which mmengine keeps loggers and histories
    return RUNNERS.build(cfg)


def log(runner):
    return ''.join(path.read_text() for path in Path(runner.log_dir).glob('*.log'))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A work dir with one epoch of a run that keeps averages."""
    folder = tmp_path_factory.mktemp('trained')
    build(folder).train()
    return folder


@pytest.fixture
def work_dir(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / 'run'))


def edit(path, change):
    """Write a checkpoint anew with something in it changed."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


# ---- the run of a work dir -------------------------------------------------------------------------------------------


def test_a_resumption_goes_on_with_the_run_that_began_last(work_dir):
    """An older run has a checkpoint of a higher number, which stays; and what another run is writing stays, too."""
    older = identity.current_run(work_dir)
    (work_dir / 'epoch_1.pth').rename(work_dir / 'epoch_3.pth')
    begun = build(work_dir)
    begun.train()
    assert f'{work_dir} holds files of earlier runs (epoch_3.pth). They stay' in log(begun)
    run = identity.current_run(work_dir)
    assert run != older and saved.read_notes(work_dir / 'epoch_1.pth')['run'] == run.name
    names = [f'.epoch_2.pth.{name}.0123456789abcdef.tmp' for name in (run.name, 'run', older.name)]
    for name in names:
        (work_dir / name).touch()

    resumed = build(work_dir, resume=True, **{'train_cfg.max_epochs': 2})
    resumed.train()
    assert f'Loaded {work_dir / "epoch_1.pth"}' in log(resumed) and resumed.iter == 2 * BATCHES
    assert identity.current_run(work_dir) == run
    assert [saved.read_notes(work_dir / f'epoch_{i}.pth')['run'] == run.name for i in (1, 2, 3)] == [True, True, False]
    assert [(work_dir / name).exists() for name in names] == [False, False, True]


def test_a_run_without_a_checkpoint_of_its_own_begins_again(work_dir):
    identity.note_run(work_dir, identity.Run.new())
    resumed = build(work_dir, resume=True)
    resumed._find_run()
    assert resumed._resumed is None and 'starts from its beginning' in log(resumed)


def test_a_run_may_branch_off_from_a_file(work_dir, tmp_path):
    """It has the file to go on from until it has checkpoints of its own, and the other run's best stays the other's."""
    best = work_dir / 'best_accuracy_top1_epoch_1.pth'
    best.touch()
    notes = dict(best_ckpt=str(best), best_score=0.0, keep_ckpt_ids=[1])
    edit(work_dir / 'epoch_1.pth', lambda checkpoint: checkpoint['message_hub']['runtime_info'].update(notes))
    hooks = {'default_hooks.checkpoint.save_best': 'accuracy/top1', 'default_hooks.checkpoint.max_keep_ckpts': 2}
    branch = tmp_path / 'branch'
    options = {'train_cfg.max_epochs': 2, **hooks}
    build(branch, resume=True, load_from=str(work_dir / 'epoch_1.pth'), **options).train()
    assert best.exists() and (work_dir / 'epoch_1.pth').exists() and list(branch.glob('best_*_epoch_*.pth'))
    run = identity.current_run(branch)
    assert run.parent == str(work_dir / 'epoch_1.pth') and run != identity.current_run(work_dir)

    (branch / 'epoch_2.pth').unlink()
    again = build(branch, resume=True, **options)
    again._find_run()
    assert again._resumed[0] == work_dir / 'epoch_1.pth' and again._run == run
    (work_dir / 'epoch_1.pth').unlink()
    with pytest.raises(mm.RunError, match='none of the 1 checkpoints'):
        build(branch, resume=True, **options)._find_run()


def test_the_last_file_of_a_run_by_name_is_no_branch(work_dir):
    resumed = build(work_dir, resume=True, load_from=str(work_dir / 'epoch_1.pth'))
    resumed._find_run()
    assert resumed._run == identity.current_run(work_dir)


@pytest.mark.parametrize('text', ['', '{}', '[1]', '{"name": 3}', '{"name": "a", "parent": 1}', '{"other": "a"}'])
def test_a_damaged_note_of_the_run_is_refused(text, tmp_path):
    (tmp_path / 'run.json').write_text(text)
    with pytest.raises(mm.RunError, match=r'run\.json must name the current run'):
        identity.current_run(tmp_path)


def test_a_work_dir_in_use_is_refused(work_dir):
    config = work_dir / 'vmamba2d_test.py'
    config.write_text('of the run that is at work')
    with identity.lock(work_dir) as locked:
        assert locked
        with pytest.raises(mm.RunError, match=f'{work_dir} is in use by another training'):
            build(work_dir, resume=True).train()
    assert config.read_text() == 'of the run that is at work'
    with identity.lock(work_dir) as locked:
        assert locked


def test_a_lock_ends_with_the_process_that_a_kill_ends(tmp_path):
    """Although a worker that it has started lives on."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with identity.lock(tmp_path):
            worker = os.fork()
            if worker:
                os.write(writing, f'{worker}\n'.encode())
            time.sleep(600)
        os._exit(0)
    worker = int(os.read(reading, 100))
    try:
        with pytest.raises(mm.RunError, match='in use'), identity.lock(tmp_path):
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.kill(worker, 0)  # it is there
        with identity.lock(tmp_path) as locked:
            assert locked
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_folder_without_locks_is_used_all_the_same(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(identity.fcntl, 'flock', refuse)
    with identity.lock(tmp_path) as locked:
        assert not locked


def test_a_call_of_the_first_process_fails_in_all(monkeypatch):
    assert utils.in_first_process(lambda: 3) == utils.in_all_processes(lambda: 3) == 3
    for call in (utils.in_first_process, utils.in_all_processes):
        with pytest.raises(mm.RunError, match='no room'):
            call(lambda: (_ for _ in ()).throw(OSError('no room')))
        with pytest.raises(ZeroDivisionError):
            call(lambda: 1 / 0)
    # In another process: what the first one sends says that it failed there.
    monkeypatch.setattr(utils, 'is_main_process', lambda: False)
    monkeypatch.setattr(utils, 'broadcast_object_list', lambda outcome: outcome.__setitem__(1, 'full'))
    monkeypatch.setattr(utils, 'all_gather_object', lambda message: ['full', message])
    for call in (utils.in_first_process, utils.in_all_processes):
        with pytest.raises(mm.RunError, match='full'):
            call(lambda: 3)


# ---- under another config --------------------------------------------------------------------------------------------


def test_a_config_is_read_and_not_run():
    text = '\n'.join(
        [
            "a = dict(b=[dict(c=1), dict(c=(1, 2))], d={'x y': None}, e=dict(), f=[1, 2])",
            'g = __import__("os").abort()',
            'h = -inf',
            'raise SystemExit',
        ]
    )
    expected = {'a.b.0.c': '1', 'a.b.1.c': '(1, 2)', 'a.d.x y': 'None', 'a.e': 'dict()', 'a.f': '[1, 2]'}
    assert compare.flat_config(text) == expected | {'g': "__import__('os').abort()", 'h': '-inf'}
    for text in (None, 3, 'a = (', 'a = ' + '(' * 9999, 'a\0'):
        assert compare.flat_config(text) is None


def test_differences_by_key():
    saved, now = dict(a='1', b='2', work_dir='x'), dict(a='3', c='4', work_dir='y')
    assert compare.differences(saved, now) == dict(a='1 -> 3', b='2 -> not set', c='not set -> 4')
    assert len(compare.differences({}, dict(a='9' * 1000))['a']) < 100


@pytest.mark.parametrize('key', ['model_name', 'scan_ndim', 'backbone.type', 'bbox_head.num_classes', 'stem.conv'])
def test_what_makes_another_model(key):
    assert compare.other_models({f'model.{key}': '1 -> 2'}) == [f'model.{key}: 1 -> 2']


@pytest.mark.parametrize(
    'key',
    [
        'model.drop_path_rate',
        'model.backbone.with_cp',
        'model.head.loss_cls.type',
        'model.data_preprocessor.mixup.num_classes',
        'model.test_cfg.rcnn.nms.iou_threshold',
        'model.pretrained',
        'model.backbone.init_cfg.checkpoint',
        'optim_wrapper.type',
    ],
)
def test_what_leaves_the_model_what_it_is(key):
    assert compare.other_models({key: '1 -> 2'}) == []


def test_the_same_config_is_no_difference(work_dir):
    resumed = build(work_dir, resume=True)
    resumed.train()
    assert 'The config is not' not in log(resumed) and resumed.iter == BATCHES


SGD = dict(type='sgd', lr=0.1)
MULTISTEP = [dict(type='LinearLR', start_factor=0.01, end=2), dict(type='MultiStepLR', milestones=[1])]


@pytest.mark.parametrize(
    'options, said',
    [
        (
            {'custom_hooks': []},
            r'the checkpoint has a moving average of the weights, and the config \(EMAHook\) has none',
        ),
        ({'model.model_name': 'test_vmamba'}, "another model \\(model.model_name: 'test_vmamba2d' -> 'test_vmamba'\\)"),
        ({'model.scan_ndim': 1}, r'another model \(model.scan_ndim: not set -> 1\)'),
        (
            {'train_dataloader.batch_size': 4},
            'before 1 process of 8 images, now 1 process of 4 images, where train_dataloader.batch_size=8, or '
            'optim_wrapper.accumulative_counts=2 with a schedule of as many more iterations, keeps',
        ),
        (
            {'param_scheduler': MULTISTEP},
            r"another schedule \(param_scheduler.1.type: 'CosineAnnealingLR' -> 'MultiStep",
        ),
        (
            {'train_dataloader.num_batch_per_epoch': 3},
            'other epochs .iteration 2 after 1 epochs, which now have 3 each',
        ),
        ({'optim_wrapper.optimizer': SGD}, 'must hold the state of SGD, got one of AdamW: load_from='),
        ({'optim_wrapper.optimizer': SGD, 'force': True}, 'must hold the state of SGD, got one of AdamW: load_from='),
    ],
    ids=['average', 'name', 'scan', 'batch', 'schedule', 'epochs', 'optimizer', 'forced'],
)
def test_a_resumption_under_another_config_is_refused(options, said, work_dir):
    before = {path: path.stat().st_mtime_ns for path in work_dir.glob('*.*')}
    resumed = build(work_dir, resume=True, **{'train_cfg.max_epochs': 2, **options})
    with pytest.raises(mm.RunError, match=said):
        resumed.train()
    assert {path: path.stat().st_mtime_ns for path in work_dir.glob('*.*')} == before
    lines = log(resumed)
    for key in options.keys() - {'custom_hooks', 'param_scheduler', 'optim_wrapper.optimizer', 'force'}:
        assert f'{key}: ' in lines
    assert 'train_cfg.max_epochs: 1 -> 2' in lines


def test_an_average_that_the_checkpoint_lacks_is_refused(work_dir):
    edit(work_dir / 'epoch_1.pth', lambda checkpoint: checkpoint.pop('ema_state_dict'))
    with pytest.raises(
        mm.RunError, match='the config has a moving average of the weights, and the checkpoint has none'
    ):
        build(work_dir, resume=True).train()


def test_another_number_of_processes_is_refused(work_dir):
    """Which is no matter of the config."""
    edit(work_dir / 'epoch_1.pth', lambda checkpoint: checkpoint['meta'].update(processes=2))
    said = r'before 2 processes of 8 images, now 1 process of 8 images, where train_dataloader.batch_size=16, or '
    with pytest.raises(
        mm.RunError, match=rf'{said}optim_wrapper.accumulative_counts=2 with .*keeps .* --force goes on'
    ):
        build(work_dir, resume=True).train()
    resumed = build(work_dir, resume=True, force=True)
    resumed.train()
    assert resumed.iter == BATCHES


def test_a_forced_run_without_the_average_goes_on_with_the_trained_weights(work_dir):
    """Not with the average, which a checkpoint has in their place. What the optimizer has stays, and is said to."""
    checkpoint = mm.read_run(work_dir / 'epoch_1.pth')
    changes = {'custom_hooks': [], 'optim_wrapper.optimizer.lr': 1.0}
    resumed = build(work_dir, resume=True, force=True, **changes)
    resumed.train()
    weights = resumed.model.state_dict()
    trained = {name.removeprefix('module.'): value for name, value in checkpoint['ema_state_dict'].items()}
    assert all(torch.equal(value, trained[name]) for name, value in weights.items())
    assert any(not torch.equal(value, checkpoint['state_dict'][name]) for name, value in weights.items())
    rates = [group['lr'] for group in checkpoint['optimizer']['param_groups']]
    assert [group['lr'] for group in resumed.optim_wrapper.optimizer.param_groups] == rates
    assert 'optim_wrapper.optimizer.lr: 0.004 -> 1.0 (stays as it was saved)' in log(resumed)


def test_a_test_of_another_model_of_the_same_shapes_is_refused(work_dir):
    """By what a training checkpoint notes; published files note nothing that is comparable."""
    path = work_dir / 'epoch_1.pth'
    assert math.isfinite(build(work_dir, load_from=str(path)).test()['accuracy/top1'])
    others = dict(name='digits/vmamba_test', load_from=str(path))
    said = r"epoch_1\.pth must be one of this model, got model.model_name: 'test_vmamba2d' -> 'test_vmamba'"
    with pytest.raises(mm.RunError, match=said):
        build(work_dir, **others).test()
    with pytest.raises(mm.RunError, match=said):
        build(work_dir, **others).train()
    build(work_dir, force=True, **others).test()
    edit(path, lambda checkpoint: checkpoint['meta'].pop('run'))
    build(work_dir, **others).test()


# ---- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04', b'\n'], ids=['empty', 'archive', 'line'])
def test_a_checkpoint_that_is_nothing_does_not_end_the_search(content, work_dir):
    (work_dir / 'epoch_2.pth').write_bytes(content)
    resumed = build(work_dir, resume=True)
    resumed._find_run()
    assert resumed._resumed[0] == work_dir / 'epoch_1.pth' and f'{work_dir / "epoch_2.pth"} must be' in log(resumed)


def test_an_error_without_a_text_is_named(work_dir, monkeypatch):
    monkeypatch.setattr(content, 'open_archive', lambda *args, **kwargs: (_ for _ in ()).throw(EOFError))
    with pytest.raises(ValueError, match=r'epoch_1\.pth .* cannot be read as such \(EOFError\)'):
        mm.read_run(work_dir / 'epoch_1.pth')


# ---- the best --------------------------------------------------------------------------------------------------------


def test_both_ways_to_keep_the_best_resume_together(tmp_path):
    """The run is cut off before the evaluation of its second epoch, which is made up for before the third."""
    hooks = {'custom_hooks': [dict(type='BestHook', metric='accuracy/top1')]}
    options = {**hooks, 'default_hooks.checkpoint.save_best': 'accuracy/top1', 'train_cfg.max_epochs': 3}
    evaluated = []

    def train(stop=None, **more):
        runner = build(tmp_path, **options, **more)
        evaluate = runner.val_loop.run

        def run():
            if runner.epoch == stop:
                raise KeyboardInterrupt
            evaluated.append(runner.epoch)
            evaluate()

        runner._val_loop.run = run
        runner._val_loop.evaluator.evaluate = lambda size: {'accuracy/top1': {1: 10.0, 2: 30.0, 3: 20.0}[runner.epoch]}
        with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            runner.train()

    train(stop=2)
    train(resume=True)
    assert evaluated == [1, 2, 3]
    assert [path.name for path in tmp_path.glob('best_*')] == ['best_accuracy_top1_epoch_2.pth']
    hook = mm.BestHook('accuracy/top1')
    run = identity.current_run(tmp_path)
    assert hook._read_best(types.SimpleNamespace(work_dir=tmp_path, run_name=run.name)) == 30.0
    assert hook._read_best(types.SimpleNamespace(work_dir=tmp_path, run_name='another')) == -math.inf


def test_the_best_of_no_run_is_that_of_no_other(tmp_path):
    hook = mm.BestHook('a')
    runner = types.SimpleNamespace(work_dir=tmp_path, run_name='mine')
    assert hook._read_best(runner) == -math.inf
    save_file({}, tmp_path / 'best.safetensors', {'a': '3.0', 'run': 'mine'})
    assert hook._read_best(runner) == 3.0


# ---- what cannot be written ------------------------------------------------------------------------------------------


class Spoiler(mm.SeedHook):
    """Does something to the run before its second iteration."""

    def __init__(self, spoil):
        self.spoil = spoil

    def before_train_iter(self, runner, *args, **kwargs):
        if runner.iter == 1:
            self.spoil()


def gone(work_dir, monkeypatch):
    shutil.rmtree(work_dir)


def full_for_tensorboard(work_dir, monkeypatch):
    from tensorboard.summary.writer.event_file_writer import RecordWriter

    monkeypatch.setattr(RecordWriter, 'write', lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'full')))


def full_for_the_log(work_dir, monkeypatch):
    import logging

    emit = logging.FileHandler.emit

    def refuse(self, record):
        self.stream.write = lambda text: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'full'))
        emit(self, record)

    monkeypatch.setattr(logging.FileHandler, 'emit', refuse)


def full_for_the_curves(work_dir, monkeypatch):
    from mmengine.visualization import LocalVisBackend

    monkeypatch.setattr(LocalVisBackend, '_dump', lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'full')))


@pytest.mark.parametrize('spoil', [gone, full_for_tensorboard, full_for_the_log, full_for_the_curves])
def test_what_cannot_be_written_stops_the_run_with_a_sentence(spoil, tmp_path, monkeypatch, capfd):
    if spoil is full_for_tensorboard:
        pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    options = {'default_hooks.logger.interval': 1, 'default_hooks.checkpoint': None, 'custom_hooks': []}
    runner = build(tmp_path / 'run', **options, **{'train_cfg.max_epochs': 3, 'train_cfg.val_interval': 3})
    runner.register_hook(Spoiler(lambda: spoil(tmp_path / 'run', monkeypatch)))
    said = 'cannot be written to any more' if spoil is gone else 'cannot be written to: .* full'
    with pytest.raises(mm.RunError, match=f'{tmp_path / "run"} {said}.*; no checkpoint was written'):
        runner.train()
    assert runner.iter < 3 * BATCHES
    assert 'Traceback' not in ''.join(capfd.readouterr())


def test_a_full_disk_met_by_something_else_is_a_sentence(tmp_path):
    runner = build(tmp_path)
    for number, error in ((errno.ENOSPC, mm.RunError), (errno.EPERM, PermissionError)):
        with pytest.raises(error, match='no room'), runner.watching():
            raise OSError(number, 'no room')


def test_a_test_tells_its_metrics_although_it_cannot_write_them(trained, tmp_path, monkeypatch):
    runner = build(tmp_path, load_from=str(trained / 'epoch_1.pth'))
    monkeypatch.setattr('mmengine.hooks.logger_hook.dump', lambda *args: (_ for _ in ()).throw(OSError('no room')))
    assert math.isfinite(runner.test()['accuracy/top1'])
    assert f'{tmp_path} cannot be written to: no room' in log(runner)
