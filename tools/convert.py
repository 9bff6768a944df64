# SPDX-License-Identifier: Apache-2.0
"""Convert a published checkpoint, or one of a training, to safetensors under our names.

Takes VMamba's, 2DVMamba's and Spatial-Mamba's files, those of their detectors and segmentors, from which it keeps the
backbone, and those of our own runs. The metadata of OUT say what it is and where it is from. No code in IN is run.
"""

import argparse
import sys
from pathlib import Path

from ..models.weights import WEIGHTS, convert
from ._common import UsageError, console
from ._models import find_model

EXAMPLE = 'vssm convert vssm1_tiny_0230s_ckpt_epoch_264.pth vmamba_tiny.safetensors'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('source', metavar='IN', type=Path, help='a .pth or .safetensors file')
    parser.add_argument('target', metavar='OUT', type=Path, help='the .safetensors file to write')
    parser.add_argument('--model', metavar='NAME', help='the model that IN holds (default: told by names and shapes)')
    parser.add_argument(
        '--weights',
        choices=WEIGHTS,
        default='auto',
        help='which of those in IN: averaged ones are model_ema (default: auto, which is those where there are any)',
    )
    parser.add_argument('--force', action='store_true', help='replace OUT')


def run(args: argparse.Namespace) -> int:
    if args.target.exists() and not args.force:
        raise UsageError(f'OUT must not exist, got {args.target}; --force replaces it.')
    model = args.model and find_model(args.model)
    try:
        metadata, twins, left_out = convert(args.source, args.target, model, args.weights)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    arguments = '' if metadata['model_args'] == '{}' else f' with {metadata["model_args"]}'
    lines = [
        f'Wrote {args.target}: {metadata["model"]}{arguments}, weights: {metadata["weights"]}',
        f'{metadata["source"]} has sha256 {metadata["sha256"]}',
    ]
    if twins:
        names = ', '.join(twins)
        lines.append(
            f'Taken for {metadata["model"]}; {names} has the same names and shapes: --model {twins[0]} if it is that.'
        )
    if left_out:
        lines.append(f'Left out what is not the network: {left_out[0]}{", ..." if len(left_out) > 1 else ""}')
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['convert', *sys.argv[1:]]))
