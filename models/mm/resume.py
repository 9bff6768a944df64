# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training: written so that it can be killed at any moment, and resumed from to the same end."""

import itertools
import shutil
from pathlib import Path
from typing import Any

from mmengine.dist import all_reduce_params, broadcast_object_list, is_main_process
from mmengine.hooks import EMAHook
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from ..files import leftovers, reason
from ..weights import misfits
from .classification import NamedModel, load_weights
from .hooks import averaged
from .loading import load_whole, without_pretrained
from .saved import numbered_checkpoints, read_run
from .utils import RunError, check_finite, replacing, share_buffers, unwrap

__all__ = ['ResumableRunner']


class ResumableRunner(Runner):
    """mmengine's Runner, with checkpoints that are whole or not there, and with exact resumption.

    A resumed run continues from the last checkpoint that can be read, with its seed, optimizer, schedule, averages and
    position in the data, and comes to the same losses as an unbroken one. No code in a file is run.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._resumed: tuple[Path, dict[str, Any]] | None = None  # until it is loaded
        self._resumed_iterations = 0
        self._last_checkpoint: Path | None = None
        self._randomness_cfg: dict[str, Any]  # mmengine's, without a type there
        super().__init__(*args, **kwargs)

    def build_train_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        loop = super().build_train_loop(loop)
        if isinstance(loop, IterBasedTrainLoop) and self._skips_iterations(self._train_dataloader):
            # mmengine would load, and throw away, the data of all iterations that were done.
            nothing = itertools.repeat(None, self._resumed_iterations)
            loop.dataloader_iterator = itertools.chain(nothing, loop.dataloader_iterator)
        return loop

    def used_indices(self, dataloader: dict[str, Any]) -> int:
        """The number of the sampler's indices that this process used before it was resumed."""
        return self._resumed_iterations * dataloader['batch_size'] if self._skips_iterations(dataloader) else 0

    def _skips_iterations(self, dataloader: DataLoader | dict[str, Any]) -> bool:
        """Whether the sampler's position follows from the number of iterations."""
        return (
            not isinstance(dataloader, DataLoader)
            and dataloader['sampler']['type'] == 'InfiniteSampler'
            and 'batch_sampler' not in dataloader
        )

    def train(self) -> nn.Module:
        """Train, from the last complete checkpoint where the run resumes.

        Raises:
            RunError: Data, disk or checkpoint are not as needed, or the loss is not finite.
        """
        if self._resume:
            self._remove_leftovers()
            self._resumed = self._find_run()
        if self._resumed is not None:  # before the data are built, whose order it decides
            meta = self._resumed[1]['meta']
            self._resumed_iterations = meta['iter']
            if self._randomness_cfg.get('seed') not in (None, meta['seed']):
                self.logger.warning(
                    f'The run goes on with its seed {meta["seed"]}, not with {self._randomness_cfg["seed"]}.'
                )
            self._randomness_cfg = dict(self._randomness_cfg, seed=meta['seed'])
            self.set_randomness(**self._randomness_cfg)
        self._check_disk()
        model = super().train()
        if self._resumed_iterations >= self.max_iters and self._val_loop is not None:
            self.val_loop.run()  # a run that was killed after its last checkpoint missed it
        return model

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """Averages follow the steps of the optimizer, not the batches whose gradients are accumulated.

        They are of the statistics of batch norms too, which mmengine's would copy: those of the last weights do not fit
        the averaged ones.
        """
        optim_wrapper = super().build_optim_wrapper(optim_wrapper)
        for hook in self.hooks:
            if isinstance(hook, EMAHook):
                hook.ema_cfg.setdefault('interval', getattr(optim_wrapper, '_accumulative_counts', 1))
                hook.ema_cfg.setdefault('update_buffers', True)
        return optim_wrapper

    def _remove_leftovers(self) -> None:
        """Remove what a run that was killed while it wrote has left in the work dir."""
        if is_main_process():
            for path in leftovers(self.work_dir):
                path.unlink(missing_ok=True)

    def _check_disk(self) -> None:
        weights = sum(value.numel() * value.element_size() for value in unwrap(self.model).state_dict().values())
        copies = 3 + any(isinstance(hook, EMAHook) for hook in self.hooks)  # Adam and its kin have two moments
        need = 2 * copies * weights  # for a new checkpoint beside the old one
        free = [shutil.disk_usage(self.work_dir).free]
        broadcast_object_list(free)  # the first process writes, but all are to stop
        if free[0] < need:
            raise RunError(
                f'{self.work_dir} must have room for two checkpoints, about {need / 1e9:.2f} GB, got '
                f'{free[0] / 1e9:.2f} GB: --work-dir names another.'
            )

    def _find_run(self) -> tuple[Path, dict[str, Any]] | None:
        """The path and the content of the checkpoint to resume from; None where there is none yet."""
        if self._load_from is not None:
            try:
                return Path(self._load_from), read_run(self._load_from)
            except (FileNotFoundError, ValueError) as error:
                raise RunError(str(error)) from error
        paths = numbered_checkpoints(self.work_dir)
        for path in reversed(paths):
            try:
                return path, read_run(path)
            except ValueError as error:
                self.logger.warning(f'{error} The one before it is tried.')
        if paths:
            raise RunError(f'none of the {len(paths)} checkpoints in {self.work_dir} can be read.')
        self.logger.warning(f'{self.work_dir} holds no checkpoint: the training starts from its beginning.')
        return None

    def _init_model_weights(self) -> None:
        if self._resumed is not None:  # its checkpoint has the weights
            return
        try:
            with without_pretrained(unwrap(self.model), self._load_from is not None):
                super()._init_model_weights()
        except (FileNotFoundError, RuntimeError, ValueError) as error:
            raise RunError(f'the weights to start from cannot be had: {reason(error)}') from error

    def load_or_resume(self) -> None:
        if self._has_loaded:
            return
        try:
            if self._resumed is not None:
                self._last_checkpoint = self._resumed[0]
                self._compare_schedules(self._resumed[1].get('param_schedulers'))
                self.resume(str(self._resumed[0]))
                self._resumed = None  # which frees its memory
            elif self._load_from is not None and not self._resume:
                self.load_checkpoint(self._load_from)
        except (FileNotFoundError, ValueError) as error:
            raise RunError(str(error)) from error

    def _compare_schedules(self, saved: Any) -> None:
        """Warn of what the config says of a schedule and the checkpoint overrules."""
        for scheduler, state in zip(self.param_schedulers or (), saved or (), strict=False):
            for key in ('begin', 'end', 'total_iters', 'T_max'):
                if key in state and state[key] != getattr(scheduler, key, state[key]):
                    self.logger.warning(
                        f'{type(scheduler).__name__} goes on as it was saved, with {key} {state[key]}, not with '
                        f'{getattr(scheduler, key)}.'
                    )

    def last_checkpoint(self) -> str:
        """A note on the last checkpoint, for messages of errors."""
        if self._last_checkpoint is None:
            return 'no checkpoint was written'
        return f'last good checkpoint: {self._last_checkpoint}'

    def load_checkpoint(self, filename: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load weights, from any file that `local_file` takes; or the whole state to resume from.

        Weights that a training starts from may be those of a model for other classes, all others must fit exactly.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file cannot be read safely, or it belongs to another model.
        """
        model = unwrap(self.model)
        if self._resumed is not None:
            checkpoint = self._resumed[1]
            problems = misfits(checkpoint['state_dict'], model.state_dict())
            if problems:
                raise ValueError(f'checkpoint {filename} must be one of this model, got {problems}.')
            self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
            model.load_state_dict(checkpoint['state_dict'])
        else:
            load = load_weights if isinstance(model, NamedModel) else load_whole
            load(model, filename, start=isinstance(self._train_loop, BaseLoop))
            checkpoint = dict(state_dict=model.state_dict())
            self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        self._has_loaded = True
        self.logger.info(f'Loaded {filename}.')
        return checkpoint

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint under another name first, so that one with its own name is always complete.

        Raises:
            RunError: A weight is not finite, or the file cannot be written; the checkpoints before it stay.
        """
        path, model = Path(out_dir, filename), unwrap(self.model)
        # The first process writes for all, so that statistics and gradients, which differ, are averaged first.
        share_buffers(*filter(None, (model, averaged(self))))
        all_reduce_params([p.grad for p in model.parameters() if p.grad is not None], op='mean')
        try:
            check_finite(model, path)
        except RunError as error:
            raise RunError(f'{error}; {self.last_checkpoint()}.') from None
        if is_main_process():
            with replacing(path) as temporary:
                super().save_checkpoint(out_dir, temporary.name, *args, **kwargs)
        self._last_checkpoint = path
