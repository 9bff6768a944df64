# SPDX-License-Identifier: Apache-2.0
"""Layouts in which tools write the features of a slide's patches: one small reader each, tried in order.

A reader knows its layout by the names of a file's arrays, and says where features and coordinates are and what the
file tells of the grid. Numbers are read when they are asked for. Coordinates in a file of their own are found by its
name.
"""

import math
import re
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from .arrays import Array, Attributes, Content, number, open_content
from .tables import slide_name

__all__ = ['Patches', 'is_companion', 'lacks_features', 'open_patches']


@dataclass(frozen=True)
class Patches:
    """The patches of a slide as a file has them. Arrays can be read while it is open.

    Args:
        features: Features of the patches, (n, width).
        coords: Coordinates of the patches, of which x and y are the first two columns, (n, 2 or more); None for none.
        attributes: What the file notes of the coordinates, and of all.
        step: Distance of neighbouring patches in pixels by these notes; None for none.
        binding: Names of the notes by which it must be the distance that the coordinates have; empty where it need not.
        scale: Pixels of a unit of the coordinates; None where they are whole pixels.
        mpp: Micrometres of a pixel where pixels are not those of the slide's full resolution; None where they are.
        centred: Whether coordinates are those of the patches' centres rather than of their corners.
    """

    features: Array
    coords: Array | None = None
    attributes: Attributes = field(default_factory=dict)
    step: float | None = None
    binding: str = ''
    scale: float | None = None
    mpp: float | None = None
    centred: bool = False

    def __len__(self) -> int:
        shape = self.features.shape
        return shape[-2] if len(shape) > 1 else math.prod(shape)

    def load_features(self) -> Tensor:
        features = self.features.load()
        return features[0] if features.ndim == 3 and len(features) == 1 else features

    def load_coords(self) -> Tensor | None:
        """x and y of each patch in pixels, whole numbers if the file is as it should be; None where it has none."""
        if self.coords is None:
            return None
        coords = self.coords.load()
        if coords.ndim == 2 and coords.shape[1] in (4, 5):  # then sides or opposite corners, and maybe a level
            coords = coords[:, :2].contiguous()
        return coords if self.scale is None else (coords.double() * self.scale).round()


@contextmanager
def open_patches(path: Path, encoder: str | None = None) -> Iterator[Patches]:
    """Open a file of features in any layout that is known, and that of its coordinates.

    Args:
        path: The file, whose suffix is one of `arrays.SUFFIXES`.
        encoder: Name of the encoder whose features are meant, where a file has those of several.

    Raises:
        ValueError: The file cannot be read, its layout is not known, or it has several encoders or not this one.
    """
    with ExitStack() as stack:
        content = stack.enter_context(open_content(path))
        for _, read in _LAYOUTS:
            patches = read(content, encoder)
            if patches is not None:
                break
        else:
            known = '; '.join(holds for holds, _ in _LAYOUTS)
            raise ValueError(f'{path.name} must hold features in a known layout ({known}), got {content.describe()}.')
        if patches.coords is None:
            patches = _add_companion(patches, path, stack)
        yield patches


def _read_clam(content: Content, encoder: str | None) -> Patches | None:
    """CLAM, TRIDENT, torchmil, and dictionaries in .pt files."""
    if 'features' not in content.arrays:
        return None
    return _with_coords(Patches(content.arrays['features']), content)


def _read_atlaspatch(content: Content, encoder: str | None) -> Patches | None:
    arrays = content.arrays.items()
    found = {name.removeprefix('features/'): array for name, array in arrays if name.startswith('features/')}
    if not found:
        coords = content.arrays.get('coords')  # none in a slide without tissue, which no encoder saw
        return Patches(coords) if coords is not None and coords.shape[:1] == (0,) else None
    if encoder is None and len(found) > 1:
        raise ValueError(f'{content.path.name} has the features of {", ".join(found)}: name one by dataset.encoder.')
    if encoder is not None and encoder not in found:
        raise ValueError(f'{content.path.name}: encoder must be one of {", ".join(found)}, got {encoder!r}.')
    return _with_coords(Patches(found[encoder] if encoder is not None else next(iter(found.values()))), content)


def _read_stamp(content: Content, encoder: str | None) -> Patches | None:
    if 'feats' not in content.arrays:
        return None
    patches = _with_coords(Patches(content.arrays['feats']), content)
    unit = content.attributes.get('unit')
    if (unit.decode() if isinstance(unit, bytes) else unit) != 'um':  # files before STAMP 2 are in pixels
        return patches
    size = number(content.attributes, 'tile_size_um') or number(content.attributes, 'tile_size')
    if size is None:
        raise ValueError(f'{content.path.name} must note tile_size_um, as its coords are in micrometres, got none.')
    side = number(content.attributes, 'tile_size_px') or size
    return replace(patches, step=side, binding='tile_size_px', scale=side / size, mpp=size / side)


