# SPDX-License-Identifier: Apache-2.0
"""Adapters for mmengine: timm models, data, metrics and hooks under the names that our configs use.

The one file of the package's models that needs mmengine. A config loads it:
`custom_imports = dict(imports=['vssm.models.mm'], allow_failed_imports=False)`.
"""

import atexit
import functools
import json
import logging
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Union

import timm
import torch
import torch.nn.functional as F
from mmengine.dist import master_only
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import BaseModel, BaseModule, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import (
    DATASETS,
    HOOKS,
    METRICS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    RUNNERS,
)
from mmengine.runner import Runner
from PIL import Image
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from timm.layers import LayerNorm2d
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms

from ..version import __version__
from . import mmcv_ext
from .checkpoints import list_models, misfits, read_checkpoint, rename_fn, strip_prefixes

__all__ = [
    'Accuracy',
    'Digits',
    'ImageClassifier',
    'ProgressHook',
    'SafetensorsHook',
    'TimmFeatures',
    'TimmOptimWrapperConstructor',
    'TimmRunner',
    'load_weights',
    'progress_bar',
]

mmcv_ext.install()  # before the first config imports mmdet's or mmseg's models

console = Console()  # one for the progress bar and the warnings, so that neither writes over the other


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """A timm model with a cross-entropy loss.

    Args:
        model_name: Name for `timm.create_model`.
        data_preprocessor: What moves a batch to the device, mmengine's BaseDataPreprocessor unless given.
        model_args: Further keyword arguments of `timm.create_model`.
    """

    def __init__(
        self,
        model_name: str,
        data_preprocessor: Union[Dict[str, Any], nn.Module, None] = None,
        **model_args: Any,
    ) -> None:
        super().__init__(data_preprocessor)
        self.model_name = model_name
        self.model_args = model_args
        self.model = timm.create_model(model_name, **model_args)

    def init_weights(self) -> None:
        """Nothing: timm models initialise themselves, and some would lose their pretrained weights here."""

    def forward(
        self,
        inputs: Tensor,
        data_samples: Optional[Tensor] = None,
        mode: str = 'tensor',
    ) -> Union[Tensor, Dict[str, Tensor], List[Dict[str, Tensor]]]:
        """Logits, the loss, or one prediction per image.

        Args:
            inputs: Images, (batch, in_chans, H, W).
            data_samples: Labels, (batch,), or for the loss also probabilities, (batch, num_classes).
            mode: 'tensor', 'loss' or 'predict'.

        Returns:
            Logits, (batch, num_classes); or dict(loss); or for each image dict(pred_score, gt_label), (num_classes,)
            and ().
        """
        logits = self.model(inputs)
        if mode == 'tensor':
            return logits
        if mode == 'loss':
            return dict(loss=F.cross_entropy(logits, data_samples))
        if mode == 'predict':
            scores = logits.float().softmax(-1)
            return [dict(pred_score=score, gt_label=label) for score, label in zip(scores, data_samples, strict=True)]
        raise ValueError(f"ImageClassifier: mode must be 'tensor', 'loss' or 'predict', got {mode!r}.")


