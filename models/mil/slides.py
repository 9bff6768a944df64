# SPDX-License-Identifier: Apache-2.0
"""Slides by their names: their files in a folder, and their patches, each slide's on one grid.

Rows of arrays are counted from 0.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .arrays import SUFFIXES, Attributes, number
from .grid import find_step, place
from .layouts import Patches, is_companion, lacks_features, open_patches
from .tables import read_rows, slide_name

__all__ = ['Bag', 'SlideFolder', 'count_patches', 'read_slide']


@dataclass(frozen=True)
class Bag:
    """The patches of a slide, all on one grid.

    Args:
        features: Features of the patches, (k, width), float32.
        coords: Pixel coordinates of the patches, (k, 2), int64, x before y; `coords // step` are cells of the grid.
            None where there are none.
        step: Distance of neighbouring patches in pixels, None where neither the file nor the distances tell it.
        pixels: Coordinates of the corners of all patches as the file has them, (n, 2), int64; None for none.
        kept: Rows of the k patches among these n. They are all but those that share a cell with a patch of another
            piece of tissue, see `place`.
        mpp: Micrometres of a pixel where pixels are not those of the slide's full resolution; None where they are.
    """

    features: Tensor
    coords: Tensor | None
    step: int | None
    pixels: Tensor | None
    kept: Tensor
    mpp: float | None = None

    @property
    def total(self) -> int:
        """The number of patches in the file."""
        return len(self.features) if self.pixels is None else len(self.pixels)

    @property
    def left_out(self) -> int:
        """The number of patches that are not kept."""
        return self.total - len(self.kept)

    def spread(self, values: Tensor) -> Tensor:
        """Values of the patches that are kept, (k,), as those of all in the file, (n,); the others have NaN."""
        return values.new_full((self.total,), torch.nan).index_copy(0, self.kept, values)


class SlideFolder:
    """The files of features in a folder and in all folders below it, by the names of their slides.

    Args:
        folder: Folder of all slides' files, such as TRIDENT's job folder.
        encoder: Name of the encoder whose features are meant, where folders of the names ENCODER or features_ENCODER
            have those of several.
    """

    def __init__(self, folder: str | Path, encoder: str | None = None) -> None:
        self.folder = Path(folder)
        self.encoder = encoder
        self.files: dict[str, list[Path]] = defaultdict(list)
        self.lists: dict[str, list[Path]] = defaultdict(list)  # of slides whose features are in several files
        for path in _walk(self.folder):
            if path.name == 'manifest.csv':
                self._add_manifest(path)
            elif path.suffix.lower() in SUFFIXES and not is_companion(path):
                self.files[slide_name(path.name)].append(path)

    def _add_manifest(self, path: Path) -> None:
        """The slides of a table that eva writes, whose rows each name a file and its slide."""
        try:
            header, rows, _ = read_rows(path)
        except ValueError:
            return  # a table of something else
        if {'embeddings', 'wsi_id'} <= set(header):
            for _, row in rows:
                self.lists[slide_name(row['wsi_id'])].append(path.parent / row['embeddings'])

    @property
    def names(self) -> list[str]:
        """The names of all slides, sorted."""
        return sorted({*self.files, *self.lists})

    def find(self, slide_id: str) -> tuple[Path, ...]:
        """The file of a slide's features, or the files that have them one after the other.

        Args:
            slide_id: Name of the slide, or of its own file, such as SLIDE.svs, which some tables have.

        Raises:
            FileNotFoundError: The slide has no file.
            ValueError: It has files in several places.
        """
        name = slide_name(slide_id)
        if name in self.lists:
            return tuple(self.lists[name])
        paths = self._of_encoder(self.files.get(name, []))
        if len(paths) > 1:
            paths = [path for path in paths if path.suffix not in ('.h5', '.hdf5') or not lacks_features(path)]
        if not paths:
            such = f', which has those of {len(self.files)} others' if self.files else ''
            raise FileNotFoundError(f'no features, neither {name}.h5 nor {name}.pt, in {self.folder}{such}.')
        first, *others = sorted(paths, key=lambda path: (SUFFIXES.index(path.suffix.lower()), len(path.parts), path))
        for other in others:  # the same features again, as CLAM writes them, where only the kinds of files differ
            if _place(other) != _place(first) or other.suffix == first.suffix:
                raise ValueError(
                    f'the features of {name} must be in one place, got {first} and {other}: give the folder of one, or '
                    'dataset.encoder where folders are named after encoders.'
                )
        return (first,)

    def _of_encoder(self, paths: list[Path]) -> list[Path]:
        """The files below a folder with the encoder's name, or else those below none with another's."""
        if self.encoder is None:
            return paths
        folders = {path: path.parent.relative_to(self.folder).parts for path in paths}
        named = [path for path in paths if {self.encoder, f'features_{self.encoder}'} & set(folders[path])]
        return named or [path for path in paths if not any(name.startswith('features_') for name in folders[path])]


_SKIPPED = re.compile(r'(slide|patient)_features.*|coords|labels|(patch|inst)_labels|.*\.zarr')


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, also by links, but those in folders of what are no patches' features."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _SKIPPED.fullmatch(name))
        yield from (Path(parent, name) for name in names)


def _place(path: Path) -> Path:
    """The folder of a file, or that of CLAM's two folders for it."""
    return path.parent.parent if path.parent.name in ('h5_files', 'pt_files') else path.parent


