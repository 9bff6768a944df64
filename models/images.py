# SPDX-License-Identifier: Apache-2.0
"""Pictures as files hold them: upright, with 8 bits a channel, and with masks that lie over them."""

import os

import numpy as np
from PIL import ExifTags, Image, ImageOps

__all__ = ['as_rgb', 'eight_bits', 'misplaced', 'read_rgb', 'turn_upright', 'upright_size']


def as_rgb(picture: Image.Image) -> Image.Image:
    """The picture in RGB with 8 bits a channel, what is transparent on white.

    Raises:
        ValueError: Its values have no range that would tell what is white.
    """
    picture = eight_bits(picture).convert('RGBA')
    return Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture).convert('RGB')


def read_rgb(path: str | os.PathLike) -> Image.Image:
    """A picture as a viewer shows it: upright, and as `as_rgb` makes it.

    Raises:
        ValueError: There is no such file, or it cannot be read.
    """
    try:
        with Image.open(path) as file:
            turn_upright(file)
            return as_rgb(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f'{path} must be an image that Pillow reads: {error}') from error


def eight_bits(image: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel; of 16 bits the upper ones, as Pillow and OpenCV take of colours.

    Pillow's own conversion clips grey pictures of more bits, so that nearly all of them become white.

    Args:
        image: Picture as `Image.open` gives it, which knows the format of its file.

    Raises:
        ValueError: Its values have no range that would tell what is white.
    """
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ('I', 'F'):
        kind = 'floating-point numbers' if image.mode == 'F' else 'signed integers or integers of 32 bits'
        raise ValueError(
            f'an image must have 8 bits a channel, or 16 without a sign, got {kind}, of which nothing says what is '
            'white; save it with 8 bits'
        )
    return image


def turn_upright(image: Image.Image) -> None:
    """Turn a picture, in place, as the orientation in its EXIF data says; where there is none it stays as it is."""
    ImageOps.exif_transpose(image, in_place=True)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of a picture once it is turned as the orientation in its EXIF data says."""
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)  # the four with swapped sides
    return image.size[::-1] if turned else image.size


def misplaced(image: str, mask: str) -> str | None:
    """Why a mask cannot lie over its image, in a sentence without its full stop; None if it can, or a file is missing.

    OpenCV turns an image as its EXIF orientation says, and masks are read as they are. A mask of another resolution is
    no problem.
    """
    try:
        with Image.open(image) as file:
            width, height = upright_size(file)
            turned = (width, height) != file.size
        with Image.open(mask) as file:
            mask_width, mask_height = file.size
    except OSError:
        return None
    if abs(width * mask_height - height * mask_width) <= max(width, height, mask_width, mask_height):
        return None  # but for the rounding of a side
    how = ', turned as its EXIF orientation says' if turned else ''
    return f'the mask {mask} must have the shape of its image, {width}x{height}{how}, got {mask_width}x{mask_height}'
