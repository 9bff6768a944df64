# SPDX-License-Identifier: Apache-2.0
"""The selective scan in bands, in plain PyTorch: how the CUDA kernels compute one walk side by side.

This file is documentation that runs: a step between the definition (`reference.py`) and the kernels (`triton/`), which
go the same way. No network calls it.

The steps of a recurrence seem to have to wait for one another. But each step is a map of the state, h -> a h + b, and
two such maps, one after the other, are again one:

    a2 (a1 h + b1) + b2  =  (a2 a1) h + (a2 b1 + b2)

So whatever many steps do to a state is told by two numbers: the product of all their a, and the state that leaves them
when the state zero enters. A walk is therefore cut into bands, and computed in three parts:

    1. summary    All bands at once: each finds its two numbers.
    2. stitching  One band after another: from the state that enters a band, its two numbers give the state that leaves
                  it, which enters the next.
    3. scan       All bands at once: each computes its states, now from the one that enters it.

All places are computed twice, but the longest chain of steps that wait for one another has only twice the length of a
band and one step for each band. The kernels cut a walk so where images and channels are too few to fill the device.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import scan_axis, selective_scan_ref


def selective_scan_chunked(*args: Any, bands: int, **kwargs: Any) -> Tensor:
    """The selective scan of `vssm.ops.selective_scan`, same arguments, with every walk cut into bands.

    Args:
        bands: Number of bands; those beyond the end of a walk are empty.
    """
    return selective_scan_ref(*args, **kwargs, recurrence=partial(scan_in_bands, bands=bands))


def scan_in_bands(a: Tensor, b: Tensor, ndim: int, bands: int) -> Tensor:
    """The recurrence over axes 1 (outer) and 2 (inner) of a walk, (batch, outer, inner, E, N): all its states.

    In 1-D the walk is one line of outer * inner places, and a band is a piece of it. In 2-D a band is a few whole
    lines: the inner recurrence, along each line, is not cut; every column hands a state of its own from band to band.
    """
    if ndim == 1:
        return scan_axis_in_bands(a.flatten(1, 2), b.flatten(1, 2), bands).unflatten(1, a.shape[1:3])
    g = scan_axis(a, b, dim=2)
    return scan_axis_in_bands(a, g, bands)


def scan_axis_in_bands(a: Tensor, b: Tensor, bands: int) -> Tensor:
    """h[t] = a[t] h[t-1] + b[t] along axis 1 of (batch, steps, ...), h[-1] = 0."""
    steps = a.shape[1]
    a, b = _cut(a, bands, fill=1.0), _cut(b, bands, fill=0.0)  # [batch, steps, ...] -> [batch, bands, length, ...]

    # Summary, (batch, bands, ...) each.
    product = a.prod(2)
    leaving = scan_axis(a, b, dim=2)[:, :, -1]  # where zero enters

    # Stitching: a recurrence over bands, whose state after one band is what enters the next.
    after = scan_axis(product, leaving, dim=1)
    entering = torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], 1)  # [batch, bands, ...]

    # Scan: the first step of each band takes in what enters it.
    first = b[:, :, :1] + a[:, :, :1] * entering.unsqueeze(2)
    h = scan_axis(a, torch.cat([first, b[:, :, 1:]], 2), dim=2)
    return h.flatten(1, 2)[:, :steps]  # [batch, bands, length, ...] -> [batch, steps, ...]


def _cut(t: Tensor, bands: int, fill: float) -> Tensor:
    """Cut axis 1 into bands of one length, (batch, steps, ...) -> (batch, bands, length, ...).

    The last bands may reach beyond the end of the walk: there a is 1 and b is 0, which leaves a state as it is.
    """
    steps = t.shape[1]
    length = math.ceil(steps / bands)
    beyond = [0, 0] * (t.dim() - 2) + [0, bands * length - steps]  # F.pad counts axes from the last
    return F.pad(t, beyond, value=fill).unflatten(1, (bands, length))
