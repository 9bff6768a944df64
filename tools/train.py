# SPDX-License-Identifier: Apache-2.0
"""Train what a config describes.

The work dir receives the config as it ran, a log, the curves as lines of JSON and for TensorBoard, and the checkpoints.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.files import state_of
from ._common import UsageError, add_run_arguments, build_runner, console, read_config

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

EXAMPLE = 'vssm train digits/vmamba2d_test --cfg-options train_cfg.max_epochs=5 optim_wrapper.optimizer.lr=1e-3'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', metavar='CONFIG', help='name, as in `vssm configs`, or path of a config')
    add_run_arguments(parser)
    parser.add_argument(
        '--resume',
        metavar='FILE',
        nargs='?',
        const=True,
        help="after CONFIG: go on from a checkpoint; without FILE from the last of the work dir's run, if there is one",
    )
    parser.add_argument(
        '--force', action='store_true', help='go on even from a checkpoint of another model, batch, schedule or average'
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='begin a new run in a work dir that holds the checkpoints of another'
    )
    parser.add_argument('--amp', action='store_true', help='compute in bfloat16 by autocast')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate to the images of a step, linearly'
    )


def run(args: argparse.Namespace) -> int:
    cfg = read_config(args)
    from ..models.mm import RunError

    cfg.force = args.force
    check_work_dir(Path(cfg.work_dir), used=args.overwrite or args.resume is not None)
    if args.resume is not None:
        cfg.resume = 'auto'
        if args.resume is not True:
            cfg.resume, cfg.load_from = True, args.resume
    if args.amp:
        _use_bfloat16(cfg)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UsageError(f'--auto-scale-lr needs a config with auto_scale_lr.base_batch_size, got {args.config}.')
        cfg.auto_scale_lr.enable = True
    runner = build_runner(cfg)
    try:
        runner.train()
    except RunError as error:
        raise UsageError(str(error)) from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(_how_to_go_on(runner, args.overwrite)) from error
    if runner.rank == 0:
        console.print(f'Written to {runner.work_dir}', highlight=False, soft_wrap=True)
    return 0


def check_work_dir(path: Path, used: bool) -> None:
    """Refuse to write over the checkpoints of an earlier run.

    Args:
        path: The work dir, which need not be there.
        used: Whether it may hold checkpoints.

    Raises:
        UsageError: It holds some, or is no folder.
    """
    from ..models.mm.saved import weights_in

    if path.exists() and not path.is_dir():
        raise UsageError(f'--work-dir must be a folder, got {path}, which {state_of(path)}.')
    files = weights_in(path) if path.is_dir() and not used else []
    if files:
        raise UsageError(
            f'{path} holds files of an earlier run ({", ".join(files[:3])}{" ..." * (len(files) > 3)}): --resume goes '
            'on from its last checkpoint, --overwrite begins a new run there, --work-dir names another folder.'
        )


def _how_to_go_on(runner: 'Runner', overwrite: bool) -> str:
    last = getattr(runner, '_last_checkpoint', None)
    if last is None:
        return 'interrupted before a checkpoint was written; the same command begins again.'
    option = '--resume in place of --overwrite' if overwrite else '--resume'
    return f'interrupted; the same command with {option} goes on from {last}.'


def _use_bfloat16(cfg: 'Config') -> None:
    wrapper = cfg.optim_wrapper
    if wrapper.get('type', 'OptimWrapper') not in ('OptimWrapper', 'BFloat16OptimWrapper'):
        raise UsageError(f'--amp needs a config whose optim_wrapper is an OptimWrapper, got {wrapper.type}.')
    wrapper.type = 'BFloat16OptimWrapper'


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['train', *sys.argv[1:]]))
