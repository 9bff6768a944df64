# SPDX-License-Identifier: Apache-2.0
"""The command `vssm`; each of its subcommands is a module of this package."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from ..version import __version__
from ._common import UsageError, find_distribution

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
    'data-check',
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

# Optional packages, and the extras that bring them: the first, unless another is that of the command or the config.
EXTRAS = {
    'mmengine': ('train', 'mmlab', 'wsi', 'demo'),
    'mmcv': ('mmlab',),
    'mmdet': ('mmlab',),
    'mmseg': ('mmlab',),
    'sklearn': ('demo',),
    'matplotlib': ('plot', 'wsi', 'demo'),
    'pytorch_grad_cam': ('plot',),
    'gdown': ('hub',),
    'huggingface_hub': ('hub',),
    'h5py': ('wsi',),
    'torchmetrics': ('wsi',),
    'torchsurv': ('wsi',),
    'lifelines': ('wsi',),
    'scipy': ('wsi',),
}
# How commands, and names of configs, begin, and the extra that has all that they need.
NEEDS = {'wsi': 'wsi', 'demo': 'demo', 'digits/': 'demo', 'coco/': 'mmlab', 'ade20k/': 'mmlab'}
# Packages of OpenMMLab, and their maintained forks, which have the same names in Python.
FORKS = dict(mmengine='onedl-mmengine', mmcv='onedl-mmcv', mmdet='onedl-mmdetection', mmseg='onedl-mmsegmentation')


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


def _how_to_install(package: str, args: argparse.Namespace) -> str:
    """What to run where an optional package is missing; quoted as every shell understands."""
    forks = [fork for fork in FORKS.values() if find_distribution(fork)]
    if package in FORKS and forks:  # the extra would put the originals in their place
        return (
            f'this needs the package {package}, which is not found beside {", ".join(forks)}: run '
            f'`pip install --no-deps {FORKS[package]}`.'
        )
    names = (args.command, str(getattr(args, 'config', '')))
    needed = [extra for start, extra in NEEDS.items() if any(name.startswith(start) for name in names)]
    extra = next((extra for extra in needed if extra in EXTRAS[package]), EXTRAS[package][0])
    return (
        f'this needs the package {package}, which is not installed: run `pip install ".[{extra}]"` in a clone of vssm.'
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status, 2 for bad input and 130 for Ctrl-C."""
    args = make_parser().parse_args(argv)
    status = 2
    try:
        return args.run(args)
    except UsageError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        package = (error.name or '').partition('.')[0]
        if package not in EXTRAS:
            raise
        message = _how_to_install(package, args)
    except ImportError as error:
        if 'libGL' not in str(error):
            raise
        message = (
            'opencv-python, which mmengine imports, misses libGL.so.1 on this machine: run '
            '`pip install --no-deps --force-reinstall opencv-python-headless`.'
        )
    except KeyboardInterrupt as error:
        message = str(error) or 'interrupted.'
        status = 130
    print(f'vssm {args.command}: {message}', file=sys.stderr)
    return status


if __name__ == '__main__':
    sys.exit(main())
