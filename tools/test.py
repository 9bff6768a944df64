# SPDX-License-Identifier: Apache-2.0
"""Evaluate a checkpoint on the test data of a config."""

import argparse
import sys
from pathlib import Path

from ..models.files import state_of
from ._common import UsageError, add_run_arguments, build_runner, follow_checkpoint, read_config
from ._tables import print_table

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
    cfg.load_from = str(args.checkpoint)
    cfg.resume, cfg.force = False, args.force
    runner = build_runner(cfg)
    from ..models.mm import RunError

    try:
        metrics = runner.test()
    except RunError as error:
        raise UsageError(str(error)) from error
    if runner.rank == 0:
        rows = [
            (name, f'{value:.2f}' if abs(value) > 1 else f'{value:.4f}')  # per cent, or else shares of 1
            for name, value in metrics.items()
        ]
        print_table(['metric', 'value'], rows)
    return 0


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['test', *sys.argv[1:]]))
