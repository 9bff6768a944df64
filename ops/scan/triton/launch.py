# SPDX-License-Identifier: Apache-2.0
"""The operators on CUDA: what a call prepares, launches and adds up."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ...backend import check_precision
from .backward import _scan_backward
from .bands import _stitch, choose_bands
from .forward import _scan_forward
from .tiles import BLOCK_E, TILES, WIDE_FROM, autotuned, chosen, kind_of, processors, resources


class _Scan:
    """A call of the op: its arguments as the kernels take them, and the launches.

    In place of an absent tensor the kernels are given x, which they do not read.
    """

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor | None,
        D: Tensor | None,
        dt_bias: Tensor | None,
        dt_weight: Tensor | None,
        ndim: int,
        orders: Sequence[int],
        softplus: bool,
    ) -> None:
        self.x = x = x.contiguous()
        self.shape = batch, height, width, channels = x.shape
        self.K, _, self.N = A.shape
        self.walks = self.K * self.N
        self.rank = 0 if dt_weight is None else dt_weight.shape[2]
        self.has_C = C is not None
        self.dt = dt if dt.stride(-1) == 1 or dt.shape[-1] == 1 else dt.contiguous()
        C = B if C is None else C
        if B.stride() != C.stride() or (B.stride(-1) != 1 and self.N > 1):
            B, C = B.contiguous(), C.contiguous()
        self.B, self.C = B, C
        D, dt_bias, dt_weight = (
            None if t is None else t.to(torch.float32).contiguous() for t in (D, dt_bias, dt_weight)
        )
        self.dt_weight = dt_weight  # (K, E, R)
        weight = None if dt_weight is None else dt_weight.transpose(1, 2).contiguous()
        self.A = A.to(torch.float32).contiguous()
        self.parameters = [x if t is None else t for t in (D, dt_bias, weight)]

        self.blocks = triton.cdiv(channels, BLOCK_E)
        self.bands = choose_bands(batch * self.blocks, height, width, ndim, processors(x.device))
        self.grid = (batch * self.bands * self.blocks,)
        self.edge = max(height, width) if ndim == 2 else 1  # columns that hand a state on to the next band
        self.left = self.buffer(batch * self.bands, self.edge, channels)
        self.carry = self.buffer(2, batch * self.bands, self.edge, channels) if self.bands > 1 else self.left
        line = max(height, width) if ndim == 2 else height * width
        kind = kind_of(batch * self.blocks, processors(x.device), line, self.rank)
        self.tiles = next(tiles for length, tiles in TILES.items() if line <= length)
        reach = max((t.shape[1] - 1) * t.stride(1) + (t.shape[2] - 1) * t.stride(2) for t in (x, self.dt, B))
        self.sizes = dict(
            dt_image=self.dt.stride(0),
            dt_row=self.dt.stride(1),
            dt_column=self.dt.stride(2),
            dt_order=self.dt.stride(3),
            BC_image=B.stride(0),
            BC_row=B.stride(1),
            BC_column=B.stride(2),
            BC_order=B.stride(3),
            height=height,
            width=width,
            channels=channels,
            rank=self.rank,
            states=self.N,
            orders=sum(order << 2 * k for k, order in enumerate(orders)),
            walks=self.walks,
            bands=self.bands,
            edge=self.edge,
            half=batch * self.bands * self.edge * channels,
            kind=kind,
        )
        self.options = dict(
            NDIM=ndim,
            SOFTPLUS=softplus,
            LOW_RANK=dt_weight is not None,
            HAS_BIAS=dt_bias is not None,
            HAS_D=D is not None,
            WIDE=reach + channels >= WIDE_FROM,
            EVEN=channels % BLOCK_E == 0,
            BLOCK_E=BLOCK_E,
        )

    def buffer(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def launch(self, kernel: triton.JITFunction, *tensors: Tensor, **options: Any) -> None:
        """Run a kernel over the whole grid; where walks are cut into bands, twice, first for the bands' summaries."""

        def once(summary: bool, has_carry: bool) -> None:
            arguments = (*tensors, self.left, self.carry)
            keywords = dict(self.sizes, **self.options, **options, SUMMARY=summary, HAS_CARRY=has_carry)
            tile = self.tiles[0]
            if self.x.is_cuda and not torch.are_deterministic_algorithms_enabled():
                flags = (value for name, value in keywords.items() if name.isupper())
                key = (kernel, self.x.device, self.sizes['kind'], *flags, *(t.dtype for t in tensors))
                if key not in chosen and not torch.cuda.is_current_stream_capturing():
                    tuner = autotuned(kernel, self.tiles)
                    tuner[self.grid](*arguments, **keywords)
                    chosen[key] = tuner.best_config.kwargs['J'], tuner.best_config.kwargs['S']
                    return
                tile = chosen.get(key, tile)
            J, S = tile
            kernel[self.grid](*arguments, **keywords, J=J, S=S, **resources(S))

        if self.bands == 1:
            return once(False, False)
        once(True, False)
        size = self.edge * self.shape[3]
        grid = (triton.cdiv(size, 128), self.shape[0])
        _stitch[grid](self.carry, self.sizes['half'], self.bands, size, BLOCK=128, num_warps=4)
        once(False, True)

    def forward(self, walk: int, walks: int, has_C: bool, sums: Tensor, y: Tensor) -> None:
        D, bias, weight = self.parameters
        tensors = (self.x, self.dt, self.A, self.B, self.C, D, bias, weight, sums, y)
        self.launch(_scan_forward, *tensors, walk=walk, walks_here=walks, HAS_C=has_C)

    def backward(
        self, walk: int, grad_y: Tensor, h: Tensor, sums: Tensor, dx: Tensor, draw: Tensor, *parts: Tensor
    ) -> None:
        D, bias, weight = self.parameters
        tensors = (grad_y, self.x, self.dt, self.A, self.B, self.C, D, bias, weight, h, sums, dx, draw, *parts)
        self.launch(_scan_backward, *tensors, walk=walk, draw_orders=draw.shape[3], HAS_C=self.has_C)


