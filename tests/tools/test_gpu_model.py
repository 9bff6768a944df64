# SPDX-License-Identifier: Apache-2.0
"""The model of a card: what it says of instructions whose time is known, and what it finds in a network."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from _gpu_network import Counting, count_network
from _gpu_sm import LATENCY, OCCUPANCY, Scheduled, Trace, class_of, schedule, simulate
from _gpu_trace import SECTOR, Run
from sass.disassembly import Instruction, Kernel
from sass.instructions import INSTRUCTIONS
from sass.launch import BASE
from sass.machine import CONTROL
from sass.memory import tags
from sass.operations import OPERATIONS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vssm.tools._models import create_for_size

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'
NONE = 7  # no scoreboard


def instruction(text, stall=1, writes=NONE, reads=NONE, waits=()):
    """An instruction, and what it tells the scheduler, as the compiler encodes that."""
    control = stall | writes << 5 | reads << 8 | sum(1 << i for i in waits) << 11
    return schedule(Instruction(0, text, control << 105))


def cycles(*programs, memory=None, most=None):
    """Cycles of programs, each of which is the steps of its warps."""
    traces = [Trace(list(warps), [memory or {} for _ in warps]) for warps in programs]
    return simulate(traces, most)[0]


ADD, LOAD, SPECIAL = 'FADD R0, R1, R2', 'LDG.E R4, [R2.64]', 'MUFU.EX2 R0, R1'
COUNT = 100


def test_control_bits_are_read():
    step = instruction('LDG.E.128 R4, desc[UR4][R2.64]', 2, 3, 1, (0, 5))
    assert step == Scheduled('load', 'memory', 2, 3, 1, (0, 5), 4, LATENCY['alu'], False)
    product = instruction('HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0')
    assert (product.unit, product.cycles, product.latency) == ('product', 8, LATENCY['group product'] + 8)
    assert instruction('DEPBAR.LE SB2, 0x0').waits == (2,)
    with pytest.raises(KeyError, match='FROB'):
        instruction('FROB R0, R1')


def test_what_the_emulator_knows_has_a_class():
    for name in {*OPERATIONS, *INSTRUCTIONS, *CONTROL}:
        assert class_of(Instruction(0, f'{name} R0, R1'))


@pytest.mark.parametrize(
    ('text', 'stall', 'warps', 'expected'),
    [
        pytest.param(ADD, 1, 1, COUNT, id='issue'),
        pytest.param(ADD, 1, 4, COUNT, id='four-schedulers'),
        pytest.param(ADD, 1, 8, 2 * COUNT, id='two-warps-a-scheduler'),
        pytest.param(ADD, 4, 1, 4 * COUNT, id='stalls'),
        pytest.param(ADD, 4, 8, 4 * COUNT, id='stalls-hidden'),
        pytest.param(SPECIAL, 1, 4, OCCUPANCY['special'] * COUNT, id='special'),
        pytest.param('IMAD R0, R1, R2, R3', 1, 4, 2 * COUNT, id='integer-products'),
        pytest.param('SHFL.IDX PT, R0, R1, R2, R3', 1, 4, 4 * COUNT, id='one-memory-unit'),
    ],
)
def test_what_binds(text, stall, warps, expected):
    """Many instructions of a kind take as long as the slots or the unit that they need."""
    steps = [instruction(text, stall)] * COUNT
    assert cycles([steps] * warps) == pytest.approx(expected, abs=10)
    assert cycles([steps] * warps, most=COUNT // 2) == pytest.approx(expected, abs=20)
    if stall == 1 and text != ADD:
        assert cycles([[step.idle for step in steps]] * warps) == COUNT  # no unit does anything


def test_latency_is_waited_for_and_hidden():
    once = [instruction(LOAD, writes=0), instruction(ADD, waits=(0,))]
    memory = {2 * i: (1, LATENCY['l2']) for i in range(COUNT)}
    alone = cycles([once * COUNT], memory=memory)
    assert alone == pytest.approx(COUNT * (LATENCY['l2'] + 2), rel=0.01)
    assert cycles([once * COUNT] * 16, memory=memory) < 1.1 * alone
    assert cycles([once * COUNT]) < alone / 5  # answered at once


@pytest.mark.parametrize(
    ('steps', 'warps', 'cause'),
    [
        pytest.param([instruction(LOAD, writes=0), instruction(ADD, waits=(0,))], 1, 'load', id='loads'),
        pytest.param([instruction(SPECIAL)], 4, 'unit special', id='unit'),
        pytest.param([instruction(ADD)], 8, 'slot', id='slots'),
        pytest.param([instruction('BAR.SYNC.DEFER_BLOCKING 0x0')], 2, 'barrier', id='barriers'),
    ],
)
def test_what_is_waited_for(steps, warps, cause):
    waits = simulate([Trace([steps * COUNT] * warps, [{}] * warps)])[1]
    assert max(waits, key=waits.__getitem__) == cause
    assert waits[cause] > 0.9 * waits.total()


def test_what_answers_a_load():
    """L1 what a program has read, L2 what it has written or others read, and DRAM the rest."""
    programs, lines = 4, 10
    own, shared = ((BASE + i * 4096, lines * 128 * n) for i, n in enumerate((programs, 1)))
    touched = {}

    def touch(stores, tensor, line):
        sectors = (tensor[0] - BASE + 128 * line) // SECTOR + np.arange(4)
        touched[len(touched)] = stores, np.full(4, tags(np.int64(0), np.int64(0), np.int64(0))), sectors

    for line in range(lines):
        touch(False, own, line)
        touch(False, own, line)
        touch(False, shared, line)
    touch(True, own, lines)
    touch(False, own, lines)
    run = Run(Kernel('copy', ()), {}, programs, 1, 0, [own, shared], [0], [], touched)
    (answers,) = run.accesses.answers
    found = [cycles for _, cycles in answers.values()]
    assert found[0:30:3] == [LATENCY['dram']] * lines
    assert found[1:30:3] == [LATENCY['l1']] * lines
    assert Counter(found[2:30:3]) == {LATENCY['dram']: lines // programs, LATENCY['l2']: lines - lines // programs}
    assert found[-1] == LATENCY['l2']


def test_barriers_hold_all_warps_of_a_program_alone():
    add, barrier = instruction(ADD), instruction('BAR.SYNC.DEFER_BLOCKING 0x0')
    short, long = [add, barrier, add], [add] * 500 + [barrier, add]
    assert cycles([short, long]) == pytest.approx(500 + LATENCY['barrier'], abs=5)
    assert cycles([short], [short]) < 100
    assert cycles([short, [add]]) < 100  # one that has ended is not waited for


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['test_vmamba2d', 'test_spatial_mamba'])
def test_autocast_is_that_of_cuda(name):
    """The same operations on as many bytes as by autocast itself on fake tensors of CUDA."""
    expected = count_network(name, 64, 2, torch.bfloat16, train=False, autocast=True)
    model = create_for_size(name, 64)
    torch.set_autocast_enabled('cuda', True)
    torch.set_autocast_dtype('cuda', torch.bfloat16)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = model.to('cuda', memory_format=torch.channels_last)
            images = torch.empty(2, 3, 64, 64, device='cuda').contiguous(memory_format=torch.channels_last)
            with Counting() as counting, torch.no_grad():
                model(images)
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled('cuda', False)
    assert counting.found.calls == expected.calls
    found, expected = (
        {op: (cost.count, cost.bytes, cost.flops) for op, cost in counted.costs.items()}
        for counted in (counting.found, expected)
    )
    assert found == expected


def test_without_autocast_nothing_is_cast():
    own, cast = (count_network('test_vmamba2d', 64, 1, torch.bfloat16, False, autocast) for autocast in (False, True))
    norm = 'native_layer_norm'
    assert cast.costs[norm].bytes == pytest.approx(2 * own.costs[norm].bytes, rel=0.1)


def test_a_network_is_counted():
    step = count_network('test_vmamba2d', 64, 2, torch.float32, train=True, autocast=False)
    model, images = create_for_size('test_vmamba2d', 64).train(), torch.randn(2, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        model(images).square().mean().backward()
    by_op = counter.get_flop_counts()['Global']
    products = sum(flops for op, flops in by_op.items() if 'selective_scan' not in str(op))
    assert sum(cost.flops for cost in step.costs.values()) == products
    names = {call.op for call in step.calls}
    assert names == {'vssm::selective_scan', 'vssm::selective_scan_backward'}
    call = next(iter(step.calls))
    tensors = call.tensors()
    dt, B, C = tensors[1], tensors[3], tensors[4]
    assert dt.untyped_storage().data_ptr() == B.untyped_storage().data_ptr() == C.untyped_storage().data_ptr()
    assert tensors[0].untyped_storage().data_ptr() != dt.untyped_storage().data_ptr()


@pytest.mark.slow
@pytest.mark.triton
def test_the_script_writes_its_figures(tmp_path):
    pytest.importorskip('triton')
    file = tmp_path / 'model.json'
    options = ['test_vmamba2d', '--size', '64', '--batch-size', '2', '--samples', '1', '--json', str(file)]
    command = [sys.executable, str(BENCHMARKS / 'gpu_model.py'), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())['rows']
    assert rows['launches'] and rows['constants']['sms'] == 132
    for row in rows['launches']:
        assert row['modelled_us'] >= max(row['bounds_us'][name] for name in ('issue', 'dram')) > 0
        assert row['binds'] in row['bounds_us'] or row['binds'].removeprefix('waits for ') in row['waits']
        assert sum(row['waits'].values()) == pytest.approx(1)
        assert sum(row['classes'].values()) == pytest.approx(row['per_element'])
    for network in rows['networks']:
        launched = sum(row['modelled_ms'] for row in rows['launches'] if row['train'] == network['train'])
        assert network['modelled_ms'] == pytest.approx(launched + network['beside_ms'] + network['rest_ms'])
    assert 'modelled' in result.stdout and 'sms 132' in result.stdout
