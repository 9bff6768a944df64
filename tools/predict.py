# SPDX-License-Identifier: Apache-2.0
"""Say what images show, by a model with published weights or by a file of weights.

IMAGE is a file, a folder with all images in it and below it, a pattern in quotes such as 'photos/*.jpg', or a URL. On a
terminal the answers stand in a table; anywhere else each image is a line of JSON.

MODEL may be the config of a detector or segmentor, by name or by path, whose weights are --checkpoint. Its answers are
objects with their boxes, or classes with their share of the image, and a picture of each image with them drawn on it.
"""

import argparse
import contextlib
import csv
import glob
import io
import itertools
import json
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from rich.console import Console
from rich.progress import track
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..models.files import reason
from ..models.predict import FILES, Classifier, load_classifier
from ._common import UsageError, console, list_configs, load_config, write_file
from ._models import find_timm_model
from ._tables import print_table

EXAMPLE = 'vssm predict vmamba_tiny photograph.jpg'

# What the entries of an answer are made of, in the order of the columns.
FIELDS = dict(
    predictions=('index', 'class', 'probability'),
    objects=('index', 'class', 'score', 'box'),
    classes=('index', 'class', 'share'),
)
_URL_SECONDS = 30
errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'model', metavar='MODEL', help='a model of timm or ours with published weights, a file of weights, or a config'
    )
    parser.add_argument('images', metavar='IMAGE', nargs='+', help='a file, a folder, a pattern or a URL')
    parser.add_argument('--checkpoint', metavar='FILE', help='weights of the detector or segmentor of a config')
    parser.add_argument(
        '--out-dir', metavar='DIR', type=Path, help='folder of the pictures for a config (default: predictions)'
    )
    parser.add_argument(
        '--threshold', metavar='P', type=float, default=0.3, help='least score of an object (default: 0.3)'
    )
    parser.add_argument('--topk', metavar='N', type=int, default=5, help='number of classes (default: 5)')
    parser.add_argument(
        '--batch-size', metavar='N', type=int, default=8, help='images at a time, one for a config (default: 8)'
    )
    parser.add_argument('--device', default='cpu', help='device to compute on (default: cpu)')
    form = parser.add_mutually_exclusive_group()
    form.add_argument('--json', action='store_true', help='a line of JSON for each image, on a terminal too')
    form.add_argument('--csv', action='store_true', help='a table with commas, a row for each answer to each image')


def run(args: argparse.Namespace) -> int:
    for option in ('topk', 'batch_size'):
        if getattr(args, option) < 1:
            raise UsageError(f'--{option.replace("_", "-")} must be at least 1, got {getattr(args, option)}.')
    is_config = args.model.endswith('.py') or args.model in list_configs()
    if not is_config and (args.checkpoint or args.out_dir):
        raise UsageError(f'--checkpoint and --out-dir are for the config of a detector or segmentor, got {args.model}.')
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: path for image in args.images for name, path in find_images(image, Path(folder))}
        answers = (look if is_config else classify)(args, paths)
        failed = 0
        write = _writer(args)
        for name, answer in answers:
            if isinstance(answer, str):
                failed += 1
                errors.print(answer)
            else:
                write(name, answer)
    if failed == len(paths):
        raise UsageError('no image could be read.')
    return 1 if failed else 0


class Answer(NamedTuple):
    """What a model says of an image.

    Args:
        model: Name of the model.
        key: What the entries are: predictions, objects or classes.
        entries: The entries, each with an index and a class.
        picture: Path of the picture with them; None where there is none.
    """

    model: str
    key: str
    entries: list[dict[str, Any]]
    picture: str | None = None


def load(source: str, device: str) -> Classifier:
    """The classifier of a name or a file.

    Raises:
        UsageError: There is none, or no such device.
    """
    is_file = source.endswith(FILES) or Path(source).is_file()
    check_device(device)
    try:
        return load_classifier(source if is_file else find_timm_model(source), device)
    except (OSError, RuntimeError, ValueError) as error:
        hint = '' if is_file else ' A file of weights may stand in its place: vssm predict FILE IMAGE.'
        raise UsageError(reason(error).partition('\n')[0] + hint) from error


def check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        said = str(error).partition('\n')[0]
        raise UsageError(f'--device must be a device of this machine, got {device}: {said}') from error


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


