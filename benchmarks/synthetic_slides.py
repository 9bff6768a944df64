# SPDX-License-Identifier: Apache-2.0
"""Networks for slides on synthetic slides: whether two tissues touch, and survival with a known risk.

    python benchmarks/synthetic_slides.py touch --json benchmarks/results/touching_tissues.json \
        --picture docs/figures/touching-tissues.png
    python benchmarks/synthetic_slides.py survival --json benchmarks/results/synthetic_survival.json \
        --picture docs/figures/synthetic-survival.png

Data are written in CLAM's layout, and everything else is done by `vssm wsi-check`, `wsi-repeat` and `wsi-km`.

touch: in a field of stroma lie two lumps of two tissues, as many patches of each in every slide, one in the rows that
follow those of the other. Either they touch across that border, or two columns or more are between them. Both classes
have the same counts, and in both the second lump begins in the row after the first has ended; in the order of the file,
that of a scanner, patches that touch are as far apart as the rows are long at that place, which is never the same.

survival: a log-risk from a normal distribution decides which share of a case's patches is tumour, in one to three
slides, and the rate of an exponential time until death; censoring comes at an independent time.
"""

import argparse
import csv
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from _run import finish, make_parser, parse
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from vssm.tools._pictures import pyplot, save_figure
from vssm.tools.main import main as vssm_main

PATCH_SIZE = 512
WIDTH = 16  # channels of the features
STROMA, FIRST, SECOND = range(3)

# Training of both tasks: small networks, more learning rate and fewer epochs than a real data set wants.
TRAINING = {
    'model.in_dim': WIDTH,
    'model.dim': 32,
    'model.drop_rate': 0.0,
    'optim_wrapper.optimizer.lr': 3e-3,
    'optim_wrapper.clip_grad': dict(max_norm=1.0),
    'dataset.cache': True,
    'device': 'cpu',
    'num_threads': 1,
    **{f'{split}_dataloader.num_workers': 0 for split in ('train', 'val', 'test')},
    **{f'{split}_dataloader.persistent_workers': False for split in ('train', 'val')},
}
NETWORKS = {
    '2DMambaMIL': dict(model_name='mamba2d_mil', depth=2),
    '2DMambaMIL, no pad token': dict(model_name='mamba2d_mil', depth=2, pad_token='none'),
    '1-D variant': dict(model_name='mamba1d_mil', depth=2),
    'attention': dict(model_name='attention_mil'),
    'mean': dict(model_name='mean_mil'),
    'max': dict(model_name='max_mil'),
}


def tissue(rng: np.random.Generator) -> np.ndarray:
    """Where an oval slice of tissue with a wavy border has patches, (rows, columns)."""
    height, width = rng.integers(10, 17, 2)
    y, x = (np.mgrid[:height, :width] + 0.5) / np.array([height, width]).reshape(2, 1, 1) * 2 - 1
    angle = np.arctan2(y, x)
    waves = sum(rng.normal(0, 0.1) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 6))
    return x**2 + y**2 < 0.9 + waves


def neighbours(mask: np.ndarray) -> np.ndarray:
    """The cells above, below, left and right of a region, with it."""
    padded = np.pad(mask, 1)
    return mask | padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]


def grow(rng: np.random.Generator, start: np.ndarray, free: np.ndarray, cells: int) -> np.ndarray | None:
    """A connected region of `cells` free cells that begins in one of `start`; None where there is no room."""
    region = np.zeros_like(free)
    border = start & free
    for _ in range(cells):
        choice = np.argwhere(border)
        if not len(choice):
            return None
        region[tuple(choice[rng.integers(len(choice))])] = True
        border = neighbours(region) & free & ~region
    return region


