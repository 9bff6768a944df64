# SPDX-License-Identifier: Apache-2.0
"""Evaluate a checkpoint on the test data of a config."""

import argparse
import sys
from pathlib import Path

from rich.table import Table

from ._common import UsageError, build_runner, console

EXAMPLE = 'vssm test digits/vmamba2d_test work_dirs/digits/vmamba2d_test/checkpoint.safetensors'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', metavar='CONFIG', help='name, as in `vssm configs`, or path of a config')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', type=Path, help='a .safetensors or .pth file')
    parser.add_argument(
        '--tta', action='store_true', help='test on several scales and flips, where the config has them'
    )
    parser.add_argument('--work-dir', metavar='DIR', type=Path, help='where the log goes (default: work_dirs/CONFIG)')
    parser.add_argument(
        '--cfg-options', metavar='KEY=VALUE', nargs='+', default=[], help='changes to the config; values as in Python'
    )


def run(args: argparse.Namespace) -> int:
    if not args.checkpoint.is_file():
        raise UsageError(f'checkpoint {args.checkpoint} does not exist; `vssm train {args.config}` makes one.')
    runner = build_runner(args.config, args.work_dir, args.cfg_options, args.tta)
    try:
        runner.load_checkpoint(args.checkpoint)
    except ValueError as error:
        raise UsageError(str(error)) from error
    table = Table('metric', 'value')
    for name, value in runner.test().items():
        table.add_row(name, f'{value:.2f}')
    console.print(table)
    return 0


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['test', *sys.argv[1:]]))
