# SPDX-License-Identifier: Apache-2.0
"""Train what a config describes.

The work dir receives the config as it ran, a log, the curves as lines of JSON, and the checkpoints.
"""

import argparse
import sys
from pathlib import Path

from ._common import build_runner, console

EXAMPLE = 'vssm train digits/vmamba2d_test --cfg-options train_cfg.max_epochs=5 optim_wrapper.optimizer.lr=1e-3'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', metavar='CONFIG', help='name, as in `vssm configs`, or path of a config')
    parser.add_argument('--work-dir', metavar='DIR', type=Path, help='where to write (default: work_dirs/CONFIG)')
    parser.add_argument(
        '--cfg-options', metavar='KEY=VALUE', nargs='+', default=[], help='changes to the config; values as in Python'
    )


def run(args: argparse.Namespace) -> int:
    runner = build_runner(args.config, args.work_dir, args.cfg_options)
    runner.train()
    console.print(f'Written to {runner.work_dir}', highlight=False, soft_wrap=True)
    return 0


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['train', *sys.argv[1:]]))
