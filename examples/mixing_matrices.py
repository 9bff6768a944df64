# SPDX-License-Identifier: Apache-2.0
"""The mixers as matrices, y = M x, built from the products of docs/theory.md and drawn side by side:

    python examples/mixing_matrices.py mixing-matrices.png

Nothing here calls the ops; tests/ops/test_theory.py holds both against each other. For one channel of a map of H x W
positions, M is (HW, HW): what every position (row) takes from every position (column), both in raster order. It belongs
to one image, for the step sizes, B and C are computed from the image itself.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor


def decays_1d(a: Tensor) -> Tensor:
    """What remains at p of what q put into the state: a[p] ... a[q+1] along the flattened walk, or 0 if q is after p.

    Args:
        a: Decays, (outer, inner, N).

    Returns:
        The decays from every q to every p, (outer * inner, outer * inner, N), p first.
    """
    a = a.flatten(0, 1)
    out = a.new_zeros(len(a), *a.shape)
    for p in range(len(a)):
        for q in range(p + 1):
            out[p, q] = a[q + 1 : p + 1].prod(0)
    return out


def decays_2d(a: Tensor) -> Tensor:
    """What remains in the 2-D scan at p = (i, j) of what q = (k, l) put in, along row k to column j, then to row i.

    Args:
        a: Decays, (outer, inner, N).

    Returns:
        The decays from every q to every p, (outer * inner, outer * inner, N), p first.
    """
    outer, inner = a.shape[:2]
    out = a.new_zeros(outer, inner, *a.shape)
    for i in range(outer):
        for j in range(inner):
            for k in range(i + 1):
                for l in range(j + 1):  # noqa: E741
                    out[i, j, k, l] = a[k + 1 : i + 1, j].prod(0) * a[k, l + 1 : j + 1].prod(0)
    return out.flatten(0, 1).flatten(1, 2)


def walk(t: Tensor, order: int) -> Tensor:
    """A map, (H, W, ...), as an order meets it, (outer, inner, ...)."""
    t = t.transpose(0, 1) if order in (1, 3) else t
    return t.flip(0, 1) if order in (2, 3) else t


def scan_matrix(
    dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, ndim: int, orders: Sequence[int] = (0, 1, 2, 3)
) -> Tensor:
    """M of the selective scan of one channel.

    Args:
        dt: Step sizes, (H, W, K).
        A: Decay rates, (K, N).
        B: Input map, (H, W, K, N).
        C: Output map, (H, W, K, N).
        D: Skip connection, (K,).
        ndim: Number of dimensions of the scan, 1 or 2.
        orders: Orders of the walks, K of them.

    Returns:
        The matrix, (HW, HW).
    """
    height, width = dt.shape[:2]
    M = D.sum() * torch.eye(height * width, dtype=dt.dtype)
    for k, order in enumerate(orders):
        a = walk(torch.exp(dt[:, :, k, None] * A[k]), order)
        decays = (decays_1d if ndim == 1 else decays_2d)(a)
        put = walk(dt[:, :, k, None] * B[:, :, k], order).flatten(0, 1)  # [HW, N]
        taken = walk(C[:, :, k], order).flatten(0, 1)
        at = walk(torch.arange(height * width).view(height, width), order).flatten()  # the walk's steps on the map
        M[at.unsqueeze(1), at] += torch.einsum('pn,pqn,qn->pq', taken, decays, put)
    return M


def fusion_matrix(weight: Tensor, height: int, width: int) -> Tensor:
    """The state fusion of one channel, h' = F h; a tap beyond the border takes the nearest position.

    Args:
        weight: Kernels of 3x3 for the dilations 1, 3 and 5, (3, 3, 3).
        height: Height of the map.
        width: Width of the map.

    Returns:
        The matrix F, (HW, HW).
    """
    F = weight.new_zeros(height, width, height, width)
    for kernel, dilation in zip(weight, (1, 3, 5), strict=True):
        for i in range(height):
            for j in range(width):
                for u in range(3):
                    for v in range(3):
                        k = min(max(i + dilation * (u - 1), 0), height - 1)
                        l = min(max(j + dilation * (v - 1), 0), width - 1)  # noqa: E741
                        F[i, j, k, l] += kernel[u, v]
    return F.flatten(0, 1).flatten(1, 2)


def fused_matrix(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, weight: Tensor) -> Tensor:
    """M of Spatial-Mamba's mixer: the states of the 1-D scan, fused, read by C, and D x added.

    The arguments are those of `scan_matrix` and `fusion_matrix`, with K = 1.
    """
    states = scan_matrix(dt, A, B, torch.ones_like(C), torch.zeros_like(D), ndim=1, orders=(0,))
    M = C.flatten().unsqueeze(1) * (fusion_matrix(weight, *dt.shape[:2]) @ states)
    return M + D.sum() * torch.eye(len(M), dtype=M.dtype)


def draw(path: str, height: int = 9, width: int = 9) -> None:
    """Draw the three matrices, and what the central position takes from the map, for random step sizes, B and C."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    torch.manual_seed(0)
    orders = (0, 1, 2, 3)
    dt = torch.rand(height, width, 4) * 0.2 + 0.3
    A, D = -torch.ones(4, 1), torch.zeros(4)
    B, C = (torch.rand(height, width, 4, 1) * 0.5 + 0.75 for _ in range(2))
    first = dt[:, :, :1], A[:1], B[:, :, :1], C[:, :, :1], D[:1]
    fused = fused_matrix(*first, torch.ones(3, 3, 3))
    matrices = {
        '1-D scan, order 0': scan_matrix(*first, ndim=1, orders=(0,)),
        '2-D scan, order 0': scan_matrix(*first, ndim=2, orders=(0,)),
        '1-D scan, order 0, fused': fused,
    }
    maps = {
        '1-D scan, four orders': scan_matrix(dt, A, B, C, D, ndim=1, orders=orders),
        '2-D scan, four orders': scan_matrix(dt, A, B, C, D, ndim=2, orders=orders),
        '1-D scan, order 0, fused': fused,
    }

    fig, axes = plt.subplots(2, 3, figsize=(10.5, 7.6), layout='constrained')
    cmap = plt.get_cmap('viridis').with_extremes(bad='0.85')  # grey where M is zero
    norm = LogNorm(1e-3, 1, clip=True)
    for ax, (title, M) in zip(axes[0], matrices.items(), strict=True):
        drawn = ax.imshow((M / M.max()).where(M > 0, torch.nan).numpy(), cmap=cmap, norm=norm)
        ax.set(title=title, xlabel='position that is taken from', ylabel='position that takes')
    for ax, (title, M) in zip(axes[1], maps.items(), strict=True):
        row = M.view(height, width, height, width)[height // 2, width // 2]
        ax.imshow((row / row.max()).where(row > 0, torch.nan).numpy(), cmap=cmap, norm=norm)
        ax.plot(width // 2, height // 2, 'o', color='white', markeredgecolor='black')
        ax.set(title=title, xlabel='column of the map', ylabel='row of the map')
    for ax in axes[:, 1:].flat:
        ax.set(ylabel=None)
    fig.colorbar(drawn, ax=axes, label='M over its maximum (grey: zero)', shrink=0.8)
    fig.suptitle(f'Above: M on a map of {height}x{width}. Below: what the centre (white) takes, its row of M as a map')
    fig.savefig(path, dpi=100, pil_kwargs=dict(optimize=True))
    plt.close(fig)


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit(f'usage: python {sys.argv[0]} FILE.png')
    draw(sys.argv[1])
