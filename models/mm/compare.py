# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint and a config belong together: the config that the checkpoint notes is read, and never run."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner

from ..weights.read import is_safetensors
from .hooks import note_data
from .saved import read_notes
from .sources import local_file

__all__ = [
    'check_data',
    'check_network',
    'check_optimizer',
    'check_position',
    'name_optimizers',
    'other_options',
    'reasons_to_stop',
]

COUNTS = 'optim_wrapper.accumulative_counts'
NOT_SET = 'not set'

# What says where a run writes, and how it is started and watched.
_ASIDE = {
    'experiment_name',
    'force',
    'launcher',
    'load_from',
    'log_level',
    'resume',
    'vis_backends',
    'visualizer',
    'work_dir',
}

# What changes the time that a run takes, or what it tells, and not its results.
_NO_RESULT = re.compile(
    r'custom_imports|default_hooks\.(checkpoint|logger|progress)\.|device$|env_cfg|log_processor|num_threads|dataset\.cache|'
    r'\w+_dataloader\.(num_workers|persistent_workers|pin_memory|prefetch_factor|dataset\.cache)'
)

# Parts of a model's config that steer its training and its test, and leave the network what it is.
_NO_NETWORK = re.compile(
    r'\.(alpha|batch_augments|channels_last|frozen_stages|init_cfg|label_smoothing|mixup|non_blocking|norm_eval|'
    r'pretrained|random_erasing|test_cfg|train_cfg|with_cp|[^.]*(drop|loss)[^.]*)(\.|$)'
)


def flat_config(text: Any) -> dict[str, str] | None:
    """The values of a config by their dotted keys, as texts.

    Args:
        text: What mmengine's `Config.pretty_text` makes of the config; None if a checkpoint has none.

    Returns:
        Keys and values; None where the text is none, or no Python.
    """
    if not isinstance(text, str):
        return None
    try:
        statements = [s for s in ast.parse(text).body if isinstance(s, ast.Assign)]
        return dict(entry for s in statements for entry in _flatten(ast.unparse(s.targets[0]), s.value))
    except (MemoryError, RecursionError, SyntaxError, ValueError):  # as ast says that it is no Python
        return None


def _flatten(key: str, node: ast.expr) -> Iterator[tuple[str, str]]:
    items: list[tuple[Any, ast.expr]] = []
    if isinstance(node, ast.Call) and ast.unparse(node.func) == 'dict' and not node.args:
        items = [(keyword.arg, keyword.value) for keyword in node.keywords]
    elif isinstance(node, ast.Dict):
        items = [(ast.unparse(k).strip('"\''), value) for k, value in zip(node.keys, node.values, strict=True) if k]
    elif isinstance(node, ast.List | ast.Tuple) and any(isinstance(e, ast.Call | ast.Dict) for e in node.elts):
        items = list(enumerate(node.elts))
    if not items:
        yield key, ast.unparse(node)
    for name, value in items:
        yield from _flatten(f'{key}.{name}', value)