def _read_anndata(content: Content, encoder: str | None) -> Patches | None:
    """Tables of tiles that LazySlide writes by way of AnnData."""
    if 'X' not in content.arrays:
        return None
    stride, downsample = (
        number(content.attributes, f'uns/tile_spec/{key}') for key in ('stride_width', 'base_downsample')
    )
    patches = Patches(content.arrays['X'], content.arrays.get('obsm/spatial'), scale=1.0)
    if stride is None or downsample is None:
        return patches
    return replace(patches, step=float(int(stride * downsample)), binding='tile_spec')


def _read_alone(content: Content, encoder: str | None) -> Patches | None:
    """Features without a name, as a tensor, a list of tensors or an array."""
    return Patches(content.arrays['']) if '' in content.arrays else None


def _with_coords(patches: Patches, content: Content) -> Patches:
    """Add the array of coordinates, and the step by attributes of it and of the file.

    TRIDENT's attributes say the patch and its overlap in pixels of the full resolution, and are binding. CLAM's say the
    patch at its level, from which the step may differ, so that they count only where the distances do not tell.
    """
    coords = content.arrays.get('coords')
    if coords is None:
        return patches
    attributes: Attributes = ChainMap(dict(coords.attributes), content.attributes)
    size, size_at_0, downsample = (number(attributes, key) for key in ('patch_size', 'patch_size_level0', 'downsample'))
    patches = replace(patches, coords=coords, attributes=attributes)
    if size_at_0:
        overlap = (number(attributes, 'overlap') or 0) * (size_at_0 / size if size else 1)
        return replace(patches, step=size_at_0 - overlap, binding='patch_size_level0 and overlap')
    return replace(patches, step=size * downsample) if size and downsample else patches


# What the files of each layout hold, and their reader.
_LAYOUTS: tuple[tuple[str, Callable[[Content, str | None], Patches | None]], ...] = (
    ('features and coords', _read_clam),
    ('features/ENCODER and coords', _read_atlaspatch),
    ('feats and coords', _read_stamp),
    ('X and obsm/spatial', _read_anndata),
    ('features alone', _read_alone),
)


# ---- coordinates in a file of their own ------------------------------------------------------------------------------

_COMPANION = re.compile(r'(_coords|_patches|\.index|\.position)\.(pt|h5|npy|npz|json)$')
_BESIDE = ('_coords.pt', '_coords.npy', '.index.npz', '.index.npy', '.position.npy', '.position.json', '.h5')
_FOLDERS = ('coords', 'h5_files', 'patches')  # of torchmil; of CLAM; of CLAM and TRIDENT
_NAMES = ('coords', 'locations', 'arr_0', '')


def is_companion(path: Path) -> bool:
    """Whether the name of a file is that of one with coordinates alone."""
    return _COMPANION.search(path.name) is not None


def lacks_features(path: Path) -> bool:
    """Whether a file has coordinates alone."""
    try:
        with open_content(path) as content:
            groups = {name.partition('/')[0] for name in content.arrays}
    except ValueError:
        return False  # reading it will raise the error
    return 'coords' in groups and not groups & {'features', 'feats'}


def _add_companion(patches: Patches, path: Path, stack: ExitStack) -> Patches:
    for beside in _companions(path):
        content = stack.enter_context(open_content(beside))
        for name in _NAMES:
            coords = content.arrays.get(name)
            if coords is not None and len(coords.shape) == 2:
                content = replace(content, arrays={'coords': coords})
                return replace(_with_coords(patches, content), centred='.index.' in beside.name)
    return patches


def _companions(path: Path) -> Iterator[Path]:
    """The files there are that may have the coordinates of a file of features."""
    stems = dict.fromkeys([path.stem, re.sub(r'\.features(\.\d+)?$', '', path.stem), slide_name(path.name)])
    names = [f'{stem}{suffix}' for stem in stems for suffix in _BESIDE]
    elsewhere = [f'{stem}{suffix}' for stem in stems for suffix in ('.h5', '.npy', '.pt', '_patches.h5')]
    places = [(path.parent, names)]
    places += [(above / folder, elsewhere) for above in list(path.parents)[:3] for folder in _FOLDERS]
    for folder, there in places:
        if folder.is_dir():
            yield from (folder / name for name in there if folder / name != path and (folder / name).is_file())