def selective_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    ndim: int,
    orders: Sequence[int],
    softplus: bool,
) -> Tensor:
    """The operator `vssm::selective_scan` on CUDA, with the same arguments; float64 is left to the reference."""
    check_precision('selective_scan', x)
    with torch.cuda.device_of(x):
        scan = _Scan(x, dt, A, B, C, D, dt_bias, dt_weight, ndim, orders, softplus)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = y if x.dtype == torch.float32 or scan.walks == 1 else scan.buffer(*x.shape)
        step = scan.walks if scan.bands == 1 else 1
        for walk in range(0, scan.walks, step):
            scan.forward(walk, step, scan.has_C, sums, y)
    return y


def selective_scan_triton_backward(
    grad_y: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_weight: Tensor | None,
    ndim: int,
    orders: Sequence[int],
    softplus: bool,
    wanted: Sequence[bool] = (True,) * 8,
) -> tuple[Tensor, ...]:
    """The operator `vssm::selective_scan_backward` on CUDA, with the same arguments; float64 is the reference's."""
    check_precision('selective_scan', x)
    inputs = (x, dt, A, B, C, D, dt_bias, dt_weight)
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):  # which would round the products
        scan = _Scan(*inputs, ndim, orders, softplus)
        batch, height, width, channels = scan.shape
        K, N, rank, weight, cells = scan.K, scan.N, scan.rank, scan.dt_weight, (batch, height, width)
        grad_y = grad_y.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = dx if x.dtype == torch.float32 or scan.walks == 1 else scan.buffer(*x.shape)
        draw = scan.buffer(*cells, 1 if rank else K, channels)
        ddt = scan.buffer(*cells, K, rank) if rank else draw
        dweight = scan.buffer(K, channels, rank)
        dB, dC = scan.buffer(*cells, K, N), scan.buffer(*cells, K, N)
        dparams = scan.buffer(batch * scan.bands, K, N, 3, channels)
        h, by_block = scan.buffer(*x.shape), scan.buffer(scan.blocks, *cells, 2)
        for walk in range(scan.walks):
            k, n = walk // N, walk % N
            scan.forward(walk, 1, False, h, h)
            scan.backward(walk, grad_y, h, sums, dx, draw, by_block, dparams)
            dB[..., k, n], dC[..., k, n] = by_block.sum(0).unbind(-1)
            if weight is not None and n == N - 1:
                low = scan.dt[..., k, :].to(torch.float32).flatten(0, 2)  # [B H W, R]
                flat = draw.flatten(0, 3)  # [B H W, E]
                ddt[..., k, :] = (flat @ weight[k]).unflatten(0, cells)
                dweight[k] = flat.T @ low
        dA, dbias, dD = dparams.sum(0).unbind(2)  # [K, N, E] each
        dA, dD = dA.transpose(1, 2).clone(memory_format=torch.contiguous_format), dD[:, 0].clone()
        grads = (dx, ddt, dA, dB, dC, dD, dbias.sum(1), dweight)
        return tuple(
            grad.to(t.dtype) if t is not None and is_wanted else grad_y.new_empty(0)
            for t, grad, is_wanted in zip(inputs, grads, wanted, strict=True)
        )
