# SPDX-License-Identifier: Apache-2.0
"""What would stop a run later, or go wrong in silence, said before its first iteration; and errors as sentences."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dist import all_gather_object, is_main_process
from mmengine.fileio import get_text
from mmengine.logging import MMLogger
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ..files import state_of
from ..images import misplaced
from .classification import NamedModel
from .features import TimmFeatures
from .utils import RunError

__all__ = [
    'agreed',
    'categories',
    'check_batches',
    'check_channels',
    'check_classes',
    'check_labels',
    'check_masks',
    'class_counts',
    'explained',
    'leaves',
    'part',
    'read_labels',
    'where_none_were',
]


# ---- errors ----------------------------------------------------------------------------------------------------------


@contextmanager
def agreed() -> Iterator[None]:
    """Let a RunError of one process be one of all, so that none waits for another that has stopped."""
    problem = None
    try:
        yield
    except RunError as error:
        problem = str(error)
    for first in filter(None, all_gather_object(problem)):
        raise RunError(first)


@contextmanager
def part(name: str) -> Iterator[None]:
    """Say of which part of the config a value is not as it must be.

    Raises:
        RunError: What the values are for does not take them.
    """
    try:
        yield
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise RunError(f'{name} of the config cannot be used: {reason.rstrip(".")}.') from error


# What libraries say, and what helps.
_REASONS = (
    (
        r"out of memory|can't allocate memory|cannot allocate memory|unable to allocate",
        'memory ran out ({said}): smaller batches need less (batch_size of the dataloader; '
        'optim_wrapper.accumulative_counts keeps the images of a step), and so does gradient checkpointing '
        '(with_cp=True of the model or its backbone).',
    ),
    (
        r'DataLoader worker .*(killed by signal|exited unexpectedly)',
        'a process that loads data was ended from outside ({said}), as systems do where memory or /dev/shm is short: '
        'fewer of them need less, by num_workers of the dataloader.',
    ),
    (
        r'Expected more than 1 value per channel',
        'batch norm cannot normalise a single value a channel, as a batch of one image has it where its map is one '
        'position ({said}): train_dataloader.drop_last=True leaves such a last batch out, and '
        'train_dataloader.batch_size must be at least 2.',
    ),
)


@contextmanager
def explained() -> Iterator[None]:
    """Say what helps against errors that a run may meet anywhere.

    Raises:
        RunError: It is one of these errors.
    """
    try:
        yield
    except RunError:
        raise
    except (MemoryError, OSError, RuntimeError, ValueError) as error:
        text = f'out of memory {error}' if isinstance(error, MemoryError) else str(error)
        for pattern, sentence in _REASONS:
            found = re.search(pattern, text, re.IGNORECASE)
            if found:
                said = next(line.strip() for line in text.splitlines() if re.search(pattern, line, re.IGNORECASE))
                raise RunError(sentence.format(said=said.rstrip('.'))) from error
        raise


# ---- batches ---------------------------------------------------------------------------------------------------------


def check_batches(loader: DataLoader, model: nn.Module) -> None:
    """Refuse batches of which an epoch has none, and odd ones that are to be mixed.

    Args:
        loader: Loader of the training.
        model: Model that gets the batches.

    Raises:
        RunError: The batches are not as needed.
    """
    counted: Any = loader.dataset if isinstance(loader.dataset, IterableDataset) else loader.sampler
    batch_size, images = loader.batch_size, len(counted)
    endless = 'Infinite' in type(getattr(loader.sampler, 'sampler', loader.sampler)).__name__
    if batch_size is None or endless:
        last = batch_size
    else:
        last = 0 if loader.drop_last else images % batch_size
        if loader.drop_last and images < batch_size:
            raise RunError(
                f'train_dataloader.batch_size must be at most {images}, the samples of a process in an epoch, as '
                f'drop_last leaves out what fills no batch, got {batch_size}.'
            )
    if getattr(getattr(model, 'data_preprocessor', None), 'mixup', None) is None:
        return
    if batch_size is not None and batch_size % 2 and images >= batch_size:
        raise RunError(f'train_dataloader.batch_size must be even, as images are mixed in pairs, got {batch_size}.')
    if last is not None and last % 2:
        raise RunError(
            'train_dataloader.drop_last must be True, as images are mixed in pairs and the last batch of an epoch '
            f'holds {last}.'
        )


# ---- classes ---------------------------------------------------------------------------------------------------------


def leaves(dataset: Any) -> list[Any]:
    """The data sets inside those that repeat, join or guard them."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    return [dataset] if inner == [None] else [leaf for one in inner for leaf in leaves(one)]


