# SPDX-License-Identifier: Apache-2.0
"""Train networks for slides under one protocol, and show which is best, by how much, and how surely.

The protocol is that of 2DMamba's paper, or of another config; --cfg-options changes it for all networks alike. Number
of classes and width of the features are those of the data. Each run has a folder of its own in the work dir; those that
are there go on where they stopped, so that the command may be given again.

The table has mean and standard deviation of each metric, and for the one that counts the mean rank among the networks
and, from five runs a network on, the p value of a Wilcoxon signed-rank test against the best in pairs of fold and seed,
not corrected for the number of networks.
"""

import argparse
import copy
import csv
import io
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ._common import UsageError, console, read_config, write_file
from ._pictures import pyplot, save_figure
from ._tables import print_table
from .wsi_repeat import Trial, plan, repeat, summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mmengine.config import Config

EXAMPLE = 'vssm wsi-compare labels.csv features --models mamba2d_mil transmil attention_mil --seeds 0 1 2 3 4'

Results = Mapping[str, Mapping[Trial, Mapping[str, float]]]  # of each network, of each trial, of each metric
FEWEST_PAIRS = 5  # of which a signed-rank test can say something


class Row(NamedTuple):
    """What the runs of a network say of it."""

    network: str
    mean: dict[str, float]  # of each metric
    deviation: dict[str, float]
    rank: float  # the mean over the trials, 1 being the best
    p: float | None  # against the best network; None for this one, and for too few trials


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('table', metavar='TABLE', type=Path, help='table of slides, as for `vssm wsi-check`')
    parser.add_argument('features', metavar='FEATURES', type=Path, help="folder with the slides' files")
    parser.add_argument(
        '--models',
        metavar='NAME[:KEY=VALUE...]',
        nargs='+',
        help='networks, with arguments of their own such as mamba2d_mil:depth=2:pad_token=none (default: all)',
    )
    parser.add_argument('--folds', metavar='K', type=int, help='number of folds, each of which is tested')
    parser.add_argument(
        '--seeds', metavar='N', type=int, nargs='+', default=[0, 1, 2, 3, 4], help='seeds (default: 0 1 2 3 4)'
    )
    parser.add_argument(
        '--config',
        help='the protocol (default: wsi/classification, or wsi/survival if TABLE has a column survival_months)',
    )
    parser.add_argument(
        '--metric',
        metavar='NAME',
        help='what counts: the higher it is the better, a loss the lower (default: wsi/auc, or wsi/c_index of a '
        'survival)',
    )
    parser.add_argument(
        '--work-dir',
        metavar='DIR',
        type=Path,
        default=Path('work_dirs', 'wsi-compare'),
        help='where to write runs, comparison.csv, runs.csv and comparison.png (default: work_dirs/wsi-compare)',
    )
    parser.add_argument(
        '--cfg-options',
        metavar='KEY=VALUE',
        nargs='+',
        default=[],
        help='changes to the config, for all networks, as of `vssm train`',
    )


def run(args: argparse.Namespace) -> int:
    from ..models.mil import list_mil_models

    pyplot()  # a missing package is better told now than after the work
    cfg = protocol(args)
    metric = args.metric or ('wsi/c_index' if cfg.dataset.task == 'survival' else 'wsi/auc')
    configs = {}
    for label in args.models or list_mil_models():
        if label in configs:
            raise UsageError(f'--models must differ, got {label} twice.')
        configs[label] = plan(config_of(cfg, label), args.folds, args.seeds)
    results: dict[str, dict[Trial, dict[str, float]]] = {}
    rows: list[Row] = []
    for label, trials in configs.items():
        results[label] = repeat(trials)
        rows = compare(results, metric)
        write(rows, results, metric, args.work_dir)  # after each network, as the next ones take their time
    show(rows, metric)
    console.print(f'Written to {args.work_dir}', highlight=False, soft_wrap=True)
    return 0


def protocol(args: argparse.Namespace) -> 'Config':
    """The config of all networks, fitted to the data.

    Raises:
        UsageError: Table, folder or options are not as needed.
    """
    from ..models.mil.tables import read_rows

    if not args.features.is_dir():
        raise UsageError(f'FEATURES must be a folder, got {args.features}, which does not exist.')
    try:
        header = read_rows(args.table)[0]
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error
    args.config = args.config or f'wsi/{"survival" if "survival_months" in header else "classification"}'
    args.data_root, args.launcher = None, 'none'
    cfg = read_config(args)
    if cfg.get('dataset', {}).get('type') != 'SlideDataset':
        raise UsageError(f'--config must be one whose dataset is a SlideDataset, got {args.config}.')
    cfg.dataset.update(data_root=str(args.features), ann_file=str(args.table.resolve()))
    given = {option.partition('=')[0] for option in args.cfg_options}
    for key, value in measures(cfg, args.folds).items():
        if f'model.{key}' not in given:
            cfg.model[key] = value
    return cfg


def measures(cfg: 'Config', folds: int | None) -> dict[str, int]:
    """The arguments of a network that the data decide: width of the features and, of a classification, classes."""
    from mmengine.registry import DATASETS

    from ..models.mm import RunError

    dealt = {} if folds is None or cfg.dataset.get('split_file') else dict(folds=folds)
    try:
        dataset = DATASETS.build({**cfg.dataset, **cfg.train_dataloader.dataset, **dealt})
        found = dict(in_dim=dataset[0]['inputs']['features'].shape[1])
    except (RunError, ValueError) as error:
        raise UsageError(f'{error}{" Or is it --folds that is missing?" if folds is None else ""}') from error
    return found if cfg.dataset.task == 'survival' else dict(found, num_classes=len(dataset.classes))


