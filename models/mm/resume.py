# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training: written so that it can be killed at any moment, and resumed from to the same end."""

import contextlib
import functools
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.dist import all_reduce_params
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.runner import BaseLoop, IterBasedTrainLoop
from torch import nn
from torch.utils.data import DataLoader

from ..files import reason
from ..weights import misfits
from .classification import NamedModel, load_weights
from .compare import (
    check_data,
    check_network,
    check_optimizer,
    check_position,
    name_optimizers,
    reasons_to_stop,
)
from .failures import WatchfulRunner
from .hooks import averaged, note_data
from .identity import Run, current_run, lock, note_run, own_checkpoints, remove_leftovers
from .loading import load_whole, without_pretrained
from .saved import read_run, weights_in
from .utils import RunError, check_finite, in_all_processes, in_first_process, replacing, share_buffers, unwrap

__all__ = ['ResumableRunner']


class ResumableRunner(WatchfulRunner):
    """mmengine's Runner, with checkpoints that are whole or not there, and with exact resumption.

    A resumed run continues from its last checkpoint that can be read, with its seed, optimizer, schedule, averages and
    position in the data, and comes to the same losses as an unbroken one. No code in a file is run.

    A work dir has one current run, which a training that does not resume begins, and one that resumes from a file by
    name where that is not the last of the current run. Checkpoints of earlier runs stay, and are left alone.

    Further keys of the config:
        resume: True; or 'auto', with which load_from is what a run starts from that has no checkpoint yet.
        force: Whether to go on even from a checkpoint of another model, batch, schedule, or without the averages.
    """

    _resume: bool | str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._resumed: tuple[Path, dict[str, Any]] | None = None  # until it is loaded
        self._resumed_iterations = 0
        self._last_checkpoint: Path | None = None
        self._run: Run | None = None
        self._randomness_cfg: dict[str, Any]  # mmengine's, without a type there
        super().__init__(*args, **kwargs)
        self._checkpoints = self._find_checkpoints()  # before CheckpointHook changes its folder

    @property
    def run_name(self) -> str:
        """The name of the run that this training began or goes on with; empty in a test."""
        return '' if self._run is None else self._run.name

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
            RunError: Data, disk, config or checkpoint are not as needed, or the loss is not finite.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.watching())
            alone = in_first_process(lambda: stack.enter_context(lock(self.work_dir)))
            if alone:
                in_first_process(self._remove_leftovers)
            if self._resume:
                self._find_run()
            self._check_disk()
            model = super().train()
            if self._resumed_iterations >= self.max_iters and self._val_loop is not None:
                self.val_loop.run()  # a run that was killed after its last checkpoint missed it
            self.check_failures()
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

    def _find_checkpoints(self) -> tuple[Path, str]:
        """The folder of the checkpoints, and the template of their names."""
        for hook in self.hooks:
            if isinstance(hook, CheckpointHook):
                folder = Path(hook.out_dir, Path(self.work_dir).name) if hook.out_dir else Path(self.work_dir)
                return folder, hook.filename_tmpl
        return Path(self.work_dir), 'epoch_{}.pth'

    def _remove_leftovers(self) -> None:
        for folder in {Path(self.work_dir), self._checkpoints[0]}:
            if folder.is_dir():
                remove_leftovers(folder, current_run(self.work_dir))

    def _check_disk(self) -> None:
        weights = sum(value.numel() * value.element_size() for value in unwrap(self.model).state_dict().values())
        copies = 3 + any(isinstance(hook, EMAHook) for hook in self.hooks)  # Adam and its kin have two moments
        need = 2 * copies * weights  # for a new checkpoint beside the old one
        free = in_first_process(lambda: shutil.disk_usage(self.work_dir).free)  # which writes, but all are to stop
        if free < need:
            raise RunError(
                f'{self.work_dir} must have room for two checkpoints, about {need / 1e9:.2f} GB, got '
                f'{free / 1e9:.2f} GB: --work-dir names another.'
            )

    def _find_run(self) -> None:
        """Read the checkpoint to resume from, if there is one, and compare it with the config."""
        named = None if self._resume == 'auto' else self._load_from
        run = in_first_process(lambda: current_run(self.work_dir))
        own = own_checkpoints(*self._checkpoints, run)  # which the first process goes through
        if named is None:
            found = self._last_readable(own)
            if found is None:
                self._resume = False  # so that hooks, too, take what is loaded for weights to start from
                return
            path, checkpoint = found
            if run is None and isinstance(checkpoint['meta'].get('run'), str):
                run = Run(checkpoint['meta']['run'])  # whose files were copied here
        else:
            path, checkpoint = Path(named), in_all_processes(lambda: read_run(named))
            last = in_first_process(
                lambda: any(p.samefile(path) for p, problem in itertools.islice(own, 1) if not problem)
            )
            run = run if last else None  # it branches off
        self._run = run or in_first_process(lambda: Run.new(path))
        self._resumed = path, checkpoint
        self._stop_for(path, reasons_to_stop(self, path, checkpoint))

        meta = checkpoint['meta']
        self._resumed_iterations = meta['iter']
        if self._randomness_cfg.get('seed') not in (None, meta['seed']):
            self.logger.warning(
                f'The run goes on with its seed {meta["seed"]}, not with {self._randomness_cfg["seed"]}.'
            )
        self._randomness_cfg = dict(self._randomness_cfg, seed=meta['seed'])
        self.set_randomness(**self._randomness_cfg)  # before the data are built, whose order it decides

    def _last_readable(self, own: Iterator[tuple[Path, str | None]]) -> tuple[Path, dict[str, Any]] | None:
        """The path and the content of the last checkpoint of a run that can be read; None where it has none yet."""
        unreadable = 0
        while True:
            path, problem = in_first_process(lambda: next(own, (None, None)))
            if path is None:
                break
            try:
                if problem is None:
                    return path, in_all_processes(functools.partial(read_run, path))
            except RunError as error:
                problem = str(error)
            unreadable += 1
            self.logger.warning(f'{problem} The one before it is tried.')
        if unreadable:
            raise RunError(f'none of the {unreadable} checkpoints in {self.work_dir} can be read.')
        self.logger.warning(f'{self.work_dir} holds no checkpoint of its run: the training starts from its beginning.')
        return None

    def _stop_for(self, path: Path, reasons: list[str]) -> None:
        """Refuse to go on from a checkpoint, unless the config has `force`."""
        if reasons and not self.cfg.get('force', False):
            raise RunError(f'the run cannot go on from {path} with {"; and ".join(reasons)}. --force goes on.')

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
                self._load_run(*self._resumed)
            elif self._load_from is not None and not self._resume:
                self.load_checkpoint(self._load_from)
        except (FileNotFoundError, ValueError) as error:
            raise RunError(str(error)) from error
        if isinstance(self._train_loop, BaseLoop):
            self._begin()

    def _load_run(self, path: Path, checkpoint: dict[str, Any]) -> None:
        self._last_checkpoint = path
        self._stop_for(path, check_data(self, checkpoint['meta']) + check_position(self, checkpoint['meta']))
        check_optimizer(self, path, checkpoint['meta'])
        self._compare_schedules(checkpoint.get('param_schedulers'))
        self._keep_records(checkpoint['message_hub'], checkpoint['meta'].get('run'))
        if 'ema_state_dict' in checkpoint and averaged(self) is None:
            # The weights that were trained are those beside the average, which took their place.
            raw = checkpoint.pop('ema_state_dict')
            checkpoint['state_dict'] |= {key.removeprefix('module.'): v for key, v in raw.items() if key != 'steps'}
        try:
            self.resume(str(path))
        except (KeyError, RuntimeError, TypeError) as error:  # as states of optimizers and schedules report it
            raise ValueError(f'checkpoint {path} must fit the config, got {type(error).__name__}: {error}') from error
        self._resumed = None  # which frees its memory

    def _keep_records(self, records: dict[str, Any], run: str | None) -> None:
        """Let the hooks that keep the best and the last checkpoints know those of this run alone."""
        notes = records['runtime_info']
        for key in [key for key in notes if key.startswith(('best_', 'keep_ckpt_ids'))]:
            if run != self.run_name:
                del notes[key]
            elif key.startswith('best_ckpt'):  # the folder may have another name by now
                notes[key] = str(self._checkpoints[0] / Path(notes[key]).name)

    def _begin(self) -> None:
        """Make this run the current one of the work dir, and note the config there."""
        if self._run is None:
            self._run = in_first_process(Run.new)
            if files := in_first_process(lambda: weights_in(self.work_dir)):
                self.logger.warning(
                    f'{self.work_dir} holds files of earlier runs ({", ".join(files[:3])}{" ..." * (len(files) > 3)}). '
                    'They stay until this one writes files of their names; --resume FILE goes on from one of them.'
                )
        run = self._run
        in_first_process(lambda: note_run(self.work_dir, run))
        in_first_process(self.dump_config)

    def dump_config(self) -> None:
        """Write the config into the work dir once the run has begun: not that of a test, or of a refused run."""
        if self._run is not None:
            super().dump_config()

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
            check_network(self, filename)
            load = load_weights if isinstance(model, NamedModel) else load_whole
            load(model, filename, start=isinstance(self._train_loop, BaseLoop))
            checkpoint = dict(state_dict=model.state_dict())
            self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        self._has_loaded = True
        self.logger.info(f'Loaded {filename}.')
        return checkpoint

    def save_checkpoint(
        self, out_dir: str, filename: str, *args: Any, meta: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
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
        notes = dict(run=self.run_name, processes=self.world_size, optimizer=name_optimizers(self.optim_wrapper))
        if isinstance(model, NamedModel):
            notes |= dict(model=model.model_name, model_args=json.dumps(model.model_args), **note_data(self))
        write = super().save_checkpoint

        def save() -> None:
            with replacing(path, self.run_name) as temporary:
                write(out_dir, temporary.name, *args, meta={**(meta or {}), **notes}, **kwargs)

        in_first_process(save)
        self._last_checkpoint = path