def check_classes(dataset: Any, model: nn.Module) -> None:
    """Compare the classes of the data with those of the model's heads.

    Args:
        dataset: Data set, with an attribute metainfo.
        model: Classifier, detector or segmentor.

    Raises:
        RunError: They are not the same; the message names the keys to set.
    """
    for leaf in leaves(dataset):
        classes = (getattr(leaf, 'metainfo', None) or {}).get('classes')
        if isinstance(classes, str):
            raise RunError(f"metainfo.classes must be a tuple of names, such as ('{classes}',), got {classes!r}.")
        if not classes:
            continue
        if hasattr(leaf, 'cat_ids'):
            _check_categories(leaf, classes, model)
        wrong = {key: need for key, need, got in class_counts(leaf, model) if need != got}
        if wrong:
            got = ', '.join(f'{key} {got}' for key, _, got in class_counts(leaf, model) if key in wrong)
            options = ' '.join(f'model.{key}={need}' for key, need in wrong.items())
            raise RunError(
                f'{", ".join(f"model.{key}" for key in wrong)} must be {_choices(wrong.values())}, the number of '
                f'classes in the data ({_some(classes)}), got {got}: --cfg-options {options}'
            )


def _choices(counts: Any) -> str:
    return ' and '.join(str(count) for count in dict.fromkeys(counts))


def _some(names: Sequence[str], most: int = 8) -> str:
    return ', '.join(map(str, names[:most])) + (f' and {len(names) - most} more' if len(names) > most else '')


