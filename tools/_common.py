# SPDX-License-Identifier: Apache-2.0
"""What the subcommands share: the console, the error for bad input, and configs by name."""

import ast
import difflib
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional, Sequence

from rich.console import Console

from .. import configs
from ..models.backbone import ALIASES
from ..models.checkpoints import list_models

if TYPE_CHECKING:
    from mmengine.runner import Runner

console = Console()


class UsageError(Exception):
    """Bad input; `main` prints the message alone and exits with 2."""


def config_dir() -> Path:
    return Path(configs.__file__).parent


def list_configs() -> List[str]:
    """Names of the shipped configs, such as 'digits/vmamba2d_test'."""
    paths = [path for path in config_dir().glob('*/**/*.py') if not path.name.startswith('_')]  # what configs share
    return sorted(path.relative_to(config_dir()).with_suffix('').as_posix() for path in paths)


def find_config(name: str) -> Path:
    """A config by its path, or by its name among the shipped ones."""
    if name.endswith('.py'):
        if Path(name).is_file():
            return Path(name)
        raise UsageError(f'config {name} does not exist; `vssm configs` lists the shipped ones, which run by name.')
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


def find_model(name: str) -> str:
    """One of our models by its name, or by that of the paper's code, with or without a tag."""
    base = name.partition('.')[0]
    base = ALIASES.get(base, base)
    names = list_models()
    if base not in names:
        raise UsageError(
            f'NAME must be one of the models that `vssm info` lists, got {name!r}.{did_you_mean(name, names)}'
        )
    return base


def build_runner(config: str, work_dir: Optional[Path], cfg_options: Sequence[str], tta: bool = False) -> 'Runner':
    """The runner of a config.

    Args:
        config: Path or name.
        work_dir: Where the run writes, work_dirs/ and the config's name unless given.
        cfg_options: Changes to the config, each 'key.key=value', the value a Python literal or else a string.
        tta: Test on several scales and flips, as the config's tta_model and tta_pipeline say.
    """
    path = find_config(config)
    options = {}
    for option in cfg_options:
        key, equals, value = option.partition('=')
        if not key or not equals:
            raise UsageError(f'--cfg-options must be KEY=VALUE, such as train_cfg.max_epochs=2, got {option!r}.')
        try:
            options[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[key] = value

    import mmengine.runner  # first: where a config imports it in vain, mmengine hides the reason  # noqa: F401
    from mmengine.config import Config
    from mmengine.registry import RUNNERS

    try:
        cfg = Config.fromfile(path)
    except ModuleNotFoundError as error:
        if 'pkg_resources' in str(error):
            raise UsageError("mmengine needs pkg_resources: run `pip install 'setuptools<82'`.") from error
        for package in ('mmdet', 'mmseg'):  # of a base in them, which mmengine names in its sentence alone
            if str(error).startswith(package):
                error.name = package
        raise
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:
        raise UsageError(f'--cfg-options must fit {path}, got {" ".join(cfg_options)}: {error}') from error
    if tta:
        if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
            raise UsageError(f'--tta needs a config with tta_model and tta_pipeline, got {path}.')
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = dict(**cfg.tta_model, module=cfg.model)
    cfg.work_dir = str(work_dir or Path('work_dirs', path.stem if config.endswith('.py') else config))
    load_from = cfg.get('load_from')
    if load_from and not Path(load_from).is_file():
        raise UsageError(f'load_from must be a checkpoint, got {load_from}, which does not exist.')
    try:
        return RUNNERS.build(cfg)
    except (
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # which mmengine prefixes with what it was building
        raise UsageError(f'config {path} cannot be built: {error}') from error
