# SPDX-License-Identifier: Apache-2.0
"""What happens around the iterations: seeds, weights for timm, a second loss, and reasons to stop."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, get_rank
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner
from torch import Tensor

from ...version import __version__
from ..weights import read_checkpoint, write_safetensors
from .checks import leaves
from .classification import ImagePreprocessor, NamedModel
from .readers import TimmStream
from .utils import (
    RunError,
    check_finite,
    in_first_process,
    mix_seeds,
    replacing,
    seed_everything,
    share_buffers,
    unwrap,
)

__all__ = [
    'BestHook',
    'EarlyStopHook',
    'FiniteLossHook',
    'MESAHook',
    'MissedEvaluationHook',
    'PendingGradientsHook',
    'SafetensorsHook',
    'SeedHook',
    'SharedBuffersHook',
    'UnreadableImagesHook',
    'note_data',
    'note_images',
    'save_for_timm',
]


@HOOKS.register_module()
class SeedHook(Hook):
    """Seeds every training iteration by the run's seed, the process and the iteration's number.

    So a resumed run drops the same paths and mixes the same images as an unbroken one, although no checkpoint holds the
    state of a random generator.
    """

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        seed_everything(mix_seeds(runner.seed, get_rank(), runner.iter))

    def before_train_epoch(self, runner: Runner) -> None:
        loader = runner.train_dataloader
        if isinstance(loader.dataset, TimmStream):  # which has no sampler to be told
            loader.dataset.set_epoch(runner.epoch)
            loader.generator.manual_seed(mix_seeds(runner.seed, get_rank(), runner.epoch))


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stops a run whose loss is not finite, or which cannot write, in every process at the same iteration.

    Raises:
        RunError: The loss is not finite, or a process could not write its log; the message names the last checkpoint.
    """

    priority = 'HIGH'  # after the loss has come from the device for the log, before averages and checkpoints

    def after_train_iter(self, runner: Runner, outputs: dict[str, Any], **kwargs: Any) -> None:
        loss = outputs['loss'].detach()
        verdict = torch.stack([loss, torch.full_like(loss, float(runner.has_failed))])
        all_reduce(verdict, 'mean')
        mean, failed = verdict.tolist()
        if failed:
            runner.check_failures()
        if not math.isfinite(mean):
            raise RunError(f'the loss is {mean} at iteration {runner.iter + 1}; {runner.last_checkpoint()}.')


@HOOKS.register_module()
class SharedBuffersHook(Hook):
    """Lets all processes evaluate the same network: batch norms take the average of all processes' statistics."""

    priority = 'VERY_HIGH'

    def before_val_epoch(self, runner: Runner) -> None:
        share_buffers(unwrap(runner.model))


@HOOKS.register_module()
class PendingGradientsHook(Hook):
    """Keeps in a checkpoint the accumulated gradients that no step of the optimizer has used yet."""

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        parameters = unwrap(runner.model).named_parameters()
        checkpoint['gradients'] = {name: p.grad.cpu() for name, p in parameters if p.grad is not None}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        gradients = checkpoint.get('gradients', {})
        for name, parameter in unwrap(runner.model).named_parameters():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter.device)


@HOOKS.register_module()
class MissedEvaluationHook(Hook):
    """Evaluates the checkpoint that a run resumes from, where the evaluations decide: a kill may have cut that off."""

    priority = 'LOWEST'  # when all hooks know that a training has begun

    def before_train(self, runner: Runner) -> None:
        loop = runner.train_loop
        done = runner.epoch if isinstance(loop, EpochBasedTrainLoop) else runner.iter
        due = done >= max(1, loop.val_begin) and done % loop.val_interval == 0 and runner.iter < runner.max_iters
        decides = any(
            isinstance(h, BestHook | EarlyStopHook) or isinstance(h, CheckpointHook) and h.save_best
            for h in runner.hooks
        )
        if due and decides and runner.val_loop is not None:
            runner.val_loop.run()