def config_of(cfg: 'Config', label: str) -> 'Config':
    """The config of a network, NAME:KEY=VALUE:..., with a folder of its own in the work dir.

    Raises:
        UsageError: There is no such network, or it takes no such arguments.
    """
    from mmengine.registry import MODELS

    from ._options import parse_option

    name, *options = label.split(':')
    if not all(re.match('[a-z]\\w*=', option) for option in options):
        raise UsageError(f'--models must be NAME or NAME:KEY=VALUE, such as mamba2d_mil:depth=2, got {label}.')
    changed = copy.deepcopy(cfg)
    changed.model.model_name = name
    try:
        changed.model.update(dict(parse_option(option) for option in options))
        MODELS.build(copy.deepcopy(changed.model))
    except (TypeError, ValueError) as error:
        raise UsageError(f'{label} cannot be built: {error}') from error
    changed.work_dir = str(Path(cfg.work_dir, re.sub(r'[^\w.=,-]+', '_', label.replace(':', ','))))
    return changed


def compare(results: Results, metric: str) -> list[Row]:
    """A row for each network, the best first, from trials that all networks share.

    The metric that counts must be defined in all networks' runs of a trial; other trials are left out, such as folds in
    which all slides are of one class.

    Raises:
        UsageError: No trial has this metric.
    """
    from scipy.stats import rankdata, wilcoxon

    trials = [
        trial
        for trial in next(iter(results.values()))
        if all(not math.isnan(runs[trial].get(metric, math.nan)) for runs in results.values())
    ]
    if not trials:
        names = sorted({name for runs in results.values() for metrics in runs.values() for name in metrics})
        raise UsageError(f'--metric must be defined in a run, one of {", ".join(names)}; got {metric}.')
    values = {label: [runs[trial][metric] for trial in trials] for label, runs in results.items()}
    sign = 1 if metric.endswith('loss') else -1  # the lower the better
    by_trial = [[sign * column[i] for column in values.values()] for i in range(len(trials))]
    ranks = dict(zip(values, rankdata(by_trial, axis=1).mean(0).tolist(), strict=True))
    order = sorted(values, key=lambda label: (sign * statistics.fmean(values[label]), ranks[label]))
    rows = []
    for label in order:
        p = None
        if label != order[0] and len(trials) >= FEWEST_PAIRS:
            differs = values[label] != values[order[0]]
            p = float(wilcoxon(values[order[0]], values[label]).pvalue) if differs else 1.0
        summary = summarise([results[label][trial] for trial in trials])
        rows.append(Row(label, summary['mean'], summary['deviation'], ranks[label], p))
    return rows


def columns_of(rows: Sequence[Row], metric: str) -> list[str]:
    """The metrics of the table, first the one that counts; neither those of single classes nor ends of intervals."""
    names = [name for name in rows[0].mean if name.count('/') == 1 and not name.endswith('%')]
    return [metric, *(name for name in names if name != metric)]


def show(rows: Sequence[Row], metric: str) -> None:
    columns = columns_of(rows, metric)
    tested = any(row.p is not None for row in rows)
    cells = []
    for row in rows:
        figures = [f'{row.mean[name]:.3f} ± {row.deviation[name]:.3f}' for name in columns]
        p = [] if not tested else ['-' if row.p is None else f'{row.p:.3f}']
        cells.append([row.network, *figures, f'{row.rank:.2f}', *p])
    print_table(['network', *columns, 'rank', *(['p'] if tested else [])], cells)


def write(rows: Sequence[Row], results: Results, metric: str, folder: Path) -> None:
    """Write the table, all runs, and the picture."""
    columns = columns_of(rows, metric)
    table: list[list[Any]] = [['network', *(f'{name} {what}' for name in columns for what in ('mean', 'deviation'))]]
    table[0] += ['rank', 'p']
    for row in rows:
        figures = [part[name] for name in columns for part in (row.mean, row.deviation)]
        table.append([row.network, *figures, row.rank, row.p])
    every = list(rows[0].mean)
    runs: list[list[Any]] = [['network', 'fold', 'seed', *every]]
    for label, trials in results.items():
        runs += [[label, *trial, *(metrics[name] for name in every)] for trial, metrics in trials.items()]
    for name, lines in (('comparison.csv', table), ('runs.csv', runs)):
        text = io.StringIO(newline='')
        csv.writer(text).writerows(lines)
        write_file(folder / name, text.getvalue().encode())
    save_figure(draw(rows, results, metric), folder / 'comparison.png')


def draw(rows: Sequence[Row], results: Results, metric: str) -> 'Figure':
    """Draw each run as a point, and mean and deviation of each network, the best above."""
    fig, ax = pyplot().subplots(figsize=(8, 1.2 + 0.42 * len(rows)), layout='constrained')
    for i, row in enumerate(rows):
        runs = [metrics[metric] for metrics in results[row.network].values() if not math.isnan(metrics[metric])]
        ax.plot(runs, [i] * len(runs), 'o', color='tab:blue', alpha=0.4, markeredgewidth=0)
        ax.errorbar(row.mean[metric], i, xerr=row.deviation[metric], fmt='k|', markersize=14, capsize=3, linewidth=1)
    ax.set(yticks=range(len(rows)), yticklabels=[row.network for row in rows])
    ax.set(xlabel=f'{metric} on the test data: each run, mean and standard deviation')
    ax.margins(y=0.6 / len(rows))
    ax.invert_yaxis()
    ax.grid(axis='x', alpha=0.3)
    return fig


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['wsi-compare', *sys.argv[1:]]))
