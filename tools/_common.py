# SPDX-License-Identifier: Apache-2.0
"""What the subcommands share: the console, the error for bad input, and configs by name."""

import argparse
import difflib
import importlib.metadata
import importlib.util
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .. import configs
from ..models.files import replacing, state_of

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

console = Console()


class UsageError(Exception):
    """Bad input; `main` prints the message alone and exits with 2."""


def config_dir() -> Path:
    return Path(configs.__file__).parent


def list_configs() -> list[str]:
    """Names of the shipped configs, such as 'digits/vmamba2d_test'."""
    paths = [path for path in config_dir().glob('*/**/*.py') if not path.name.startswith('_')]  # _NAME is shared
    return sorted(path.relative_to(config_dir()).with_suffix('').as_posix() for path in paths)


def find_config(name: str) -> Path:
    """A config by its path, or by its name among the shipped ones."""
    if name.endswith('.py'):
        if Path(name).is_file():
            return Path(name)
        raise UsageError(f'config {name} {state_of(name)}; `vssm configs` lists the shipped ones, which run by name.')
    names = list_configs()
    if name not in names:
        raise UsageError(
            f'config must be the path of a .py file or one of the names that `vssm configs` lists, got {name!r}.'
            f'{did_you_mean(name, names)}'
        )
    return config_dir() / f'{name}.py'


def did_you_mean(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f' Did you mean {close[0]!r}?' if close else ''


def write_file(path: Path, data: bytes) -> None:
    """Replace a file as a whole, or not at all.

    Raises:
        UsageError: It cannot be written.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise UsageError(f'{path} cannot be written: {error}') from error


def write_json(path: Path, content: Any) -> None:
    """Replace a file by what `to_json` says.

    Raises:
        UsageError: It cannot be written.
    """
    write_file(path, to_json(content).encode())


def to_json(content: Any) -> str:
    return json.dumps(content, indent=2) + '\n'


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that a training and a test share."""
    parser.add_argument('--work-dir', metavar='DIR', type=Path, help='where to write (default: work_dirs/CONFIG)')
    add_config_options(parser)
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        default='none',
        help='what started this process as one of several: torchrun is pytorch',
    )


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that change a config."""
    parser.add_argument('--data-root', metavar='DIR', help='folder of the data, in place of the one in the config')
    parser.add_argument(
        '--cfg-options',
        metavar='KEY=VALUE',
        nargs='+',
        default=[],
        help='changes to the config; values as mmengine reads them, 2, 1e-3, true, a,b or [a,b], or as in Python',
    )


def read_config(args: argparse.Namespace) -> 'Config':
    """The config that `args.config` and the options of `add_run_arguments`, or `add_config_options`, describe.

    Raises:
        UsageError: There is no such config, or an option does not fit it.
    """
    from ._options import check_options, parse_option

    path = find_config(args.config)
    try:
        options = dict(parse_option(option) for option in args.cfg_options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    cfg = load_config(args.config)
    try:
        check_options(cfg, options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if args.data_root is not None:
        _move_data(cfg, args.data_root)
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:
        raise UsageError(f'--cfg-options must fit {path}, got {" ".join(args.cfg_options)}: {error}') from error
    if 'launcher' in args:  # of what runs it
        name = path.stem if args.config.endswith('.py') else args.config
        cfg.work_dir = str(args.work_dir or Path('work_dirs', name))
        cfg.launcher = args.launcher
    return cfg


def load_config(name: str) -> 'Config':
    """A config by name or path, with its bases.

    Raises:
        UsageError: There is no such config.
        ImportError: A package that it imports is missing; the error is that of the package.
    """
    path = find_config(name)
    quieten_packages()
    _find_by_module()
    import mmengine.runner  # noqa: F401  # first: where only a config imports it in vain, mmengine hides the reason
    from mmengine.config import Config

    try:
        return Config.fromfile(path)
    except ModuleNotFoundError as error:
        if 'pkg_resources' in str(error):
            raise UsageError('mmengine needs pkg_resources: run `pip install "setuptools<82"`.') from error
        for package in ('mmdet', 'mmseg'):  # mmengine names the package of a base in its sentence alone
            if str(error).startswith(package):
                error.name = package
        raise
    except ImportError as error:
        reason: BaseException = error
        while reason.__context__ is not None and not isinstance(reason, ModuleNotFoundError):
            reason = reason.__context__  # behind the config's own imports mmengine hides the reason
        raise reason from None


def _find_by_module() -> None:
    """Let mmengine find `mmseg::` bases by the name of the module where no mmsegmentation is installed, but a fork."""
    from mmengine.config.utils import MODULE2PACKAGE

    for module, package in MODULE2PACKAGE.items():
        if package != module and not find_distribution(package) and importlib.util.find_spec(module) is not None:
            MODULE2PACKAGE[module] = module


def find_distribution(name: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def quieten_packages() -> None:
    """Silence warnings of mmengine, mmdet and mmseg that concern nobody but their authors."""
    about = 'pkg_resources is deprecated|.* be deprecated|Default ``avg_non_ignore``|The draw is False|'
    about += 'Warning: The .* is out of bounds'  # of an object at the rim, which is drawn as far as it goes
    warnings.filterwarnings('ignore', about, UserWarning)


def _move_data(cfg: 'Config', root: str) -> None:
    """Let all data sets and metrics look for their files in another folder."""
    if 'dataset' in cfg:  # the settings that all data sets share
        cfg.dataset.data_root = root
        return
    roots = {loader.dataset.get('data_root') for loader in (cfg.train_dataloader, cfg.val_dataloader)}
    if len(roots) != 1 or None in roots:
        raise UsageError(f'--data-root needs a config whose data sets share a data_root, got {roots}.')
    (before,) = roots
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        cfg[name].dataset.data_root = root
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        if str(evaluator.get('ann_file', '')).startswith(before):
            evaluator.ann_file = str(Path(root, Path(evaluator.ann_file).relative_to(before)))


def follow_checkpoint(cfg: 'Config', checkpoint: Path, options: Sequence[str] = (), force: bool = False) -> None:
    """Let a config for slides build what a checkpoint was trained with, and say what changes by that.

    Args:
        cfg: Config, of whatever task.
        checkpoint: Checkpoint that is tested.
        options: Options of the command line, KEY=VALUE, which must not contradict the checkpoint.
        force: Whether the options stand where they do.

    Raises:
        UsageError: They contradict it, or the checkpoint cannot be read or is of another task.
    """
    if cfg.model.get('type') not in ('SlideClassifier', 'SlideSurvival'):
        return
    from ..models.mm import RunError
    from ..models.mm.wsi_notes import follow_checkpoint as follow
    from ._options import parse_option

    try:
        sentences = follow(cfg, checkpoint, dict(parse_option(option) for option in options), force)
    except (RunError, ValueError) as error:
        raise UsageError(str(error)) from error
    for sentence in sentences:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def build_runner(cfg: 'Config') -> 'Runner':
    """The runner of a config.

    Raises:
        UsageError: A value in the config is not as its part needs it.
    """
    from mmengine.registry import RUNNERS

    if cfg.get('load_from') and cfg.get('resume') != 'auto' and not Path(cfg.load_from).is_file():
        raise UsageError(f'load_from must be a checkpoint, got {cfg.load_from}, which {state_of(cfg.load_from)}.')
    try:
        return RUNNERS.build(cfg)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:  # mmengine names what it was building
        raise UsageError(f'config {cfg.filename} cannot be built: {error}') from error
