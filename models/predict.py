# SPDX-License-Identifier: Apache-2.0
"""Labels of photographs: a network with its weights, its classes and its preprocessing, from one name or one file."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import Tensor, nn

from .files import printable
from .images import as_rgb, read_rgb
from .weights import list_models, misfits, read_checkpoint, translate

__all__ = ['Classifier', 'class_names', 'load_classifier', 'load_network', 'predict']

Picture = str | os.PathLike | Image.Image
# What a file may note of timm's arguments.
TRANSFORM = {'input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode'}
FILES = ('.safetensors', '.pth', '.pt', '.bin', '.ckpt', '.tar')  # how names of files of weights end


def predict(
    model: str | os.PathLike,
    images: Picture | Sequence[Picture],
    topk: int = 5,
    batch_size: int = 8,
    device: str = 'cpu',
) -> list[list[dict[str, Any]]]:
    """Classify images.

        vssm.predict('vmamba_tiny', 'photograph.jpg')[0][0]['class']

    Args:
        model: What `load_classifier` takes: the name of a model with published weights, or a file of weights.
        images: Path of an image, or an image of Pillow's, or several of either.
        topk: Number of classes for each image, fewer where the model has fewer.
        batch_size: Number of images that the network sees at a time.
        device: Device to compute on.

    Returns:
        For each image its likeliest classes, the likeliest first, each as dict(index, class, probability).

    Raises:
        FileNotFoundError: A file does not exist.
        RuntimeError: There are no such weights, or they cannot be loaded from their source.
        ValueError: A file cannot be read, or is none of a classifier; topk or batch_size is less than 1.
    """
    for name, value in (('topk', topk), ('batch_size', batch_size)):
        if value < 1:
            raise ValueError(f'predict: {name} must be at least 1, got {value}.')
    pictures = [images] if isinstance(images, (str, os.PathLike, Image.Image)) else list(images)
    classifier = load_classifier(model, device)
    batches = [pictures[i : i + batch_size] for i in range(0, len(pictures), batch_size)]
    return [answer for batch in batches for answer in classifier(batch, topk)]


class Classifier(NamedTuple):
    """A network that says what images show.

    Args:
        name: Name of the network in timm.
        model: The network, in evaluation mode.
        transform: Function from an image of Pillow's to what the network takes of it, (in_chans, H, W).
        classes: Names of the classes, in their order.
    """

    name: str
    model: nn.Module
    transform: Callable[[Image.Image], Tensor]
    classes: Sequence[str]

    @torch.inference_mode()
    def __call__(self, images: Sequence[Picture], topk: int = 5) -> list[list[dict[str, Any]]]:
        """The likeliest classes of each image, as `predict` returns them; all images are one batch."""
        device = next(self.model.parameters()).device
        batch = torch.stack([self.transform(self._open(image)) for image in images])
        probabilities = self.model(batch.to(device)).float().softmax(-1)
        return [
            [
                dict(index=int(i), **{'class': self.classes[i]}, probability=float(p))
                for p, i in zip(*row.topk(min(topk, len(row))), strict=True)
            ]
            for row in probabilities.cpu()
        ]

    def _open(self, image: Picture) -> Image.Image:
        picture = as_rgb(image) if isinstance(image, Image.Image) else read_rgb(image)
        return picture.convert('L') if getattr(self.model, 'in_chans', 3) == 1 else picture


def load_classifier(source: str | os.PathLike, device: str = 'cpu') -> Classifier:
    """A classifier with its weights.

    A file of our trainings brings its architecture, the names of its classes and its preprocessing along; a published
    file is told by its tensors, and the rest is timm's configuration of the network.

    Args:
        source: Name of a model in timm, whose published weights are taken; or a file of weights of such a model.
        device: Device of the network.

    Raises:
        FileNotFoundError: The file does not exist.
        RuntimeError: There are no such weights, or they cannot be loaded from their source.
        ValueError: The file cannot be read safely, or is none of a classifier.
    """
    path = Path(source)
    is_file = path.suffix in FILES or path.is_file()
    model, metadata = _from_file(path) if is_file else (timm.create_model(str(source), pretrained=True), {})
    if not getattr(model, 'num_classes', 0):
        raise ValueError(f'{source} must hold a classifier, got a network without classes.')
    name = metadata.get('model', str(source))
    try:
        options = resolve_model_data_config(model)
        if getattr(model, 'in_chans', 3) == 1:
            options.update({key: [sum(options[key]) / len(options[key])] for key in ('mean', 'std')})
        noted = _noted(metadata, 'transform', dict)
        transform = create_transform(**options | {key: noted[key] for key in noted.keys() & TRANSFORM})
        names = class_names(model, metadata)
    except (TypeError, ValueError) as error:
        raise ValueError(f'checkpoint {path} must note classes and a transform: {printable(str(error))}') from error
    if len(names) != model.num_classes:
        raise ValueError(
            f'checkpoint {path} must name its {model.num_classes} classes, got {len(names)} names: it is damaged.'
        )
    return Classifier(name, model.eval().to(device), transform, names)


def _from_file(path: Path) -> tuple[Any, dict[str, str]]:
    """The network that a file holds the weights of, and the file's metadata."""
    tensors, metadata = read_checkpoint(path)
    name = metadata.get('model', '')
    if name and timm.is_model(name) and name.partition('.')[0] not in list_models():  # of timm's, trained by ours
        model = timm.create_model(name, **_noted(metadata, 'model_args', dict))
        problems = misfits(tensors, model.state_dict())
        if problems:
            raise ValueError(f'checkpoint {path} must hold the tensors of {name}: {problems}.')
        model.load_state_dict(tensors)
        return model, metadata
    return _network(tensors, metadata, path)


