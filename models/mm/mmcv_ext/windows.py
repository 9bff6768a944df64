# SPDX-License-Identifier: Apache-2.0
"""Operators over the window around each position."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from .common import wide

__all__ = [
    'carafe_backward',
    'carafe_forward',
    'carafe_naive_backward',
    'carafe_naive_forward',
    'masked_col2im_forward',
    'masked_im2col_forward',
    'psamask_backward',
    'psamask_forward',
]

# ---- CARAFE: an upsampling whose weights are given for every position ------------------------------------------------


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Weighted sum of the window around the position that an output position lies in, written to `output`.

    The positions of the window are taken one by one, so that no window is ever held.

    Args:
        features: Map, (batch, C, H, W).
        masks: Weights, group by group, (batch, group_size * kernel_size ** 2, H * scale_factor, W * scale_factor).
        output: Tensor to write to, (batch, C, H * scale_factor, W * scale_factor).
        kernel_size: Side of the window, odd.
        group_size: Number of groups of channels with weights of their own.
        scale_factor: Number of output positions in a position along each axis.
    """
    total = torch.zeros_like(_folded(output, group_size, scale_factor))
    weights, padded = _folded(masks, group_size, scale_factor), _padded(features, kernel_size, group_size)
    for tap, rows, columns in _taps(kernel_size, *features.shape[2:]):
        total.addcmul_(padded[..., rows, None, columns, None], weights[:, :, tap, None])
    output.copy_(total.view_as(output))


def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Gradients of map and weights of `carafe_naive_forward`, written to `bottom_grad` and `mask_grad`."""
    grad, weights = (_folded(each, group_size, scale_factor) for each in (top_grad, masks))
    padded = _padded(features, kernel_size, group_size)
    grad_padded, grad_weights = torch.zeros_like(padded), torch.zeros_like(weights)
    for tap, rows, columns in _taps(kernel_size, *features.shape[2:]):
        grad_weights[:, :, tap] = (grad * padded[..., rows, None, columns, None]).sum(2)
        grad_padded[..., rows, columns] += (grad * weights[:, :, tap, None]).sum((4, 6))
    edge = kernel_size // 2
    bottom_grad.copy_(pad(grad_padded, (-edge,) * 4).flatten(1, 2))
    mask_grad.copy_(grad_weights.view_as(mask_grad))


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """As `carafe_naive_forward`.

    mmcv saves `rfeatures` alone for the backward pass, so that the map is left there; `routput` and `rmasks` are
    workspace, which is not used.
    """
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """As `carafe_naive_backward`, of the map that `carafe_forward` left in `rfeatures`; the others are workspace."""
    carafe_naive_backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)


def _folded(maps: Tensor, groups: int, scale: int) -> Tensor:
    """Groups of channels, and output positions within positions, (batch, groups, C, H, scale, W, scale)."""
    return wide(maps).unflatten(3, (-1, scale)).unflatten(2, (-1, scale)).unflatten(1, (groups, -1))


def _padded(features: Tensor, kernel_size: int, groups: int) -> Tensor:
    """The map with zeros around it, (batch, groups, C, H + kernel_size - 1, W + kernel_size - 1)."""
    return pad(wide(features), (kernel_size // 2,) * 4).unflatten(1, (groups, -1))


def _taps(kernel_size: int, height: int, width: int) -> Iterator[tuple[int, slice, slice]]:
    """Number of each place in the window, and what it sees of the padded map."""
    for tap, (y, x) in enumerate(itertools.product(range(kernel_size), repeat=2)):
        yield tap, slice(y, y + height), slice(x, x + width)


# ---- the windows of some positions alone -----------------------------------------------------------------------------


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """The windows of some positions, written to the columns of `col`, zero beyond the map.

    Args:
        im: Map, (1, C, H, W).
        mask_h_idx, mask_w_idx: y and x of the positions, (positions,).
        col: Tensor to write to, (C * kernel_h * kernel_w, positions).
        kernel_h, kernel_w: Height and width of the window.
        pad_h, pad_w: Rows and columns of the window before the position.
    """
    after = max(kernel_w - 1 - pad_w, 0), max(kernel_h - 1 - pad_h, 0)
    padded = pad(im[0], (pad_w, after[0], pad_h, after[1]))
    taps = col.unflatten(0, (len(padded), -1))
    for tap, (y, x) in enumerate(itertools.product(range(kernel_h), range(kernel_w))):
        taps[:, tap] = padded[:, mask_h_idx + y, mask_w_idx + x]


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Put values at some positions of a map.

    Args:
        col: Values, (channels, positions).
        mask_h_idx, mask_w_idx: y and x of the positions, (positions,).
        im: Map to write to, (1, channels, height, width).
        height, width, channels: Sizes of the map, which are not used.
    """
    im[0, :, mask_h_idx, mask_w_idx] = col


# ---- attention of every position to the window around it -------------------------------------------------------------


def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Spread the window of weights that each position has over the whole map, written to `output`; zero beyond it.

    Args:
        input: Weights, (batch, h_mask * w_mask, h_feature, w_feature).
        output: Tensor to write to, (batch, h_feature * w_feature, h_feature, w_feature): weights of what a position
            looks at for each position if `psa_type` is 0, else the other way round.
        psa_type: Order of the positions in `output`, 0 to collect, 1 to distribute.
        num_: Number of images, which is not used.
        h_feature, w_feature, h_mask, w_mask: Heights and widths of the map and of the window.
        half_h_mask, half_w_mask: Rows and columns of the window before its position.
    """
    seen = _seen_first(output, psa_type)
    half = half_h_mask, half_w_mask
    for part, values in _shifted(input, (h_mask, w_mask), (h_feature, w_feature), half, -1):
        seen[:, part] = values


def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Gradient of the weights of `psamask_forward`, written to `grad_input`."""
    seen = _seen_first(grad_output, psa_type)
    half = half_h_mask, half_w_mask
    for part, values in _shifted(seen, (h_feature, w_feature), (h_mask, w_mask), half, 1):
        grad_input[:, part] = values


def _seen_first(maps: Tensor, psa_type: int) -> Tensor:
    """The maps with what a position looks at before the position, (batch, H * W, H, W)."""
    return maps if psa_type == 0 else maps.flatten(2).transpose(1, 2).unflatten(2, maps.shape[2:])


def _shifted(
    source: Tensor, size: tuple[int, int], target_size: tuple[int, int], half: tuple[int, int], sign: int
) -> Iterator[tuple[slice, Tensor]]:
    """Channels of the result and their values, (batch, target_width, H, W), a row of them at a time.

    Args:
        source: Maps whose channels are the positions of a grid, (batch, height * width, H, W).
        size: Height and width of this grid.
        target_size: Height and width of the grid of the result's channels.
        half: Offset of the map's middle along height and width.
        sign: 1 to look behind, -1 to look before a channel of the result, as far as the position is from `half`.
    """
    y, x = (
        sign * (torch.arange(n, device=source.device) - middle)
        for n, middle in zip(source.shape[2:], half, strict=True)
    )
    columns = torch.arange(target_size[1], device=source.device)[:, None, None] + x  # (target_width, 1, W)
    for row in range(target_size[0]):
        rows = row + y[:, None]  # (H, 1)
        there = (rows >= 0) & (rows < size[0]) & (columns >= 0) & (columns < size[1])
        index = (rows * size[1] + columns).masked_fill(~there, 0).expand(len(source), -1, -1, -1)
        yield slice(row * target_size[1], (row + 1) * target_size[1]), source.gather(1, index).masked_fill(~there, 0)
