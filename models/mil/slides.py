# SPDX-License-Identifier: Apache-2.0
"""Files of slides, in CLAM's layout: the features of the patches, and their coordinates.

Rows of arrays are counted from 0.
"""

import re
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from ..weights.archive import Stored, open_archive

__all__ = ['find_slide', 'read_slide']


def find_slide(folder: str | Path, slide_id: str) -> Path:
    """The file of a slide's features: SLIDE.h5 or else SLIDE.pt, in a folder or in CLAM's h5_files and pt_files there.

    Args:
        folder: Folder of all slides' files.
        slide_id: SLIDE, or the name of the slide's own file, such as SLIDE.svs, which some tables have.

    Raises:
        FileNotFoundError: The slide has no file.
    """
    folder = Path(folder)
    slide_id = re.sub(r'\.(svs|ndpi|tiff?|mrxs|scn|bif)$', '', slide_id)
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


def read_slide(path: str | Path) -> tuple[Tensor, Tensor]:
    """The features of a slide, (n, width), float32, and its pixel coordinates, (n, 2), int64, x before y.

    Args:
        path: SLIDE.h5 with `features` and `coords`, or SLIDE.pt with a dictionary of the two or with the features
            alone. The coordinates are then in SLIDE_coords.pt or SLIDE.h5 beside it, or in ../h5_files/SLIDE.h5.

    Raises:
        ValueError: The file cannot be read, or its content has another form or is not finite.
        FileNotFoundError: There are no coordinates.
    """
    path = Path(path)
    if path.suffix == '.h5':
        features, coords = (_read_h5(path, key) for key in ('features', 'coords'))
    else:
        content = _read_pt(path)
        if isinstance(content, Tensor):
            features, coords = content, _read_coords(path)
        elif {'features', 'coords'} <= content.keys():
            features, coords = content['features'], content['coords']
        else:
            raise ValueError(f'{path.name} must hold features and coords, got {", ".join(map(str, content))}.')
    return _check(path, features, coords)


def _read_coords(path: Path) -> Tensor:
    beside = path.with_name(f'{path.stem}_coords.pt')
    if beside.is_file():
        coords = _read_pt(beside)
        if not isinstance(coords, Tensor):
            raise ValueError(f'{beside.name} must hold a tensor, got {type(coords).__name__}.')
        return coords
    for folder in (path.parent, path.parent.parent / 'h5_files'):
        if (folder / f'{path.stem}.h5').is_file():
            return _read_h5(folder / f'{path.stem}.h5', 'coords')
    raise FileNotFoundError(f'no coordinates to {path.name}, neither {beside.name} nor {path.stem}.h5.')


def _read_h5(path: Path, key: str) -> Tensor:
    try:
        with h5py.File(path) as file:  # opened for each read, as an open file must not reach another process
            if key not in file:
                raise ValueError(f'{path.name} must hold features and coords, got {", ".join(file) or "nothing"}.')
            array = file[key][()]
    except OSError as error:
        raise ValueError(f'{path.name} cannot be read as HDF5: {error}') from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in 'iuf':
        raise ValueError(
            f'{path.name} must hold numbers as {key}, got {getattr(array, "dtype", type(array).__name__)}.'
        )
    return torch.from_numpy(array.astype(np.float32 if array.dtype.kind == 'f' else np.int64, copy=False))


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
        finite = array.isfinite().all(1)
        if not finite.all():
            row = _first(~finite)
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
