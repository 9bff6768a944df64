# SPDX-License-Identifier: Apache-2.0
"""All files of a data set, looked at once: what is wrong with each, and how often each class occurs."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS
from PIL import Image

from ..files import printable, state_of
from ..images import upright_size
from .checks import check_labels, read_labels
from .data import ImageFolder, unreadable
from .utils import RunError, count_cores

__all__ = ['Inspected', 'data_sets', 'inspect', 'wrong_heads']

Size = tuple[int, int]
Watch = Callable[[Iterable[Any], int], Iterable[Any]]  # (items, their number) to the items


@dataclass
class Inspected:
    """What a data set holds.

    Args:
        unit: What `counts` counts: images, objects or pixels.
        images: Number of images.
        counts: Number of units of each class, in the order of the classes.
        problems: Sentences, each on a file or an entry that is not as it must be.
    """

    unit: str
    images: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def inspect(
    cfg: dict[str, Any], least: int, scope: str | None = None, watch: Watch = lambda items, _: items
) -> Inspected:
    """Look at every file of a data set.

    Args:
        cfg: Config of the data set: of images in folders, of COCO's format, or of images and masks of mmsegmentation,
            perhaps in wrappers.
        least: Least height and width of an image.
        scope: Name of the registry that the config's types are of.
        watch: Function that gives the items on and shows how far it is.

    Raises:
        ValueError: It is a data set of another kind, or not one of local files.
    """
    parts = [cfg['dataset']] if 'dataset' in cfg else cfg.get('datasets') or []
    if parts:
        first, *others = [inspect(part, least, scope, watch) for part in parts]
        for other in others:
            first.images += other.images
            first.counts += other.counts
            first.problems += other.problems
        return first
    if '://' in str(cfg.get('data_root')):
        raise ValueError(f'data_root must be a folder of this machine, got {cfg["data_root"]}.')
    with DATASETS.switch_scope_and_registry(scope) as registry:
        kind = registry.get(cfg['type'])
        names = {base.__name__ for base in getattr(kind, '__mro__', ())}
        if kind is ImageFolder:
            return _inspect_folder(cfg, least, watch)
        if 'CocoDataset' in names:
            return _inspect_coco(cfg, kind, least, watch)
        if 'BaseSegDataset' in names:
            return _inspect_masks(cfg, registry, least, watch)
    raise ValueError(
        'the config must be one of images in folders (ImageFolder), of objects in the format of COCO (CocoDataset) or '
        f'of images and masks (BaseSegDataset), got {cfg["type"]}.'
    )


def wrong_heads(model: dict[str, Any], classes: int) -> Iterator[str]:
    """Sentences on the numbers of classes in a model's config that are not that of the data."""
    for key, value in _numbers(model, 'model'):
        if value != classes:
            option = f'--cfg-options {key}={classes}'
            yield f'{key} must be {classes}, the number of classes in the data, got {value}: {option}.'


def _numbers(node: Any, path: str) -> Iterator[tuple[str, int]]:
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, value in pairs:
        if key == 'num_classes' and isinstance(value, int):
            yield f'{path}.{key}', value
        elif key != 'backbone':
            yield from _numbers(value, f'{path}.{key}')


def _each(look: Callable[[Any], Any], items: Sequence[Any], watch: Watch) -> Iterator[Any]:
    """What a function says of each item, in their order; decoders let other threads work."""
    with ThreadPoolExecutor(count_cores()) as pool:
        yield from watch(pool.map(look, items), len(items))


def _look(path: str | Path, least: int) -> tuple[Size | None, str | None]:
    """Width and height of an image as its viewer shows it, None if it cannot be read; and what is wrong with it."""
    if not Path(path).is_file():
        return None, f'the image {path} {state_of(path)}.'
    problem = unreadable(str(path))
    if problem:
        return None, f'{problem}.'
    with Image.open(path) as file:
        size = upright_size(file)
    if min(size) < least:
        return size, f'the image {path} must have at least {least} pixels a side, got {_by(size)}.'
    return size, None


def _by(size: Sequence[float]) -> str:
    return 'x'.join(map(str, size))


# ---- images in folders -----------------------------------------------------------------------------------------------


def _inspect_folder(cfg: dict[str, Any], least: int, watch: Watch) -> Inspected:
    report = Inspected('images')
    try:
        dataset = ImageFolder(**{key: value for key, value in cfg.items() if key not in ('type', 'transform')})
    except RunError as error:
        report.problems.append(str(error))
        return report
    report.images = len(dataset)
    numbers = np.bincount(dataset.labels, minlength=len(dataset.metainfo['classes']))
    report.counts.update(dict(zip(dataset.metainfo['classes'], numbers.tolist(), strict=True)))
    paths = [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]
    report.problems += [problem for _, problem in _each(lambda path: _look(path, least), paths, watch) if problem]
    return report


# ---- objects in COCO's format ----------------------------------------------------------------------------------------


