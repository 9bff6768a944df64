# SPDX-License-Identifier: Apache-2.0
"""Networks by name, with their weights; and classification of images: preprocessing, losses and accuracy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import METRICS, MODELS
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from ..files import printable
from ..weights import adapt_input, list_models, misfits, rename_fn
from .sources import log_changes, naming, read_weights
from .utils import RunError, check_init, init_file

__all__ = ['Accuracy', 'ImageClassifier', 'ImagePreprocessor', 'NamedModel', 'load_weights']


class NamedModel(BaseModel):
    """Holds a network that was built by its name; `TimmRunner` reads its weights, `SafetensorsHook` writes them.

    Weights to start from are read by `init_weights`, which a training calls and a test does not; a head of another size
    is left out.

    Args:
        model_name: Name of the network.
        model: The network, with an attribute num_classes.
        model_args: Further arguments that it was built with, of plain values.
        data_preprocessor: Module, or its config, that moves a batch to the device; mmengine's BaseDataPreprocessor
            unless given.
        init_cfg: Config of a file to start from, dict(type='Pretrained', checkpoint=FILE), see `local_file`.
    """

    def __init__(
        self,
        model_name: str,
        model: nn.Module,
        model_args: dict[str, Any],
        data_preprocessor: dict[str, Any] | nn.Module | None = None,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(data_preprocessor, init_cfg)
        self.model_name = model_name
        self.model_args = model_args
        self.model: Any = model

    @property
    def heads(self) -> tuple[str, ...]:
        """The names of the modules of the network that another number of classes changes."""
        return ('head',)

    @property
    def architecture(self) -> str:
        """The name of the network, even if model_name is an alias."""
        return self.model_name

    def is_named(self, name: str) -> bool:
        """Whether a name that a checkpoint notes is that of the network."""
        return name in (self.architecture, self.model_name)

    def rename(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under the network's own names, from published ones."""
        return state_dict

    def init_weights(self) -> None:
        """Read the weights that `init_cfg` asks for; without it networks initialise themselves.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file cannot be read safely, or does not fit.
        """
        if self.init_cfg is not None:
            load_weights(self, init_file(self.init_cfg), start=True)


@MODELS.register_module()
class ImagePreprocessor(BaseDataPreprocessor):
    """Moves a batch of uint8 images to the device, normalises them, and in training erases and mixes.

    Args:
        mean: Mean of each channel, where white is 1.
        std: Standard deviation of each channel, where white is 1.
        random_erasing: Keyword arguments of timm's RandomErasing, such as probability and mode; None for no erasing.
        mixup: Keyword arguments of timm's Mixup, to which an ImageClassifier adds its num_classes; None for no mixing.
            It does cutmix too, and makes the labels probabilities, smoothed or not.
        channels_last: Whether the images have the memory format channels_last.
        non_blocking: Whether the program goes on while a batch is copied from pinned memory.
    """

    def __init__(
        self,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        random_erasing: dict[str, Any] | None = None,
        mixup: dict[str, Any] | None = None,
        channels_last: bool = False,
        non_blocking: bool = True,
    ) -> None:
        super().__init__(non_blocking)
        self.register_buffer('mean', 255 * torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer('std', 255 * torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)
        self.random_erasing = RandomErasing(**random_erasing) if random_erasing is not None else None
        self.mixup = Mixup(**mixup) if mixup is not None else None
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, data: dict[str, Tensor], training: bool = False) -> dict[str, Tensor]:
        """dict(inputs, data_samples): (batch, C, H, W) uint8, (batch,) -> float32, (batch,) or (batch, num_classes).

        Raises:
            RunError: A batch to be mixed holds an odd number of images.
        """
        data = self.cast_data(data)
        images, labels = data['inputs'], data['data_samples']
        images = ((images - self.mean) / self.std).contiguous(memory_format=self.memory_format)
        if training and self.random_erasing is not None:
            self.random_erasing.device = images.device
            images = self.random_erasing(images)
        if training and self.mixup is not None:
            if len(images) % 2:
                raise RunError(
                    f'ImagePreprocessor: a batch to be mixed must hold an even number of images, got {len(images)}: '
                    'set train_dataloader.batch_size to an even number and drop_last=True.'
                )
            images, labels = self.mixup(images, labels)
        return dict(inputs=images, data_samples=labels)


