# SPDX-License-Identifier: Apache-2.0
"""All networks for slides on the slides of `synthetic_slides.py touch`, by `vssm wsi-compare`.

    python benchmarks/compare_slides.py --seeds 0 1 2 --json benchmarks/results/compare_slides.json \
        --picture docs/figures/compare-slides.png

Data and networks' width are those of that script. Batches of 4 at a rate of 3e-3 are kinder to networks along the
file's order than its batches of 8 at 5e-3, which were chosen for 2DMambaMIL, so that they are the default here. With
--work-dir the slides and the runs stay, and the command goes on where it was cut off.
"""

import argparse
import csv
import shutil
import tempfile
from pathlib import Path
from typing import Any

from _run import finish, make_parser, parse
from synthetic_slides import TRAINING, vssm, write_touching

MODELS = [
    'mamba2d_mil:depth=2',
    'mamba1d_mil:depth=2',
    'srmambamil',
    'mambamil',
    's4mil',
    'transmil',
    'dtfd_mil',
    'attention_mil',
    'mean_mil',
    'max_mil',
]


def compare(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Write the slides, train and test all networks, and return the table."""
    slides, runs = folder / 'slides', folder / 'runs'
    if not slides.is_dir():
        partial = folder / 'partial'
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_touching(partial, dict(train=args.train, val=args.test // 3, test=args.test))
        partial.rename(slides)
    options = {key: value for key, value in TRAINING.items() if key != 'model.in_dim'}
    options |= {
        'optim_wrapper.optimizer.lr': args.lr,
        'train_cfg.max_epochs': args.epochs,
        'train_dataloader.batch_size': args.batch_size,
        'default_hooks.logger.interval': 1000,
    }
    where = [slides / 'labels.csv', slides, '--work-dir', runs, '--metric', 'wsi/accuracy']
    changes = [f'{key}={value!r}' for key, value in options.items()]
    vssm('wsi-compare', *where, '--models', *args.models, '--seeds', *args.seeds, '--cfg-options', *changes)
    with open(runs / 'comparison.csv', newline='') as file:
        rows = [dict(network=row['network'], **numbers(row)) for row in csv.DictReader(file)]
    with open(runs / 'runs.csv', newline='') as file:
        for run in csv.DictReader(file):
            row = next(row for row in rows if row['network'] == run['network'])
            row.setdefault('runs', []).append(float(run['wsi/accuracy']))
    if args.picture:
        shutil.copy(runs / 'comparison.png', args.picture)
    return rows


def numbers(row: dict[str, str]) -> dict[str, float | None]:
    return {name: float(value) if value else None for name, value in row.items() if name != 'network'}


def main() -> None:
    parser = make_parser(__doc__, batch_size=4)
    parser.add_argument('--models', nargs='+', default=MODELS, help='networks, as of `vssm wsi-compare`')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--train', type=int, default=600, help='slides to train on')
    parser.add_argument('--test', type=int, default=300, help='slides to test on; a third as many are for validation')
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--lr', type=float, default=3e-3)
    parser.add_argument('--work-dir', type=Path, help='where slides and runs stay')
    parser.add_argument('--picture', type=Path)
    args = parse(parser)
    with tempfile.TemporaryDirectory() as temporary:
        rows = compare(args.work_dir or Path(temporary), args)
    cells = [
        [row['network'], f'{row["wsi/accuracy mean"]:.3f}', ' '.join(f'{x:.3f}' for x in row['runs'])] for row in rows
    ]
    finish(args, rows, 'all networks on touching tissues', ['network', 'accuracy', 'each seed'], cells)


if __name__ == '__main__':
    main()