def class_counts(leaf: Any, model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Each number of classes in a model: its key in the config, what it must be for these data, what it is."""
    classes = leaf.metainfo['classes']
    if isinstance(model, NamedModel):
        yield 'num_classes', len(classes), model.model.num_classes
    elif hasattr(leaf, 'seg_map_suffix') and hasattr(leaf, 'reduce_zero_label'):  # of mmsegmentation
        for name, module in model.named_modules():
            # The head of STDC that finds edges has classes of its own.
            if re.fullmatch(r'(.+\.)?(decode|auxiliary)_head(\.\d+)?', name) and type(module).__name__ != 'STDCHead':
                if hasattr(module, 'num_classes'):
                    yield f'{name}.num_classes', len(classes), module.num_classes
    elif hasattr(leaf, 'cat_ids') and not getattr(leaf, 'return_classes', False):  # heads for texts have other sizes
        things = len(leaf.metainfo.get('thing_classes', classes))
        stuff = len(leaf.metainfo.get('stuff_classes', ()))
        heads: list[str] = []
        for name, module in model.named_modules():
            if {'', 'backbone', 'rpn_head'} & set(name.split('.')) or type(module).__name__ == 'FusedSemanticHead':
                continue  # the whole; a backbone's own classes; object or not; and stuff, which boxes do not have
            within = any(name.startswith(f'{head}.') for head in heads)
            if within and not name.rpartition('.')[2].startswith('loss'):
                continue  # what a head builds by its own number
            if hasattr(module, 'num_things_classes'):
                yield f'{name}.num_things_classes', things, module.num_things_classes
                yield f'{name}.num_stuff_classes', stuff, module.num_stuff_classes
                heads.append(name)
            elif isinstance(getattr(module, 'num_classes', None), int):
                yield f'{name}.num_classes', things, module.num_classes  # type: ignore[misc]
                heads.append(name)


def _check_categories(leaf: Any, classes: Sequence[str], model: nn.Module) -> None:
    """Compare metainfo.classes with the names in a file as of COCO, whose order numbers them whatever that of classes.

    Raises:
        RunError: A class has no category of its name, or the order is another.
    """
    from mmdet.datasets import CocoDataset

    if type(leaf).load_data_list is not CocoDataset.load_data_list:
        return  # others number their classes in other ways
    text = get_text(leaf.ann_file, backend_args=getattr(leaf, 'backend_args', None))
    names = {category['id']: category['name'] for category in categories(text)}
    found = [names.get(number) for number in leaf.cat_ids]
    if not names or found == list(classes):
        left_out = [name for name in names.values() if name not in classes]
        if left_out:
            MMLogger.get_current_instance().warning(
                f'{leaf.ann_file}: the categories {_some(left_out)} are no classes of the config, and left out.'
            )
        return
    everything = list(names.values())
    right = found if len(found) == len(classes) else everything
    keys = dict.fromkeys(key for key, _, _ in class_counts(leaf, model))
    raise RunError(
        f'metainfo.classes must be names of categories in {leaf.ann_file}, in their order there '
        f'({_some(everything)}), got {_some(classes)}: set metainfo=dict(classes={_tuple(right)}) in the dataset of '
        f'every dataloader, and {", ".join(f"model.{key}" for key in keys)} to their number, {len(right)}.'
    )


def _tuple(names: Sequence[Any]) -> str:
    shown = ', '.join(map(repr, names[:20])) + (', ...' if len(names) > 20 else '')
    return f'({shown},)' if len(names) == 1 else f'({shown})'


def categories(text: str) -> list[dict[str, Any]]:
    """The categories of a json as of COCO, without the rest, which may be half a gigabyte."""
    for match in re.finditer(r'"categories"\s*:\s*', text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, match.end())
        except ValueError:
            continue
        if isinstance(value, list) and all(isinstance(one, dict) and {'id', 'name'} <= one.keys() for one in value):
            return value
    return []


def where_none_were(dataset: Any) -> str:
    """Where data sets of mmsegmentation found no image, for the error."""
    leaf = leaves(dataset)[0]
    folder = (getattr(leaf, 'data_prefix', None) or {}).get('img_path')
    return f', no file ends with {leaf.img_suffix} in {folder}' if folder and hasattr(leaf, 'img_suffix') else ''


# ---- channels --------------------------------------------------------------------------------------------------------


def check_channels(model: nn.Module, cfg: dict[str, Any]) -> None:
    """Compare the channels of a TimmFeatures with those that the neck or the heads behind it were made for.

    Args:
        model: Detector or segmentor.
        cfg: Its config.

    Raises:
        ValueError: They are not the same; the message names the keys to set.
    """
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, TimmFeatures):
        return
    channels = [backbone.model.feature_info.channels(level) for level in backbone.levels]
    wrong = {key: need for key, need, got in _inputs(model, cfg, channels) if need != got}
    if wrong:
        got = ', '.join(str(got) for key, _, got in _inputs(model, cfg, channels) if key in wrong)
        options = ' '.join(f'model.{key}={need}'.replace(' ', '') for key, need in wrong.items())
        raise ValueError(
            f'{", ".join(f"model.{key}" for key in wrong)} must be {", ".join(map(str, wrong.values()))}, the channels '
            f'of {backbone.architecture}, got {got}: --cfg-options {options}'
        )


def _inputs(model: Any, cfg: dict[str, Any], channels: list[int]) -> Iterator[tuple[str, Any, Any]]:
    """What takes a backbone's maps: the key of its channels in the config, what they must be, what they are."""
    neck = cfg.get('neck')
    if neck is not None:
        first, prefix = (neck[0], 'neck.0') if isinstance(neck, list | tuple) else (neck, 'neck')
        if isinstance(first.get('in_channels'), list | tuple) and len(first['in_channels']) == len(channels):
            yield f'{prefix}.in_channels', channels, list(first['in_channels'])
        return
    for name in ('decode_head', 'auxiliary_head'):
        heads = getattr(model, name, None)
        many = isinstance(heads, nn.ModuleList)
        for i, head in enumerate(heads if many else filter(None, [heads])):  # type: ignore[arg-type]
            index = getattr(head, 'in_index', None)
            if index is None or not hasattr(head, 'input_transform'):
                continue
            need: Any = [channels[j] for j in index] if isinstance(index, list | tuple) else channels[index]
            got = head.in_channels
            if head.input_transform == 'resize_concat' and got == sum(need):
                continue
            got = list(got) if isinstance(got, tuple) else got
            yield f'{name}.{i}.in_channels' if many else f'{name}.in_channels', need, got


# ---- masks -----------------------------------------------------------------------------------------------------------


def check_masks(dataset: Any, most: int = 32) -> None:
    """Compare the values in some masks of mmsegmentation's data with the number of classes, and sizes with the images'.

    Args:
        dataset: Data set.
        most: Largest number of masks to read, which are spread evenly.

    Raises:
        RunError: A mask is missing, has other values or another size.
    """
    for leaf in leaves(dataset) if is_main_process() else ():  # all would read the same
        classes = (getattr(leaf, 'metainfo', None) or {}).get('classes')
        if not classes or not hasattr(leaf, 'reduce_zero_label'):
            continue
        _check_zero(leaf)
        count = min(most, len(leaf))
        for index in (i * len(leaf) // count for i in range(count)):
            info = leaf.get_data_info(index)
            image, mask = info.get('img_path'), info.get('seg_map_path')
            if mask and '://' not in mask:
                _check_mask(mask, leaf, len(classes))
                problem = misplaced(image, mask)
                if problem:
                    raise RunError(f'{problem}.')


def _check_zero(leaf: Any) -> None:
    for step in getattr(getattr(leaf, 'pipeline', None), 'transforms', ()):
        wanted = getattr(step, 'reduce_zero_label', None)
        if wanted not in (None, leaf.reduce_zero_label):
            raise RunError(
                f'reduce_zero_label of {type(step).__name__} in the pipeline must be that of its dataset, '
                f'{leaf.reduce_zero_label}, or None, got {wanted}.'
            )


def _check_mask(path: str, leaf: Any, classes: int) -> None:
    found, labels, _ = read_labels(path, leaf)
    check_labels(path, found, labels, leaf, classes)


def read_labels(path: str, leaf: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The values in a mask, the labels that a data set of mmsegmentation makes of them, and their numbers of pixels.

    Raises:
        RunError: There is no such file, it cannot be read, or it has several channels.
    """
    if not Path(path).is_file():
        raise RunError(f'the data are not complete: {path} {state_of(path)}.')
    try:
        with Image.open(path) as file:
            values = np.asarray(file)
    except Exception as error:  # of any kind, as the bytes may mean anything to a decoder
        raise RunError(f'the mask {path} cannot be read ({error}).') from error
    if values.squeeze().ndim != 2:
        raise RunError(
            f'the mask {path} must have one channel, whose values number the classes, got {values.shape[-1]}: masks of '
            'colours have to be converted.'
        )
    found, counts = np.unique(values, return_counts=True)
    found = found.astype(np.int64)
    labels = found - 1 if leaf.reduce_zero_label else found
    for old, new in (leaf.label_map or {}).items():
        labels = np.where(found - bool(leaf.reduce_zero_label) == old, new, labels)
    return found, labels, counts


def check_labels(path: str, found: np.ndarray, labels: np.ndarray, leaf: Any, classes: int) -> None:
    """Compare what `read_labels` gives with the number of classes.

    Raises:
        RunError: A value is that of no class.
    """
    ignored = (found == 255) | (labels == leaf.ignore_index) | (labels < 0)
    wrong = found[~ignored & (labels >= classes)]
    if len(wrong):
        first = 1 if leaf.reduce_zero_label else 0
        hint = '' if leaf.reduce_zero_label else '; where 0 is no class, set reduce_zero_label=True in the dataset'
        raise RunError(
            f'the mask {path} must have values from {first} to {classes - 1 + first} for the {classes} classes, or 255 '
            f'for none, got {_some(wrong.tolist())}{hint}.'
        )