@MODELS.register_module()
class ImageClassifier(NamedModel):
    """A timm model with a cross-entropy loss.

    Args:
        model_name: Name for `timm.create_model`.
        data_preprocessor: Module, or its config, that moves a batch to the device; mmengine's BaseDataPreprocessor
            unless given.
        label_smoothing: Smoothing of labels that are numbers; the mixing smooths those that it mixes.
        with_cp: Whether gradient checkpointing is on.
        pretrained: Whether to start from timm's pretrained weights.
        init_cfg: Config of a file to start from, dict(type='Pretrained', checkpoint=FILE), see `local_file`.
        model_args: Further keyword arguments of `timm.create_model`, such as num_classes and drop_path_rate.

    Raises:
        ValueError: An argument has another form.
    """

    def __init__(
        self,
        model_name: str,
        data_preprocessor: dict[str, Any] | nn.Module | None = None,
        label_smoothing: float = 0.0,
        with_cp: bool = False,
        pretrained: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        **model_args: Any,
    ) -> None:
        check_init(type(self).__name__, pretrained, init_cfg)
        model: Any = timm.create_model(model_name, **model_args)
        if isinstance(data_preprocessor, dict) and data_preprocessor.get('mixup') is not None:
            mixup = {'num_classes': model.num_classes, **data_preprocessor['mixup']}
            data_preprocessor = {**data_preprocessor, 'mixup': mixup}
            if mixup['num_classes'] != model.num_classes:
                raise ValueError(
                    f'ImageClassifier: data_preprocessor.mixup.num_classes must be num_classes, {model.num_classes}, '
                    f'as it is where it is left out, got {mixup["num_classes"]}.'
                )
        super().__init__(model_name, model, model_args, data_preprocessor, init_cfg)
        self.label_smoothing = label_smoothing
        self.pretrained = pretrained
        self.model.set_grad_checkpointing(with_cp)
        self._teacher: tuple[nn.Module, float] | None = None

    @property
    def heads(self) -> tuple[str, ...]:
        names = self.model.pretrained_cfg['classifier']
        return (names,) if isinstance(names, str) else tuple(names)  # distilled networks have two

    @property
    def architecture(self) -> str:
        return self.model.pretrained_cfg['architecture']

    def rename(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return (
            rename_fn(self.architecture)(state_dict, self.model) if self.architecture in list_models() else state_dict
        )

    def init_weights(self) -> None:
        """Read timm's pretrained weights, or those that `init_cfg` asks for.

        Raises:
            RuntimeError: There are no pretrained weights, or they cannot be loaded from their source.
            FileNotFoundError: The file does not exist.
            ValueError: The file cannot be read safely, or does not fit.
        """
        if self.pretrained:
            whole = timm.create_model(self.model_name, pretrained=True, **self.model_args)
            self.model.load_state_dict(whole.state_dict())
        else:
            super().init_weights()

    def learn_from(self, teacher: nn.Module, weight: float) -> None:
        """Add a part to the loss that draws the outputs to those of another network, which is not trained.

        Args:
            teacher: Network that makes logits, (batch, num_classes), of images, (batch, in_chans, H, W).
            weight: Weight of that part of the loss.
        """
        self._teacher = (teacher, weight)  # in a tuple, so that its weights do not become this model's

    def forward(
        self,
        inputs: Tensor,
        data_samples: Tensor | None = None,
        mode: str = 'tensor',
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Tensor]]:
        """Logits, the loss, or one prediction per image.

        Args:
            inputs: Images, (batch, in_chans, H, W).
            data_samples: Labels, (batch,), or for the loss also probabilities, (batch, num_classes).
            mode: 'tensor', 'loss' or 'predict'.

        Returns:
            Logits, (batch, num_classes); or the parts of the loss; or for each image dict(pred_score, gt_label),
            (num_classes,) and ().
        """
        logits = self.model(inputs)
        if mode == 'tensor':
            return logits
        labels = cast(Tensor, data_samples)  # logits alone need none
        if mode == 'loss':
            return self._loss(inputs, logits, labels)
        if mode == 'predict':
            scores = logits.float().softmax(-1)
            return [dict(pred_score=score, gt_label=label) for score, label in zip(scores, labels, strict=True)]
        raise ValueError(f"ImageClassifier: mode must be 'tensor', 'loss' or 'predict', got {mode!r}.")

    def _loss(self, inputs: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        smoothing = self.label_smoothing if labels.ndim == 1 else 0.0
        losses = dict(loss_cls=F.cross_entropy(logits, labels, label_smoothing=smoothing))
        if self._teacher is not None:
            teacher, weight = self._teacher
            with torch.no_grad():
                probabilities = teacher(inputs).float().softmax(-1)
            losses['loss_mesa'] = weight * F.cross_entropy(logits, probabilities)
        return losses


def load_weights(classifier: NamedModel, path: str | Path, start: bool = False) -> None:
    """Load a checkpoint whose names and shapes fit exactly, under published names or ours.

    Args:
        classifier: Model that gets the weights.
        path: What `local_file` takes; of its weights the averaged ones are taken where there are any.
        start: Whether a training starts from the weights: then a head for another number of classes is left out, and
            the model keeps its own; and weights for images of three channels are fitted to those of the model. The log
            says so.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file cannot be fetched or read safely, or it belongs to another model.
    """
    state_dict, metadata = read_weights(path)
    if not classifier.is_named(metadata.get('model', classifier.model_name)):
        raise ValueError(f'checkpoint {path} must hold {classifier.model_name}, got {printable(metadata["model"])}.')
    state_dict = {name.removeprefix('model.'): value for name, value in state_dict.items()}  # as a run saves
    with naming(path):
        state_dict = dict(classifier.rename(state_dict))
    own = classifier.model.state_dict()
    if start:
        fitted = adapt_input(state_dict, classifier.model)
        head = [name for name in own if name.startswith(tuple(f'{module}.' for module in classifier.heads))]
        changed = [name for name in head if name in state_dict and state_dict[name].shape != own[name].shape]
        log_changes(path, fitted, changed, state_dict, own)
        state_dict.update({name: own[name] for name in (head if changed else ())})
    problems = misfits(state_dict, own)
    if problems:
        raise ValueError(
            f'checkpoint {path} must hold the {len(own)} tensors of {classifier.model_name}, got {len(state_dict)}: '
            f'{problems}.'
        )
    classifier.model.load_state_dict(state_dict)


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Per cent of the images whose label is among the k best scores, 'accuracy/top{k}'.

    Args:
        topk: The values of k.
        kwargs: Keyword arguments of mmengine's BaseMetric.
    """

    default_prefix = 'accuracy'

    def __init__(self, topk: Sequence[int] = (1,), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.topk = topk

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Tensor]]) -> None:
        scores = torch.stack([sample['pred_score'] for sample in data_samples])  # [batch, classes]
        labels = torch.stack([sample['gt_label'] for sample in data_samples])
        classes = scores.shape[1]
        if max(self.topk) > classes:
            raise ValueError(f'Accuracy: topk must be at most the number of classes, {classes}, got {self.topk}.')
        best = scores.topk(max(self.topk)).indices
        self.results.extend((best == labels[:, None]).tolist())  # plain values, to be sent between processes

    def compute_metrics(self, results: list[list[bool]]) -> dict[str, float]:
        hits = torch.tensor(results)  # [images, max(topk)]
        return {f'top{k}': 100 * hits[:, :k].any(1).sum().item() / len(hits) for k in self.topk}
