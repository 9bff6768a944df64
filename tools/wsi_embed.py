# SPDX-License-Identifier: Apache-2.0
"""Write what a network for slides makes of each slide before it classifies: one vector a slide, in an HDF5 file.

The file holds `embeddings` (n, width) in float32 and `slide_ids` (n,), in the same order, and as attributes the name
of the network, the checkpoint's name and its SHA-256. It is written whole or not at all.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import track
from torch import Tensor, nn

from ..models.files import replacing
from ._common import UsageError, console
from .wsi_heatmap import load_model, notes_on_data

if TYPE_CHECKING:
    from ..models.mil import MIL

EXAMPLE = 'vssm wsi-embed work_dirs/wsi/classification/best.safetensors features --output embeddings.h5'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', metavar='CHECKPOINT', type=Path, help='a .safetensors file of a training')
    parser.add_argument(
        'features', metavar='FEATURES', type=Path, nargs='+', help='files of slides, and folders of such'
    )
    parser.add_argument('--encoder', metavar='NAME', help='encoder of the features (default: that of the training)')
    parser.add_argument(
        '--output',
        metavar='FILE',
        type=Path,
        default=Path('embeddings.h5'),
        help='file to write (default: embeddings.h5)',
    )


def run(args: argparse.Namespace) -> int:
    import h5py

    from ..models.mil.slides import count_patches, read_slide
    from ..models.weights import read_checkpoint

    if args.output.suffix not in ('.h5', '.hdf5') or not args.output.parent.is_dir():
        raise UsageError(f'--output must be a .h5 file in a folder that exists, got {args.output}.')
    try:
        model = load_model(args.checkpoint)
        encoder = args.encoder or notes_on_data(args.checkpoint).get('encoder')
        slides = dict(find_slides(args.features, encoder))
        embeddings, empty = {}, 0
        for name, paths in track(
            slides.items(), 'embedding', console=console, transient=True, disable=not console.is_terminal
        ):
            if not count_patches(*paths, encoder=encoder):
                empty += 1
                continue
            bag = read_slide(*paths, encoder=encoder)
            try:
                embeddings[name] = embed(model, bag.features, bag.coords, [bag.step])
            except ValueError as error:
                raise ValueError(f'{paths[0].name}: {error}') from error
        if not embeddings:
            raise ValueError(f'FEATURES must hold slides with patches, got {len(slides)} slides without.')
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error
    try:
        with replacing(args.output) as temporary, h5py.File(temporary, 'w') as file:
            file['embeddings'] = torch.stack(list(embeddings.values())).numpy()
            file.create_dataset('slide_ids', data=list(embeddings), dtype=h5py.string_dtype())
            file.attrs['model'] = read_checkpoint(args.checkpoint)[1]['model']
            file.attrs['checkpoint'] = args.checkpoint.name
            file.attrs['checkpoint_sha256'] = hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f'{args.output} cannot be written: {error}') from error
    left_out = f'; {empty} slides without patches are left out' if empty else ''
    console.print(
        f'{args.output}: {len(embeddings)} slides of {len(next(iter(embeddings.values())))} numbers each{left_out}',
        highlight=False,
        soft_wrap=True,
    )
    return 0


def find_slides(features: list[Path], encoder: str | None) -> Iterator[tuple[str, tuple[Path, ...]]]:
    """The names of all slides in files and folders, and their files.

    Raises:
        FileNotFoundError: A path does not exist, or there is no slide.
        ValueError: A slide is there twice.
    """
    from ..models.mil.slides import SlideFolder
    from ..models.mil.tables import slide_name

    known = set()
    for path in features:
        if path.is_dir():
            folder = SlideFolder(path, encoder)
            found = [(name, folder.find(name)) for name in folder.names]
        elif path.is_file():
            found = [(slide_name(path.name), (path,))]
        else:
            raise FileNotFoundError(f'FEATURES must be files or folders, got {path}, which does not exist.')
        if not found:
            raise FileNotFoundError(f'FEATURES must hold files of features, such as SLIDE.h5, got {path} with none.')
        for name, paths in found:
            if name in known:
                raise ValueError(f'FEATURES must hold each slide once, got {name} again in {path}.')
            known.add(name)
            yield name, paths


@torch.inference_mode()
def embed(model: 'MIL', features: Tensor, coords: Tensor | None, steps: list[int | None]) -> Tensor:
    """What a network's classifier is given of a slide, (width,).

    Args:
        model: Network whose classifier is `head`, a linear layer.
        features: Features of the slide's patches, (n, in_dim).
        coords: Their pixel coordinates, (n, 2), where there are some.
        steps: Distance of neighbouring patches, in a list of one.

    Raises:
        ValueError: The network has no such classifier, or the slide is unfit for it.
    """
    if not isinstance(getattr(model, 'head', None), nn.Linear):
        raise ValueError(f'{type(model).__name__} must have a linear layer as head, for an embedding before it.')
    given: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        model(features, coords, steps=steps)
    finally:
        handle.remove()
    return given[-1].reshape(-1).float()


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['wsi-embed', *sys.argv[1:]]))
