# SPDX-License-Identifier: Apache-2.0
"""The operators on CUDA: what a call prepares, launches and adds up."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..._triton import LAUNCH
from ...backend import check_precision
from .backward_1d import _scan_backward_1d
from .backward_2d import _scan_backward_2d
from .bands import _stitch, choose_bands
from .forward_1d import _scan_forward_1d
from .forward_2d import _scan_forward_2d
from .tiles import BLOCK_E, TILES, WIDE_FROM, chosen, kind_of, processors, resources, tune

PAIRS = ((0, 1), (2, 3), (0, 1, 2, 3))  # orders that come two by two from one corner


def _rows(t: Tensor) -> Tensor:
    """A map (batch, H, W, K, R) as rows at an equal distance, (batch H W K, R); a view but for unusual strides."""
    rows = t.flatten(0, 3)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _parameters(A: Tensor, D: Tensor | None, dt_bias: Tensor | None, dt_weight: Tensor | None) -> Tensor:
    """The parameters of the channels in float32, (K, N + 2 + R, E): A of all states, D, the bias, the weights."""
    per_channel = (A.new_zeros(A.shape[:2]) if t is None else t for t in (D, dt_bias))
    rows = [A.transpose(1, 2), *(t[:, None] for t in per_channel)]
    if dt_weight is not None:
        rows.append(dt_weight.transpose(1, 2))
    return torch.cat([t.to(torch.float32) for t in rows], 1)


class _Scan:
    """A call of the op: its arguments as the kernels take them, and the launches.

    In place of C, where there is none, the kernels are given B, which they then do not use.
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
        self.dt, self.B = _rows(dt), _rows(B)
        self.C = self.B if C is None else _rows(C)
        if self.B.stride() != self.C.stride():
            self.B, self.C = self.B.contiguous(), self.C.contiguous()
        self.parameters = _parameters(A, D, dt_bias, dt_weight)

        self.ndim = ndim
        self.pairs = ndim == 2 and self.has_C and tuple(orders) in PAIRS
        self.blocks = triton.cdiv(channels, BLOCK_E)
        self.bands = choose_bands(batch * self.blocks, height, width, ndim, processors(x.device))
        self.grid = batch * self.blocks, self.bands
        self.edge = max(height, width) if ndim == 2 else 1  # columns that hand a state on to the next band
        line = max(height, width) if ndim == 2 else height * width
        kind = kind_of(batch * self.blocks, processors(x.device), line)
        self.tiles = next(tiles for length, tiles in TILES[ndim].items() if line <= length)
        rows, edges = batch * height * width, 6 * batch * self.bands * self.edge
        reach = max(channels * max(rows, edges), self.K * rows * max(self.dt.stride(0), self.B.stride(0)))
        self.sizes = dict(
            dt_row=self.dt.stride(0),
            BC_row=self.B.stride(0),
            height=height,
            width=width,
            channels=channels,
            rank=self.rank,
            states=self.N,
            orders=sum(order << 2 * k for k, order in enumerate(orders)),
            kind=kind,
        )
        self.options = dict(
            SOFTPLUS=softplus,
            RANK=max(16, triton.next_power_of_2(self.rank)) if self.rank else 0,  # which tensor cores can take
            WIDE=reach >= WIDE_FROM,
            EVEN=channels % BLOCK_E == 0,
        )
        # What a tile is chosen for: all launches of a kernel in a call, whatever each is to write.
        self.kind = (kind, self.has_C, *self.options.values(), x.dtype, self.dt.dtype, B.dtype)

    def buffer(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def launch(self, kernel: triton.JITFunction, tensors: Sequence[Tensor], orders: int = 1, **options: Any) -> None:
        """Run a kernel over the whole grid; where walks are cut into bands, twice, first for the bands' summaries.

        Args:
            kernel: Kernel to run.
            tensors: Tensors of the call; edges of strips and bands are added.
            orders: Number of orders that a walk goes at once.
            **options: Further arguments of the kernel.
        """
        batch, _, _, channels = self.shape
        parts, size = orders * batch, self.bands * self.edge * channels
        kinds = (self.ndim - 1) + (2 if self.bands > 1 else 0)  # edges of strips, and products and states of bands
        edges = self.buffer(kinds, parts, size) if kinds else self.parameters

        def once(summary: bool) -> None:
            arguments = (*tensors, edges)
            keywords = dict(self.sizes, **self.options, **options, SUMMARY=summary, **LAUNCH)
            if summary and 'TERMS' in options:  # whatever the second launch is to write, this one writes no map
                arguments = (*self.inputs(), self.x, self.x, edges)
                keywords |= dict(TERMS=False, HAS_C=False)
            tile = self.tiles[0]
            if not (self.x.is_cpu or torch.are_deterministic_algorithms_enabled()):
                key = (kernel, self.x.device, self.kind)
                if key not in chosen and not torch.cuda.is_current_stream_capturing():
                    chosen[key] = tune(kernel, self.tiles, self.kind, self.grid, arguments, keywords)
                    return
                tile = chosen.get(key, tile)
            kernel[self.grid](*arguments, **keywords, J=tile[0], S=tile[1], **resources(tile))

        if self.bands > 1:
            once(True)
            size = self.edge * channels
            grid = triton.cdiv(size, 128), parts
            _stitch[grid](edges[-2:], parts * self.bands * size, self.bands, size, BLOCK=128, num_warps=4, **LAUNCH)
        once(False)

    def inputs(self) -> tuple[Tensor, ...]:
        return self.x, self.dt, self.B, self.C, self.parameters

    def forward(self) -> Tensor:
        """Scan all walks."""
        y = torch.empty(self.shape, dtype=self.x.dtype, device=self.x.device)
        orders = 2 if self.pairs else 1
        walks = self.walks // orders
        sums = y if self.x.dtype == torch.float32 or walks == 1 else self.buffer(*self.shape)
        kernel, pair = _scan_forward_1d, {}
        if self.ndim == 2:
            kernel, pair = _scan_forward_2d, dict(PAIR=self.pairs)
        here = walks if self.bands == 1 else 1
        for walk in range(0, walks, here):
            self.launch(
                kernel,
                (*self.inputs(), sums, y),
                orders,
                walk=walk,
                walks=walks,
                walks_here=here,
                HAS_C=self.has_C,
                TERMS=False,
                **pair,
            )
        return y

    def terms(self, walk: int) -> list[Tensor]:
        """What the backward pass of a walk reads: a times the state of the line, and of the place, before."""
        terms = [self.buffer(*self.shape) for _ in range(self.ndim)]
        kernel, pair = (_scan_forward_1d, {}) if self.ndim == 1 else (_scan_forward_2d, dict(PAIR=False))
        keywords = dict(walk=walk, walks=self.walks, walks_here=1, HAS_C=False, TERMS=True, **pair)
        self.launch(kernel, (*self.inputs(), terms[-1], terms[0]), **keywords)
        return terms

    def backward(self, walk: int, grad_y: Tensor, sums: Tensor, dx: Tensor, draw: Tensor, *parts: Tensor) -> None:
        """Follow a walk backwards."""
        kernel = _scan_backward_1d if self.ndim == 1 else _scan_backward_2d
        tensors = (grad_y, *self.inputs(), *self.terms(walk), sums, dx, draw, *parts)
        self.launch(kernel, tensors, walk=walk, walks=self.walks, HAS_C=self.has_C)


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
        return _Scan(x, dt, A, B, C, D, dt_bias, dt_weight, ndim, orders, softplus).forward()


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
        K, N, rank, weight, cells = scan.K, scan.N, scan.rank, dt_weight, (batch, height, width)
        grad_y = grad_y.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sums = dx if x.dtype == torch.float32 or scan.walks == 1 else scan.buffer(*x.shape)
        # Gradients of low-rank steps are products: of bfloat16 where these are in it, unless states add up in them.
        exact = weight is None or N > 1 or dt.dtype != torch.bfloat16
        product = torch.float32 if exact else torch.bfloat16
        precise: dict[str, Any] = dict(out_dtype=torch.float32) if x.is_cuda else {}
        draw = scan.buffer(*cells, 1 if rank else K, channels, dtype=product)
        ddt = scan.buffer(*cells, K, rank, dtype=product) if rank else draw
        dweight = scan.buffer(K, channels, rank)
        dBC = scan.buffer(*cells, K, N, 2)
        dparams = scan.buffer(batch * scan.bands, K, N, 3, channels)
        by_block = scan.buffer(scan.blocks, *cells, 2)
        for walk in range(scan.walks):
            k, n = walk // N, walk % N
            scan.backward(walk, grad_y, sums, dx, draw, by_block, dparams)
            torch.sum(by_block, 0, out=dBC[..., k, n, :])
            if weight is not None and n == N - 1:
                flat, low = draw.flatten(0, 3), dt[..., k, :].to(product).flatten(0, 2)  # [B H W, E], [B H W, R]
                if wanted[1]:
                    ddt[..., k, :] = (flat @ weight[k].to(product)).unflatten(0, cells)
                if wanted[7]:
                    dweight[k] = torch.mm(flat.T, low, **precise)
        dA, dbias, dD = dparams.sum(0).unbind(2)  # [K, N, E] each
        dA, dD = dA.transpose(1, 2).contiguous(), dD[:, 0]
        grads = (dx, ddt, dA, *dBC.unbind(-1), dD, dbias.sum(1), dweight)
        return tuple(
            grad.to(t.dtype).contiguous() if t is not None and is_wanted else grad_y.new_empty(0)
            for t, grad, is_wanted in zip(inputs, grads, wanted, strict=True)
        )
