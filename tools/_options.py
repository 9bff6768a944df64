# SPDX-License-Identifier: Apache-2.0
"""Changes to a config on the command line: read as mmengine reads them, and refused where nothing would take them."""

import argparse
import ast
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine.config import Config

# What a config may have at its top beside the arguments of mmengine's Runner: what it and ours read from the config.
_TOP_KEYS = {
    *('activation_checkpointing', 'compile', 'custom_imports', 'dataset', 'device', 'efficient_conv_bn_eval'),
    *('find_unused_parameters', 'force', 'model_wrapper_cfg', 'num_threads', 'runner_type', 'sync_bn'),
    *('tta_model', 'tta_pipeline', 'unreadable'),
}
_MMENGINE_HOOKS = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')


# ---- reading ---------------------------------------------------------------------------------------------------------


def parse_option(option: str) -> tuple[str, Any]:
    """Split KEY=VALUE and read the value as mmengine's DictAction does, which most scripts of its family use.

    It knows numbers, true, false, None, inf, and lists as a,b or [a,b] or (a,b). Python's own notation means more where
    DictAction would drop it: dictionaries, and quotes, which keep blanks and make words of numbers.

    Raises:
        ValueError: It is not of this form.
    """
    from mmengine.config import DictAction

    key, equals, text = option.partition('=')
    if not key or not equals:
        raise ValueError(f'--cfg-options must be KEY=VALUE, such as train_cfg.max_epochs=2, got {option!r}.')
    try:
        value = ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):
        pass
    else:
        if isinstance(value, str | dict | list) or (isinstance(value, tuple) and text.strip().startswith('(')):
            return key, value
    words = re.search(r'[^\s,([]\s+[^\s,)\]]', text)  # a blank within a word, which DictAction would drop
    brackets = all(text.count(start) == text.count(end) for start, end in ('()', '[]'))
    if '{' in text or 'dict(' in text or not brackets or (words and re.search(r'[,([]', text)):
        raise ValueError(
            f'--cfg-options values in brackets must be Python literals or words without blanks, got {option!r}.'
        )
    if words:
        return key, text
    options = argparse.Namespace()
    DictAction([], dest='options')(argparse.ArgumentParser(), options, [option])
    return key, options.options[key]


# ---- checking --------------------------------------------------------------------------------------------------------


def check_options(cfg: 'Config', options: Mapping[str, Any]) -> None:
    """Refuse changes that would have no effect, and values of another kind than those that they replace.

    A key that is new must be one that its dictionary is read for. Which these are, the signature of what is built from
    the dictionary says. Where that takes anything, as a model does, any key may be new; then a note says so if a key
    that is there is nearly the same.

    Args:
        cfg: Config before the changes.
        options: New values by dotted keys.

    Raises:
        ValueError: A key has no effect, or a value is of another kind.
    """
    content = cfg.to_dict()
    for key, value in options.items():
        *above, last = key.split('.')
        if last in ('type', 'constructor', 'ema_type', 'by_epoch'):  # they decide which other keys there may be
            _put(content, above, last, value)
    for key, value in options.items():
        _check_option(content, key, value, options)


def _put(node: Any, path: Sequence[str], last: str, value: Any) -> None:
    for name in path:
        if isinstance(node, list) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        else:
            node = node.get(name) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node[last] = value


