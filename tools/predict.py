# SPDX-License-Identifier: Apache-2.0
"""Say what images show, by a model with published weights or by a file of weights.

IMAGE is a file, a folder with all images in it and below it, a pattern in quotes such as 'photos/*.jpg', or a URL. On a
terminal the classes stand in a table; anywhere else each image is a line of JSON.
"""

import argparse
import csv
import glob
import json
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from rich.console import Console
from rich.progress import track
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..models.files import reason
from ..models.predict import FILES, Classifier, load_classifier
from ._common import UsageError, console
from ._models import find_timm_model
from ._tables import print_table

EXAMPLE = 'vssm predict vmamba_tiny photograph.jpg'

_URL_SECONDS = 30
errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'model', metavar='MODEL', help='a model of timm or ours with published weights, or a file of weights'
    )
    parser.add_argument('images', metavar='IMAGE', nargs='+', help='a file, a folder, a pattern or a URL')
    parser.add_argument('--topk', metavar='N', type=int, default=5, help='number of classes (default: 5)')
    parser.add_argument('--batch-size', metavar='N', type=int, default=8, help='images at a time (default: 8)')
    parser.add_argument('--device', default='cpu', help='device to compute on (default: cpu)')
    form = parser.add_mutually_exclusive_group()
    form.add_argument('--json', action='store_true', help='a line of JSON for each image, on a terminal too')
    form.add_argument('--csv', action='store_true', help='a table with commas, a row for each class of each image')


def run(args: argparse.Namespace) -> int:
    for option in ('topk', 'batch_size'):
        if getattr(args, option) < 1:
            raise UsageError(f'--{option.replace("_", "-")} must be at least 1, got {getattr(args, option)}.')
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: path for image in args.images for name, path in find_images(image, Path(folder))}
        classifier = load(args.model, args.device)
        failed = 0
        write = _writer(args, classifier)
        for name, answer in _classify(classifier, paths, args):
            if isinstance(answer, str):
                failed += 1
                errors.print(answer)
            else:
                write(name, answer)
    if failed == len(paths):
        raise UsageError('no image could be read.')
    return 1 if failed else 0


def load(source: str, device: str) -> Classifier:
    """The classifier of a name or a file.

    Raises:
        UsageError: There is none, or no such device.
    """
    is_file = source.endswith(FILES) or Path(source).is_file()
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        said = str(error).partition('\n')[0]
        raise UsageError(f'--device must be a device of this machine, got {device}: {said}') from error
    try:
        return load_classifier(source if is_file else find_timm_model(source), device)
    except (OSError, RuntimeError, ValueError) as error:
        hint = '' if is_file else ' A file of weights may stand in its place: vssm predict FILE IMAGE.'
        raise UsageError(reason(error).partition('\n')[0] + hint) from error


def find_images(image: str, folder: Path) -> list[tuple[str, Path]]:
    """What an argument names, each image by the name to show and its path.

    Args:
        image: File, folder, pattern or URL.
        folder: Folder to which what a URL names is saved.

    Raises:
        UsageError: There is no such image.
    """
    path = Path(image)
    if urlsplit(image).scheme in ('http', 'https'):
        target = folder / f'{len(list(folder.iterdir()))}{Path(urlsplit(image).path).suffix[:10]}'
        try:
            request = urllib.request.Request(image, headers={'User-Agent': 'vssm'})  # some servers refuse Python's
            with urllib.request.urlopen(request, timeout=_URL_SECONDS) as answer, open(target, 'wb') as file:
                shutil.copyfileobj(answer, file)
        except (OSError, ValueError) as error:
            raise UsageError(f'{image} cannot be fetched: {error}') from error
        return [(image, target)]
    if path.is_dir():
        found = sorted(p for p in path.rglob('*') if p.suffix.lower() in IMG_EXTENSIONS and not p.name.startswith('.'))
    elif path.exists():
        found = [path]
    else:
        found = [Path(p) for p in sorted(glob.glob(image, recursive=True)) if Path(p).is_file()]
    if not found and path.is_dir():
        raise UsageError(f'IMAGE must hold images ({" ".join(IMG_EXTENSIONS)}), got the folder {image} without one.')
    if not found:
        raise UsageError(f'IMAGE must be a file, a folder, a pattern or a URL, got {image}, which names no file.')
    return [(str(p), p) for p in found]


def _classify(classifier: Classifier, paths: dict[str, Path], args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """The name of each image, and its classes or, as text, why there are none."""
    names = list(paths)
    starts = range(0, len(names), args.batch_size)
    bar = len(starts) > 1 and errors.is_terminal
    for start in track(starts, 'Images', console=errors, transient=True) if bar else starts:
        batch = names[start : start + args.batch_size]
        try:
            yield from zip(batch, classifier([paths[name] for name in batch], args.topk), strict=True)
        except ValueError:  # of one image, which is to be left out
            for name in batch:
                try:
                    yield name, classifier([paths[name]], args.topk)[0]
                except ValueError as error:
                    yield name, str(error)


def _writer(args: argparse.Namespace, classifier: Classifier):
    """What is called with the name of an image and its classes."""
    if args.csv:
        rows = csv.writer(sys.stdout, lineterminator='\n')
        rows.writerow(['image', 'rank', 'index', 'class', 'probability'])

        def write(name: str, answer: list[dict[str, Any]]) -> None:
            for rank, row in enumerate(answer, 1):
                rows.writerow([name, rank, row['index'], row['class'], f'{row["probability"]:.6f}'])
    elif args.json or not console.is_terminal:

        def write(name: str, answer: list[dict[str, Any]]) -> None:
            print(json.dumps(dict(image=name, model=classifier.name, predictions=answer), ensure_ascii=False))
    else:

        def write(name: str, answer: list[dict[str, Any]]) -> None:
            rows = [[row['class'], f'{100 * row["probability"]:.1f} %', str(row['index'])] for row in answer]
            print_table(['class', 'probability', 'number'], rows, name)

    return write


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['predict', *sys.argv[1:]]))
