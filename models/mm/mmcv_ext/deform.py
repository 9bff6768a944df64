# SPDX-License-Identifier: Apache-2.0
"""Attention and convolutions that sample their maps where they are told."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from .common import gradients, wide

__all__ = [
    'deform_conv_backward_input',
    'deform_conv_backward_parameters',
    'deform_conv_forward',
    'modulated_deform_conv_backward',
    'modulated_deform_conv_forward',
    'ms_deform_attn_backward',
    'ms_deform_attn_forward',
]

# ---- attention -------------------------------------------------------------------------------------------------------


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Weighted sum of samples of several maps for every query, (batch, queries, heads * C).

    Levels and points are taken one by one, so that besides the result one sample of each query is held.

    Args:
        value: Maps of all levels, one behind the other, (batch, positions, heads, C).
        value_spatial_shapes: Height and width of each level, (levels, 2).
        value_level_start_index: First position of each level, (levels,).
        sampling_locations: Places as x and y, from 0 to 1 across the map, (batch, queries, heads, levels, points, 2).
        attention_weights: Weights of the samples, (batch, queries, heads, levels, points).
        im2col_step: Number of images that mmcv's kernel takes at a time, which is not used.
    """
    batch, _, heads, channels = value.shape
    output: Tensor | int = 0
    for level, keys, size in _levels(value_spatial_shapes, value_level_start_index):
        maps = _maps(value[:, keys], size)
        for point in range(sampling_locations.shape[4]):
            at = (slice(None), slice(None), slice(None), level, point)
            output = output + _samples(maps, _by_head(sampling_locations[at]), _by_head(attention_weights[at]))
    assert isinstance(output, Tensor)
    return output.view(batch, heads * channels, -1).transpose(1, 2).to(value.dtype).contiguous()


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Gradients of `ms_deform_attn_forward`, each written to the tensor of its name.

    Args:
        value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, im2col_step:
            Arguments of `ms_deform_attn_forward`.
        grad_output: Gradient of its result, (batch, queries, heads * C).
        grad_value, grad_sampling_loc, grad_attn_weight: Tensors to write to, of the shapes of the arguments.
    """
    batch, _, heads, channels = value.shape
    grad = wide(grad_output).transpose(1, 2).reshape(batch * heads, channels, -1)
    for level, keys, size in _levels(value_spatial_shapes, value_level_start_index):
        maps = _maps(value[:, keys], size)
        grad_maps = torch.zeros_like(maps)
        for point in range(sampling_locations.shape[4]):
            at = (slice(None), slice(None), slice(None), level, point)
            inputs = maps, _by_head(sampling_locations[at]), _by_head(attention_weights[at])
            grad_map, grad_place, grad_weight = gradients(_samples, inputs, grad)
            grad_maps += grad_map
            grad_sampling_loc[at] = grad_place.unflatten(0, (batch, heads)).transpose(1, 2)
            grad_attn_weight[at] = grad_weight.unflatten(0, (batch, heads)).transpose(1, 2)
        grad_value[:, keys] = grad_maps.view(batch, heads, channels, -1).permute(0, 3, 1, 2)


def _levels(shapes: Tensor, starts: Tensor) -> Iterator[tuple[int, slice, tuple[int, int]]]:
    """Number, positions, and height and width of each level."""
    for level, ((height, width), start) in enumerate(zip(shapes.tolist(), starts.tolist(), strict=True)):
        yield level, slice(start, start + height * width), (height, width)


def _maps(value: Tensor, size: tuple[int, int]) -> Tensor:
    """The map of each head, (batch, H * W, heads, C) -> (batch * heads, C, H, W)."""
    return wide(value).permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, size)


def _by_head(values: Tensor) -> Tensor:
    """(batch, queries, heads, ...) -> (batch * heads, queries, ...)."""
    return wide(values).transpose(1, 2).flatten(0, 1)


def _samples(maps: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """One weighted sample for each query, zero beyond the map: places (N, queries, 2) -> (N, C, queries)."""
    grid = 2 * places[:, :, None] - 1
    samples = grid_sample(maps, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
    return samples[..., 0] * weights[:, None]


# ---- convolutions ----------------------------------------------------------------------------------------------------
# mmcv gives their numbers by name, and others in front of them as workspace, which is not used.


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **numbers: int
) -> None:
    """Convolution whose taps are moved, written to `output`.

    Args:
        input: Map, (batch, C, H, W).
        weight: Weights, (out_C, C / group, kH, kW).
        offset: y and x by which each tap is moved, (batch, deformable_group * kH * kW * 2, out_H, out_W).
        output: Tensor to write to, (batch, out_C, out_H, out_W).
        columns, ones: Workspace.
        numbers: Strides dH and dW, paddings padH and padW, dilations dilationH and dilationW, numbers of groups of the
            convolution and of the offsets, `group` and `deformable_group`; others are not used.
    """
    output.copy_(_convolve(_geometry(**numbers), input, weight, offset))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **numbers: int,
) -> None:
    """Gradients of map and offsets of `deform_conv_forward`, written to `gradInput` and `gradOffset`.

    torchvision computes those of all arguments at once. That of the weights stays in the workspace `columns`, which
    mmcv hands on to `deform_conv_backward_parameters`.
    """
    grads = _convolve_backward(_geometry(**numbers), gradOutput, input, weight, offset)
    gradInput.copy_(grads[0])
    gradOffset.copy_(grads[2])
    columns.resize_(weight.shape).copy_(grads[1])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float,
    **numbers: int,
) -> None:
    """Gradient of the weights of `deform_conv_forward`, times `scale`, added to `gradWeight`."""
    if columns.shape == gradWeight.shape:  # which `deform_conv_backward_input` left
        gradWeight.add_(columns, alpha=scale)
        columns.resize_(0)  # a second backward pass has another
    else:
        grads = _convolve_backward(_geometry(**numbers), gradOutput, input, torch.zeros_like(gradWeight), offset)
        gradWeight.add_(grads[1], alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    with_bias: bool,
    **numbers: int,
) -> None:
    """As `deform_conv_forward`, but every sample has a factor, and there may be a bias.

    Args:
        input, weight, offset, output, columns, ones: Tensors as in `deform_conv_forward`.
        bias: Bias, (out_C,), not used without `with_bias`.
        mask: Factor of each tap, (batch, deformable_group * kernel_h * kernel_w, out_H, out_W).
        with_bias: Whether the bias is added.
        numbers: As in `deform_conv_forward`, by the names stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
            group and deformable_group.
    """
    output.copy_(_convolve(_modulated_geometry(**numbers), input, weight, offset, mask, bias if with_bias else None))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    with_bias: bool,
    **numbers: int,
) -> None:
    """Gradients of `modulated_deform_conv_forward`, each written to the tensor of its name."""
    grads = _convolve_backward(_modulated_geometry(**numbers), grad_output, input, weight, offset, mask)
    targets = [grad_input, grad_weight, grad_offset, grad_mask, *([grad_bias] if with_bias else [])]
    for target, grad in zip(targets, grads, strict=False):
        target.copy_(grad)


def _geometry(
    dH: int, dW: int, padH: int, padW: int, dilationH: int, dilationW: int, group: int, deformable_group: int, **_: int
) -> tuple[int, ...]:
    """The numbers as torchvision's operator takes them."""
    return dH, dW, padH, padW, dilationH, dilationW, group, deformable_group


def _modulated_geometry(
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    **_: int,
) -> tuple[int, ...]:
    return stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group


def _convolve(geometry: tuple[int, ...], *tensors: Any) -> Tensor:
    """torchvision's convolution of map, weights, offsets and, where given, factors and bias."""
    return torch.ops.torchvision.deform_conv2d(*_filled(*tensors), *geometry, len(tensors) > 3)


def _convolve_backward(geometry: tuple[int, ...], grad_output: Tensor, *tensors: Any) -> list[Tensor]:
    """Gradients of map, weights, offsets, factors and bias."""
    filled = _filled(*tensors)
    return torch.ops.torchvision._deform_conv2d_backward(wide(grad_output), *filled, *geometry, len(tensors) > 3)


def _filled(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
) -> list[Tensor]:
    """All five tensors, as torchvision's operators take no fewer."""
    mask = input.new_zeros(len(input), 1) if mask is None else mask
    bias = input.new_zeros(len(weight)) if bias is None else bias
    return [wide(tensor) for tensor in (input, weight, offset, mask, bias)]
