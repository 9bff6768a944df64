# SPDX-License-Identifier: Apache-2.0
"""What networks cost on an H100 that need not be there. All of its figures are modelled.

    python benchmarks/gpu_model.py                                               # inference
    python benchmarks/gpu_model.py vmamba2d_tiny --train                         # a training step
    python benchmarks/gpu_model.py --both --samples 1 --most 8000 --json benchmarks/results/gpu_model.json
    python benchmarks/gpu_model.py vmamba2d_tiny --kernel scan --stage 3 --pass backward --most 10000
    python benchmarks/gpu_model.py spatial_mamba_tiny --kernel fusion --stage 1 --train --json kernels.json

The host code compiles what the models launch, at their real shapes. A few programs of each launch run in the emulator
of tests/sass, and a model of one multiprocessor times what their warps issue (`_gpu_sm`). All else in a network takes
as long as its products or its bytes at stated rates (`_gpu_network`). The constants are printed, and stand in the json.

What binds a launch is a unit that is busy four fifths of the time or more, or else what its warps wait for most. With
`--both` the kernels' aims, too, are printed, as a table for docs/performance.md.
"""

import argparse
import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop('TRITON_INTERPRET', None)  # before anything imports Triton
os.environ.setdefault('TRITON_CACHE_DIR', str(Path.home() / '.triton' / 'cache'))

import torch  # noqa: E402
from _gpu_network import OPS, Call, Counted, Counting, count_network  # noqa: E402
from _gpu_sm import CHIP, LATENCY, OCCUPANCY  # noqa: E402
from _gpu_trace import Recorded, Recorder  # noqa: E402
from _run import finish, make_parser, parse, print_table  # noqa: E402

from vssm.tools._tables import markdown_table  # noqa: E402

MODELS = ('swin_tiny_patch4_window7_224', 'vmamba2d_tiny', 'vmamba_tiny', 'spatial_mamba_tiny')
CYCLES_PER_US = 1e3 * CHIP['clock_ghz']
GROUPS = {  # of classes of instructions
    'integer': ('alu', 'imad', 'wide', 'uniform', 'constant', 'convert'),
    'float': ('fp32',),
    'MUFU': ('special',),
    'products': ('product', 'group product'),
    'global': ('load', 'store'),
    'shared': ('load shared', 'store shared', 'shuffle'),
    'spills': ('spill',),
    'control': ('control', 'barrier'),
}
BUSY = 0.8  # the part of the time from which on a unit binds
CAUSES = {  # what warps wait for, in words, by what keeps them
    'loads': ('load',),
    'spills': ('spill',),
    'stores': ('store',),
    'shared memory': ('load shared', 'store shared', 'shuffle'),
    'barriers': ('barrier',),
    'results': ('special', 'convert', 'constant', 'product', 'group product'),
    'an issue slot': ('slot',),
    'the load-store unit': ('unit memory',),
    'an arithmetic unit': tuple(f'unit {name}' for name in ('alu', 'heavy', 'light', 'special', 'convert', 'product')),
}

Row = dict[str, Any]
PER_STEP = ('launches', 'modelled_ms')  # of a row, what is in a step as often as its call


@dataclass(frozen=True)
class Aim:
    """What the kernels are held to.

    Args:
        words: What is looked at.
        most: At most so many.
        figure: 'modelled_ms', or 'per_element' of instructions.
        only: What a row must have to be counted.
    """

    words: str
    most: float
    figure: str
    only: Row


SCANS, BLOCKS = dict(name='vmamba2d_tiny', op='scan'), dict(name='spatial_mamba_tiny')
AIMS = (
    Aim('`vmamba2d_tiny`, all scans of an inference, ms', 4.5, 'modelled_ms', SCANS | dict(train=False)),
    Aim('all scans of a training step, ms', 15, 'modelled_ms', SCANS | dict(train=True)),
    Aim('instructions, stage 1, forward', 60, 'per_element', SCANS | dict(train=False, stage=1)),
    Aim('instructions, stage 4, forward', 120, 'per_element', SCANS | dict(train=False, stage=4)),
    Aim('instructions, stage 1, backward', 160, 'per_element', SCANS | dict(stage=1, kernel='scan_backward_2d')),
    Aim('`spatial_mamba_tiny`, scans and fusions of an inference, ms', 1.0, 'modelled_ms', BLOCKS | dict(train=False)),
)


