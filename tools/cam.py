# SPDX-License-Identifier: Apache-2.0
"""Draw class activation maps: which parts of an image speak for a class.

By Grad-CAM on the output of the last stage, for the class that the model finds most likely unless --class names one.
Weights are random unless --pretrained or --checkpoint says otherwise, and then so is the map.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._common import UsageError, console
from ._pictures import (
    add_picture_arguments,
    build_models,
    check_picture_arguments,
    normalize,
    pyplot,
    read_image,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLE = 'vssm cam vmamba_tiny spatial_mamba_tiny photo.jpg --pretrained'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('models', metavar='NAME', nargs='+', help="models of ours or of timm's, drawn side by side")
    parser.add_argument('image', metavar='IMAGE', type=Path, help='an image file, of which the middle is taken')
    parser.add_argument(
        '--class', metavar='N', type=int, dest='class_index', help='class that the map is for (default: the likeliest)'
    )
    add_picture_arguments(parser, 'cam.png')


def run(args: argparse.Namespace) -> int:
    check_picture_arguments(args)
    image = read_image(args.image, args.size)
    import pytorch_grad_cam  # noqa: F401  # a missing package is better told now than after the work

    maps, titles = [], []
    for model, name, weights, names in build_models(args):
        try:
            activation, class_index, probability = activation_map(model, image, args.class_index)
        except (AssertionError, RuntimeError) as error:  # from networks for images of one size
            raise UsageError(f'--size must fit {name}, got {args.size}: {error}') from error
        maps.append(activation)
        known = f' ({names[class_index]})' if names and names[class_index] != f'class {class_index}' else ''
        titles.append(f'{name}\n{weights}\nclass {class_index}{known}, probability {probability:.2g}')
    save_figure(draw(image, maps, titles), args.output)
    for title in titles:
        console.print(title.replace('\n', ', '), highlight=False, soft_wrap=True)
    console.print(f'Picture: {args.output}', highlight=False, soft_wrap=True)
    return 0


def activation_map(model: Any, image: Tensor, class_index: int | None = None) -> tuple[Tensor, int, float]:
    """Where an image speaks for a class.

    Args:
        model: Classifier of timm's with feature maps, in evaluation mode.
        image: Image with values in [0, 1], (3, H, W).
        class_index: Number of the class; None takes the likeliest.

    Returns:
        The map, from 0 to 1 at its maximum, (H, W); the class; and the model's probability of it.

    Raises:
        UsageError: The model has no such class, or no feature maps.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    x = normalize(model, image).unsqueeze(0)
    with torch.no_grad():
        probabilities = model(x).softmax(-1)[0]
    if class_index is None:
        class_index = probabilities.argmax().item()
    if not 0 <= class_index < len(probabilities):
        raise UsageError(f'--class must be one of 0 to {len(probabilities) - 1}, got {class_index}.')

    def channels_first(features: Tensor) -> Tensor:
        if features.dim() != 4:
            raise UsageError(f'NAME must be a network with feature maps, got {type(model).__name__}, which has tokens.')
        return features.permute(0, 3, 1, 2) if getattr(model, 'output_fmt', 'NCHW') == 'NHWC' else features

    last_stage = model.get_submodule(model.feature_info[-1]['module'])
    with GradCAM(model, [last_stage], reshape_transform=channels_first) as cam:
        activation = cam(x, [ClassifierOutputTarget(class_index)])[0]
    return torch.from_numpy(activation), class_index, probabilities[class_index].item()


def draw(image: Tensor, maps: Sequence[Tensor], titles: Sequence[str]) -> 'Figure':
    """Draw the image, and beside it the maps, each over the image in grey."""
    plt = pyplot()
    columns = len(maps) + 1
    fig, axes = plt.subplots(1, columns, figsize=(3.1 * columns + 1, 4.1), layout='constrained', sharey=True)
    axes[0].imshow(image.permute(1, 2, 0).numpy())
    axes[0].set_title('image', fontsize=10)
    for ax, activation, title in zip(axes[1:], maps, titles, strict=True):
        ax.imshow(image.mean(0).numpy(), cmap='gray', vmin=0, vmax=1)
        drawn = ax.imshow(activation.numpy(), cmap='viridis', vmin=0, vmax=1, alpha=0.6)
        ax.set_title(title, fontsize=10)
    for ax in axes:
        ax.set_xlabel('column (pixels)')
    axes[0].set_ylabel('row (pixels)')
    fig.colorbar(drawn, ax=axes, label='activation over its maximum', shrink=0.7)
    return fig


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['cam', *sys.argv[1:]]))
