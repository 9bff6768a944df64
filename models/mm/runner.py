# SPDX-License-Identifier: Apache-2.0
"""mmengine's Runner, made safe to leave alone."""

import copy
import importlib.util
import logging
import re
import sys
from pathlib import Path
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel, is_model_wrapper, revert_sync_batchnorm
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, Runner
from mmengine.visualization import Visualizer
from rich.logging import RichHandler
from torch import nn
from torch.utils.data import DataLoader

from ..files import state_of
from .checks import agreed, check_batches, check_channels, check_classes, check_masks, explained, part, where_none_were
from .data import GuardedDataset
from .own_classes import fill_classes
from .progress import console
from .readers import TimmStream
from .resume import ResumableRunner
from .sources import has_folder
from .utils import RunError, check_interface, count_cores, unwrap

__all__ = ['TimmRunner']

# mmengine warns of its own old names, of data it skips, of gradients it would lose: all as they should be.
_OWN_WARNINGS = re.compile('FileClient|HardDiskBackend|Advance dataloader|The prefix is not|Resumed iteration number')


# The hooks of a TimmRunner beside mmengine's, by their names under default_hooks; the last two only where needed.
OWN_HOOKS = dict(
    seed='SeedHook',
    finite_loss='FiniteLossHook',
    missed_evaluation='MissedEvaluationHook',
    pending_gradients='PendingGradientsHook',
    progress='ProgressHook',
    shared_buffers='SharedBuffersHook',
    unreadable='UnreadableImagesHook',
)