# ---- the launches of our ops -----------------------------------------------------------------------------------------


def host_function(op: str) -> Any:
    from vssm.ops.fusion import triton as fusion
    from vssm.ops.scan.triton import launch as scan

    name = op.removeprefix('vssm::')
    kind, which = OPS[op]
    module = scan if kind == 'scan' else fusion
    return getattr(module, f'{name.removesuffix("_backward")}_triton' + '_backward' * (which == 'backward'))


def each_tile(args: argparse.Namespace, kind: str) -> Iterator[None]:
    """Let the scan take its default tiles, or each of them in turn."""
    from vssm.ops.scan.triton import launch

    if kind != 'scan' or not args.tiles:
        yield
        return
    for i in range(max(len(tiles) for by_length in launch.TILES.values() for tiles in by_length.values())):
        turned = {
            ndim: {length: (tiles[i % len(tiles)],) for length, tiles in by_length.items()}
            for ndim, by_length in launch.TILES.items()
        }
        with mock.patch.object(launch, 'TILES', turned):
            yield


def grouped(launches: list[Recorded]) -> list[list[Recorded]]:
    """Launches that differ in the walk alone, together."""
    groups: dict[Any, list[Recorded]] = {}
    for each in launches:
        groups.setdefault((each.launch.kernel.name, *each.options.items()), []).append(each)
    return list(groups.values())


def launch_row(alike: list[Recorded], call: Call, args: argparse.Namespace) -> Row:
    """The figures of the launches of a call that are alike, of which the first is run."""
    run = alike[0].run(args.samples)
    kinds, schedulers = run.counts, CHIP['sms'] * CHIP['schedulers'] * CYCLES_PER_US
    issued = sum(kinds.values())
    per_element = 32 * len(alike) * run.programs / call.elements
    taken = {kind: run.programs * kinds[kind] * cycles / schedulers for kind, cycles in OCCUPANCY.items()}
    bounds = dict(
        issue=run.programs * issued / schedulers,
        integer=taken['alu'],
        float=taken['fp32'] / 2 + taken['imad'] + taken['wide'],
        mufu=taken['special'],
        load_store=run.programs * run.requests / (CHIP['sms'] * CYCLES_PER_US),
        dram=run.traffic['dram'] / CHIP['dram_tb_per_s'] / 1e6,
    )
    cycles, waits = run.cycles(args.most)
    simulated = cycles / CYCLES_PER_US
    modelled = max(simulated, bounds['dram'])
    waited = {words: sum(waits[kind] for kind in kinds_) / max(1, waits.total()) for words, kinds_ in CAUSES.items()}
    busy = {name: bound / modelled for name, bound in bounds.items()}
    return dict(
        op=OPS[call.op][0],
        passes=OPS[call.op][1],
        shape=list(call.shape),
        dtype=args.dtype,
        kernel=run.name,
        options=run.options,
        launches=len(alike),
        registers=run.kernel.registers,
        stack=run.kernel.stack,
        shared=run.shared,
        programs=run.programs,
        warps=run.warps,
        warps_on_sm=run.resident * run.warps,
        per_element=per_element * issued,
        classes={name: per_element * sum(kinds[k] for k in group) for name, group in GROUPS.items()},
        barriers=kinds['barrier'] / run.warps,
        issued_per_cycle=run.programs * issued / (simulated * CYCLES_PER_US * CHIP['sms']),
        l2_mb=run.traffic['l2'] / 1e6,
        dram_mb=run.traffic['dram'] / 1e6,
        bounds_us=bounds,
        waits=waited,
        binds=most_of(busy) if max(busy.values()) >= BUSY else f'waits for {most_of(waited)}',
        simulated_us=simulated,
        modelled_us=modelled,
        call_ms=modelled * len(alike) / 1e3,
        modelled_ms=modelled * len(alike) / 1e3,
    )


def most_of(parts: Mapping[str, float]) -> str:
    return max(parts, key=parts.__getitem__)