def classify(args: argparse.Namespace, paths: dict[str, Path]) -> Iterator[tuple[str, Answer | str]]:
    """The name of each image, and its classes or, as text, why there are none.

    Raises:
        UsageError: There is no such model.
    """
    classifier = load(args.model, args.device)
    names = list(paths)
    for start in _shown(range(0, len(names), args.batch_size)):
        batch = names[start : start + args.batch_size]
        try:
            answers: list[Any] = classifier([paths[name] for name in batch], args.topk)
        except ValueError:  # of one image, which is to be left out
            answers = []
            for name in batch:
                try:
                    answers += classifier([paths[name]], args.topk)
                except ValueError as error:
                    answers.append(str(error))
        for name, answer in zip(batch, answers, strict=True):
            yield name, answer if isinstance(answer, str) else Answer(classifier.name, 'predictions', answer)


def look(args: argparse.Namespace, paths: dict[str, Path]) -> Iterator[tuple[str, Answer | str]]:
    """The name of each image, and what a detector or segmentor finds in it or, as text, why it cannot be read.

    Raises:
        UsageError: There is no such config or checkpoint, or a picture cannot be written.
    """
    if not args.checkpoint:
        raise UsageError(
            f'--checkpoint must name the weights of {args.model}, of which `vssm train` makes a file; those of a '
            'classifier need no config: vssm predict FILE IMAGE.'
        )
    check_device(args.device)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where mmengine's logger else writes among the answers
            cfg = load_config(args.model)
            from ..models.mm.inference import load_predictor

            predictor = load_predictor(cfg, args.checkpoint, args.device)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(reason(error).partition('\n')[0]) from error
    folder = args.out_dir or Path('predictions')
    targets = _targets(paths, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f'--out-dir cannot be made: {error}') from error
    for name in _shown(list(paths)):
        try:
            entries, picture = predictor(paths[name], args.threshold)
        except ValueError as error:
            yield name, str(error)
            continue
        data = io.BytesIO()
        picture.save(data, 'PNG')
        write_file(targets[name], data.getvalue())
        key = 'objects' if predictor.is_detector else 'classes'
        yield name, Answer(predictor.name, key, entries, str(targets[name]))


def _targets(paths: dict[str, Path], folder: Path) -> dict[str, Path]:
    """Where the picture of each image is written: under its own name, with a number where several have the same.

    Raises:
        UsageError: A picture would take the place of an image.
    """
    targets: dict[str, Path] = {}
    for name in paths:
        stem = Path(urlsplit(name).path).stem or 'image'
        numbered = (folder / f'{stem}{f"-{i}" if i else ""}.png' for i in itertools.count())
        targets[name] = next(path for path in numbered if path not in targets.values())
    images = {path.resolve() for path in paths.values()}
    for target in targets.values():
        if target.resolve() in images:
            raise UsageError(f'--out-dir must be another folder than that of the images, got {folder}.')
    return targets


def _shown(items: Sequence[Any]) -> Iterable[Any]:
    """The items, beside a bar if there are several and somebody looks."""
    if len(items) > 1 and errors.is_terminal:
        return track(items, 'Images', console=errors, transient=True)
    return items


def _writer(args: argparse.Namespace) -> Callable[[str, Answer], None]:
    """What is called with the name of an image and the answer."""
    rows = csv.writer(sys.stdout, lineterminator='\n')
    begun = False

    def write_rows(name: str, answer: Answer) -> None:
        nonlocal begun
        keys = FIELDS[answer.key]
        if not begun:
            rows.writerow(['image', 'rank', *keys])
            begun = True
        for rank, entry in enumerate(answer.entries, 1):
            cells = [f'{entry[key]:.6f}' if isinstance(entry[key], float) else entry[key] for key in keys[:3]]
            rows.writerow([name, rank, *cells, *(' '.join(map(str, entry[key])) for key in keys[3:])])

    def write_line(name: str, answer: Answer) -> None:
        more = {} if answer.picture is None else dict(picture=answer.picture)
        print(
            json.dumps({'image': name, 'model': answer.model, answer.key: answer.entries, **more}, ensure_ascii=False)
        )

    def write_table(name: str, answer: Answer) -> None:
        measure, *others = FIELDS[answer.key][2:]
        cells = [
            [
                entry['class'],
                f'{100 * entry[measure]:.1f} %',
                str(entry['index']),
                *(' '.join(f'{x:.0f}' for x in entry[key]) for key in others),
            ]
            for entry in answer.entries
        ]
        title = name if answer.picture is None else f'{name}, drawn in {answer.picture}'
        print_table(['class', measure, 'number', *others], cells, title)

    return write_rows if args.csv else write_line if args.json or not console.is_terminal else write_table


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['predict', *sys.argv[1:]]))