def differences(saved: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """What differs between two configs, by key: 'saved -> now'."""
    return {
        key: f'{_short(saved.get(key, NOT_SET))} -> {_short(now.get(key, NOT_SET))}'
        for key in {**saved, **now}
        if saved.get(key) != now.get(key) and key.partition('.')[0] not in _ASIDE
    }


def _short(text: str) -> str:
    return text if len(text) <= 80 else f'{text[:77]}...'


def other_models(changes: dict[str, str]) -> list[str]:
    """Those of `differences` that make another network of the model, even one whose weights have the same shapes."""
    return [
        f'{key}: {change}'
        for key, change in changes.items()
        if key.startswith('model.') and not _NO_NETWORK.search(key)
    ]


def other_options(text: Any, cfg: Config) -> list[str]:
    """What a checkpoint's config says that makes its run another one than this config's, a line for each key.

    Args:
        text: The config that the checkpoint notes.
        cfg: The config of now. How its data are loaded and its work is told may differ.
    """
    saved, now = flat_config(text), flat_config(cfg.pretty_text)
    if saved is None or now is None:
        return ['its config cannot be read']
    return [f'{key}: {change}' for key, change in differences(saved, now).items() if not _NO_RESULT.match(key)]


def check_data(runner: Runner, meta: dict[str, Any]) -> list[str]:
    """Why a run would not go on with the data that it began with, if so, as far as the checkpoint notes them."""
    saved, now = (json.loads(notes.get('data', '{}')) for notes in (meta, note_data(runner)))
    changes = [
        f'{key}: {_short(str(saved[key]))} -> {_short(str(now.get(key)))}'
        for key in saved
        if saved[key] != now.get(key)
    ]
    return [f'other data ({"; ".join(changes)})'] if changes else []


def reasons_to_stop(runner: Runner, path: Path, checkpoint: dict[str, Any]) -> list[str]:
    """Say each difference of a run's config to that of the checkpoint that it resumes from, in a line.

    Returns:
        Why the run would go wrong if it went on nevertheless.
    """
    meta = checkpoint['meta']
    saved, now = flat_config(meta.get('cfg')), flat_config(runner.cfg.pretty_text)
    if saved is None or now is None:
        runner.logger.warning(f'The config of {path} cannot be read, and is not compared with this one.')
        saved, now = {}, {}
    changes = differences(saved, now)
    if changes:
        runner.logger.warning(f'The config is not that of {path}, which said:')
    for key, change in changes.items():
        stays = key.startswith(('optim_wrapper.optimizer.', 'param_scheduler.'))
        runner.logger.warning(f'{key}: {change}{" (stays as it was saved)" if stays else ""}')

    reasons = [f'another model ({line})' for line in other_models(changes)[:1]]
    reasons += _other_batches(meta.get('processes'), runner.world_size, saved, now)
    averages = any(isinstance(hook, EMAHook) for hook in runner.hooks)
    if averages != ('ema_state_dict' in checkpoint):
        has, lacks = ('the config', 'the checkpoint') if averages else ('the checkpoint', 'the config (EMAHook)')
        reasons.append(f'{has} has a moving average of the weights, and {lacks} has none')
    schedulers = [key for key in changes if re.fullmatch(r'param_scheduler(\.\d+)?(\.type)?', key)]
    reasons += [f'another schedule ({key}: {changes[key]})' for key in schedulers[:1]]
    return reasons


def _other_batches(processes: int | None, now: int, saved_cfg: dict[str, str], cfg: dict[str, str]) -> list[str]:
    """Why iterations before and after would not be of the same images, and which options would make steps so."""
    key = 'train_dataloader.batch_size'
    sizes = [config.get(key, '') for config in (saved_cfg, cfg)]
    if processes in (None, now) and sizes[0] == sizes[1]:
        return []
    processes = processes or now
    before, after = (
        f'{count} process{"es" * (count > 1)}' + f' of {size} images' * bool(size)
        for count, size in zip((processes, now), sizes, strict=True)
    )
    ways = []
    if all(re.fullmatch('[1-9][0-9]*', size) for size in sizes):
        images, images_now = processes * int(sizes[0]), now * int(sizes[1])
        steps, rest = divmod(images * int(saved_cfg.get(COUNTS, '1')), images_now)
        if images % now == 0 and images != images_now:
            ways.append(f'{key}={images // now}')
        if rest == 0 and steps != int(cfg.get(COUNTS, '1')):
            ways.append(f'{COUNTS}={steps} with a schedule of as many more iterations')
    way = f', where {", or ".join(ways)}, keeps the images of a step' if ways else ''
    return [f'another batch (before {before}, now {after}{way})']


def check_position(runner: Runner, meta: dict[str, Any]) -> list[str]:
    """Why the epochs before and after would not be of the same iterations, if so: with other data, for one."""
    if not isinstance(runner.train_loop, EpochBasedTrainLoop):
        return []
    length = len(runner.train_dataloader)
    if meta['iter'] == meta['epoch'] * length:
        return []
    return [f'other epochs (iteration {meta["iter"]} after {meta["epoch"]} epochs, which now have {length} each)']


def name_optimizers(wrapper: OptimWrapper | OptimWrapperDict) -> str:
    """The classes of a run's optimizers."""
    if isinstance(wrapper, OptimWrapperDict):
        return ', '.join(f'{name} {name_optimizers(part)}' for name, part in wrapper.items())
    return type(wrapper.optimizer).__name__


def check_optimizer(runner: Runner, path: Path, meta: dict[str, Any]) -> None:
    """Refuse the state of another optimizer, which PyTorch would take.

    Raises:
        ValueError: It is of another one, by name.
    """
    saved, now = meta.get('optimizer'), name_optimizers(runner.optim_wrapper)
    if saved is None:  # in a checkpoint of mmengine's own Runner
        configs = [flat_config(text) or {} for text in (meta.get('cfg'), runner.cfg.pretty_text)]
        saved, now = (config.get('optim_wrapper.optimizer.type', '').strip("'") for config in configs)
    if saved and saved != now:
        raise ValueError(
            f'checkpoint {path} must hold the state of {now}, got one of {saved}: load_from={path} without --resume '
            'starts a training from its weights alone.'
        )


def check_network(runner: Runner, path: str | Path) -> None:
    """Refuse a checkpoint whose run had another network, even one of the same shapes, unless the config has `force`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read safely, or it belongs to another network.
    """
    with local_file(path) as file:
        notes = {} if is_safetensors(file) else read_notes(file)
    if 'run' not in notes or runner.cfg.get('force', False):  # published files have other configs of the same network
        return
    saved, now = flat_config(notes.get('cfg')), flat_config(runner.cfg.pretty_text)
    if saved is None or now is None:
        return
    inner = 'model.module.'  # of a model that merges predictions
    wrapped = {f'model.{key.removeprefix(inner)}': now[key] for key in now if key.startswith(inner)}
    others = other_models(differences(saved, wrapped or now))
    if isinstance(runner._train_loop, BaseLoop):  # which starts from these weights, and may change all but the network
        others = [line for line in others if line.partition(':')[0].endswith('.model_name')]
    if others:
        raise ValueError(f'checkpoint {path} must be one of this model, got {"; ".join(others[:3])}. --force loads it.')
