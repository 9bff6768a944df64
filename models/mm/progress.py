# SPDX-License-Identifier: Apache-2.0
"""How far a run is: a bar on a terminal, elsewhere a line now and then."""

import atexit
import math
import time
from numbers import Real
from typing import Any

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ['ProgressHook', 'console', 'progress_bar']

console = Console()  # one for the progress bar and the warnings, so that neither writes over the other


def progress_bar(console: Console) -> Progress:
    """A bar with a count, a field `status` and the time that is left. It shows nothing where there is no terminal."""
    return Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn('{task.fields[status]}'),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=3600,  # longer than an evaluation, during which nothing advances
        disable=not console.is_terminal,
    )


@HOOKS.register_module()
class ProgressHook(Hook):
    """Shows a bar with the time that is left on a terminal, elsewhere a line after each evaluation and now and then.

    Args:
        seconds: Least time between two lines where there is no terminal, in seconds.
    """

    priority = 'LOW'  # after the runtime information of the iteration has been noted
    progress: Progress  # it and `task` exist once `_start` was called
    task: TaskID

    def __init__(self, seconds: float = 60.0) -> None:
        self.seconds = seconds
        self.started = False
        self.metrics = ''
        self.said = math.inf

    def _start(self, description: str, total: int) -> None:
        self.progress = progress_bar(console)
        self.task = self.progress.add_task(description, total=total, status='')
        self.progress.start()
        self.started = True
        self.said = time.monotonic()
        atexit.register(self._stop)  # an exception would else leave the terminal without its cursor

    @master_only
    def before_train(self, runner: Runner) -> None:
        self._start('train', runner.max_iters)
        self.progress.update(self.task, completed=runner.iter)

    @master_only
    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=runner.iter + 1, status=self._status(runner))
        if time.monotonic() - self.said > self.seconds:
            self._say(runner, runner.iter + 1)

    @master_only
    def after_val_iter(self, runner: Runner, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        if self.started:
            status = f'{self._status(runner)}  evaluating {batch_idx + 1}/{len(runner.val_dataloader)}'
            self.progress.update(self.task, status=status)

    @master_only
    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        numbers = [(name, value) for name, value in metrics.items() if isinstance(value, Real)]
        self.metrics = '  '.join(f'{name} {value:.2f}' for name, value in numbers[:3])  # papers quote the first ones
        if self.started:  # an evaluation without training has no bar
            self.progress.update(self.task, status=self._status(runner))
            self._say(runner, runner.iter)

    @master_only
    def after_train(self, runner: Runner) -> None:
        self._stop()

    @master_only
    def before_test_epoch(self, runner: Runner) -> None:
        self._start('test', len(runner.test_dataloader))

    @master_only
    def after_test_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        self.progress.advance(self.task)

    @master_only
    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._stop()

    def _status(self, runner: Runner) -> str:
        return f'loss {runner.message_hub.get_scalar("train/loss").current():.3f}  {self.metrics}'

    def _say(self, runner: Runner, done: int) -> None:
        if not console.is_terminal:
            seconds = self.progress.tasks[self.task].time_remaining
            left = f'{seconds:.0f}' if seconds is not None else '?'
            console.print(
                f'iteration {done}/{runner.max_iters}  {self._status(runner)}  {left} s left',
                highlight=False,
                soft_wrap=True,
            )
        self.said = time.monotonic()

    def _stop(self) -> None:
        self.progress.stop()
        atexit.unregister(self._stop)
