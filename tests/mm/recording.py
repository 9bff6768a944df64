# SPDX-License-Identifier: Apache-2.0
"""A hook of the tests, for configs of runs in processes of their own: what each process computed, and its death."""

import os
import signal
from pathlib import Path

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class RecordingHook(Hook):
    """Writes the loss of every iteration to WORK_DIR/losses_RANK.txt, in lines of iteration and loss.

    Args:
        kill: Rank and iteration of a process that dies there, the first time that it comes there.
    """

    priority = 'VERY_LOW'

    def __init__(self, kill=None):
        self.kill = kill

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        with Path(runner.work_dir, f'losses_{get_rank()}.txt').open('a') as file:
            file.write(f'{runner.iter} {outputs["loss"].item()!r}\n')
        killed = Path(runner.work_dir, 'killed')
        if self.kill == [get_rank(), runner.iter] and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
