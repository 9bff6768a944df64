# SPDX-License-Identifier: Apache-2.0
"""Classes that a config leaves open, for data of one's own: their names and their number come from the data."""

from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.config import ConfigDict
from mmengine.fileio import get_text, join_path
from mmengine.registry import DATASETS

from .checks import categories
from .data import class_folders
from .utils import RunError

__all__ = ['fill_classes', 'open_heads']


def fill_classes(cfg: Any, classes: Sequence[str] | None = None) -> None:
    """Set each `num_classes=None` of a model, and each `metainfo=dict(classes=None)` of a data set, from the data.

    The names are those of the training data: folders of images, what timm's readers know, the categories of a json as
    of COCO, or for masks the lines of classes.txt beside their folders. Where none are open, nothing is read.

    Args:
        cfg: mmengine's config of a whole run, changed in place.
        classes: The names, where a checkpoint has told them.

    Raises:
        RunError: Such names are not there, or the data set is of another kind.
    """
    heads = open_heads(cfg)
    loaders = [loader for name in ('train', 'val', 'test') if (loader := cfg.get(f'{name}_dataloader'))]
    data = [part for loader in loaders for part in _parts(loader.dataset) if _is_open(part)]
    if not heads and not data:
        return
    if classes is None:
        classes = _names_of_training(cfg)
    for part in heads:
        part.num_classes = len(classes)
    for part in data:
        part.metainfo.classes = tuple(classes)


def open_heads(cfg: Any) -> list[ConfigDict]:
    """The parts of a config's model whose number of classes is left open."""
    return [part for part in _parts(cfg.get('model', {})) if part.get('num_classes', 0) is None]


def _names_of_training(cfg: Any) -> Sequence[str]:
    dataset = cfg.train_dataloader.dataset
    while 'dataset' in dataset or 'datasets' in dataset:  # of wrappers; those that are joined have the same classes
        dataset = dataset.dataset if 'dataset' in dataset else dataset.datasets[0]
    return _names({**cfg.get('dataset', {}), **dataset})


def _parts(node: Any) -> Iterator[ConfigDict]:
    """Each dictionary in a part of a config."""
    if isinstance(node, ConfigDict):
        yield node
    if isinstance(node, dict | list | tuple):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _parts(child)


def _is_open(dataset: ConfigDict) -> bool:
    metainfo = dataset.get('metainfo') or {}
    return 'classes' in metainfo and metainfo['classes'] is None


def _names(dataset: dict[str, Any]) -> Sequence[str]:
    kind, root, args = dataset.get('type'), dataset.get('data_root', ''), dataset.get('backend_args')
    if kind == 'ImageFolder':
        return class_folders(join_path(root, dataset.get('class_split', 'train')))
    if kind in ('TimmDataset', 'TimmStream'):
        return DATASETS.build(dataset).metainfo['classes']
    if kind == 'CocoDataset':
        path = join_path(root, dataset['ann_file'])
        names = [category['name'] for category in categories(_read(path, args))]
        if not names:
            raise RunError(f'{path} must have categories, each with an id and a name, got none.')
        return names
    if kind == 'BaseSegDataset':
        path = join_path(root, 'classes.txt')
        names = [line.strip() for line in _read(path, args).splitlines() if line.strip()]
        if not names:
            raise RunError(f'{path} must name a class in each line, in the order of their values, got none.')
        return names
    raise RunError(f'num_classes and metainfo.classes must be given for data of type {kind}, got None.')


def _read(path: str, backend_args: dict[str, Any] | None) -> str:
    try:
        return get_text(path, backend_args=backend_args)
    except OSError as error:
        raise RunError(f'{path} must be there, for the names of the classes: {error}.') from error