@RUNNERS.register_module()
class TimmRunner(ResumableRunner):
    """A Runner with a quiet console, whose runs can be killed at any moment, see `ResumableRunner`.

    What is wrong with data, disk or loss it says in a sentence (RunError). Classes that the config leaves open are
    those of the data, see `fill_classes`.

    Further keys of the config:
        device: 'cpu', where mmengine would take a GPU.
        num_threads: Number of threads on the CPU, PyTorch's choice unless given.
        unreadable: What a training does at an image that cannot be read, 'stop' (the default) or 'skip'.
        dataset: Keyword arguments of all data sets, which those of a single one override.
    """

    @classmethod
    def from_cfg(cls, cfg: Any) -> Runner:
        cfg = copy.deepcopy(cfg)
        fill_classes(cfg)
        return super().from_cfg(cfg)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.cfg.get('unreadable', 'stop') not in ('stop', 'skip'):
            raise ValueError(f"unreadable must be 'stop' or 'skip', got {self.cfg.unreadable!r}.")

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        if self.cfg.get('device', get_device()) not in ('cpu', get_device()):
            raise ValueError(
                f"device must be 'cpu' or what this machine has, {get_device()!r}, got {self.cfg.device!r}."
            )
        if self.distributed and not is_distributed() and self.device == 'cpu':
            if self.launcher != 'pytorch':
                raise RunError(f"on a CPU, launcher must be 'pytorch' (torchrun), got {self.launcher!r}.")
            check_interface()
            torch.distributed.init_process_group('gloo')  # mmengine would look for GPUs
        super().setup_env(env_cfg)
        if 'num_threads' in self.cfg:
            torch.set_num_threads(self.cfg.num_threads)

    @property
    def device(self) -> str:
        return self.cfg.get('device', get_device())

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """A log file that gets everything, and warnings alone on the console, which shows the progress."""
        logger = super().build_logger(*args, **kwargs)
        level = max(logger.handlers[0].level, logging.WARNING)
        logger.handlers[0] = RichHandler(level, console, show_path=False)
        logger.handlers[0].addFilter(lambda record: not _OWN_WARNINGS.search(record.getMessage()))
        for handler in logger.handlers[1:]:  # whose errors Python's logging would print with a traceback, and forget
            handler.handleError = lambda record: self.note_failure(sys.exc_info()[1])
        return logger

    def build_visualizer(self, visualizer: Visualizer | dict[str, Any] | None = None) -> Visualizer:
        """mmengine's visualizer, which writes TensorBoard's files too where TensorBoard is installed."""
        if not isinstance(visualizer, Visualizer) and importlib.util.find_spec('tensorboard') is not None:
            visualizer = copy.deepcopy(visualizer) if visualizer is not None else dict(type='Visualizer')
            backends = visualizer.setdefault('vis_backends', [dict(type='LocalVisBackend')])
            if not any(backend['type'] == 'TensorboardVisBackend' for backend in backends):
                backends.append(dict(type='TensorboardVisBackend'))
        return super().build_visualizer(visualizer)

    def register_default_hooks(self, hooks: dict[str, Any] | None = None) -> None:
        needed = dict(shared_buffers=self.distributed, unreadable=self.cfg.get('unreadable') == 'skip')
        ours = {name: dict(type=kind) for name, kind in OWN_HOOKS.items() if needed.get(name, True)}
        hooks = {**ours, **(hooks or {})}
        if (hooks.get('checkpoint') or {}).get('max_keep_ckpts') == 1:
            raise ValueError(
                'default_hooks.checkpoint.max_keep_ckpts must be at least 2, or -1 for all, got 1: mmengine removes '
                'the old checkpoint before the new one is complete.'
            )
        super().register_default_hooks({name: hook for name, hook in hooks.items() if hook or name not in ours})

    def build_model(self, model: nn.Module | dict[str, Any]) -> nn.Module:
        built = super().build_model(model)
        if isinstance(model, dict):
            check_channels(unwrap(built), model.get('module', model))  # the latter of a model that merges predictions
        return built

    def train(self) -> nn.Module:
        with explained():
            return super().train()

    def val(self) -> dict[str, float]:
        with explained():
            return super().val()

    def test(self) -> dict[str, float]:
        with explained():
            return super().test()

    def build_train_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        with part('train_cfg'):
            return super().build_train_loop(loop)

    def build_val_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        with part('val_cfg'):
            return super().build_val_loop(loop)

    def build_test_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        with part('test_cfg'):
            return super().build_test_loop(loop)

    def build_evaluator(self, evaluator: Any) -> Evaluator:
        with part('an evaluator'):
            return super().build_evaluator(evaluator)

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        with part('optim_wrapper'):
            return super().build_optim_wrapper(optim_wrapper)

    def build_param_scheduler(self, scheduler: Any) -> Any:
        with part('param_scheduler'):
            return super().build_param_scheduler(scheduler)

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        if self.device != 'cpu' or is_model_wrapper(model):
            return super().wrap_model(model_wrapper_cfg, model)
        model = revert_sync_batchnorm(model.to('cpu'))  # GPUs alone have synchronised ones
        if not self.distributed:
            return model
        if model_wrapper_cfg is not None:
            return super().wrap_model(model_wrapper_cfg, model)
        find_unused = self.cfg.get('find_unused_parameters', False)
        return MMDistributedDataParallel(module=model, broadcast_buffers=False, find_unused_parameters=find_unused)

    def scale_lr(self, optim_wrapper: Any, auto_scale_lr: dict[str, Any] | None = None) -> None:
        """Scale the rate by the images of a step of the optimizer: of all batches whose gradients it accumulates."""
        if auto_scale_lr is not None and 'base_batch_size' in auto_scale_lr:
            steps = getattr(optim_wrapper, '_accumulative_counts', 1)
            auto_scale_lr = dict(auto_scale_lr, base_batch_size=auto_scale_lr['base_batch_size'] / steps)
        super().scale_lr(optim_wrapper, auto_scale_lr)

    def build_dataloader(
        self, dataloader: DataLoader | dict[str, Any], seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """A loader of a GuardedDataset; for training with a SeededSampler, which begins where a resumed run stopped.

        Raises:
            RunError: The data are not there, or the classes are not as many as the model's.
        """
        if isinstance(dataloader, DataLoader):
            return dataloader
        training = dataloader is self._train_dataloader
        with agreed(), part('a dataloader' if not training else 'train_dataloader'):
            return self._build_dataloader(dataloader, training, seed, diff_rank_seed)

    def _build_dataloader(
        self, dataloader: dict[str, Any], training: bool, seed: int | None, diff_rank_seed: bool
    ) -> DataLoader:
        cfg = copy.deepcopy(dataloader)
        cfg['dataset'] = {**self.cfg.get('dataset', {}), **cfg['dataset']}
        root = cfg['dataset'].get('data_root')
        if root and not has_folder(root, cfg['dataset'].get('backend_args')):
            raise RunError(
                f'data_root must be a folder, got {root}, which {state_of(root)}; --data-root names another.'
            )
        if cfg['dataset']['type'] in ('TimmStream', TimmStream):
            return self._build_stream(cfg, training)
        skip = training and self.cfg.get('unreadable') == 'skip'
        cfg['dataset'] = dict(type='GuardedDataset', dataset=cfg['dataset'], skip=skip)
        if training:
            cfg['sampler'] = dict(type='SeededSampler', sampler=cfg['sampler'], skip=self.used_indices(cfg))
        cfg['num_workers'] = self._count_workers(cfg.get('num_workers', 0))
        if not torch.cuda.is_available():
            cfg['pin_memory'] = False  # PyTorch would warn at every epoch
        try:
            loader = Runner.build_dataloader(cfg, seed, diff_rank_seed)
        except FileNotFoundError as error:
            raise RunError(f'the data are not complete: {error}') from error
        self._check_data(loader.dataset)
        if training:
            check_batches(loader, unwrap(self.model))
        return loader

    def _count_workers(self, wanted: int) -> int:
        """The number of processes that load data: as many as the config wants, but no more than cores."""
        cores = count_cores()
        if wanted > cores:
            self.logger.info(f'{cores} processes load data in place of {wanted}, one for each core of this process.')
        return min(wanted, cores)

    def _build_stream(self, cfg: dict[str, Any], training: bool) -> DataLoader:
        """A loader without a sampler, of new workers in each epoch, whose seeds follow from its number."""
        wanted = self._count_workers(cfg.get('num_workers', 0))
        cfg['num_workers'] = max(1, wanted) if training else min(1, wanted)
        options = dict(batch_size=cfg['batch_size'], num_workers=cfg['num_workers'], training=training, seed=self.seed)
        dataset = {**cfg['dataset'], **options}
        changes = dict(dataset=dataset, sampler=None, persistent_workers=False, generator=torch.Generator())
        if not torch.cuda.is_available():
            changes['pin_memory'] = False
        loader = Runner.build_dataloader({**cfg, **changes})
        check_classes(loader.dataset, unwrap(self.model))
        if training:
            check_batches(loader, unwrap(self.model))
            self.logger.warning(
                f'{dataset["name"]} is a stream: a run that is resumed within an epoch begins that epoch anew, and '
                'images that cannot be decoded are left out.'
            )
        return loader

    def _check_data(self, dataset: GuardedDataset) -> None:
        if not len(dataset):
            check_classes(dataset, unwrap(self.model))  # images without a known class may have been left out
            raise RunError(f'the data must hold images, got none{where_none_were(dataset)}.')
        for path in dataset.paths(0):  # to look for those of all samples would take too long
            if '://' not in path and not Path(path).is_file():
                raise RunError(f'the data are not complete: {path} {state_of(path)}.')
        check_classes(dataset, unwrap(self.model))
        check_masks(dataset)