@MODELS.register_module()
class TimmFeatures(BaseModule):
    """A timm model as the backbone of a detector or segmentor: one map per level, (batch, C, H, W).

    Weights are read by `init_weights`, which a training calls and a test does not. Of a classifier, a detector, a
    segmentor or a backbone alone, under published names or ours, it takes what belongs to this backbone.

    Args:
        model_name: Name for `timm.create_model`.
        out_indices: Which levels.
        out_norm: A layer norm over the channels of each level, `outnorm{i}` as in the published detectors.
        frozen_stages: How many stages keep their weights and statistics, the stem too; 0 for the stem alone, -1 for
            none.
        norm_eval: Batch norms keep their statistics.
        with_cp: Gradient checkpointing.
        pretrained: Start from timm's pretrained weights.
        init_cfg: dict(type='Pretrained', checkpoint=FILE) starts from what `read_checkpoint` reads.
        model_args: Further keyword arguments of `timm.create_model`, such as drop_path_rate.

    Raises:
        ValueError: An argument is not as said above.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_norm: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        pretrained: bool = False,
        init_cfg: Optional[Dict[str, Any]] = None,
        **model_args: Any,
    ) -> None:
        super().__init__(init_cfg)
        if init_cfg is not None and (init_cfg.get('type') != 'Pretrained' or 'checkpoint' not in init_cfg):
            raise ValueError(
                f"TimmFeatures: init_cfg must be dict(type='Pretrained', checkpoint=FILE), got {init_cfg}."
            )
        if not isinstance(pretrained, bool) or pretrained and init_cfg is not None:
            raise ValueError(
                'TimmFeatures: pretrained must be True or False, and False where init_cfg names a file, got '
                f'{pretrained!r}.'
            )
        self._whole = functools.partial(timm.create_model, model_name, **model_args)
        # The getter gives (batch, C, H, W) of every model and leaves its names as they are.
        self._features = functools.partial(
            self._whole, features_only=True, feature_cls='getter', out_indices=tuple(out_indices)
        )
        self.model = self._features()
        self.architecture = self.model.pretrained_cfg['architecture']  # whatever alias model_name is
        self.pretrained = pretrained
        self.norm_eval = norm_eval
        self.levels = tuple(self.model.out_indices)
        self.out_norm = out_norm
        if out_norm:
            for level, channels in zip(self.levels, self.model.feature_info.channels(), strict=True):
                self.add_module(f'outnorm{level}', LayerNorm2d(channels, eps=1e-5))
        self.frozen_stages = frozen_stages
        for module in self._frozen():
            module.requires_grad_(False)
        self.model.model.set_grad_checkpointing(with_cp)
        self.register_load_state_dict_pre_hook(_take_other_names)

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Images, (batch, in_chans, H, W) -> a map per level, (batch, C, H/4, W/4), (batch, C', H/8, W/8), ..."""
        features = self.model(x)
        if self.out_norm:
            features = [getattr(self, f'outnorm{i}')(f) for i, f in zip(self.levels, features, strict=True)]
        return tuple(f.contiguous() for f in features)  # compiled operators of mmcv take no other layout

    def train(self, mode: bool = True) -> 'TimmFeatures':
        super().train(mode)
        for module in self._frozen():
            module.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _frozen(self) -> List[nn.Module]:
        if self.frozen_stages == -1:
            return []
        stages = getattr(self.model.model, 'stages', ())
        if not hasattr(self.model.model, 'stem') or self.frozen_stages not in range(len(stages) + 1):
            raise ValueError(
                f'TimmFeatures: frozen_stages must be -1, or 0 to {len(stages)} of a model with a stem and stages, got '
                f'{self.frozen_stages!r} for {self.architecture}.'
            )
        return [self.model.model.stem, *stages[: self.frozen_stages]]

    def init_weights(self) -> None:
        """Read the weights that `pretrained` or `init_cfg` ask for; timm models initialise themselves otherwise.

        Raises:
            FileNotFoundError: There is no such file.
            RuntimeError: timm has no pretrained weights, or no way to them from here.
            ValueError: The file cannot be read safely, or does not fit.
        """
        if self.pretrained:
            self.model.load_state_dict(self._features(pretrained=True).state_dict())
        elif self.init_cfg is not None:
            self._load(self.init_cfg['checkpoint'])

    def _load(self, path: Union[str, Path]) -> None:
        tensors, metadata = read_checkpoint(path)
        if metadata.get('model', self.architecture) != self.architecture:
            raise ValueError(f'checkpoint {path} must hold {self.architecture}, got {metadata["model"]}.')
        tensors = self.rename(strip_prefixes(tensors)[0])
        own = {name.removeprefix(_INNER): value for name, value in self.state_dict().items()}
        with torch.device('meta'):
            whole = self._whole()
        elsewhere = set(whole.state_dict())  # the head, stages after the last level; and norms of levels left out
        if self.out_norm:
            levels = range(len(whole.feature_info))
            elsewhere.update(f'outnorm{i}.{kind}' for i in levels for kind in ('weight', 'bias'))
        tensors = {name: value for name, value in tensors.items() if name in own or name not in elsewhere}
        if not any(name.startswith('outnorm') for name in tensors):  # a classifier's: here the norms begin anew
            own = {name: value for name, value in own.items() if not name.startswith('outnorm')}
        problems = misfits(tensors, own)
        if problems:
            raise ValueError(
                f'checkpoint {path} must hold the {len(own)} tensors of the backbone {self.architecture}, got '
                f'{len(tensors)}: {problems}.'
            )
        for name, value in tensors.items():
            own[name].copy_(value)

    def rename(self, state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Published names of this backbone become timm's; all others stay as they are."""
        if self.architecture not in list_models():
            return state_dict
        return rename_fn(self.architecture)(state_dict, self.model.model)


_INNER = 'model.model.'  # where the network is in a TimmFeatures, below timm's getter


def _take_other_names(
    backbone: TimmFeatures, state_dict: Dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
) -> None:
    """Lets a detector that was published load as a whole: its backbone's names become ours, in place."""
    tensors = {}
    for name in [name for name in state_dict if name.startswith(prefix)]:
        tensors[name.removeprefix(prefix).removeprefix(_INNER)] = state_dict.pop(name)
    for name, value in backbone.rename(tensors).items():
        state_dict[f'{prefix}{"" if name.startswith("outnorm") else _INNER}{name}'] = value


@DATASETS.register_module()
class Digits(Dataset):
    """scikit-learn's 1,797 scans of handwritten digits, 8x8 in 17 grey levels, a third of them held out.

    Gives dict(inputs, data_samples): an image, (1, img_size, img_size), in [-1, 1], and its label.

    Args:
        split: 'train' or 'heldout'; the division is fixed and keeps the share of every digit.
        img_size: Height and width that the scans are enlarged to.
        affine: Keyword arguments of torchvision's RandomAffine, None for no augmentation.
    """

    metainfo = dict(classes=tuple('0123456789'))

    def __init__(self, split: str, img_size: int = 32, affine: Optional[Dict[str, Any]] = None) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        scans, labels = load_digits(return_X_y=True)
        indices = train_test_split(range(len(labels)), test_size=1 / 3, stratify=labels, random_state=0)
        if split not in ('train', 'heldout'):
            raise ValueError(f"Digits: split must be 'train' or 'heldout', got {split!r}.")
        self.indices = sorted(indices[split == 'heldout'])
        self.labels = [int(labels[i]) for i in self.indices]
        grey = (scans.reshape(-1, 8, 8) * (255 / 16)).round().astype('uint8')
        self.images = [Image.fromarray(grey[i]).resize((img_size, img_size), Image.BICUBIC) for i in self.indices]

        steps = [transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
        if affine is not None:
            steps.insert(0, transforms.RandomAffine(interpolation=transforms.InterpolationMode.BILINEAR, **affine))
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Dict[str, Any]:
        return dict(inputs=self.transform(self.images[index]), data_samples=self.labels[index])


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Per cent of the images whose label is among the k best scores, 'accuracy/top{k}'.

    Args:
        topk: Which k.
        kwargs: Keyword arguments of mmengine's BaseMetric.
    """

    default_prefix = 'accuracy'

    def __init__(self, topk: Sequence[int] = (1,), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.topk = topk

    def process(self, data_batch: Any, data_samples: Sequence[Dict[str, Tensor]]) -> None:
        for sample in data_samples:
            best = sample['pred_score'].topk(max(self.topk)).indices
            self.results.append(best == sample['gt_label'])  # [max(topk)]

    def compute_metrics(self, results: List[Tensor]) -> Dict[str, float]:
        hits = torch.stack(results)  # [images, max(topk)]
        return {f'top{k}': 100 * hits[:, :k].any(1).sum().item() / len(hits) for k in self.topk}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TimmOptimWrapperConstructor:
    """An optimizer of timm's, by `optimizer=dict(type=NAME, lr=..., weight_decay=..., ...)`.

    Weight decay follows timm's rules: none for vectors, for biases and for what a `no_weight_decay()` names, be it the
    model's own or that of a timm model inside.
    """

    def __init__(self, optim_wrapper_cfg: Dict[str, Any], paramwise_cfg: Optional[Dict[str, Any]] = None) -> None:
        if paramwise_cfg is not None:
            raise ValueError(
                'TimmOptimWrapperConstructor: paramwise_cfg must be None, as the model names what does not decay, got '
                f'{paramwise_cfg}.'
            )
        self.optim_wrapper_cfg = optim_wrapper_cfg

    def __call__(self, model: nn.Module) -> OptimWrapper:
        cfg = dict(self.optim_wrapper_cfg)
        optimizer_cfg = dict(cfg.pop('optimizer'))
        weight_decay = optimizer_cfg.pop('weight_decay', 0.0)
        model = _unwrap(model)
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=_no_weight_decay(model))
        optimizer = create_optimizer_v2(groups, opt=optimizer_cfg.pop('type'), **optimizer_cfg)
        return OPTIM_WRAPPERS.build(cfg, default_args=dict(type='OptimWrapper', optimizer=optimizer))


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _no_weight_decay(model: nn.Module) -> Set[str]:
    """The patterns of every module that has `no_weight_decay()`, as full parameter names."""
    patterns = set()
    for prefix, module in model.named_modules():
        if hasattr(module, 'no_weight_decay'):
            patterns |= {f'{prefix}.{pattern}' if prefix else pattern for pattern in module.no_weight_decay()}
    return patterns


def progress_bar(console: Console) -> Progress:
    """Bar, count, a field `status` and the time that is left; nothing where there is no terminal."""
    return Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn('{task.fields[status]}'),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@HOOKS.register_module()
class ProgressHook(Hook):
    """A progress bar with the time that is left on a terminal, elsewhere one line after each evaluation."""

    priority = 'LOW'  # after the runtime information of the iteration has been noted

    def __init__(self) -> None:
        self.progress: Optional[Progress] = None
        self.metrics = ''

    def _start(self, description: str, total: int) -> None:
        self.progress = progress_bar(console)
        self.task = self.progress.add_task(description, total=total, status='')
        self.progress.start()
        atexit.register(self._stop)  # an exception would else leave the terminal without its cursor

    @master_only
    def before_train(self, runner: Runner) -> None:
        self._start('train', runner.max_iters)
        self.progress.update(self.task, completed=runner.iter)

    @master_only
    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=runner.iter + 1, status=self._status(runner))

    @master_only
    def after_val_epoch(self, runner: Runner, metrics: Optional[Dict[str, float]] = None) -> None:
        self.metrics = '  '.join(f'{name} {value:.2f}' for name, value in metrics.items())
        if self.progress is None:  # an evaluation without training
            return
        status = self._status(runner)
        self.progress.update(self.task, status=status)
        if not console.is_terminal:
            seconds = self.progress.tasks[self.task].time_remaining or 0
            console.print(
                f'iteration {runner.iter}/{runner.max_iters}  {status}  {seconds:.0f} s left', highlight=False
            )

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
    def after_test_epoch(self, runner: Runner, metrics: Optional[Dict[str, float]] = None) -> None:
        self._stop()

    def _status(self, runner: Runner) -> str:
        return f'loss {runner.message_hub.get_scalar("train/loss").current():.3f}  {self.metrics}'

    def _stop(self) -> None:
        self.progress.stop()


@HOOKS.register_module()
class SafetensorsHook(Hook):
    """Writes an ImageClassifier's timm model to WORK_DIR/checkpoint.safetensors.

    `timm.create_model(model, checkpoint_path=..., **model_args)` loads the file; its metadata hold these two, the epoch
    and our version. It is replaced as a whole, so that a reader never finds half of one.

    Args:
        interval: Epochs between two writes; the last epoch is always written.
    """

    priority = 'VERY_LOW'

    def __init__(self, interval: int = 1) -> None:
        self.interval = interval

    @master_only
    def after_train_epoch(self, runner: Runner) -> None:
        if not self.every_n_epochs(runner, self.interval) and not self.is_last_train_epoch(runner):
            return
        classifier = _unwrap(runner.model)
        metadata = dict(
            model=classifier.model_name,
            model_args=json.dumps(classifier.model_args),
            epoch=str(runner.epoch + 1),
            vssm=__version__,
        )
        path = Path(runner.work_dir, 'checkpoint.safetensors')
        temporary = path.with_suffix('.tmp')
        state_dict = {name: value.detach().cpu().contiguous() for name, value in classifier.model.state_dict().items()}
        save_file(state_dict, temporary, metadata)
        os.replace(temporary, path)
        runner.logger.info(f'Wrote {path}.')


def load_weights(classifier: ImageClassifier, path: Union[str, Path]) -> None:
    """Load a checkpoint whose names and shapes fit exactly.

    Args:
        classifier: What to load into.
        path: What `read_checkpoint` reads; averaged weights where there are any.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read safely, or it belongs to another model.
    """
    state_dict, metadata = read_checkpoint(path)
    if metadata.get('model', classifier.model_name) != classifier.model_name:
        raise ValueError(f'checkpoint {path} must hold {classifier.model_name}, got {metadata["model"]}.')
    state_dict = {name.removeprefix('model.'): value for name, value in state_dict.items()}  # as ImageClassifier saves
    own = classifier.model.state_dict()
    problems = misfits(state_dict, own)
    if problems:
        raise ValueError(
            f'checkpoint {path} must hold the {len(own)} tensors of {classifier.model_name}, got {len(state_dict)}: '
            f'{problems}.'
        )
    classifier.model.load_state_dict(state_dict)


@RUNNERS.register_module()
class TimmRunner(Runner):
    """mmengine's Runner with a quiet console and safe loading; the config may set `device` and `num_threads`."""

    def __init__(self, *args: Any, resume: bool = False, **kwargs: Any) -> None:
        if resume:
            raise ValueError(
                'resume must be False, as checkpoints hold weights alone; load_from=FILE starts from them.'
            )
        super().__init__(*args, **kwargs)

    def setup_env(self, env_cfg: Dict[str, Any]) -> None:
        super().setup_env(env_cfg)
        if 'num_threads' in self.cfg:
            torch.set_num_threads(self.cfg.num_threads)

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """The log file gets everything; the console, which shows the progress, warnings only."""
        logger = super().build_logger(*args, **kwargs)
        level = max(logger.handlers[0].level, logging.WARNING)
        logger.handlers[0] = RichHandler(level, console, show_path=False)
        return logger

    def wrap_model(self, model_wrapper_cfg: Optional[Dict[str, Any]], model: nn.Module) -> nn.Module:
        if 'device' not in self.cfg:
            return super().wrap_model(model_wrapper_cfg, model)
        return model.to(self.cfg.device)

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """See `load_weights`."""
        load_weights(_unwrap(self.model), filename)
        self._has_loaded = True
        self.logger.info(f'Loaded {filename}.')
