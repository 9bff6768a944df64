# SPDX-License-Identifier: Apache-2.0
"""Look at all data of a config before a training: images in folders, objects in COCO's format, or masks.

Every problem is told: images that are missing, unreadable or tiny, or of another size than their annotations say; boxes
outside their image or without an area; categories that are no classes of the config, and classes that are no category;
masks with values beyond the classes, or of another size than their image. Then a table counts the images and what each
class has in each split. The exit status is 1 where there is a problem. For slides there is `vssm wsi-check`.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterable
from typing import Any

from rich.progress import track

from ..models.files import printable
from ._common import UsageError, add_config_options, console, read_config
from ._tables import print_table

EXAMPLE = 'vssm data-check finetune/vmamba_tiny_1xb64-50e_folder --data-root data/leaves'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', metavar='CONFIG', help='name, as in `vssm configs`, or path of a config')
    add_config_options(parser)
    parser.add_argument(
        '--min-size', metavar='N', type=int, default=32, help='least height and width of an image (default: 32)'
    )
    parser.add_argument('--most', metavar='N', type=int, default=50, help='number of problems to tell (default: 50)')


def run(args: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):  # where mmengine's logger else writes above the table
        cfg = read_config(args)
        from ..models.mm import RunError
        from ..models.mm.inspection import data_sets, inspect, wrong_heads
        from ..models.mm.own_classes import fill_classes

        try:
            fill_classes(cfg)
        except RunError as error:
            raise UsageError(str(error)) from error

    def watch(items: Iterable[Any], count: int) -> Iterable[Any]:
        shown = console.is_terminal
        return track(items, f'reading {split}', count, console=console, transient=True, disable=not shown)

    reports, problems = {}, []
    for split, dataset in data_sets(cfg).items():
        try:
            with contextlib.redirect_stdout(sys.stderr):
                reports[split] = inspect(dataset, args.min_size, cfg.get('default_scope'), watch)
        except ValueError as error:
            raise UsageError(str(error)) from error
        problems += [f'{split}: {problem}' for problem in reports[split].problems]
    classes = list(dict.fromkeys(name for report in reports.values() for name in report.counts))
    problems += wrong_heads(cfg.model.to_dict(), len(classes)) if classes else []
    for problem in problems[: args.most]:
        console.print(printable(problem), highlight=False, markup=False, soft_wrap=True)
    if len(problems) > args.most:
        console.print(f'... and {len(problems) - args.most} more; --most {len(problems)} tells all.', highlight=False)

    unit = next(iter(reports.values())).unit
    rows = [['all images', *(str(report.images) for report in reports.values())]]
    for name in classes:
        rows.append([name, *(_share(report, name) for report in reports.values())])
    print_table(['class', *reports], rows, f'{unit} of each class' if unit != 'pixels' else 'pixels of each class, %')
    if problems:
        console.print(f'{len(problems)} problem{"s" * (len(problems) > 1)}.', highlight=False)
    return 1 if problems else 0


def _share(report: Any, name: str) -> str:
    """The number of a class, of pixels in per cent of all that have a class."""
    count = report.counts[name]
    if report.unit != 'pixels':
        return str(count)
    return f'{100 * count / max(1, report.counts.total()):.2f}'


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['data-check', *sys.argv[1:]]))
