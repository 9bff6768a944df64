# SPDX-License-Identifier: Apache-2.0
"""Compile the CUDA kernels for GPUs that need not be there; print registers, spills and shared memory.

    python benchmarks/compile_cuda.py                      # the default tiles, every type and option, every card
    python benchmarks/compile_cuda.py --all-tiles          # and the tiles among which the autotuner chooses
    python benchmarks/compile_cuda.py --options models     # those options alone that the pyramids of maps use
    python benchmarks/compile_cuda.py --options tokens     # sequences and windows of tokens, with many states
    python benchmarks/compile_cuda.py --capability 9.0 --json kernels.json
    python benchmarks/compile_cuda.py --capability gfx942  # an AMD card

Exits with 1 where a kernel does not compile, or where one spills more than a little with its default tile. The backward
kernels spill some: on an H200 they were fastest so, since with more registers a processor has fewer warps at a time.
"""

import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

CAPABILITIES = ('7.5', '8.0', '8.6', '8.9', '9.0', '10.0', '12.0')
AMD = ('gfx942',)  # the MI300's
DTYPES = ('float32', 'float16', 'bfloat16')


class Card:
    """A stand-in for Triton's driver that names the card to compile for, and runs nothing.

    Args:
        capability: Compute capability times ten, or the architecture of an AMD card.
    """

    def __init__(self, capability: int | str) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        is_amd = isinstance(self.capability, str)
        return GPUTarget('hip', self.capability, 64) if is_amd else GPUTarget('cuda', self.capability, 32)


