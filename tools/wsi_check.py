# SPDX-License-Identifier: Apache-2.0
"""Check a table of slides and the files of their features before a training.

Every problem is told with its row and slide: missing files, labels and splits that are not in their list, numbers that
are not finite, features of another width, a step of the grid that contradicts the file's attributes or --patch-size,
coordinates off the grid, two patches in one cell. Rows of the table count its header as row 1, rows of a slide's arrays
begin with 0.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import track

from ..models.files import state_of
from ._common import UsageError, console
from ._tables import print_table

if TYPE_CHECKING:
    from ..models.mil.tables import Slide

EXAMPLE = 'vssm wsi-check features/labels.csv features'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'table', metavar='CSV', type=Path, help='table with slide_id,label,... or case_id,slide_id,censorship,...'
    )
    parser.add_argument(
        'folder', metavar='DIR', type=Path, help='folder with the features, such as SLIDE.h5, in it or below it'
    )
    parser.add_argument(
        '--task', choices=('classification', 'survival'), help='default: survival, if CSV has a column survival_months'
    )
    parser.add_argument('--split-file', metavar='FILE', type=Path, help='published splits, as of dataset.split_file')
    parser.add_argument(
        '--columns',
        metavar='OURS=THEIRS',
        nargs='+',
        default=[],
        help='names of columns in CSV that have others here, such as label=subtype',
    )
    parser.add_argument(
        '--no-barcodes',
        action='store_true',
        help='take no notice of the patients in TCGA barcodes, as dataset.barcodes=False',
    )
    parser.add_argument(
        '--encoder', metavar='NAME', help='encoder whose features are meant, where there are those of several'
    )
    parser.add_argument('--classes', metavar='NAME', nargs='+', help='the labels that there may be (default: any)')
    parser.add_argument(
        '--patch-size',
        metavar='N',
        type=int,
        help='distance of neighbouring patches in pixels (default: that of each slide, 512 where a slide has too few '
        'patches to tell)',
    )
    parser.add_argument(
        '--grid-size', metavar=('H', 'W'), type=int, nargs=2, help='the largest grid that there may be, in cells'
    )


def run(args: argparse.Namespace) -> int:
    from ..models.mil import side_of_cells, to_cells
    from ..models.mil.slides import SlideFolder, count_patches, read_slide
    from ..models.mil.tables import apply_splits, read_table, recognised_cases

    if args.patch_size is not None and args.patch_size < 1:
        raise UsageError(f'--patch-size must be at least 1, got {args.patch_size}.')
    if not args.folder.is_dir():
        raise UsageError(f'DIR must be a folder, got {args.folder}, which {state_of(args.folder)}.')
    if not all('=' in entry for entry in args.columns):
        raise UsageError(f'--columns must be OURS=THEIRS, such as label=subtype, got {" ".join(args.columns)}.')
    columns = dict(entry.split('=', 1) for entry in args.columns)
    barcodes = not args.no_barcodes
    try:
        known = {*_header(args.table), *columns}
        task = args.task or ('survival' if 'survival_months' in known else 'classification')
        slides, problems = read_table(args.table, task, args.classes, barcodes, columns)
        said = recognised_cases(slides)
        notes = [f'{args.table.name} has no case_id: {said}' if said else None]
        if args.split_file is not None:
            slides, more, said = apply_splits(slides, args.split_file, barcodes)
            problems += [problem for problem in more if problem not in problems]
            notes.append(said)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error

    for note in filter(None, notes):
        console.print(note, highlight=False, markup=False, soft_wrap=True)

    usual: int | None = None
    counts, steps, grids, empty = [], [], [], 0
    folder = SlideFolder(args.folder, args.encoder)
    for slide in track(slides, 'reading', console=console, transient=True, disable=not console.is_terminal):
        try:
            paths = folder.find(slide.slide_id)
            if not count_patches(*paths, encoder=args.encoder):
                empty += 1
                continue
            bag = read_slide(*paths, encoder=args.encoder)
            usual = usual or bag.features.shape[1]
            if bag.features.shape[1] != usual:
                raise ValueError(
                    f'features must be as wide as those of the first slide, {usual}, got {bag.features.shape[1]}.'
                )
            if bag.coords is not None:
                _, grid = to_cells(bag.coords, side_of_cells(bag.step, args.patch_size), args.grid_size)
                grids.append(grid)
                steps.append(bag.step)
        except (FileNotFoundError, ValueError) as error:
            problems.append(f'{args.table.name} row {slide.row}, slide {slide.slide_id!r}: {error}')
            continue
        counts.append((bag.total, bag.left_out))
    if problems:
        for problem in problems:
            console.print(problem, highlight=False, markup=False, soft_wrap=True)
        raise UsageError(f'{len(problems)} problems in {args.table} and {args.folder}.')

    rows = [
        ('slides', str(len(slides))),
        ('cases', str(len({slide.case_id for slide in slides}))),
        ('width of the features', str(usual)),
        ('patches of a slide', f'{min(counts, default=(0,))[0]} to {max(counts, default=(0,))[0]}'),
        *_count_steps(steps),
    ]
    if grids:
        rows.append(('largest grid, height x width', ' x '.join(str(max(sides)) for sides in zip(*grids, strict=True))))
    rows += _count_groups(slides, task)
    left_out = [count for _, count in counts if count]
    exceptions = {
        'slides without coordinates, for networks that need none': len(counts) - len(grids),
        'slides without patches, left out': empty,
        'patches left out, in the cell of a patch of another piece of tissue': sum(left_out),
        'slides with patches left out': len(left_out),
    }
    rows += [(what, str(count)) for what, count in exceptions.items() if count]
    print_table(['what', 'count'], rows)
    return 0


def _count_steps(steps: 'Sequence[int | None]') -> Iterator[tuple[str, str]]:
    """Rows with the number of slides of each step of the grid."""
    counts = Counter(steps)
    unknown = counts.pop(None, 0)
    for step, count in sorted(counts.items()):
        yield f'slides with patches {step} pixels apart', str(count)
    if unknown:
        yield 'slides with too few patches to tell their distance', str(unknown)


def _count_groups(slides: 'Sequence[Slide]', task: str) -> Iterator[tuple[str, str]]:
    """Rows with the number of slides of each split and each class, or of cases with an event."""
    for split, count in Counter(slide.split for slide in slides).items():
        yield 'slides without a split' if split is None else f'slides of {split}', str(count)
    if task == 'classification':
        for label, count in sorted(Counter(slide.label for slide in slides).items()):
            yield f'slides of class {label}', str(count)
    else:
        censored = {slide.case_id: slide.censored for slide in slides}
        yield 'cases with an event', str(sum(not value for value in censored.values()))


def _header(path: Path) -> list[str]:
    from ..models.mil.tables import read_rows

    if not path.is_file():
        raise UsageError(f'CSV must be a file, got {path}, which {state_of(path)}.')
    return read_rows(path)[0]


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['wsi-check', *sys.argv[1:]]))