def _inspect_coco(cfg: dict[str, Any], kind: Any, least: int, watch: Watch) -> Inspected:
    report, root = Inspected('objects'), cfg.get('data_root') or ''
    path, folder = Path(root, cfg['ann_file']), Path(root, (cfg.get('data_prefix') or {}).get('img', ''))
    classes = (cfg.get('metainfo') or {}).get('classes') or kind.METAINFO['classes']
    try:
        content = json.loads(path.read_bytes())
        images, objects, categories = (list(content[key]) for key in ('images', 'annotations', 'categories'))
        if not all(isinstance(entry, dict) for entry in objects):
            raise ValueError('an annotation is no object')
        names = {category['id']: printable(str(category['name'])) for category in categories}
        shapes = {image['id']: (image['width'], image['height']) for image in images}
        files = [folder / image['file_name'] for image in images]
    except OSError:
        report.problems.append(f'{path} must be a file of annotations, and {state_of(path)}.')
        return report
    except (KeyError, TypeError, ValueError) as error:
        report.problems.append(
            f'{path} must have images with id, file_name, width and height, annotations, and categories with id and '
            f'name, as in the format of COCO ({type(error).__name__}: {printable(str(error))}).'
        )
        return report
    report.images = len(images)
    report.counts.update(dict.fromkeys(classes, 0))
    report.problems += _wrong_categories(path, names, classes, len(categories), len(images) - len(shapes))
    for image, (size, problem) in zip(images, _each(lambda file: _look(file, least), files, watch), strict=True):
        if problem:
            report.problems.append(problem)
        if size and size != shapes[image['id']]:
            report.problems.append(
                f'the image {folder / image["file_name"]} must be {_by(shapes[image["id"]])}, as {path} says, got '
                f'{_by(size)}.'
            )
    for entry in objects:
        problem = _wrong_object(entry, names, shapes)
        if problem:
            report.problems.append(f'{path}: the annotation {printable(str(entry.get("id")))} {problem}.')
        elif names[entry['category_id']] in report.counts:
            report.counts[names[entry['category_id']]] += 1
    return report


def _wrong_categories(
    path: Path, names: dict[Any, str], classes: Sequence[str], categories: int, twins: int
) -> Iterator[str]:
    if len(names) < categories or twins:
        yield f'{path}: ids of categories and images must differ, got some twice.'
    missing = [name for name in classes if name not in names.values()]
    if missing:
        yield (
            f'{path}: metainfo.classes of the config must be names of categories ({", ".join(names.values())}), got '
            f'{", ".join(missing)}.'
        )
    elif [name for name in names.values() if name in classes] != list(classes):
        yield f'{path}: metainfo.classes must have the order of the categories ({", ".join(names.values())}).'
    others = [f'{name} (id {number})' for number, name in names.items() if name not in classes]
    if others:
        yield f'{path}: the categories {", ".join(others)} are no classes of the config, and would be left out.'


def _wrong_object(entry: Any, names: dict[Any, str], shapes: dict[Any, Size]) -> str | None:
    """What is wrong with an annotation, as the end of a sentence."""
    image, category, box = (entry.get(key) for key in ('image_id', 'category_id', 'bbox'))
    for key, number, known in (('image', image, shapes), ('category', category, names)):
        if not isinstance(number, int | str) or number not in known:
            return f'must have the {key}_id of an entry in the file, got {printable(str(number))[:60]}'
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(x, int | float) and math.isfinite(x) for x in box)
    ):
        return f'must have a bbox of four numbers, got {printable(str(box))[:60]}'
    x, y, width, height = box
    if width < 1 or height < 1:
        return f'must have a bbox of at least one pixel a side, got {width} x {height}'
    if min(x, y) < -1 or x + width > shapes[image][0] + 1 or y + height > shapes[image][1] + 1:  # but for rounding
        return (
            f'must have a bbox within its image, {_by(shapes[image])}, got x {x}, y {y}, width {width}, height {height}'
        )
    return None


# ---- images and masks ------------------------------------------------------------------------------------------------


def _inspect_masks(cfg: dict[str, Any], registry: Any, least: int, watch: Watch) -> Inspected:
    report = Inspected('pixels')
    try:
        dataset = registry.build({**cfg, 'pipeline': [], 'serialize_data': False, 'lazy_init': False})
    except (OSError, ValueError) as error:
        report.problems.append(f'the data are not complete: {printable(str(error))}')
        return report
    classes = dataset.metainfo['classes'] or ()
    report.images = len(dataset)
    totals = np.zeros(len(classes), np.int64)

    def look(info: dict[str, Any]) -> tuple[list[str], np.ndarray]:
        image, mask = info['img_path'], info.get('seg_map_path')
        size, problem = _look(image, least)
        problems, sums = [problem] if problem else [], np.zeros_like(totals)
        if not mask:
            return [*problems, f'the image {image} must have a mask, got none.'], sums
        try:
            found, labels, counts = read_labels(mask, dataset)
            known = (labels >= 0) & (labels < len(classes)) & (labels != dataset.ignore_index) & (found != 255)
            np.add.at(sums, labels[known], counts[known])
            with Image.open(mask) as file:
                if size and file.size != size:
                    problems.append(
                        f'the mask {mask} must have the size of its image, {_by(size)}, got {_by(file.size)}.'
                    )
            check_labels(mask, found, labels, dataset, len(classes))
        except RunError as error:
            problems.append(str(error))
        return problems, sums

    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    for problems, sums in _each(look, infos, watch):
        report.problems += problems
        totals += sums
    if not infos:
        report.problems.append(
            f'{dataset.data_prefix.get("img_path")} must hold images *{dataset.img_suffix}, got none.'
        )
    report.counts.update(dict(zip(classes, totals.tolist(), strict=True)))
    return report


def data_sets(cfg: Config) -> dict[str, dict[str, Any]]:
    """The configs of the data sets, by the names of the splits that they are for, such as 'train' and 'val, test'."""
    found: dict[str, dict[str, Any]] = {}
    for split in ('train', 'val', 'test'):
        loader = cfg.get(f'{split}_dataloader')
        if not loader:
            continue
        whole = {**cfg.get('dataset', {}), **loader.dataset}
        same = next((name for name, other in found.items() if other == whole), None)
        if same is not None:
            found[f'{same}, {split}'] = found.pop(same)
        else:
            found[split] = whole
    return found
