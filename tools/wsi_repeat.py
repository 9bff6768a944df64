# SPDX-License-Identifier: Apache-2.0
"""Train and test a config on slides with several seeds, or on all folds, and show mean and standard deviation.

Each run has a folder of its own in the work dir, and is tested with its best weights on the validation data. A run that
is there already goes on where it stopped, so that the command may be given again; one of other options, or of another
table, is refused. Results go to results.json.
"""

import argparse
import copy
import json
import math
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ._common import UsageError, add_run_arguments, build_runner, console, read_config, write_json
from ._tables import print_table

if TYPE_CHECKING:
    from mmengine.config import Config

EXAMPLE = 'vssm wsi-repeat wsi/classification --seeds 0 1 2 3 4'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', metavar='CONFIG', help='name, as in `vssm configs`, or path of a config')
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--seeds', metavar='N', type=int, nargs='+', help='seeds of the runs')
    what.add_argument('--folds', metavar='K', type=int, help='divide the cases into K folds, each of which is tested')
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.seeds is not None and len(set(args.seeds)) != len(args.seeds):
        raise UsageError(f'--seeds must differ, got {" ".join(map(str, args.seeds))}.')
    if args.folds is not None and args.folds < 3:
        raise UsageError(f'--folds must be at least 3, for training, validation and test, got {args.folds}.')
    cfg = read_config(args)
    if cfg.get('dataset', {}).get('type') != 'SlideDataset':
        raise UsageError(f'CONFIG must be one whose dataset is a SlideDataset, got {args.config}.')
    runs = [f'seed{seed}' for seed in args.seeds] if args.seeds else [f'fold{fold}' for fold in range(args.folds)]
    splits = cfg.dataset.get('split_file')
    if args.folds and splits and '%d' not in splits:
        raise UsageError(f'dataset.split_file must name the file of each of --folds by %d, got {splits}.')
    configs = {}
    for i, name in enumerate(runs):
        changed = copy.deepcopy(cfg)
        changed.work_dir = str(Path(cfg.work_dir, name))
        if args.seeds:
            changed.randomness = dict(cfg.get('randomness', {}), seed=args.seeds[i])
        else:
            changed.dataset.update(fold=i, folds=None if cfg.dataset.get('split_file') else args.folds)
        configs[name] = changed
    for changed in configs.values():  # before the first of them takes its time
        check_test(changed)
        check_run(changed)
    try:
        results = {name: train_and_test(changed) for name, changed in configs.items()}
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt('interrupted; the same command goes on where it was.') from error
    from mmengine.dist import is_main_process

    if not is_main_process():
        return 0
    summary = summarise(list(results.values()))
    write_json(Path(cfg.work_dir, 'results.json'), dict(config=args.config, runs=results, **summary))

    rows = [(name, *(f'{value:.4f}' for value in metrics.values())) for name, metrics in (results | summary).items()]
    print_table(['run', *summary['mean']], rows, rules=[len(results)])
    console.print(f'Written to {cfg.work_dir}', highlight=False, soft_wrap=True)
    return 0


def check_test(cfg: 'Config') -> None:
    """Build the data set that a config tests on, which published splits may lack.

    Raises:
        UsageError: It is not as needed, such as one without slides.
    """
    from mmengine.registry import DATASETS

    from ..models.mm import RunError

    try:
        DATASETS.build({**cfg.dataset, **cfg.test_dataloader.dataset})
    except RunError as error:
        raise UsageError(f'{Path(cfg.work_dir).name}: {error}') from error


def check_run(cfg: 'Config') -> None:
    """Let a config go on with the run in its work dir, if there is one, and say so.

    Raises:
        UsageError: That run had other options, or another table.
    """
    from ..models.mm import RunError
    from ..models.mm.compare import other_options
    from ..models.mm.identity import current_run, own_checkpoints
    from ..models.mm.saved import read_notes
    from ..models.mm.wsi_data import table_digest, table_files

    folder = Path(cfg.work_dir)
    try:
        run = current_run(folder)
        own = own_checkpoints(folder, 'epoch_{}.pth', run) if run is not None else ()
        path = next((path for path, problem in own if problem is None), None)
        notes = read_notes(path) if path is not None else {}
    except (OSError, RunError, ValueError) as error:
        raise UsageError(str(error)) from error
    cfg.resume = path is not None
    if path is None:
        return
    others = other_options(notes.get('cfg'), cfg)
    files = table_files(**cfg.dataset)
    reason = f'other options, {"; ".join(others)}' if others else ''
    if not others and json.loads(notes.get('data', '{}')).get('table') != table_digest(files):
        reason = f'another table, {" or ".join(map(str, files))} has changed'
    if reason:
        raise UsageError(f'{folder} holds a run of {reason}: remove it, or name another folder by --work-dir.')
    finished = notes.get('epoch') == cfg.train_cfg.max_epochs
    what = f'the finished training of {folder} is tested again' if finished else f'goes on from {path}'
    console.print(f'{folder.name}: {what}', highlight=False, soft_wrap=True)


def train_and_test(cfg: 'Config') -> dict[str, float]:
    """The metrics of a config's best weights on its test data."""
    from ..models.mm import RunError
    from ..models.mm.wsi_notes import follow_checkpoint

    best = Path(cfg.work_dir, 'best.safetensors')
    cfg.experiment_name = '-'.join(Path(cfg.work_dir).parts)  # the name by which mmengine keeps loggers and histories
    try:
        build_runner(copy.deepcopy(cfg)).train()
        if not best.is_file():
            raise UsageError(f'CONFIG must have a BestHook in custom_hooks, so that {best} is there.')
        follow_checkpoint(cfg, best, {})
        cfg.update(load_from=str(best), resume=False, experiment_name=f'{cfg.experiment_name}-test')
        return build_runner(cfg).test()
    except (RunError, ValueError) as error:
        raise UsageError(f'{Path(cfg.work_dir).name}: {error}') from error


def summarise(results: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (n - 1) of each metric over the runs in which it is defined, that is not NaN.

    The deviation of a single run is 0; where a metric is defined in none, both are NaN.
    """
    columns = {name: [m[name] for m in results if not math.isnan(m[name])] for name in results[0]}
    return dict(
        mean={name: statistics.fmean(values) if values else math.nan for name, values in columns.items()},
        deviation={name: _deviation(values) for name, values in columns.items()},
    )


def _deviation(values: list[float]) -> float:
    if len(values) > 1:
        return statistics.stdev(values)
    return 0.0 if values else math.nan


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['wsi-repeat', *sys.argv[1:]]))