def _check_option(content: dict[str, Any], key: str, value: Any, options: Mapping[str, Any]) -> None:
    node: Any = content
    *above, last = key.split('.')
    path: tuple[str, ...] = ()
    for name in (*above, last):
        here = '.'.join(path)
        if isinstance(node, list | tuple):
            if not name.isdigit() or int(name) >= len(node):
                raise ValueError(f'--cfg-options {key}: {here} has entries 0 to {len(node) - 1}, got {name!r}.')
            old = node[int(name)]
        elif isinstance(node, dict):
            defaults, closed = _takes(content, path, node)
            names = {*defaults, *(node if path else ())}
            if closed and name not in names and not (here == 'default_hooks' and f'{here}.{name}.type' in options):
                what = f'{here} takes' if path else 'what reads the config takes'
                raise ValueError(f'--cfg-options {key}: {what} no {name!r}.{_nearest(name, path, names, content)}')
            near = difflib.get_close_matches(name, node, n=1, cutoff=0.85)
            if name not in node and name not in defaults and near:
                print(f'note: {key} is new to the config, where {here} has {near[0]!r}.', file=sys.stderr)
            old = node.get(name)
            default = defaults.get(name)
            if isinstance(default, str) and isinstance(value, str):
                return  # such as loss_scale='dynamic' in place of a number
            old = default if old is None else old
        else:
            return  # merging the change says what is wrong
        path = (*path, name)
        node = {} if old is None and len(path) <= len(above) else old  # a dictionary that the change begins
    need = _misfit(node, value)
    if need:
        raise ValueError(f'--cfg-options {key} must be {need}, as {_short(node)} in its place is, got {value!r}.')


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


def _misfit(old: Any, new: Any) -> str | None:
    """What a value must be to take the place of another; None if it can."""
    if old is None or new is None or isinstance(old, type):  # a signature's mark of no default is a type
        return None
    if isinstance(old, bool):
        return None if isinstance(new, int) and new in (0, 1) else 'True or False'  # True and False are 1 and 0
    if isinstance(old, int | float):
        return 'a number' if isinstance(new, str | bool | dict) else None
    if isinstance(old, dict):
        return 'a dictionary' if isinstance(new, str | int | float) else None
    return None


def _nearest(name: str, path: Sequence[str], names: set[str], content: dict[str, Any]) -> str:
    """A hint at the key that was meant: of the same dictionary, or for one at the top of any."""
    everywhere: dict[str, str] = {}
    if not path:
        for key in _keys(content):
            everywhere.setdefault(key.rpartition('.')[2], key)
    close = difflib.get_close_matches(name, names, n=1)
    if close and name not in everywhere:
        return f' Did you mean {".".join((*path, close[0]))!r}?'
    close = difflib.get_close_matches(name, everywhere, n=1)
    return f' Did you mean {everywhere[close[0]]!r}?' if close else ''


def _keys(node: Any, prefix: str = '') -> Iterator[str]:
    """The dotted keys of all that the reader of a config takes, with the dictionaries on the way."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    for name, value in pairs:
        if prefix or name in top_keys():
            yield f'{prefix}{name}'
            yield from _keys(value, f'{prefix}{name}.')


def top_keys() -> set[str]:
    from mmengine.runner import Runner

    return {*list(inspect.signature(Runner.__init__).parameters)[1:], *_TOP_KEYS} - {'cfg'}


# ---- what takes a dictionary -----------------------------------------------------------------------------------------


def _takes(content: dict[str, Any], path: Sequence[str], node: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The names that a dictionary is read for, with their defaults; and whether it is read for no others."""
    names = [name for name in path if not name.isdigit()]
    if not names:
        return dict.fromkeys(top_keys()), True
    if len(names) == 1:
        plain = _plain(names[0], node)
        if plain is not None:
            return plain, True
    kind = _built_from(content, names, node)
    if kind is None:
        return {}, False
    own = _signature(kind.__init__ if inspect.isclass(kind) else kind)[0]
    if names[0] in ('model', 'tta_model'):  # which gives arguments on to networks
        return own, False
    taken = _constructor(kind, node)
    if taken is None:
        return own, False
    beside = {'type': None, '_delete_': None, '_scope_': None}
    if names[-1] == 'optim_wrapper':
        beside |= dict.fromkeys(('optimizer', 'constructor', 'paramwise_cfg'))
    elif names[-1] == 'optimizer':
        beside |= dict.fromkeys(('layer_decay',))
    elif names[-1] == 'param_scheduler':
        beside |= dict.fromkeys(('convert_to_iter_based',))
    return taken | beside, True


