# SPDX-License-Identifier: Apache-2.0
"""Time per pixel of a large image over that of a small one, on the CPU, one image at a time.

python benchmarks/size_cpu.py --json benchmarks/results/size_cpu.json
"""

from functools import partial
from typing import Any

from _models import MODELS, forward, make
from _run import finish, make_parser, parse

from vssm.tools._bench import median_seconds


def measure(name: str, sizes: tuple[int, int], rounds: int) -> dict[str, Any]:
    seconds = []
    for size in sizes:
        call = partial(forward, *make(name, size, batch_size=1))
        seconds.append(median_seconds({name: call}, rounds if size > 512 else 5 * rounds)[name])
    small, large = (s / size**2 for s, size in zip(seconds, sizes, strict=True))
    return dict(name=name, sizes=list(sizes), ms=[1e3 * s for s in seconds], per_pixel=large / small)


def main() -> None:
    parser = make_parser(__doc__, MODELS, rounds=5)
    parser.add_argument('--sizes', type=int, nargs=2, default=(224, 1792), metavar=('SMALL', 'LARGE'))
    args = parse(parser)
    rows = [measure(name, args.sizes, args.rounds) for name in args.models]
    small, large = args.sizes
    title = f'inference, batch 1, float32: {small}x{small} and {large}x{large}'
    header = ['model', f'{small}, ms', f'{large}, ms', 'time per pixel']
    cells = [[row['name'], *(f'{ms:.0f}' for ms in row['ms']), f'{row["per_pixel"]:.2f}x'] for row in rows]
    finish(args, rows, title, header, cells)


if __name__ == '__main__':
    main()