def calls(dtype: str, all_tiles: bool, which: str) -> Iterator[tuple[bool, str]]:
    """Launch every kernel with every option; yields whether the tile is a default one, and the options in words."""
    import torch

    from vssm.ops.fusion import triton as fusion
    from vssm.ops.scan.triton import launch as scan

    type_ = getattr(torch, dtype)

    def inputs(channels: int, K: int, rank: int, grid: tuple[int, int] = (8, 40), N: int = 1, **options: Any) -> tuple:
        maps = torch.zeros(1, *grid, K, max(rank, channels), dtype=type_)
        parameter = torch.zeros(K, channels)
        full = options.get('has_C', True)
        return (
            torch.zeros(1, *grid, channels, dtype=type_),
            maps[..., : rank or channels],
            torch.zeros(K, channels, N),
            maps[..., :N],
            maps[..., N : 2 * N] if full else None,
            parameter if full else None,
            parameter,
            torch.zeros(K, channels, rank) if rank else None,
        )

    def run(*arguments: Any) -> None:
        scan.selective_scan_triton(*arguments)
        scan.selective_scan_triton_backward(arguments[0], *arguments)

    if which == 'tokens':  # Vim's, and the windows of MambaVision
        for width, N, channels, order in ((197, 16, 384, 0), (730, 16, 384, 2), (49, 8, 320, 0), (196, 8, 160, 0)):
            run(*inputs(channels, 1, channels // 16, (1, width), N), 1, (order,), True)
            yield True, f'1x{width}, {N} states, order {order}'
        return
    tiles, bands = dict(scan.TILES), scan.choose_bands
    for ndim, by_length in tiles.items():
        defaults = [group[0] for group in by_length.values()]
        candidates = dict.fromkeys(tile for group in by_length.values() for tile in group)
        for tile in candidates if all_tiles else defaults:
            scan.TILES = {ndim: {1 << 62: (tile,)}}
            for rank in (3, 0) if which == 'all' else (3,):
                for cut in (1, 2) if which == 'all' and tile == defaults[-1] else (1,):
                    scan.choose_bands = lambda *_, cut=cut: cut
                    run(*inputs(96, 4, rank), ndim, (0, 1, 2, 3), True)
                    steps = 'low-rank' if rank else 'full'
                    yield tile in defaults, f'{ndim}-D, {steps} steps, {cut} band(s), tile {tile}'
    scan.TILES, scan.choose_bands = tiles, lambda *_: 1
    for ndim in (1, 2):
        run(*inputs(96, 1, 3, has_C=False), ndim, (0,), True)
        yield True, f'{ndim}-D without C'
        if which == 'all':
            run(*inputs(40, 2, 0), ndim, (1, 2), False)
            yield True, f'{ndim}-D without softplus, odd channels'
    scan.choose_bands = bands
    h, weight = torch.zeros(1, 8, 40, 96, dtype=type_), torch.zeros(3, 96, 3, 3)
    fusion.state_fusion_triton(h, weight)
    fusion.state_fusion_triton_backward(h, h, weight)
    yield True, 'state fusion'


def compile_all(capability: str, dtype: str, all_tiles: bool, options: str) -> list[dict[str, Any]]:
    """Compile all kernels for a card and a type, in a process of its own, and return a row for each."""
    os.environ.pop('TRITON_INTERPRET', None)
    os.environ['TRITON_CACHE_DIR'] = tempfile.mkdtemp()
    import torch
    import triton
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    is_amd = capability in AMD
    if is_amd:
        torch.version.hip = capability  # by which the kernels know whose they are
    driver.set_active(Card(capability if is_amd else int(capability.replace('.', ''))))
    triton.knobs.nvidia.dump_ptxas_log = True
    rows: list[dict[str, Any]] = []
    compiled: set[str] = set()
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        log = StringIO()
        with redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in compiled:
            compiled.add(kernel.hash)
            text = kernel.asm['amdgcn'] if is_amd else log.getvalue()
            patterns = OF_AMD if is_amd else PATTERNS
            numbers = {key: int(re.search(pattern, text)[1]) for key, pattern in patterns.items()}
            names = dict(kernel=self.__name__.lstrip('_'), warps=kwargs['num_warps'])
            rows.append(dict(**names, **numbers, shared=kernel.metadata.shared))
        return kernel

    JITFunction.run = compile_only
    seen = 0
    for is_default, what in calls(dtype, all_tiles, options):
        for row in rows[seen:]:
            row |= dict(capability=capability, dtype=dtype, options=what, default=is_default)
        seen = len(rows)
    return rows


MOST_SPILLED = 1024  # bytes of a thread
PATTERNS = dict(registers=r'Used (\d+) registers', spilled=r'(\d+) bytes spill stores')
OF_AMD = dict(registers=r'\.vgpr_count:\s+(\d+)', spilled=r'\.private_segment_fixed_size:\s+(\d+)')

COLUMNS = {
    'capability': 'card',
    'dtype': 'dtype',
    'kernel': 'kernel',
    'options': 'options',
    'warps': 'warps',
    'registers': 'registers',
    'spilled': 'spilled bytes',
    'shared': 'shared bytes',
}


def main() -> int:
    # Imported here, for the processes that compile import this file too, and must set Triton up before torch.
    from _run import finish, make_parser, parse

    parser = make_parser(__doc__)
    parser.add_argument('--capability', nargs='*', default=CAPABILITIES, choices=(*CAPABILITIES, *AMD), metavar='X.Y')
    parser.add_argument('--dtype', nargs='*', default=DTYPES, choices=DTYPES)
    parser.add_argument('--all-tiles', action='store_true')
    parser.add_argument('--options', choices=('all', 'models', 'tokens'), default='all')
    parser.add_argument('--jobs', type=int, default=os.cpu_count())
    args = parse(parser)

    jobs = [
        (c, d, args.all_tiles, args.options)
        for c in args.capability
        for d in args.dtype
        if (c, d) != ('7.5', 'bfloat16')
    ]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context('spawn'), max_tasks_per_child=1) as pool:
        results = pool.map(compile_all, *zip(*jobs, strict=True))
        rows = [row for result in results for row in result]

    cells = [[str(row[key]) for key in COLUMNS] for row in rows]
    finish(args, rows, 'Compiled CUDA kernels', list(COLUMNS.values()), cells)
    spilling = [row for row in rows if row['default'] and row['spilled'] > MOST_SPILLED]
    print(f'{len(rows)} kernels compiled, {len(spilling)} of default tiles spill more than {MOST_SPILLED} bytes')
    return 1 if spilling else 0


if __name__ == '__main__':
    sys.exit(main())
