# SPDX-License-Identifier: Apache-2.0
"""Train and test a config on slides on all folds, with several seeds, or both; show mean and standard deviation.

Folds are those of the files that dataset.split_file names by %d, or of the columns that dataset.columns names so for
the split; those of the table's column fold; or dealt out. They are the same for all seeds. Each run has a folder of its
own in the work dir, and is tested with its best weights on the validation data. A run that is there already goes on
where it stopped, so that the command may be given again; one of other options, or of another table, is refused. Results
go to results.json.
"""

import argparse
import copy
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ._common import UsageError, add_run_arguments, build_runner, console, read_config, write_json
from ._tables import print_table, wide_console

if TYPE_CHECKING:
    from mmengine.config import Config

EXAMPLE = 'vssm wsi-repeat wsi/classification --folds 5 --seeds 0 1 2'


class Trial(NamedTuple):
    """The fold and the seed of a run; None where the config's own stands."""

    fold: int | None
    seed: int | None

    @property
    def name(self) -> str:
        return '-'.join(f'{key}{value}' for key, value in self._asdict().items() if value is not None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', metavar='CONFIG', help='name, as in `vssm configs`, or path of a config')
    parser.add_argument('--folds', metavar='K', type=int, help='number of folds, each of which is tested')
    parser.add_argument('--seeds', metavar='N', type=int, nargs='+', help='seeds of the runs, on each fold if any')
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    cfg = read_config(args)
    if cfg.get('dataset', {}).get('type') != 'SlideDataset':
        raise UsageError(f'CONFIG must be one whose dataset is a SlideDataset, got {args.config}.')
    results = {trial.name: metrics for trial, metrics in repeat(plan(cfg, args.folds, args.seeds)).items()}
    from mmengine.dist import is_main_process

    if not is_main_process():
        return 0
    summary = summarise(list(results.values()))
    write_json(Path(cfg.work_dir, 'results.json'), dict(config=args.config, runs=results, **summary))

    # Neither those of single classes nor the ends of intervals, which the file has.
    columns = [name for name in summary['mean'] if name.count('/') == 1 and not name.endswith('%')]
    rows = [(name, *(f'{metrics[c]:.4f}' for c in columns)) for name, metrics in (results | summary).items()]
    print_table(['run', *columns], rows, rules=[len(results)], to=wide_console())
    console.print(f'Written to {cfg.work_dir}', highlight=False, soft_wrap=True)
    return 0


def plan(cfg: 'Config', folds: int | None = None, seeds: Sequence[int] | None = None) -> dict[Trial, 'Config']:
    """The configs of all folds and seeds, checked before the first of them takes its time.

    Each has a folder of its own in the config's work dir, and goes on with the run that is there, which is said.

    Args:
        cfg: Config with a SlideDataset, with all that the trials share.
        folds: Number of folds; the config's fold alone unless given.
        seeds: Seeds of each fold; the config's seed alone unless given.

    Raises:
        UsageError: Folds or seeds do not fit, a fold has nothing to test, or a folder holds a run of other options or
            of another table.
    """
    if folds is None and not seeds:
        raise UsageError('--folds or --seeds must be given, or both, got neither.')
    if seeds is not None and len(set(seeds)) != len(seeds):
        raise UsageError(f'--seeds must differ, got {" ".join(map(str, seeds))}.')
    splits = cfg.dataset.get('split_file')
    given = splits or '%d' in (cfg.dataset.get('columns') or {}).get('split', '')  # by the user, in files or columns
    if folds is not None and folds < (1 if given else 3):
        need = 'at least 1' if given else 'at least 3, for training, validation and test'
        raise UsageError(f'--folds must be {need}, got {folds}.')
    if folds is not None and splits and '%d' not in splits:
        raise UsageError(f'dataset.split_file must name the file of each of --folds by %d, got {splits}.')
    all_folds: list[int | None] = [None] if folds is None else [*range(folds)]
    configs = {}
    for trial in [Trial(fold, seed) for fold in all_folds for seed in ([*seeds] if seeds else [None])]:
        changed = copy.deepcopy(cfg)
        changed.work_dir = str(Path(cfg.work_dir, trial.name))
        if trial.seed is not None:
            changed.randomness = dict(cfg.get('randomness', {}), seed=trial.seed)
        if trial.fold is not None:
            changed.dataset.update(fold=trial.fold, folds=None if given else folds)
        configs[trial] = changed
    for changed in {trial.fold: changed for trial, changed in configs.items()}.values():
        check_test(changed)
    for changed in configs.values():
        check_run(changed)
    return configs


def repeat(configs: Mapping[Trial, 'Config']) -> dict[Trial, dict[str, float]]:
    """Train and test what `plan` has planned; the metrics of each trial on its test data.

    Raises:
        UsageError: Something is not as a run needs it; the sentence names the trial.
    """
    return {trial: train_and_test(config) for trial, config in configs.items()}


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


def summarise(results: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
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
