# SPDX-License-Identifier: Apache-2.0
"""Files of slides, in CLAM's layout: the features of the patches, their coordinates, and the step of their grid.

Rows of arrays are counted from 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ..weights.archive import Stored, open_archive
from .grid import find_step, place
from .tables import slide_name

__all__ = ['Bag', 'find_slide', 'read_slide']

Attributes = Mapping[str, Any]


@dataclass(frozen=True)
class Bag:
    """The patches of a slide, all on one grid.

    Args:
        features: Features of the patches, (k, width), float32.
        coords: Pixel coordinates of the patches, (k, 2), int64, x before y; `coords // step` are cells of the grid.
        step: Distance of neighbouring patches in pixels, None where neither the file nor the distances tell it.
        pixels: Coordinates of all patches as the file has them, (n, 2), int64.
        kept: Rows of the k patches among these n. They are all but those that share a cell with a patch of another
            piece of tissue, see `place`.
    """

    features: Tensor
    coords: Tensor
    step: int | None
    pixels: Tensor
    kept: Tensor

    @property
    def left_out(self) -> int:
        """The number of patches that are not kept."""
        return len(self.pixels) - len(self.kept)

    def spread(self, values: Tensor) -> Tensor:
        """Values of the patches that are kept, (k,), as those of all in the file, (n,); the others have NaN."""
        return values.new_full((len(self.pixels),), torch.nan).index_copy(0, self.kept, values)


def find_slide(folder: str | Path, slide_id: str) -> Path:
    """The file of a slide's features: SLIDE.h5 or else SLIDE.pt, in a folder or in CLAM's h5_files and pt_files there.

    Args:
        folder: Folder of all slides' files.
        slide_id: SLIDE, or the name of the slide's own file, such as SLIDE.svs, which some tables have.

    Raises:
        FileNotFoundError: The slide has no file.
    """
    folder = Path(folder)
    slide_id = slide_name(slide_id)
    candidates = [folder / f'{slide_id}.h5', folder / 'h5_files' / f'{slide_id}.h5']
    candidates += [folder / f'{slide_id}.pt', folder / 'pt_files' / f'{slide_id}.pt']
    for path in candidates:
        if path.is_file() and not (path.suffix == '.h5' and _lacks_features(path)):
            return path
    raise FileNotFoundError(f'no features, neither {slide_id}.h5 nor {slide_id}.pt, in {folder}.')


def _lacks_features(path: Path) -> bool:
    """Whether a file has coordinates alone, whose features are in a .pt file."""
    try:
        with h5py.File(path) as file:
            return 'coords' in file and 'features' not in file
    except OSError:
        return False  # reading it will raise the error


def read_slide(path: str | Path) -> Bag:
    """Read the patches of a slide, and find the step of their grid.

    The step is what the attributes of `coords`, or of the file, say, or else the distance of neighbouring patches.

    Args:
        path: SLIDE.h5 with `features` and `coords`, or SLIDE.pt with a dictionary of the two or with the features
            alone. The coordinates are then in SLIDE_coords.pt or SLIDE.h5 beside it, or in ../h5_files/SLIDE.h5.

    Raises:
        ValueError: The file cannot be read, its content has another form or is not finite, patches lie beyond the
            slide, or the attributes contradict the distances.
        FileNotFoundError: There are no coordinates.
    """
    path = Path(path)
    attributes: Attributes = {}
    if path.suffix == '.h5':
        features, _ = _read_h5(path, 'features')
        coords, attributes = _read_h5(path, 'coords')
    else:
        content = _read_pt(path)
        if isinstance(content, Tensor):
            features = content
            coords, attributes = _read_coords(path)
        elif {'features', 'coords'} <= content.keys():
            features, coords = content['features'], content['coords']
        else:
            raise ValueError(f'{path.name} must hold features and coords, got {", ".join(map(str, content))}.')
    features, coords = _check(path, features, coords)
    _check_extent(path, coords, attributes)
    step = _choose_step(path, coords, attributes)
    placed, kept = place(coords, step) if step is not None else (coords, torch.arange(len(coords)))
    if len(kept) < len(coords):
        features = features[kept]
    return Bag(features, placed, None if step is None else round(step), coords, kept)


def _choose_step(path: Path, coords: Tensor, attributes: Attributes) -> float | None:
    """The step by the attributes and by the distances.

    TRIDENT's attributes say the patch and its overlap in pixels of the full resolution, and are binding. CLAM's say the
    patch at its level, from which the step may differ, so that they count only where the distances do not tell.
    """
    found = find_step(coords)
    size, size_at_0 = _number(attributes, 'patch_size'), _number(attributes, 'patch_size_level0')
    if size_at_0:
        said = size_at_0 - (_number(attributes, 'overlap') or 0) * (size_at_0 / size if size else 1)
        if found is not None and abs(found - said) >= 1:
            raise ValueError(
                f'{path.name}: the distance of neighbouring patches must be that of the attributes, {said:g} pixels by '
                f'patch_size_level0 and overlap, got {found:g}.'
            )
        return found or said
    downsample = _number(attributes, 'downsample')
    return found or (size * downsample if size and downsample else None)


def _check_extent(path: Path, coords: Tensor, attributes: Attributes) -> None:
    """Refuse patches that begin outside of the slide, which has y before x in files of some tools."""
    sides = [_number(attributes, f'level0_{side}') for side in ('width', 'height')]
    size = torch.tensor([side or torch.inf for side in sides])
    off = ((coords < 0) | (coords >= size)).any(1)
    if off.any():
        row = _first(off)
        turned = ((coords >= 0) & (coords < size.flip(0))).all()
        raise ValueError(
            f'{path.name}: coords row {row} must lie on the slide'
            + (f' of {sides[0]:g} x {sides[1]:g} pixels' if all(sides) else '')
            + f', got {tuple(coords[row].tolist())}{": is y before x?" if turned else "."}'
        )


def _number(attributes: Attributes, key: str) -> float | None:
    """A positive number among the attributes, the first one of an array; None where there is none."""
    try:
        value = float(np.ravel(attributes[key])[0])
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return value if 0 < value < np.inf else None


def _read_coords(path: Path) -> tuple[Tensor, Attributes]:
    beside = path.with_name(f'{path.stem}_coords.pt')
    if beside.is_file():
        coords = _read_pt(beside)
        if not isinstance(coords, Tensor):
            raise ValueError(f'{beside.name} must hold a tensor, got {type(coords).__name__}.')
        return coords, {}
    for folder in (path.parent, path.parent.parent / 'h5_files'):
        if (folder / f'{path.stem}.h5').is_file():
            return _read_h5(folder / f'{path.stem}.h5', 'coords')
    raise FileNotFoundError(f'no coordinates to {path.name}, neither {beside.name} nor {path.stem}.h5.')


def _read_h5(path: Path, key: str) -> tuple[Tensor, Attributes]:
    """An array, and its attributes with those of the file."""
    try:
        with h5py.File(path) as file:  # opened for each read, as an open file must not reach another process
            if key not in file:
                raise ValueError(f'{path.name} must hold features and coords, got {", ".join(file) or "nothing"}.')
            data, attributes = file[key], {**file.attrs, **file[key].attrs}
            kind = getattr(data, 'dtype', np.dtype(object)).kind
            if kind not in 'iuf' or not data.shape:
                raise ValueError(f'{path.name} must hold numbers as {key}, got {getattr(data, "dtype", "a group")}.')
            array = np.empty(data.shape, np.float32 if kind == 'f' else np.int64)
            if data.size:
                data.read_direct(array)  # which converts on the way, without a second array
    except OSError as error:
        raise ValueError(f'{path.name} cannot be read as HDF5: {error}') from error
    return torch.from_numpy(array), attributes


def _read_pt(path: Path) -> Tensor | dict[str, Tensor]:
    try:
        with open(path, 'rb') as file:
            content, load, _ = open_archive(file)
            values = dict(dict.items(content)) if isinstance(content, dict) else {'': content}
            tensors = {key: load(value) for key, value in values.items() if isinstance(value, Stored)}
    except Exception as error:  # of many kinds, as a file may be damaged anywhere
        raise ValueError(f'{path.name} cannot be read as tensors ({type(error).__name__}).') from error
    if len(tensors) < len(values):
        raise ValueError(f'{path.name} must hold tensors, got {type(content).__name__}.')
    return tensors if isinstance(content, dict) else tensors['']


def _check(path: Path, features: Tensor, coords: Tensor) -> tuple[Tensor, Tensor]:
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f'{path.name}: features must be (n, width), got {tuple(features.shape)} of {features.dtype}.')
    if not len(features):
        raise ValueError(f'{path.name}: features must be those of one patch or more, got none.')
    if coords.shape != (len(features), 2):
        raise ValueError(f'{path.name}: coords must be {(len(features), 2)}, got {tuple(coords.shape)}.')
    for name, array in (('features', features), ('coords', coords)):
        # A sum is not finite where a number is not, and takes no second array; a large one may overflow.
        for row in array.sum(1).isfinite().logical_not().nonzero().flatten().tolist():
            if not array[row].isfinite().all():
                raise ValueError(f'{path.name}: {name} row {row} must be finite, got {_shorten(array[row])}.')
    whole = (coords == coords.floor()).all(1) if coords.is_floating_point() else torch.ones(len(coords)).bool()
    if not whole.all():
        row = _first(~whole)
        raise ValueError(f'{path.name}: coords row {row} must be whole pixels, got {coords[row].tolist()}.')
    return features.float(), coords.long()


def _first(true: Tensor) -> int:
    return int(true.nonzero()[0])


def _shorten(row: Tensor) -> str:
    """The first number of a row that is not finite, and its column."""
    column = _first(~row.isfinite())
    return f'{row[column].item()} in column {column}'
