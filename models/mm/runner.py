# SPDX-License-Identifier: Apache-2.0
"""mmengine's Runner, made safe to kill and to leave alone."""

import copy
import importlib.util
import itertools
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce_params, broadcast_object_list, is_distributed, is_main_process
from mmengine.hooks import EMAHook
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel, is_model_wrapper, revert_sync_batchnorm
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from mmengine.visualization import Visualizer
from rich.logging import RichHandler
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..weights import misfits, read_checkpoint
from .classification import NamedModel, load_weights
from .hooks import averaged, console
from .saved import numbered_checkpoints, read_run
from .utils import RunError, check_finite, replacing, share_buffers, unwrap

__all__ = ['TimmRunner']


_OWN_WARNINGS = re.compile('FileClient|HardDiskBackend|Advance dataloader|The prefix is not|Resumed iteration number')


@RUNNERS.register_module()
class TimmRunner(Runner):
    """mmengine's Runner with a quiet console, and runs that can be killed at any moment.

    Checkpoints appear under their name when they are complete. A resumed run continues from the last complete one with
    its seed, optimizer, schedule, averages and position in the data, and to the same losses as an unbroken one. Files
    are read with `weights_only`. Of data, disk and loss it says what is wrong in a sentence (RunError).

    Further keys of the config:
        device: 'cpu' where mmengine would take a GPU.
        num_threads: Of the CPU, PyTorch's choice unless given.
        unreadable: 'stop' (the default) or 'skip', what a training does at an image that cannot be read.
        dataset: What all data sets have in common, so that it is said once; each one's own config goes before it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._resumed: tuple[Path, dict[str, Any]] | None = None  # until it is loaded
        self._resumed_iterations = 0
        self._last_checkpoint: Path | None = None
        super().__init__(*args, **kwargs)
        if self.cfg.get('unreadable', 'stop') not in ('stop', 'skip'):
            raise ValueError(f"unreadable must be 'stop' or 'skip', got {self.cfg.unreadable!r}.")

    # ---- surroundings ------------------------------------------------------------------------------------------------

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        if self.cfg.get('device', get_device()) not in ('cpu', get_device()):
            raise ValueError(
                f"device must be 'cpu' or what this machine has, {get_device()!r}, got {self.cfg.device!r}."
            )
        if self.distributed and not is_distributed() and self.device == 'cpu':
            if self.launcher != 'pytorch':
                raise RunError(f"on a CPU, launcher must be 'pytorch' (torchrun), got {self.launcher!r}.")
            torch.distributed.init_process_group('gloo')  # mmengine would look for GPUs
        super().setup_env(env_cfg)
        if 'num_threads' in self.cfg:
            torch.set_num_threads(self.cfg.num_threads)

    @property
    def device(self) -> str:
        return self.cfg.get('device', get_device())

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """The log file gets everything; the console, which shows the progress, warnings only."""
        logger = super().build_logger(*args, **kwargs)
        level = max(logger.handlers[0].level, logging.WARNING)
        logger.handlers[0] = RichHandler(level, console, show_path=False)
        # mmengine warns of its own old names, of data it skips, of gradients it would lose: all as they should be.
        logger.handlers[0].addFilter(lambda record: not _OWN_WARNINGS.search(record.getMessage()))
        return logger

    def build_visualizer(self, visualizer: Visualizer | dict[str, Any] | None = None) -> Visualizer:
        """With TensorBoard's files where TensorBoard is installed."""
        if not isinstance(visualizer, Visualizer) and importlib.util.find_spec('tensorboard') is not None:
            visualizer = copy.deepcopy(visualizer) if visualizer is not None else dict(type='Visualizer')
            backends = visualizer.setdefault('vis_backends', [dict(type='LocalVisBackend')])
            if not any(backend['type'] == 'TensorboardVisBackend' for backend in backends):
                backends.append(dict(type='TensorboardVisBackend'))
        return super().build_visualizer(visualizer)

    def register_default_hooks(self, hooks: dict[str, Any] | None = None) -> None:
        ours = dict(
            seed=dict(type='SeedHook'),
            finite_loss=dict(type='FiniteLossHook'),
            pending_gradients=dict(type='PendingGradientsHook'),
            progress=dict(type='ProgressHook'),
        )
        if self.distributed:
            ours['shared_buffers'] = dict(type='SharedBuffersHook')
        if self.cfg.get('unreadable') == 'skip':
            ours['unreadable'] = dict(type='UnreadableImagesHook')
        hooks = {**ours, **(hooks or {})}
        if (hooks.get('checkpoint') or {}).get('max_keep_ckpts') == 1:
            raise ValueError(
                'default_hooks.checkpoint.max_keep_ckpts must be at least 2, or -1 for all, got 1: mmengine removes '
                'the old checkpoint before the new one is complete.'
            )
        super().register_default_hooks({name: hook for name, hook in hooks.items() if hook or name not in ours})

    # ---- model and data ----------------------------------------------------------------------------------------------

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        if self.device != 'cpu' or is_model_wrapper(model):
            return super().wrap_model(model_wrapper_cfg, model)
        model = revert_sync_batchnorm(model.to('cpu'))  # which GPUs alone have
        if not self.distributed:
            return model
        if model_wrapper_cfg is not None:
            return super().wrap_model(model_wrapper_cfg, model)
        find_unused = self.cfg.get('find_unused_parameters', False)
        return MMDistributedDataParallel(module=model, broadcast_buffers=False, find_unused_parameters=find_unused)

    def scale_lr(self, optim_wrapper: Any, auto_scale_lr: dict[str, Any] | None = None) -> None:
        """By the images of one step of the optimizer, so with accumulated gradients by those of all of its batches."""
        if auto_scale_lr is not None and 'base_batch_size' in auto_scale_lr:
            steps = getattr(optim_wrapper, '_accumulative_counts', 1)
            auto_scale_lr = dict(auto_scale_lr, base_batch_size=auto_scale_lr['base_batch_size'] / steps)
        super().scale_lr(optim_wrapper, auto_scale_lr)

    def build_dataloader(
        self, dataloader: DataLoader | dict[str, Any], seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """With a GuardedDataset; in training with a SeededSampler, which begins where a resumed run stopped.

        Raises:
            RunError: The data are not there, or the classes are not as many as the model's.
        """
        if isinstance(dataloader, DataLoader):
            return dataloader
        training = dataloader is self._train_dataloader
        cfg = copy.deepcopy(dataloader)
        cfg['dataset'] = {**self.cfg.get('dataset', {}), **cfg['dataset']}
        root = cfg['dataset'].get('data_root')
        if root and not Path(root).is_dir():
            raise RunError(f'data_root must be a folder, got {root}, which does not exist; --data-root names another.')
        skip = training and self.cfg.get('unreadable') == 'skip'
        cfg['dataset'] = dict(type='GuardedDataset', dataset=cfg['dataset'], skip=skip)
        if training:
            done = self._resumed_iterations * cfg['batch_size'] if self._skips_iterations(cfg) else 0
            cfg['sampler'] = dict(type='SeededSampler', sampler=cfg['sampler'], skip=done)
        if not torch.cuda.is_available():
            cfg['pin_memory'] = False  # of which PyTorch would warn at every epoch
        try:
            loader = Runner.build_dataloader(cfg, seed, diff_rank_seed)
        except FileNotFoundError as error:
            raise RunError(f'the data are not complete: {error}') from error
        self._check_data(loader.dataset)
        return loader

    def _check_data(self, dataset: Dataset) -> None:
        if not len(dataset):
            raise RunError('the data must hold images, got none.')
        for path in dataset.paths(0):  # of them all are too many to look for
            if '://' not in path and not Path(path).is_file():
                raise RunError(f'the data are not complete: {path} does not exist.')
        model = unwrap(self.model)
        classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
        if isinstance(model, NamedModel) and classes and len(classes) != model.model.num_classes:
            raise RunError(
                f'model.num_classes must be {len(classes)}, the number of classes in the data, got '
                f'{model.model.num_classes}: --cfg-options model.num_classes={len(classes)}'
            )

    def build_train_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        loop = super().build_train_loop(loop)
        if isinstance(loop, IterBasedTrainLoop) and self._skips_iterations(self._train_dataloader):
            # mmengine would load and throw away the data of all iterations that were done: here they cost nothing.
            nothing = itertools.repeat(None, self._resumed_iterations)
            loop.dataloader_iterator = itertools.chain(nothing, loop.dataloader_iterator)
        return loop

    def _skips_iterations(self, dataloader: DataLoader | dict[str, Any]) -> bool:
        """Whether the sampler's position follows from the number of iterations."""
        return (
            not isinstance(dataloader, DataLoader)
            and dataloader['sampler']['type'] == 'InfiniteSampler'
            and 'batch_sampler' not in dataloader
        )

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def train(self) -> nn.Module:
        """Train, from the last complete checkpoint where the run resumes.

        Raises:
            RunError: Data, disk or checkpoint are not as needed, or the loss is not finite.
        """
        if self._resume:
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
            self.val_loop.run()  # which the run may have missed
        return model

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """Averages follow the steps of the optimizer, not the batches whose gradients are accumulated."""
        optim_wrapper = super().build_optim_wrapper(optim_wrapper)
        for hook in self.hooks:
            if isinstance(hook, EMAHook):
                hook.ema_cfg.setdefault('interval', getattr(optim_wrapper, '_accumulative_counts', 1))
        return optim_wrapper

    def _check_disk(self) -> None:
        weights = sum(value.numel() * value.element_size() for value in unwrap(self.model).state_dict().values())
        copies = 3 + any(isinstance(hook, EMAHook) for hook in self.hooks)  # with the two moments of Adam's kind
        need = 2 * copies * weights  # a new checkpoint beside the old one
        free = [shutil.disk_usage(self.work_dir).free]
        broadcast_object_list(free)  # the first process writes, and all stop
        if free[0] < need:
            raise RunError(
                f'{self.work_dir} must have room for two checkpoints, about {need / 1e9:.2f} GB, got '
                f'{free[0] / 1e9:.2f} GB: --work-dir names another.'
            )

    def _find_run(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to resume from, and what it holds; None where there is none yet."""
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
        if self._resumed is not None:  # whose weights come from its checkpoint
            return
        try:
            super()._init_model_weights()
        except (FileNotFoundError, RuntimeError, ValueError) as error:
            raise RunError(f'the weights to start from cannot be had: {error}') from error

    def load_or_resume(self) -> None:
        if self._has_loaded:
            return
        try:
            if self._resumed is not None:
                self._last_checkpoint = self._resumed[0]
                self._compare_schedules(self._resumed[1].get('param_schedulers'))
                self.resume(str(self._resumed[0]))
                self._resumed = None  # and its memory is free
            elif self._load_from is not None and not self._resume:
                self.load_checkpoint(self._load_from)
        except (FileNotFoundError, ValueError) as error:
            raise RunError(str(error)) from error

    def _compare_schedules(self, saved: Any) -> None:
        for scheduler, state in zip(self.param_schedulers or (), saved or (), strict=False):
            for key in ('begin', 'end', 'total_iters', 'T_max'):
                if key in state and state[key] != getattr(scheduler, key, state[key]):
                    self.logger.warning(
                        f'{type(scheduler).__name__} goes on as it was saved, with {key} {state[key]}, not with '
                        f'{getattr(scheduler, key)}.'
                    )

    def last_checkpoint(self) -> str:
        if self._last_checkpoint is None:
            return 'no checkpoint was written'
        return f'last good checkpoint: {self._last_checkpoint}'

    def load_checkpoint(self, filename: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load weights that fit exactly, of whatever file `read_checkpoint` reads; in a resumption, everything.

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
            if isinstance(model, NamedModel):
                load_weights(model, filename)
            else:
                _load_exactly(model, filename)
            checkpoint = dict(state_dict=model.state_dict())
            self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        self._has_loaded = True
        self.logger.info(f'Loaded {filename}.')
        return checkpoint

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint under another name first, so that one with its own name is complete.

        Raises:
            RunError: A weight is not finite, or the file cannot be written; the checkpoints before it stay.
        """
        path, model = Path(out_dir, filename), unwrap(self.model)
        # The first process writes what all have: statistics and gradients that each has of its own are averaged first.
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


def _load_exactly(model: nn.Module, path: str | Path) -> None:
    tensors, _ = read_checkpoint(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:]]
        more = f' and {len(problems) - 3} more' if len(problems) > 3 else ''
        raise ValueError(
            f'checkpoint {path} must hold the weights of this model, got {" ".join(problems[:3])}{more}.'
        ) from error