@HOOKS.register_module()
class UnreadableImagesHook(Hook):
    """Names and counts the training images that cannot be read and were replaced by others.

    Args:
        interval: Number of iterations between two reports.
    """

    priority = 'LOW'

    def __init__(self, interval: int = 100) -> None:
        self.interval = interval
        self.known: set[int] = set()

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if self.every_n_train_iters(runner, self.interval):
            self._report(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        self._report(runner)

    def _report(self, runner: Runner) -> None:
        dataset = runner.train_dataloader.dataset
        if isinstance(dataset, TimmStream):
            return  # its reader leaves them out
        unreadable = dataset.unreadable.to(torch.uint8)
        all_reduce(unreadable, 'max')  # each process knows only the images that it read
        found = set(unreadable.nonzero().flatten().tolist())
        for index in sorted(found - self.known):
            names = dataset.paths(index) or [dataset.name_of(index)]
            runner.logger.warning(f'Unreadable, replaced by another image: {" or ".join(names)}')
        if found != self.known:
            runner.logger.warning(f'{len(found)} of {len(dataset)} images are unreadable.')
        self.known = found


@HOOKS.register_module()
class MESAHook(Hook):
    """Lets an ImageClassifier learn from its own moving average too (Du et al., Sharpness-Aware Training for Free).

    The loss gets weight x cross-entropy against the probabilities that the average of an EMAHook gives to the same
    batch, as in the published training of Spatial-Mamba.

    Args:
        weight: Weight of this part of the loss.
        begin: Share of the training after which this part begins.
    """

    def __init__(self, weight: float, begin: float = 0.25) -> None:
        self.weight = weight
        self.begin = begin

    def before_train(self, runner: Runner) -> None:
        if averaged(runner) is None:
            raise ValueError('MESAHook needs an EMAHook in custom_hooks, got none.')
        self.begun = False

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if not self.begun and runner.iter >= self.begin * runner.max_iters:
            unwrap(runner.model).learn_from(averaged(runner).model.eval(), self.weight)
            self.begun = True


def averaged(runner: Runner) -> Any:
    """The moving average of a run's model; None if the run keeps none."""
    return next((hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)), None)


@HOOKS.register_module()
class SafetensorsHook(Hook):
    """Writes a NamedModel's network, or its moving average, to WORK_DIR/checkpoint.safetensors.

    `timm.create_model(model, checkpoint_path=FILE, **model_args)` loads the file of a timm model; its metadata hold
    these two, the epoch, our version, and what `vssm.predict` needs: the names of the classes, and how images are
    prepared. It is replaced as a whole, so that a reader never finds half of a file.

    Args:
        interval: Number of epochs between two writes; the last epoch is always written.
    """

    priority = 'LOW'  # before CheckpointHook, so that a run whose last checkpoint is there has written this file too

    def __init__(self, interval: int = 1) -> None:
        self.interval = interval

    def after_train_epoch(self, runner: Runner) -> None:
        if not self.every_n_epochs(runner, self.interval) and not self.is_last_train_epoch(runner):
            return
        _write_weights(runner, 'checkpoint.safetensors', runner.epoch + 1)


@HOOKS.register_module()
class BestHook(Hook):
    """Writes a file like SafetensorsHook's, WORK_DIR/best.safetensors, when a metric of the evaluation is a new best.

    The metadata hold the metric and the seed too. A resumed run reads its best metric from the file, unless it is that
    of an earlier run. A metric that is NaN is not defined for the data; then the last weights count as the best.

    Args:
        metric: Name of the metric, such as 'accuracy/top1'. The higher it is the better, a loss the lower.

    Raises:
        RunError: The evaluation has no such metric, or the metric is infinite.
    """

    priority = 'LOW'  # after EMAHook, which swaps the weights and their average for the evaluation, and back

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.best = -math.inf

    def before_train(self, runner: Runner) -> None:
        self.best = in_first_process(lambda: self._read_best(runner))

    def _read_best(self, runner: Runner) -> float:
        path = Path(runner.work_dir, 'best.safetensors')
        metadata = read_checkpoint(path)[1] if path.is_file() else {}
        value = float(metadata.get(self.metric, math.nan)) if metadata.get('run') == runner.run_name else math.nan
        return -math.inf if math.isnan(value) else _goodness(self.metric, value)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        value = _defined(self, metrics)
        undefined = math.isnan(value) and self.best == -math.inf
        if undefined:
            runner.logger.warning(
                f'{self.metric} is not defined: the weights of epoch {runner.epoch} count as the best.'
            )
        if undefined or _goodness(self.metric, value) > self.best:
            self.best = -math.inf if undefined else _goodness(self.metric, value)
            _write_weights(
                runner, 'best.safetensors', runner.epoch, **{self.metric: repr(value), 'seed': str(runner.seed)}
            )