def call_rows(recorder: Recorder, call: Call, args: argparse.Namespace) -> tuple[list[Row], float]:
    """A row for each kind of launch of a call, of several tiles the fastest; and seconds of what else the host does."""
    choices = []
    for _ in each_tile(args, OPS[call.op][0]):
        with recorder.recording() as launches, Counting() as counting:
            host_function(call.op)(*call.tensors())
        choices.append([launch_row(alike, call, args) for alike in grouped(launches)])
    rows = [min(rows, key=lambda row: row['modelled_us']) for rows in zip(*choices, strict=True)]
    for row in rows:
        print(f'{row["kernel"]}, {row["shape"]}: modelled {row["modelled_us"]:.0f} us', file=sys.stderr, flush=True)
    return rows, counting.found.seconds


def stage_of(call: Call, calls: Mapping[Call, int]) -> int:
    """The number of a call's shape among those of its op, the largest map first, from 1."""
    shapes = {other.shape for other in calls if other.op == call.op}
    return 1 + sorted(shapes, key=lambda shape: -shape[1] * shape[2]).index(call.shape)


def chosen(call: Call, calls: Mapping[Call, int], args: argparse.Namespace) -> bool:
    kind, which = OPS[call.op]
    by_kind, by_pass = args.kernel in (None, kind), args.passes in (None, which)
    return by_kind and by_pass and (args.stage is None or stage_of(call, calls) in args.stage)


# ---- tables ----------------------------------------------------------------------------------------------------------


def tile_name(row: Row) -> str:
    return 'x'.join(str(row['options'][name]) for name in ('J', 'S', 'P', 'BLOCK_E') if name in row['options'])


def launch_cells(row: Row) -> dict[str, str]:
    """A row of the table of launches, by heading."""
    return {
        'map': 'x'.join(map(str, row['shape'])),
        'kernel': row['kernel'] + ' TERMS' * bool(row['options'].get('TERMS')),
        'tile': tile_name(row),
        'launches': str(row['launches']),
        'registers': str(row['registers']),
        'stack': str(row['stack']),
        'programs': str(row['programs']),
        'warps/SM': str(row['warps_on_sm']),
        'instr./el.': f'{row["per_element"]:.0f}',
        **{name: f'{count:.1f}' for name, count in row['classes'].items()},
        'a cycle': f'{row["issued_per_cycle"]:.2f}',
        'MB': f'{row["dram_mb"]:.0f}',
        **{f'{name} us': f'{bound:.0f}' for name, bound in row['bounds_us'].items()},
        'modelled us': f'{row["modelled_us"]:.0f}',
        'binds': row['binds'],
        'modelled ms, all': f'{row["modelled_ms"]:.2f}',
    }


def largest(parts: Mapping[str, float]) -> str:
    """The largest part, and how much of all it is."""
    return f'{most_of(parts)} ({parts[most_of(parts)] / sum(parts.values()):.0%})'


def binding(rows: Iterable[Row], **others: float) -> str:
    """What binds most of the time of some launches, and of what else takes so many milliseconds."""
    parts = Counter[str](others)
    for row in rows:
        parts[row['binds']] += row['modelled_ms']
    return largest(parts)


def network_row(counted: Counted, launches: list[Row], inside: float, args: argparse.Namespace, **of: Any) -> Row:
    """The figures of a network: milliseconds of our launches, of what their host code adds, and of all else."""
    ops = {' '.join(OPS[op]): 0.0 for op in OPS}
    for row in launches:
        ops[f'{row["op"]} {row["passes"]}'] += row['modelled_ms']
    total = sum(ops.values()) + 1e3 * (inside + counted.seconds)
    return dict(
        **of,
        size=args.size,
        batch_size=args.batch_size,
        **{f'{op.replace(" ", "_")}_ms': ms for op, ms in ops.items()},
        beside_ms=1e3 * inside,
        rest_ms=1e3 * counted.seconds,
        modelled_ms=total,
        modelled_images_per_s=1e3 * args.batch_size / total,
        binds=binding(launches, **{what: 1e3 * seconds for what, seconds in counted.by_rate.items()}),
        operations={name: vars(cost) for name, cost in counted.costs.items()},
    )


