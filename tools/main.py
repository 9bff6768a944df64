# SPDX-License-Identifier: Apache-2.0
"""The command `vssm`; each of its subcommands is a module of this package."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from ..version import __version__
from ._common import UsageError

COMMANDS = (
    'demo',
    'train',
    'test',
    'predict',
    'info',
    'report',
    'convert',
    'download',
    'configs',
    'erf',
    'cam',
    'wsi-check',
    'wsi-repeat',
    'wsi-compare',
    'wsi-heatmap',
    'wsi-embed',
    'wsi-km',
    'zoo',
    'env',
)

# Optional packages, and the extras that bring them.
EXTRAS = {
    'mmengine': 'train',
    'mmcv': 'mmlab',
    'mmdet': 'mmlab',
    'mmseg': 'mmlab',
    'sklearn': 'demo',
    'matplotlib': 'demo',
    'pytorch_grad_cam': 'plot',
    'gdown': 'hub',
    'huggingface_hub': 'hub',
    'h5py': 'wsi',
    'torchmetrics': 'wsi',
    'torchsurv': 'wsi',
    'lifelines': 'wsi',
    'scipy': 'wsi',
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser('vssm', description='Vision state-space models for timm.')
    parser.add_argument('--version', action='version', version=f'vssm {__version__}')
    subparsers = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    for name in COMMANDS:
        module = importlib.import_module(f'.{name.replace("-", "_")}', __package__)
        words = module.__doc__ or ''
        subparser = subparsers.add_parser(
            name,
            help=words.splitlines()[0],
            description=words,
            epilog=f'example:\n  {module.EXAMPLE}',
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status, 2 for bad input."""
    args = make_parser().parse_args(argv)
    try:
        return args.run(args)
    except UsageError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        package = (error.name or '').partition('.')[0]
        if package not in EXTRAS:
            raise
        message = (
            f'this needs the package {package}, which is not installed: run `pip install .[{EXTRAS[package]}]` in a '
            'clone of vssm.'
        )
    except ImportError as error:
        if 'libGL' not in str(error):
            raise
        message = (
            'opencv-python, which mmengine imports, misses libGL.so.1 on this machine: run '
            '`pip install --no-deps --force-reinstall opencv-python-headless`.'
        )
    except KeyboardInterrupt:
        return 130
    print(f'vssm {args.command}: {message}', file=sys.stderr)
    return 2


if __name__ == '__main__':
    sys.exit(main())
