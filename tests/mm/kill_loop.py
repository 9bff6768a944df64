# SPDX-License-Identifier: Apache-2.0
"""Kill a training at random moments and resume it, until it ends; its weights must be those of an unbroken run.

    python tests/mm/kill_loop.py --kills 100

One process loads the packages once, and starts each training as a copy of itself, so that a kill takes seconds. Of the
kills, a third wait until a file is being written. Half meet the training alone, whose workers live on for a while, the
others all of its processes.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

EPOCHS = 3
CHANGES = {
    'train_dataloader.num_workers': 1,
    'train_dataloader.batch_size': 8,
    'train_dataloader.num_batch_per_epoch': 4,
    'val_dataloader.batch_size': 8,
    'val_dataloader.num_batch_per_epoch': 1,
    'train_cfg.max_epochs': EPOCHS,
    'default_hooks.checkpoint.interval': 1,
    'default_hooks.checkpoint.save_best': 'accuracy/top1',
    'default_hooks.logger.interval': 1,
    'log_processor.window_size': 1,
    'custom_hooks': [
        dict(type='EMAHook', momentum=0.1),
        dict(type='SafetensorsHook'),
        dict(type='BestHook', metric='accuracy/top1'),
    ],
}


def train(work_dir: Path, said: Path) -> None:
    """Train in a session of its own, whose processes a kill can reach together."""
    os.setsid()
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from vssm.tools.main import main

    options = [f'{key}={value!r}' for key, value in CHANGES.items()]
    arguments = ['train', 'digits/vmamba2d_test', '--work-dir', str(work_dir), '--resume', '--cfg-options', *options]
    sys.exit(main(arguments))


def writing(work_dir: Path) -> bool:
    """Whether a file is being written, or was when the run was killed."""
    return work_dir.is_dir() and any(work_dir.glob('.*.tmp'))


def kill_until_done(work_dir: Path, said: Path, length: float, moments: random.Random, kills: int) -> Counter:
    """Resume a run until it ends; at most `kills` times it is killed before.

    Returns:
        How many kills left what.
    """
    context = multiprocessing.get_context('fork')
    found: Counter = Counter()
    while True:
        process = context.Process(target=train, args=(work_dir, said))
        process.start()
        if found.total() == kills:
            process.join()
        elif moments.random() < 0.7:
            process.join(moments.uniform(0.0, length))
        else:
            while process.exitcode is None and not writing(work_dir):
                time.sleep(0.0005)
        if process.exitcode is not None:
            assert process.exitcode == 0, said.read_text()
            return found
        alone = moments.random() < 0.5 or os.getpgid(process.pid) != process.pid  # whose session has not begun yet
        (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
        process.join()
        checkpoints = len(list(work_dir.glob('epoch_*.pth')))
        found['while a file was written' if writing(work_dir) else f'after {checkpoints} checkpoints'] += 1


def check(work_dir: Path, whole: Path, said: Path) -> None:
    """Compare the files of a run that was killed with those of an unbroken one."""
    import torch

    from vssm.models.weights import read_checkpoint

    names = {path.name for folder in (whole, work_dir) for path in folder.glob('*.*') if path.suffix != '.json'}
    assert names == {path.name for path in whole.glob('*.*') if path.suffix != '.json'}, names
    assert not list(work_dir.glob('.*.tmp'))
    for path in (*whole.glob('*.safetensors'), *whole.glob('*.pth')):
        for which in ('auto', 'model') if path.name.startswith('epoch') else ('auto',):
            (expected, notes), (weights, metadata) = (read_checkpoint(f / path.name, which) for f in (whole, work_dir))
            assert all(torch.equal(value, expected[key]) for key, value in weights.items()), path.name
            assert {**metadata, 'run': ''} == {**notes, 'run': ''}, path.name
    assert losses(work_dir) == losses(whole)
    text = said.read_text()
    for word in ('Traceback', 'cannot be', 'The config is not'):
        assert word not in text, text


def losses(work_dir: Path) -> dict[int, float]:
    lines = [
        line for path in sorted(work_dir.glob('*/vis_data/scalars.json')) for line in path.read_text().splitlines()
    ]
    records = [json.loads(line) for line in lines if line.endswith('}')]  # of which a kill may leave the last by half
    return {record['iter']: record['loss'] for record in records if 'loss' in record}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=100, help='number of kills')
    parser.add_argument('--seed', type=int, default=0, help='decides the moments of the kills')
    args = parser.parse_args()
    # Loaded here, so that they need not be in each training.
    import torch

    import vssm.models.mm  # noqa: F401
    from vssm.tools import test, train  # noqa: F401

    torch.set_num_threads(1)
    moments, found, runs = random.Random(args.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, 'whole')
        begin = time.monotonic()
        kill_until_done(whole, Path(folder, 'whole.txt'), 0.0, moments, 0)
        length = time.monotonic() - begin
        while found.total() < args.kills:
            work_dir, said = Path(folder, f'run{runs}'), Path(folder, f'run{runs}.txt')
            found += kill_until_done(work_dir, said, length, moments, min(10, args.kills - found.total()))
            check(work_dir, whole, said)
            runs += 1
    kinds = ', '.join(f'{count} {kind}' for kind, count in sorted(found.items()))
    print(f'{found.total()} kills of {runs} runs ({kinds}): all ended with the weights and losses of an unbroken run')


if __name__ == '__main__':
    main()