def aim_cells(launches: list[Row]) -> Iterator[list[str]]:
    """Rows of the table of aims, of those that some launches tell of; of instructions, which are most."""
    for aim in AIMS:
        rows = [row for row in launches if aim.only.items() <= row.items()]
        if rows:
            classes = sum((Counter(row['classes']) for row in rows), Counter[str]())
            most = binding(rows) if aim.figure == 'modelled_ms' else largest(classes)
            yield [aim.words, f'{sum(row[aim.figure] for row in rows):.3g}', f'{aim.most:g}', most]


NETWORK = {
    'scan_forward_ms': 'scan forward',
    'scan_backward_ms': 'scan backward',
    'fusion_forward_ms': 'fusion forward',
    'fusion_backward_ms': 'fusion backward',
    'beside_ms': "ops' products, sums",
    'rest_ms': 'all else',
    'modelled_ms': 'modelled ms',
}


def main() -> int:
    parser = make_parser(__doc__, MODELS, batch_size=128)
    parser.add_argument('--size', type=int, default=224, help='side of the images')
    parser.add_argument('--dtype', default='bfloat16', choices=('bfloat16', 'float16', 'float32'))
    parser.add_argument('--no-autocast', action='store_true', help='the network itself is in --dtype')
    parser.add_argument('--train', action='store_true', help='a training step, forward and backward')
    parser.add_argument('--both', action='store_true', help='an inference and a training step')
    parser.add_argument('--pass', dest='passes', choices=('forward', 'backward'), help='the launches of one pass alone')
    parser.add_argument('--kernel', choices=('scan', 'fusion'), help='the launches of one op alone')
    parser.add_argument('--stage', type=int, nargs='+', help='those of some of the maps alone, by number from 1')
    parser.add_argument('--tiles', action='store_true', help="try all of the scan's tiles, not the default alone")
    parser.add_argument('--samples', type=int, default=4, help='programs of a launch that are run')
    parser.add_argument('--most', type=int, help='instructions of a warp to time; the rest goes on at that pace')
    args = parse(parser)
    args.train |= args.passes == 'backward'
    torch.set_num_threads(1)
    constants = dict(CHIP, latency_cycles=LATENCY, occupancy_cycles=OCCUPANCY)
    recorder, launches, networks = Recorder(), [], []
    known: dict[Call, tuple[list[Row], float]] = {}
    for name, train in itertools.product(args.models, (False, True) if args.both else (args.train,)):
        autocast, of = not args.no_autocast, dict(name=name, train=train)
        counted = count_network(name, args.size, args.batch_size, getattr(torch, args.dtype), train, autocast)
        mine: list[Row] = []
        inside = 0.0
        for call, count in counted.calls.items():
            if chosen(call, counted.calls, args):
                if call not in known:
                    known[call] = call_rows(recorder, call, args)
                rows, also = known[call]
                stage = stage_of(call, counted.calls)
                mine += [row | of | dict(stage=stage) | {key: count * row[key] for key in PER_STEP} for row in rows]
                inside += count * also
        launches += mine
        networks.append(network_row(counted, mine, inside, args, **of))
    print('All of this is modelled, for a chip of these constants:')
    print(*(f'{key} {value}' for key, value in constants.items()), sep='; ')
    if launches:
        cells = [launch_cells(row) for row in launches]
        print_table(list(cells[0]), [list(row.values()) for row in cells], 'Launches, modelled')
    aims = list(aim_cells(launches))
    if args.kernel or args.passes or args.stage:
        networks, aims = [], []  # of which only some launches were looked at
    if args.both and aims:
        print(markdown_table(['', 'modelled', 'aim', 'binds, or is most'], aims))
    cells = [
        [
            row['name'],
            'training' if row['train'] else 'inference',
            *(f'{row[key]:.2f}' for key in NETWORK),
            row['binds'],
        ]
        for row in networks
    ]
    figures = dict(constants=constants, launches=launches, networks=networks)
    title = 'Networks, modelled milliseconds' + ('' if networks else ': none was looked at as a whole')
    finish(args, figures, title, ['model', 'step', *NETWORK.values(), 'binds'], cells)
    return 0


if __name__ == '__main__':
    sys.exit(main())
