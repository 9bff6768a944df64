# SPDX-License-Identifier: Apache-2.0
"""Evaluate a checkpoint on the test data of a config."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.files import state_of
from ._common import UsageError, add_run_arguments, build_runner, follow_checkpoint, read_config
from ._tables import print_table

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

EXAMPLE = 'vssm test digits/vmamba2d_test work_dirs/digits/vmamba2d_test/checkpoint.safetensors'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', metavar='CONFIG', help='name, as in `vssm configs`, or path of a config')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', type=Path, help='a .safetensors or .pth file')
    parser.add_argument(
        '--tta', action='store_true', help='test on several scales and flips, where the config has them'
    )
    parser.add_argument(
        '--force',
        action='store_true',
        help='test even a checkpoint that notes another model, or other options of slides',
    )
    parser.add_argument(
        '--bootstrap',
        metavar='N',
        type=int,
        default=0,
        help='of slides: 95 %% intervals of the metrics, by N resamplings of the cases, such as 1000',
    )
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if not args.checkpoint.is_file():
        raise UsageError(
            f'checkpoint {args.checkpoint} {state_of(args.checkpoint)}; `vssm train {args.config}` makes one.'
        )
    cfg = read_config(args)
    if args.tta:
        if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
            raise UsageError(f'--tta needs a config with tta_model and tta_pipeline, got {args.config}.')
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = dict(**cfg.tta_model, module=cfg.model)
    follow_checkpoint(cfg, args.checkpoint, args.cfg_options, args.force)
    if args.bootstrap:
        _set_bootstrap(cfg, args)
    cfg.load_from = str(args.checkpoint)
    cfg.resume, cfg.force = False, args.force
    runner = build_runner(cfg)
    from ..models.mm import RunError

    try:
        metrics = runner.test()
    except RunError as error:
        raise UsageError(str(error)) from error
    if runner.rank == 0:
        header = ['metric', 'value', *(['95 % interval'] if args.bootstrap else [])]
        print_table(header, list(_rows(metrics)))
        _print_confusion(runner)
    return 0


def _set_bootstrap(cfg: 'Config', args: argparse.Namespace) -> None:
    if args.bootstrap < 0:
        raise UsageError(f'--bootstrap must be at least 1, got {args.bootstrap}.')
    if cfg.get('dataset', {}).get('type') != 'SlideDataset' or isinstance(cfg.test_evaluator, list):
        raise UsageError(
            f'--bootstrap needs a config whose dataset is a SlideDataset, with one metric, got {args.config}.'
        )
    cfg.test_evaluator.bootstrap = args.bootstrap


def _rows(metrics: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    """The metrics as a table, each with its interval where it has one."""
    for name, value in metrics.items():
        if not name.endswith('%'):  # the ends of an interval
            ends = [metrics[name + end] for end in ('_2.5%', '_97.5%') if name + end in metrics]
            yield name, _number(value), *([' to '.join(map(_number, ends))] if ends else [])


def _number(value: float) -> str:
    return f'{value:.2f}' if abs(value) > 1 else f'{value:.4f}'  # per cent, or else shares of 1


def _print_confusion(runner: 'Runner') -> None:
    """Show which classes slides were taken for, where the test has noted it."""
    for classes, matrix in filter(None, (getattr(hook, 'confusion', None) for hook in runner.hooks)):
        rows = [(name, *map(str, counts)) for name, counts in zip(classes, matrix.tolist(), strict=True)]
        print_table(['class', *(f'as {name}' for name in classes)], rows)


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['test', *sys.argv[1:]]))