def _plain(name: str, node: dict[str, Any]) -> dict[str, Any] | None:
    """What a dictionary without a type is read for; None for any other."""
    from mmengine.registry import LOOPS
    from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, TestLoop, ValLoop
    from torch.utils.data import DataLoader

    if name in ('train_cfg', 'val_cfg', 'test_cfg'):
        by_epoch = EpochBasedTrainLoop if node.get('by_epoch', True) else IterBasedTrainLoop
        loop = (
            LOOPS.get(node['type']) if 'type' in node else dict(val_cfg=ValLoop, test_cfg=TestLoop).get(name, by_epoch)
        )
        taken = _constructor(loop, node) if loop is not None else None
        return taken and {**taken, 'type': None, 'by_epoch': None}
    if name.endswith('_dataloader'):
        taken, _ = _signature(DataLoader.__init__)
        return {**taken, 'num_batch_per_epoch': None}
    if name == 'randomness':
        return _signature(Runner.set_randomness)[0]
    if name == 'default_hooks':
        from ..models.mm.runner import OWN_HOOKS

        return dict.fromkeys((*_MMENGINE_HOOKS, *OWN_HOOKS))
    known = dict(
        auto_scale_lr=('enable', 'base_batch_size'),
        env_cfg=('cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'),
    )
    return dict.fromkeys(known[name]) if name in known else None


def _built_from(content: dict[str, Any], names: Sequence[str], node: dict[str, Any]) -> Any:
    """What a dictionary's type names, a class or a function; None if that is not known."""
    from mmengine import registry

    registries = dict(
        model=registry.MODELS,
        tta_model=registry.MODELS,
        default_hooks=registry.HOOKS,
        custom_hooks=registry.HOOKS,
        dataset=registry.DATASETS,
        datasets=registry.DATASETS,
        sampler=registry.DATA_SAMPLERS,
        batch_sampler=registry.DATA_SAMPLERS,
        pipeline=registry.TRANSFORMS,
        transforms=registry.TRANSFORMS,
        val_evaluator=registry.METRICS,
        test_evaluator=registry.METRICS,
        optim_wrapper=registry.OPTIM_WRAPPERS,
        optimizer=registry.OPTIMIZERS,
        param_scheduler=registry.PARAM_SCHEDULERS,
        log_processor=registry.LOG_PROCESSORS,
        visualizer=registry.VISUALIZERS,
    )
    where = names[0] if names[0] in ('model', 'tta_model', 'default_hooks') else names[-1]
    kind = node.get('type')
    if kind is None and where == 'dataset':
        kind = content.get('dataset', {}).get('type')  # what all data sets share
    elif kind is None:
        kind = dict(optim_wrapper='OptimWrapper', log_processor='LogProcessor', visualizer='Visualizer').get(where)
    if where not in registries or not isinstance(kind, str):
        return None
    if where == 'optimizer' and content['optim_wrapper'].get('constructor') == 'TimmOptimWrapperConstructor':
        from timm.optim import get_optimizer_class

        try:
            return get_optimizer_class(kind, bind_defaults=False)
        except ValueError:
            return None
    with registries[where].switch_scope_and_registry(content.get('default_scope')) as found:
        return found.get(kind)


def _signature(function: Callable) -> tuple[dict[str, Any], bool]:
    """The names of a function's arguments with their defaults, and whether it takes others by name."""
    parameters = list(inspect.signature(function).parameters.values())
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {p.name: p.default for p in parameters if p.kind in named and p.name != 'self'}
    return names, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _constructor(kind: Any, node: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a class, of its bases too where it takes any by name; None where the bases take any."""
    from mmengine.hooks import CheckpointHook, EMAHook
    from mmengine.registry import MODELS

    if not inspect.isclass(kind):
        return None
    names: dict[str, Any] = {}
    for base in inspect.getmro(kind):
        if base is object or '__init__' not in vars(base):
            continue
        own, more = _signature(vars(base)['__init__'])
        names = {**own, **names}
        if base is CheckpointHook:  # the others are for `save_checkpoint`, which takes this one
            return {**names, 'meta': None}
        if base is EMAHook:
            average = MODELS.get(node.get('ema_type', names['ema_type']))
            more_names = _constructor(average, node) if average is not None else None
            return more_names and {**names, **more_names}
        if not more:
            return names
    return None