def touching(rng: np.random.Generator, touch: bool, cells: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Where a slide has patches, and what is on each: two lumps in a field of stroma, which touch or not."""
    while True:
        mask = tissue(rng)
        first = grow(rng, mask, mask, cells)
        if first is None:
            continue
        rows, columns = first.any(1), first.any(0)
        near = np.convolve(columns, np.ones(5), 'same') > 0  # and two columns on both sides
        free = mask & ~rows[:, None] & (True if touch else ~near[None])
        next_rows = neighbours(rows[:, None])[:, :1]
        start = neighbours(first) if touch else np.broadcast_to(next_rows, mask.shape)
        second = grow(rng, start, free, cells)
        if second is not None:
            kinds = np.where(first, FIRST, np.where(second, SECOND, STROMA))
            if rng.random() < 0.5:  # either may lie above
                kinds = np.where(kinds == STROMA, STROMA, FIRST + SECOND - kinds)
            return mask, kinds


def write_slide(path: Path, rng: np.random.Generator, mask: np.ndarray, kinds: np.ndarray) -> None:
    """Write features of each patch's kind with noise, in the order of a scanner, row by row."""
    looks = np.random.default_rng(7).normal(size=(3, WIDTH))  # equal on all slides
    cells = np.argwhere(mask)  # [n, (row, column)]
    features = looks[kinds[mask]] + 0.3 * rng.normal(size=(len(cells), WIDTH))
    with h5py.File(path, 'w') as file:
        file['features'] = features.astype(np.float32)
        file['coords'] = cells[:, ::-1] * PATCH_SIZE + rng.integers(0, PATCH_SIZE, 2)  # x before y


def write_touching(folder: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Write FOLDER/labels.csv and a file for each slide; in half of each split the tissues touch."""
    rng = np.random.default_rng(seed)
    rows = [(split, i % 2 == 1) for split, count in counts.items() for i in range(count)]
    with open(folder / 'labels.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['slide_id', 'label', 'split'])
        for number in rng.permutation(len(rows)):
            split, touch = rows[number]
            writer.writerow([f'slide{number}', 'touching' if touch else 'apart', split])
            write_slide(folder / f'slide{number}.h5', rng, *touching(rng, touch))


def write_survival(folder: Path, counts: dict[str, int], seed: int = 0) -> dict[str, float]:
    """Write FOLDER/survival.csv and a file for each slide; return the log-risk of each case, which no file holds."""
    rng = np.random.default_rng(seed)
    splits = [split for split, count in counts.items() for _ in range(count)]
    risks = {}
    with open(folder / 'survival.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['case_id', 'slide_id', 'censorship', 'survival_months', 'split'])
        for number, split in enumerate(rng.permutation(splits)):
            case, risk = f'case{number}', rng.normal(0, 2)
            death, end = 24 * rng.exponential(np.exp(-risk)), 60 * rng.exponential()
            outcome = [int(death > end), f'{min(death, end):.3f}']
            for i in range(rng.integers(1, 4)):
                mask = tissue(rng)
                share = 1 / (1 + np.exp(-risk - 0.2 * rng.normal()))
                write_slide(
                    folder / f'{case}_{i}.h5', rng, mask, np.where(rng.random(mask.shape) < share, FIRST, STROMA)
                )
                writer.writerow([case, f'{case}_{i}', *outcome, split])
            risks[case] = float(risk)
    return risks


def vssm(*arguments: object) -> None:
    status = vssm_main([str(argument) for argument in arguments])
    if status:
        sys.exit(status)


def train(config: str, data: Path, work_dir: Path, seeds: list[int], options: dict[str, object]) -> dict[str, Any]:
    """Train by `vssm wsi-repeat`, and return its test metrics of each seed, their mean and deviation."""
    changes = [f'{key}={value!r}' for key, value in (TRAINING | options).items()]
    where = ['--data-root', data, '--work-dir', work_dir]
    vssm('wsi-repeat', config, '--seeds', *seeds, *where, '--cfg-options', *changes)
    return json.loads((work_dir / 'results.json').read_text())


def run_touch(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    write_touching(folder, dict(train=args.train or 1200, val=100, test=300))
    vssm('wsi-check', folder / 'labels.csv', folder, '--patch-size', PATCH_SIZE)
    rows = []
    for name in args.networks or NETWORKS:
        options = {f'model.{key}': value for key, value in NETWORKS[name].items()}
        options |= {
            'optim_wrapper.optimizer.lr': 5e-3,
            'train_cfg.max_epochs': args.epochs or 8,
            'train_dataloader.batch_size': 8,
        }
        results = train('wsi/classification', folder, folder / name, args.seeds, options)
        accuracies = [metrics['wsi/accuracy'] for metrics in results['runs'].values()]
        rows.append(dict(name=name, test_accuracies=accuracies, test_accuracy=statistics.fmean(accuracies)))
    if args.picture:
        draw_touch(rows, args.picture)
    return rows


def run_survival(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    risks = write_survival(folder, dict(train=args.train or 300, val=100, test=200))
    vssm('wsi-check', folder / 'survival.csv', folder, '--patch-size', PATCH_SIZE)
    rows = []
    for config in ('wsi/survival', 'wsi/survival_cox'):
        work_dir = folder / config
        options = {'train_cfg.max_epochs': args.epochs or 10}
        options |= {'train_dataloader.batch_size': 4} if config == 'wsi/survival' else {}
        results = train(config, folder, work_dir, args.seeds, options)
        c_indices = [metrics['wsi/c_index'] for metrics in results['runs'].values()]
        rows.append(dict(name=config, test_c_indices=c_indices, test_c_index=statistics.fmean(c_indices)))
    predictions = work_dir / f'seed{args.seeds[0]}' / 'predictions.csv'
    rows.append(dict(name='the log-risk itself', test_c_index=true_c_index(predictions, risks)))
    if args.picture:
        vssm('wsi-km', predictions, '--output', args.picture)
    return rows


def true_c_index(predictions: Path, risks: dict[str, float]) -> float:
    """The concordance index of the log-risk that made the data, on the cases of a test."""
    from torchsurv.metrics.cindex import ConcordanceIndex

    with open(predictions, newline='') as file:
        cases = list(csv.DictReader(file))
    risk, months, censored = torch.tensor(
        [[risks[case['case_id']], float(case['survival_months']), float(case['censorship'])] for case in cases]
    ).T
    return ConcordanceIndex()(risk, censored == 0, months).item()


def draw_touch(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw slides of both classes, and the accuracies of the networks."""
    plt = pyplot()
    rng = np.random.default_rng(3)
    colours = ListedColormap(['white', '0.85', 'tab:purple', 'tab:orange'])
    fig, axes = plt.subplot_mosaic('abx;cdx', figsize=(11, 5.2), width_ratios=(1, 1, 2.4), layout='constrained')
    for key, touch in zip('abcd', (True, False, True, False), strict=True):
        mask, kinds = touching(rng, touch)
        axes[key].imshow(np.where(mask, kinds + 1, 0), colours, vmin=0, vmax=3)
        axes[key].set(title='touching' if touch else 'apart', xticks=[], yticks=[])
    tissues = ('no tissue', 'stroma', 'first tissue', 'second tissue')
    patches = [Patch(facecolor=colours(i), edgecolor='0.5', label=name) for i, name in enumerate(tissues)]
    fig.legend(handles=patches, loc='outside lower left', ncols=4)
    fig.get_layout_engine().set(wspace=0.12)  # names of the networks are long
    ax = axes['x']
    for i, row in enumerate(reversed(rows)):
        ax.barh(i, row['test_accuracy'], color='tab:blue', alpha=0.6)
        ax.plot(row['test_accuracies'], [i] * len(row['test_accuracies']), 'k|', markersize=12)
    ax.axvline(0.5, color='k', linestyle=':', label='chance')
    ax.set(yticks=range(len(rows)), yticklabels=[row['name'] for row in reversed(rows)], xlim=(0, 1))
    ax.set(xlabel='accuracy on 300 held-out slides, mean and each seed')
    ax.legend(loc='lower right')
    save_figure(fig, path)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument('task', choices=('touch', 'survival'))
    parser.add_argument('--networks', nargs='+', choices=NETWORKS, help='networks of the task touch, all unless given')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
    parser.add_argument('--train', type=int, help='slides or cases to train on')
    parser.add_argument('--epochs', type=int)
    parser.add_argument('--picture', type=Path)
    args = parse(parser)
    with tempfile.TemporaryDirectory() as folder:
        rows = dict(touch=run_touch, survival=run_survival)[args.task](Path(folder), args)
    keys = list(rows[0])[1:]
    cells = [[row['name'], *(figures(row.get(key, [])) for key in keys)] for row in rows]
    finish(args, rows, f'synthetic slides, {args.task}', ['network', *keys], cells)


def figures(value: float | list[float]) -> str:
    return ' '.join(f'{x:.3f}' for x in (value if isinstance(value, list) else [value]))


if __name__ == '__main__':
    main()
