# SPDX-License-Identifier: Apache-2.0
"""What the checkpoint of a training on slides notes of its network and its data, and configs that follow it."""

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..mil import create_mil_model, current_name
from ..mil.tables import class_name
from ..weights import read_checkpoint
from ..weights.read import is_safetensors
from .saved import read_notes
from .utils import RunError
from .wsi_data import SlideDataset, table_digest, table_files

__all__ = ['follow_checkpoint']

# What a config has beside the arguments of the network, or what steers the training alone.
_BESIDE = ('alpha', 'class_weights', 'data_preprocessor', 'drop_rate', 'init_cfg', 'type')
# What names the columns of one table and divides it, and means nothing for another.
_OF_TABLE = ('columns', 'barcodes', 'split_file', 'folds', 'fold', 'fold_seed')


def follow_checkpoint(cfg: Config, path: Path, options: Mapping[str, Any], force: bool = False) -> list[str]:
    """Let the config of a test build the network, the classes and the split that a checkpoint was trained with.

    Folds are taken over only where the table is that of the training.

    Args:
        cfg: Config with a model and a test_dataloader for slides, which is changed.
        path: Checkpoint. One that notes nothing, such as a published file, changes nothing.
        options: Changes to the config that the user has asked for, by dotted keys.
        force: Whether these stand even where the checkpoint notes something else.

    Returns:
        Sentences on what is now another than in the config.

    Raises:
        RunError: The checkpoint is of another task, or the options contradict it.
        ValueError: The checkpoint cannot be read safely, or its notes are none of ours.
    """
    notes = read_checkpoint(path)[1] if is_safetensors(path) else read_notes(path)
    name = current_name(notes.get('model'))
    if name is None:
        return []
    dataset = {**cfg.get('dataset', {}), **cfg.test_dataloader.dataset}
    try:
        network = dict(json.loads(notes['model_args']), model_name=name)
        defaults = inspect.signature(type(create_mil_model(**network, device='meta'))).parameters
        data = json.loads(notes.get('data', '{}'))
        of_training = {**dataset, **{key: data[key] for key in ('split_file', 'fold') if key in data}}
        same_table = table_digest(table_files(**of_training)) == data.get('table')
        settings = {f'model.{key}': value for key, value in network.items()}
        settings |= _data_settings(data, dataset, path, same_table)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'checkpoint {path} must note a network and its data, got {notes}.') from error

    noted = {f'model.{name}': p.default for name, p in defaults.items()} | settings
    given = dict(_flat(options))
    others = [f'{key}={noted[key]}, not {value}' for key, value in given.items() if not _agrees(key, value, noted)]
    if others and not force:
        raise RunError(f'{path} was trained with {"; and ".join(others)}. Without this option it is taken from there.')
    kept = given if force else {}
    for name in [name for name in cfg.model if name in defaults]:
        settings.setdefault(f'model.{name}', None)
    changes = list(filter(None, [_set(cfg, key, value) for key, value in settings.items() if key not in kept]))
    sentences = [f'As in the training of {path}: {", ".join(changes)}'] if changes else []
    if data:
        sentences += _tell_table(data, dataset, path, same_table)
    return sentences


def _tell_table(data: dict[str, Any], dataset: Mapping[str, Any], path: Path, same_table: bool) -> list[str]:
    """What is to be known of the table of a test: whose it is, and whether cases are tested that were trained on."""
    if same_table:
        whole = dataset.get('split') == 'all'
        return ['All slides of the table are tested, those that were trained on too.'] if whole else []
    taken = f'classes {", ".join(data["classes"])}' if data['classes'] else 'model of risk'
    sentence = f'{dataset["ann_file"]} is not the table of the training of {path}, whose network and {taken} are taken'
    if data['folds'] or data['split_file'] or dataset.get('folds'):
        return [f'{sentence}: whether cases that are tested were trained on is not known.']
    return [f'{sentence}; columns and split are those of the config.']


def _data_settings(data: dict[str, Any], dataset: Mapping[str, Any], path: Path, same_table: bool) -> dict[str, Any]:
    """What the notes on the data say of a config, by dotted keys; nothing where an earlier version noted nothing."""
    if not data:
        return {}
    task = dataset.get('task', 'classification')
    if data['task'] != task:
        raise RunError(f'{path} must be a checkpoint of {task}, as the config is, got one of {data["task"]}.')
    settings = {f'dataset.{key}': data[key] for key in _OF_TABLE} if same_table else {}
    if data.get('encoder'):
        settings['dataset.encoder'] = data['encoder']
    if task == 'classification':
        return {**settings, 'dataset.classes': data['classes'], 'dataset.class_weights': data.get('class_weights')}
    edges = data['edges'] or None
    settings |= {'dataset.edges': edges, 'dataset.bins': edges and len(edges) + 1}
    return {**settings, 'model.loss': 'nll' if edges else 'cox'}


def _flat(options: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Options by dotted keys, those of the data set that is tested as those of all data sets."""
    for key, value in options.items():
        key = f'{prefix}{key}'
        if isinstance(value, Mapping) and not key.endswith('.columns'):
            yield from _flat(value, f'{key}.')
        else:
            yield key.removeprefix('test_dataloader.'), value


def _agrees(key: str, value: Any, noted: Mapping[str, Any]) -> bool:
    name = key.rpartition('.')[2]
    return key not in noted or name in _BESIDE or _plain(value, name) == _plain(noted[key], name)


def _plain(value: Any, name: str) -> Any:
    """A value as JSON gives it back, so that tuples are lists; classes by name, networks by their present one."""
    if name == 'model_name':
        return current_name(value) or value
    if name == 'classes' and value is not None:
        return [class_name(label) for label in ([value] if isinstance(value, str) else value)]
    return json.loads(json.dumps(value))


def _set(cfg: Config, key: str, value: Any) -> str | None:
    """Set a value of a config, or remove one that is None from a model's; say what has changed."""
    above, _, name = key.partition('.')
    if above == 'model':
        node, before = cfg.model, cfg.model.get(name)
    else:  # those of the data set that is tested override those of all
        node, default = cfg.test_dataloader.dataset, inspect.signature(SlideDataset).parameters[name].default
        before = {name: default, **cfg.get('dataset', {}), **node}[name]
    node[name] = value
    if above == 'model' and value is None:
        del node[name]
    same = name in _BESIDE or _plain(before, name) == _plain(value, name)
    return None if same else f'{key}={value}'
