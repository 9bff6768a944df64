# SPDX-License-Identifier: Apache-2.0
"""What the commands that draw share: their options, models with weights, images, and how a picture is written."""

import argparse
import io
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as TF

from ..models.files import reason, state_of
from ..models.images import read_rgb
from ..models.predict import class_names, load_network
from ..models.weights import list_models
from ._common import UsageError, write_file
from ._models import find_timm_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_picture_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the options of every command that draws what models see."""
    parser.add_argument('--size', metavar='N', type=int, default=224, help='height and width (default: 224)')
    parser.add_argument('--pretrained', action='store_true', help='published weights, downloaded')
    parser.add_argument(
        '--checkpoint',
        metavar='FILE',
        action='append',
        default=[],
        help='weights from a file; for several models once for each in turn, - for one without',
    )
    parser.add_argument('--seed', metavar='N', type=int, default=0, help='seed of random weights (default: 0)')
    parser.add_argument(
        '--output', metavar='FILE', type=Path, default=Path(output), help=f'picture to write (default: {output})'
    )


def check_picture_arguments(args: argparse.Namespace) -> None:
    """Refuse bad options before any work, and give models the names that timm knows.

    Raises:
        UsageError: An option is not as it must be.
    """
    args.models = [find_timm_model(name) for name in args.models]
    if args.size < 32:
        raise UsageError(f'--size must be at least 32, got {args.size}.')
    if len(args.checkpoint) not in (0, len(args.models)):
        raise UsageError(
            f'--checkpoint must be given once for each of the {len(args.models)} models, - for one without, got '
            f'{len(args.checkpoint)}.'
        )
    for path in args.checkpoint:
        if path != '-' and not Path(path).is_file():
            raise UsageError(f'--checkpoint must be a file, got {path}, which {state_of(path)}.')
    check_output(args.output)


def check_output(path: Path) -> None:
    """Refuse a picture that could not be written, before the work.

    Raises:
        UsageError: It is no .png file, or in no folder.
    """
    if path.suffix != '.png' or not path.parent.is_dir():
        raise UsageError(f'--output must be a .png file in a folder that exists, got {path}.')


def build_models(args: argparse.Namespace) -> Iterator[tuple[Any, str, str, Sequence[str] | None]]:
    """The models in evaluation mode, one at a time, each with its name and a word on its weights."""
    for name, path in zip(args.models, args.checkpoint or ['-'] * len(args.models), strict=True):
        torch.manual_seed(args.seed)
        try:
            if path != '-':
                (model, metadata), weights = load_model(name, Path(path)), Path(path).name
            elif args.pretrained:
                model, metadata, weights = timm.create_model(name, pretrained=True), {}, 'pretrained'
            else:
                model, metadata, weights = timm.create_model(name), None, f'random, seed {args.seed}'
            names = None if metadata is None else class_names(model, metadata)
        except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise UsageError(reason(error).partition('\n')[0]) from error
        if getattr(model, 'in_chans', 3) != 3:
            raise UsageError(f'NAME must be a network for images of 3 channels, got {name} with {path} for another.')
        yield model.eval(), name, weights, names


def load_model(name: str, path: Path) -> tuple[nn.Module, dict[str, str]]:
    """A model with the weights of a file, and the file's metadata; of ours any file that `vssm convert` reads."""
    if name.partition('.')[0] not in list_models():
        model = timm.create_model(name, checkpoint_path=str(path))
        if path.suffix != '.safetensors':
            return model, {}
        with safe_open(path, 'pt') as file:
            return model, file.metadata() or {}
    return load_network(path, name.partition('.')[0])


def normalize(model: Any, images: Tensor) -> Tensor:
    """Images with values in [0, 1], (..., 3, H, W), as a model takes them."""
    return TF.normalize(images, model.pretrained_cfg['mean'], model.pretrained_cfg['std'])


def read_image(path: Path, size: int) -> Tensor:
    """The middle of an image whose shorter side is scaled to `size`, values in [0, 1], (3, size, size).

    Raises:
        UsageError: There is no such image, or it cannot be read.
    """
    try:
        image = TF.to_tensor(read_rgb(path))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return TF.center_crop(_resize(image, size), [size, size])


def read_images(folder: Path, count: int, size: int) -> list[Tensor]:
    """At most `count` images in a folder and those below it, evenly spread over their sorted paths."""
    if not folder.is_dir():
        raise UsageError(f'--images must be a folder, got {folder}, which {state_of(folder)}.')
    if count < 1:
        raise UsageError(f'--count must be at least 1, got {count}.')
    paths = sorted(path for path in folder.rglob('*') if path.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise UsageError(f'--images must hold images ({", ".join(IMG_EXTENSIONS)}), got {folder} without one.')
    count = min(count, len(paths))
    return [read_image(paths[i * len(paths) // count], size) for i in range(count)]


def sample_images(size: int) -> list[Tensor]:
    """Two rows of three crops, as far apart as they come, of each of scikit-learn's two photographs of 427x640.

    For crops of more than 427 pixels there is a single row, which is enlarged.
    """
    from sklearn.datasets import load_sample_images

    crops = []
    for photograph in load_sample_images().images:
        image = TF.to_tensor(photograph.copy())  # PyTorch warns of read-only arrays
        height, width = image.shape[1:]
        side = min(size, height)
        for top in dict.fromkeys((0, height - side)):
            for left in (0, (width - side) // 2, width - side):
                crops.append(_resize(image[:, top : top + side, left : left + side], size))
    return crops


def _resize(image: Tensor, size: int) -> Tensor:
    """Scale the shorter side to `size`, and clamp what cubic interpolation overshoots."""
    return TF.resize(image, size, TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)


def pyplot():
    """The module matplotlib.pyplot, set to write files."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    return plt


def save_figure(fig: 'Figure', path: Path, dpi: int = 100) -> None:
    """Write a picture as a whole or not at all, and let go of it."""
    data = io.BytesIO()
    fig.savefig(
        data, format=path.suffix[1:], dpi=dpi, pil_kwargs=dict(optimize=True) if path.suffix == '.png' else None
    )
    write_file(path, data.getvalue())
    pyplot().close(fig)