@HOOKS.register_module()
class EarlyStopHook(Hook):
    """Ends a training whose evaluations have brought no new best for a while.

    The checkpoints' histories have what earlier evaluations brought, so that a resumed run ends where an unbroken one
    does, which it would not with mmengine's EarlyStoppingHook. A metric that is NaN is not defined, and ends nothing.

    Args:
        metric: Name of the metric, such as 'wsi/loss'. The higher it is the better, a loss the lower.
        patience: Number of evaluations in turn without a new best after which the training ends; None for no end.
        begin: Number of evaluations that there are at least.

    Raises:
        RunError: The evaluation has no such metric, or the metric is infinite.
    """

    priority = 'VERY_LOW'  # after BestHook

    def __init__(self, metric: str, patience: int | None = None, begin: int = 0) -> None:
        if patience is not None and patience < 1:
            raise ValueError(f'EarlyStopHook: patience must be at least 1, or None, got {patience}.')
        self.metric = metric
        self.patience = patience
        self.begin = begin
        self.values: list[float] = []

    def before_train(self, runner: Runner) -> None:
        scalars = runner.message_hub.log_scalars if runner.iter else {}  # of the run that is resumed
        name = f'val/{self.metric}'
        self.values = [float(value) for value in scalars[name].data[0]] if name in scalars else []

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        if self.patience is None or not isinstance(runner._train_loop, BaseLoop):
            return
        self.values.append(_defined(self, metrics))
        known = [_goodness(self.metric, value) for value in self.values if not math.isnan(value)]
        if not known:
            return
        waited = len(known) - 1 - known.index(max(known))
        if waited >= self.patience and len(self.values) >= self.begin:
            runner.train_loop.stop_training = True
            runner.logger.warning(
                f'The training ends after epoch {runner.epoch}: {waited} evaluations in turn brought no better '
                f'{self.metric}.'
            )


def _defined(hook: BestHook | EarlyStopHook, metrics: dict[str, float]) -> float:
    """The metric that a hook decides by."""
    value = metrics.get(hook.metric, math.inf)
    if math.isinf(value):
        raise RunError(
            f'{type(hook).__name__} needs {hook.metric}, got {metrics.get(hook.metric)}: evaluated are '
            f'{", ".join(metrics)}.'
        )
    return value


def _goodness(metric: str, value: float) -> float:
    """A number that is the higher the better: a loss, by its name, is the better the lower it is."""
    return -value if metric.endswith('loss') else value


def _write_weights(runner: Runner, name: str, epoch: int, **metadata: str) -> None:
    classifier = unwrap(runner.model)
    source = averaged(runner) or classifier
    share_buffers(source)
    path = Path(runner.work_dir, name)
    check_finite(source, path)
    run = getattr(runner, 'run_name', '')  # mmengine's own Runner has none
    dataset = (runner.val_loop or runner.train_loop).dataloader.dataset
    metadata = dict(metadata, **note_data(runner), **note_images(dataset, classifier), run=run)
    in_first_process(lambda: save_for_timm(path, classifier, source.model.state_dict(), epoch, **metadata))
    runner.logger.info(f'Wrote {path}.')


def note_data(runner: Runner) -> dict[str, str]:
    """What the data set of a training wants its checkpoints to note, as JSON; nothing where it wants none."""
    notes = getattr(runner.train_dataloader.dataset, 'notes', None)
    return {} if notes is None else dict(data=json.dumps(notes))


def note_images(dataset: Any, classifier: NamedModel) -> dict[str, str]:
    """What `vssm.predict` needs to know of the images, as JSON, for `save_for_timm`; nothing of other data.

    Args:
        dataset: The data set that the classifier is evaluated on, in whatever wrappers.
        classifier: The model, whose preprocessor scales the images.

    Returns:
        `classes`, the names in their order, and `transform`, how an image is prepared for an evaluation, as arguments
        of timm's `create_transform`.
    """
    dataset = leaves(dataset)[0]
    noted: dict[str, str] = {}
    if not hasattr(dataset, 'preprocessing'):
        return noted
    if classes := (getattr(dataset, 'metainfo', None) or {}).get('classes'):
        noted['classes'] = json.dumps(list(classes))
    if dataset.preprocessing is not None:
        preprocessor = classifier.data_preprocessor
        scale = {
            key: (getattr(preprocessor, key).flatten() / 255).tolist()
            for key in ('mean', 'std')
            if isinstance(preprocessor, ImagePreprocessor)
        }
        noted['transform'] = json.dumps(scale | dataset.preprocessing)
    return noted


def save_for_timm(
    path: Path, classifier: NamedModel, state_dict: dict[str, Tensor], epoch: int, **metadata: str
) -> None:
    """Write the weights of a classifier's network, or their average, with all that builds the network again.

    Args:
        path: The .safetensors file to write.
        classifier: The model whose network it is.
        state_dict: Names and tensors of the network.
        epoch: Number of epochs that were trained.
        metadata: Further metadata of the file, the name of its `run` among them.

    Raises:
        RunError: The file cannot be written; one of that name stays as it was.
    """
    metadata = dict(
        metadata,
        model=classifier.model_name,
        model_args=json.dumps(classifier.model_args),
        epoch=str(epoch),
        vssm=__version__,
    )
    with replacing(path, metadata.get('run', '')) as temporary:
        write_safetensors(temporary, state_dict, metadata)