def count_patches(*paths: str | Path, encoder: str | None = None) -> int:
    """The number of patches in the files of a slide, see `read_slide`, whose numbers are not read."""
    total = 0
    for path in paths:
        with open_patches(Path(path), encoder) as patches:
            total += len(patches)
    return total


def read_slide(*paths: str | Path, encoder: str | None = None) -> Bag:
    """Read the patches of a slide, and find the step of their grid.

    The step is what the file says, or else the distance of neighbouring patches.

    Args:
        paths: File of the features in any layout of `layouts`; or files that have them one after the other, which
            leaves the slide without coordinates.
        encoder: Name of the encoder whose features are meant, where a file has those of several.

    Raises:
        ValueError: A file cannot be read, its layout is not known, its content has another form or is not finite,
            patches lie beyond the slide, or what the file says of the step contradicts the distances.
    """
    if len(paths) > 1:
        features = _read_features([Path(path) for path in paths], encoder)
        return Bag(features, None, None, None, torch.arange(len(features)))
    path = Path(paths[0])
    with open_patches(path, encoder) as patches:
        features, coords = patches.load_features(), patches.load_coords()
    _check_features(path, features)
    if coords is None:
        return Bag(features, None, None, None, torch.arange(len(features)))
    coords = _check_coords(path, coords, features, patches)
    step = _choose_step(path, coords, patches)
    if step is None:
        return Bag(features, coords, None, coords, torch.arange(len(coords)), patches.mpp)
    if patches.centred:
        coords = coords - min(round(step) // 2, int(coords.min()))
    placed, kept = place(coords, step)
    if len(kept) < len(coords):
        features = features[kept]
    return Bag(features, placed, round(step), coords, kept, patches.mpp)


def _read_features(paths: Sequence[Path], encoder: str | None) -> Tensor:
    """The features of several files, one after the other; those of one file are there twice for a while."""
    total, start = count_patches(*paths, encoder=encoder), 0
    features = torch.empty(0)
    for path in paths:
        with open_patches(path, encoder) as patches:
            part = patches.load_features()
        _check_features(path, part)
        features = features if start else part.new_empty(total, part.shape[1])
        if part.shape[1] != features.shape[1]:
            raise ValueError(
                f'{path.name}: features must be as wide as those of {paths[0].name}, {features.shape[1]}, got '
                f'{part.shape[1]}.'
            )
        features[start : start + len(part)] = part
        start += len(part)
    return features


def _choose_step(path: Path, coords: Tensor, patches: Patches) -> float | None:
    """The step by what the file says and by the distances."""
    found, said = find_step(coords), patches.step
    if patches.binding and said is not None and found is not None and abs(found - said) >= 1:
        raise ValueError(
            f'{path.name}: the distance of neighbouring patches must be that of the attributes, {said:g} pixels by '
            f'{patches.binding}, got {found:g}.'
        )
    return found or said


def _check_extent(path: Path, coords: Tensor, attributes: Attributes) -> None:
    """Refuse patches that begin outside of the slide, which has y before x in files of some tools."""
    sides = [number(attributes, f'level0_{side}') for side in ('width', 'height')]
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


def _check_features(path: Path, features: Tensor) -> None:
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f'{path.name}: features must be (n, width), got {tuple(features.shape)} of {features.dtype}.')
    if not len(features):
        raise ValueError(f'{path.name}: features must be those of one patch or more, got none.')
    _check_finite(path, 'features', features)


def _check_coords(path: Path, coords: Tensor, features: Tensor, patches: Patches) -> Tensor:
    """Coordinates as whole numbers."""
    if coords.shape != (len(features), 2):
        raise ValueError(f'{path.name}: coords must be {(len(features), 2)}, got {tuple(coords.shape)}.')
    _check_finite(path, 'coords', coords)
    whole = (coords == coords.floor()).all(1) if coords.is_floating_point() else torch.ones(len(coords)).bool()
    if not whole.all():
        row = _first(~whole)
        raise ValueError(f'{path.name}: coords row {row} must be whole pixels, got {coords[row].tolist()}.')
    coords = coords.long()
    _check_extent(path, coords, patches.attributes)
    return coords


def _check_finite(path: Path, name: str, array: Tensor) -> None:
    # A sum is not finite where a number is not, and takes no second array; a large one may overflow.
    for row in array.sum(1).isfinite().logical_not().nonzero().flatten().tolist():
        if not array[row].isfinite().all():
            raise ValueError(f'{path.name}: {name} row {row} must be finite, got {_shorten(array[row])}.')


def _first(true: Tensor) -> int:
    return int(true.nonzero()[0])


def _shorten(row: Tensor) -> str:
    """The first number of a row that is not finite, and its column."""
    column = _first(~row.isfinite())
    return f'{row[column].item()} in column {column}'
