# SPDX-License-Identifier: Apache-2.0
"""Overlaps of boxes and their suppression; boxes are x1, y1, x2, y2."""

import torch
import torchvision.ops
from torch import Tensor

from .common import wide

__all__ = ['bbox_overlaps', 'nms', 'nms_match', 'softnms']


def nms(bboxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that non-maximum suppression keeps, best first, (kept,).

    Args:
        bboxes: Boxes, (boxes, 4).
        scores: Scores of the boxes, (boxes,).
        iou_threshold: Largest overlap with a better box at which a box is kept.
        offset: Number that is added to x2 - x1 and y2 - y1 for the sides of a box, 0 or 1.
    """
    return torchvision.ops.nms(_closed(bboxes, offset), wide(scores), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Indices of the boxes that soft suppression keeps, best first, (kept,).

    One box after the other, the best that is left is taken, and lowers the scores of those that overlap it.

    Args:
        boxes: Boxes, (boxes, 4).
        scores: Scores of the boxes, (boxes,).
        dets: Tensor whose first rows get the kept boxes and their lowered scores, (boxes, 5).
        iou_threshold: Least overlap that lowers a score, by methods 0 and 1.
        sigma: Width of the Gaussian of method 2.
        min_score: Score under which a box is dropped once another was taken.
        method: 0 drops overlapping boxes, 1 multiplies their scores by 1 - overlap, 2 by a Gaussian of the overlap.
        offset: Number that is added to x2 - x1 and y2 - y1 for the sides of a box, 0 or 1.
    """
    corners, scores = _closed(boxes, offset), wide(scores).clone()
    left = torch.arange(len(boxes), device=boxes.device)
    kept: list[Tensor] = []
    while len(left):
        place = scores[left].argmax()
        best = left[place]
        dets[len(kept), :4], dets[len(kept), 4] = boxes[best], scores[best]
        kept.append(best)
        left = torch.cat([left[:place], left[place + 1 :]])
        overlap = _ratios(corners[best], corners[left]).nan_to_num_(0)  # of boxes without an area
        if method == 2:
            scores[left] *= (-overlap.square() / sigma).exp()
        else:
            lowered = 1 - overlap if method == 1 else torch.zeros_like(overlap)
            scores[left] *= lowered.where(overlap >= iou_threshold, 1)
        left = left[scores[left] >= min_score]
    return torch.stack(kept) if kept else left


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """The boxes in groups, each the index of a box that suppression keeps and of those that it suppresses, best first.

    Args:
        dets: Boxes and their scores, (boxes, 5).
        iou_threshold: Least overlap with a better box at which a box is suppressed.
    """
    corners, left = wide(dets[:, :4]), dets[:, 4].argsort(descending=True, stable=True)
    groups = []
    while len(left):
        near = _ratios(corners[left[0]], corners[left]) >= iou_threshold
        near[0] = True  # of a box without an area it is not a number
        groups.append(left[near].tolist())
        left = left[~near]
    return groups


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Overlap of two sets of boxes, over their union or over the first, written to `ious`.

    Args:
        bboxes1: Boxes, (m, 4).
        bboxes2: Other boxes, (n, 4).
        ious: Tensor to write to, (m,) if aligned, else (m, n).
        mode: 0 to divide by the union, 1 by the area of the first box.
        aligned: Whether each box has one partner rather than all of the others.
        offset: Number that is added to x2 - x1 and y2 - y1 for the sides of a box, 0 or 1.
    """
    first, second = _closed(bboxes1, offset), _closed(bboxes2, offset)
    ious.copy_(_ratios(first if aligned else first[:, None], second, of_union=mode == 0, least=offset))


def _closed(boxes: Tensor, offset: int) -> Tensor:
    """The boxes with x2 and y2 behind their last pixel."""
    boxes = wide(boxes)
    return boxes + boxes.new_tensor([0, 0, offset, offset])


def _ratios(first: Tensor, second: Tensor, of_union: bool = True, least: int | None = None) -> Tensor:
    """Intersection of boxes over their union or over the first's area, which count no less than `least`."""
    common = _shared_side(first, second, 0)
    common *= _shared_side(first, second, 1)
    whole = _area(first)
    if of_union:
        whole = whole + _area(second) - common
    return common / (whole if least is None else whole.clamp(min=least))


def _shared_side(first: Tensor, second: Tensor, axis: int) -> Tensor:
    ends = torch.minimum(first[..., axis + 2], second[..., axis + 2])
    return (ends - torch.maximum(first[..., axis], second[..., axis])).clamp_(min=0)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