def load_network(path: Path, name: str | None = None) -> tuple[Any, dict[str, str]]:
    """One of our networks with the weights of a file, any that `convert` reads, and the metadata that this gives it.

    Args:
        path: File of weights.
        name: Name of the network that the file must hold, told by the file unless given.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file cannot be read safely, holds another network, or the backbone of a detector or segmentor.
    """
    return _network(*read_checkpoint(path), path, name)


def _network(
    tensors: dict[str, Tensor], metadata: dict[str, str], path: Path, name: str | None = None
) -> tuple[Any, dict[str, str]]:
    tensors, (metadata, _, _) = translate(tensors, metadata, path, name)
    model_args = json.loads(metadata['model_args'])
    if 'features_only' in model_args:
        raise ValueError(
            f'checkpoint {path} must hold a classifier, got the backbone of a detector or segmentor, whose config has '
            'to be named: vssm predict CONFIG IMAGE --checkpoint FILE.'
        )
    model = timm.create_model(metadata['model'], **model_args)
    model.load_state_dict(tensors)
    return model, metadata


def class_names(model: Any, metadata: dict[str, str]) -> list[str]:
    """The names of a classifier's classes: those that a file's metadata note, or timm's of ImageNet, or numbers.

    Raises:
        ValueError: The metadata note something else.
    """
    return _noted(metadata, 'classes', list) or _known_classes(model)


def _noted(metadata: dict[str, str], key: str, kind: type) -> Any:
    """A value of the metadata, which may be anybody's; an empty one if it is not there."""
    value = json.loads(metadata.get(key, 'null'))
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise ValueError(f'{key} must be a {kind.__name__}, got {type(value).__name__}')
    return [printable(str(name)) for name in value] if isinstance(value, list) else value


def _known_classes(model: Any) -> list[str]:
    """The names of ImageNet's classes as timm knows them, for others numbers."""
    subset = infer_imagenet_subset(model)
    if subset is None:
        return [f'class {i}' for i in range(model.num_classes)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(model.num_classes)]
