# SPDX-License-Identifier: Apache-2.0
"""Pictures of slides: their thumbnails and squares of them, by openslide, or by Pillow from a plain image."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.images import read_rgb
from ._common import UsageError

if TYPE_CHECKING:
    from PIL import Image

IMAGES = ('.png', '.jpg', '.jpeg', '.bmp', '.webp')  # what Pillow reads, as a whole

Size = tuple[int, int]  # width and height


def find_slide_files(folder: Path) -> dict[str, Path]:
    """The slides' own files in a folder and those below it, by the names of the slides."""
    from ..models.mil.arrays import SUFFIXES
    from ..models.mil.tables import slide_name

    found: dict[str, Path] = {}
    for path in sorted(folder.rglob('*')):
        name = path.stem if path.suffix.lower() in IMAGES else slide_name(path.name)
        if name != path.name and path.suffix.lower() not in SUFFIXES and path.is_file():
            found.setdefault(name, path)
    return found


def read_thumbnail(slide: Path | None, mpp: float | None = None) -> tuple[tuple['Image.Image', Size] | None, str]:
    """A small image of a slide and the slide's width and height, or None; and, in words, what is drawn on.

    Args:
        slide: The slide's file, None for none.
        mpp: Micrometres of the pixels in which width and height are wanted, None for the slide's own.

    Raises:
        UsageError: The file cannot be read, or does not tell the size of its pixels where `mpp` is given.
    """
    if slide is None:
        return None, 'the grid: no --slide is given'
    if not slide.is_file():
        return None, f'the grid: {slide} does not exist'
    if slide.suffix.lower() in IMAGES:
        image = _read_image(slide, mpp)
        size = image.size
        image.thumbnail((1024, 1024))
        return (image, size), f'the image {slide}'
    try:
        import openslide
    except ImportError:
        return None, 'the grid: openslide is not installed, `pip install openslide-python openslide-bin` does it'
    try:
        with openslide.OpenSlide(slide) as opened:
            scales = _scales(opened, slide, mpp)
            width, height = (round(side * scale) for side, scale in zip(opened.dimensions, scales, strict=True))
            return (opened.get_thumbnail((1024, 1024)), (width, height)), f'the thumbnail of {slide}'
    except openslide.OpenSlideError as error:
        raise UsageError(f'--slide must be a file that openslide reads, got {slide}: {error}') from error


def read_squares(
    slide: Path, corners: Sequence[tuple[int, int]], side: int, mpp: float | None = None, shown: int = 224
) -> list['Image.Image']:
    """Squares of a slide that has a thumbnail, each of `shown` pixels.

    Args:
        slide: The slide's file.
        corners: Coordinates of their upper left corners, x before y.
        side: Their width and height in the pixels of these coordinates.
        mpp: Micrometres of these pixels, None for the slide's own.
        shown: Width and height of the images.

    Raises:
        UsageError: The file cannot be read.
    """
    if slide.suffix.lower() in IMAGES:
        image = _read_image(slide, mpp)
        return [image.crop((x, y, x + side, y + side)).resize((shown, shown)) for x, y in corners]
    import openslide

    try:
        with openslide.OpenSlide(slide) as opened:
            across, down = _scales(opened, slide, mpp)
            level = opened.get_best_level_for_downsample(side / across / shown)
            size = max(1, round(side / across / opened.level_downsamples[level]))
            return [
                opened.read_region((round(x / across), round(y / down)), level, (size, size))
                .convert('RGB')
                .resize((shown, shown))
                for x, y in corners
            ]
    except openslide.OpenSlideError as error:
        raise UsageError(f'--slide must be a file that openslide reads, got {slide}: {error}') from error


def _read_image(path: Path, mpp: float | None) -> 'Image.Image':
    if mpp is not None:
        raise UsageError(f'--slide must tell the size of its pixels for coordinates in micrometres, got {path}.')
    try:
        return read_rgb(path)
    except ValueError as error:
        raise UsageError(f'--slide {error}') from error


def _scales(opened: Any, slide: Path, mpp: float | None) -> tuple[float, float]:
    """The pixels of coordinates in one of the slide's own, across and down."""
    if mpp is None:
        return 1.0, 1.0
    try:
        across, down = (float(opened.properties[f'openslide.mpp-{axis}']) / mpp for axis in 'xy')
    except KeyError as error:
        raise UsageError(
            f'--slide must tell the size of its pixels for coordinates in micrometres, got {slide}, which does not.'
        ) from error
    return across, down
