# SPDX-License-Identifier: Apache-2.0
"""The emulator itself: single instructions against plain arithmetic, and small programs, most of them with a fault."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from sass import cases
from sass.arithmetic import compare_floats, float_to_integer, fused_multiply_add, maximum, minimum
from sass.disassembly import Kernel, UnknownInstruction, assemble
from sass.launch import BASE, Arena, constants
from sass.machine import Deadlock, Launch, Warps, decode_step
from sass.memory import POISON_WORD, Memory

MASK = 0xFFFFFFFF
PARAMETERS = 0x210
SPECIAL = (0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan, 2.0**-149, -(2.0**-127), 3.4e38, 65504.0, 65520.0)


def bits_of(values):
    return np.asarray(values, np.float32).view(np.uint32)


def floats_of(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


@pytest.fixture
def draw():
    """draw(): 32 numbers of 32 bits, small, large and special ones among them."""
    generator = random.Random(0)

    def numbers():
        simple = [0, 1, 31, 32, 0x7FFFFFFF, 0x80000000, MASK, MASK - 1]
        drawn = [generator.getrandbits(generator.randint(1, 32)) for _ in range(24)]
        return np.array(generator.sample(simple + drawn, 32), np.uint32)

    return numbers


@pytest.fixture
def draw_floats(draw):
    return lambda: np.concatenate([bits_of(SPECIAL), draw()[:8], bits_of(np.random.default_rng(0).normal(size=12))])


def run_one(text, registers=None, predicates=None, mask=None):
    """Registers and predicates of one warp after one instruction, or several."""
    instructions = assemble(text)
    launch = Launch(Kernel('test', instructions), (1, 1, 1), 1, 0, Memory(0, str), 0, {})
    warps = Warps(launch, np.arange(1))
    for index, value in (registers or {}).items():
        warps.registers[index] = value
    for index, value in (predicates or {}).items():
        warps.predicates[index] = value
    with np.errstate(all='ignore'):
        for instruction in instructions:
            decode_step(instruction).execute(warps, mask)
    return warps.registers[:, 0], warps.predicates[:, 0]


def signed(x):
    return int(x) - (1 << 32) if int(x) >> 31 else int(x)


# ---- integers --------------------------------------------------------------------------------------------------------


def test_sums_and_differences_of_64_bits(draw):
    a, b, c, d = (draw() for _ in range(4))
    text = """
        IADD3 R8, P0, R2, R4, RZ
        IADD3.X R9, R3, R5, RZ, P0, !PT
        IADD3 R10, P1, R2, -R4, RZ
        IADD3.X R11, R3, ~R5, RZ, P1, !PT
        IADD3 R12, P2, P3, R2, R4, R4
        IADD3.X R13, R3, R5, R5, P2, P3
        IADD3 R14, R2, -0x2, -R4
    """
    registers, _ = run_one(text, {2: a, 3: b, 4: c, 5: d})
    for lane in range(32):
        first, second = int(b[lane]) << 32 | int(a[lane]), int(d[lane]) << 32 | int(c[lane])
        for at, expected in ((8, first + second), (10, first - second), (12, first + 2 * second)):
            assert int(registers[at + 1, lane]) << 32 | int(registers[at, lane]) == expected % (1 << 64), (at, lane)
        assert registers[14, lane] == (int(a[lane]) - 2 - int(c[lane])) % (1 << 32)


INTEGERS = {  # text of R8 (and R9) from R2 to R5; what it is in Python
    'IMAD R8, R2, -0x3, -R4': lambda a, b, c, d: -3 * a - c,
    'IMAD.IADD R8, R2, 0x1, R4': lambda a, b, c, d: a + c,
    'IMAD.HI.U32 R8, R2, R3, RZ': lambda a, b, c, d: a * b >> 32,
    'IMAD.HI.U32 R8, R2, R3, R4': lambda a, b, c, d: (a * b + (d << 32 | c)) >> 32,
    'IMAD.HI R8, R2, 0x4, RZ': lambda a, b, c, d: signed(a) * 4 >> 32,
    'LEA R8, R2, R4, 0x5': lambda a, b, c, d: (a << 5) + c,
    'LEA R8, R2, -R4, 0x5': lambda a, b, c, d: (a << 5) - c,
    'LEA.HI R8, R2, R4, R3, 0x5': lambda a, b, c, d: ((b << 32 | a) << 5 >> 32) + c,
    'LEA.HI.SX32 R8, R2, R4, 0x1e': lambda a, b, c, d: (signed(a) << 30 >> 32) + c,
    'SHF.L.U32 R8, R2, 0x7, RZ': lambda a, b, c, d: a << 7,
    'SHF.L.U32 R8, R2, R3, RZ': lambda a, b, c, d: a << b if b < 32 else 0,
    'SHF.L.U64.HI R8, R2, 0x7, R3': lambda a, b, c, d: (b << 32 | a) << 7 >> 32,
    'SHF.R.S32.HI R8, RZ, R3, R2': lambda a, b, c, d: signed(a) >> min(b, 32),
    'SHF.R.U32.HI R8, RZ, 0x5, R2': lambda a, b, c, d: a >> 5,
    'SHF.R.U64 R8, R2, 0x5, R3': lambda a, b, c, d: (b << 32 | a) >> 5,
    'SGXT R8, R2, 0x5': lambda a, b, c, d: (a & 31) - (32 if a & 16 else 0),
    'SGXT.U32 R8, R2, 0x5': lambda a, b, c, d: a & 31,
    'IABS R8, R2': lambda a, b, c, d: abs(signed(a)),
    'VIADD R8, R2, -0x9': lambda a, b, c, d: a - 9,
    'VIMNMX R8, R2, R3, PT': lambda a, b, c, d: min(signed(a), signed(b)),
    'VIMNMX.U32 R8, R2, R3, !PT': lambda a, b, c, d: max(a, b),
    'VIADDMNMX R8, R2, R3, R4, PT': lambda a, b, c, d: min(signed((a + b) & MASK), signed(c)),
    'LOP3.LUT R8, R2, R3, R4, 0x96, !PT': lambda a, b, c, d: a ^ b ^ c,
    'LOP3.LUT R8, R2, R3, R4, 0xca, !PT': lambda a, b, c, d: (a & b) | (~a & c),
    'LOP3.LUT R8, R2, 0x1f, RZ, 0xc0, !PT': lambda a, b, c, d: a & 31,
    'PRMT R8, R2, 0x7610, R3': lambda a, b, c, d: a & 0xFFFF | b & 0xFFFF0000,
    'PRMT R8, R2, 0x5432, R3': lambda a, b, c, d: a >> 16 | (b & 0xFFFF) << 16,
    'PRMT R8, R2, 0xbbbb, RZ': lambda a, b, c, d: MASK if a >> 31 else 0,
    'MOV R8, 0x3f800000': lambda a, b, c, d: 0x3F800000,
    'POPC R8, R2': lambda a, b, c, d: a.bit_count(),
}


@pytest.mark.parametrize(('text', 'expected'), INTEGERS.items(), ids=INTEGERS)
def test_integers(text, expected, draw):
    a, b, c, d = (draw() for _ in range(4))
    registers, _ = run_one(text, {2: a, 3: b, 4: c, 5: d})
    for lane in range(32):
        values = (int(x[lane]) for x in (a, b, c, d))
        assert int(registers[8, lane]) == expected(*values) & MASK, lane


@pytest.mark.parametrize('kind', ('', '.U32'))
def test_products_of_64_bits(kind, draw):
    a, b, c, d = (draw() for _ in range(4))
    registers, _ = run_one(f'IMAD.WIDE{kind} R8, R2, R3, R4', {2: a, 3: b, 4: c, 5: d})
    number = int if kind else signed
    for lane in range(32):
        expected = number(a[lane]) * number(b[lane]) + (int(d[lane]) << 32 | int(c[lane]))
        assert int(registers[9, lane]) << 32 | int(registers[8, lane]) == expected % (1 << 64)


@pytest.mark.parametrize('how', ('LT', 'LE', 'GT', 'GE', 'EQ', 'NE'))
def test_comparisons_of_64_bits(how, draw):
    a, b, c, d = (draw() for _ in range(4))
    c[::2], d[::3] = a[::2], b[::3]
    text = f'ISETP.{how}.U32.AND P0, PT, R2, R4, PT\nISETP.{how}.AND.EX P1, P2, R3, R5, PT, P0'
    _, predicates = run_one(text, {2: a, 3: b, 4: c, 5: d})
    compare = getattr(int, f'__{how.lower()}__')
    for lane in range(32):
        first, second = (signed(y[lane]) * (1 << 32) + int(x[lane]) for x, y in ((a, b), (c, d)))
        assert predicates[1, lane] == compare(first, second)
        assert predicates[2, lane] != predicates[1, lane]


def test_predicates():
    a, b = np.arange(32) % 2 == 0, np.arange(32) % 3 == 0
    text = """
        PLOP3.LUT P2, P3, P0, P1, PT, 0x80, 0x8
        P2R R8, PR, RZ, 0x7
        SEL R9, R8, 0x64, !P0
        R2P PR, R10, 0x60
        LOP3.LUT P4, RZ, R10, 0x20, RZ, 0xc0, !PT
    """
    registers, predicates = run_one(text, {10: np.arange(32) << 5}, {0: a, 1: b})
    assert (predicates[2] == (a & b)).all() and (predicates[3] == (~a & b)).all()
    assert (registers[8] == a * 1 + b * 2 + (a & b) * 4).all()
    assert (registers[9] == np.where(~a, registers[8], 100)).all()
    assert (predicates[5] == a ^ True).all() and (predicates[6] == (np.arange(32) & 2 > 0)).all()
    assert (predicates[4] == ~a).all()


# ---- floating point --------------------------------------------------------------------------------------------------


def rounded(exact: Fraction) -> float:
    """The float32 nearest to a fraction, to even where two are; not for what overflows."""
    if exact == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(exact))), -126)
    while abs(exact) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > -126 and abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    return float(round(exact / unit) * unit)  # Python rounds to even


def test_fused_multiply_add_is_rounded_once():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 4000)).astype(np.float32)
    c = (-(a.astype(np.float64) * b) * (1 + generator.integers(-3, 4, 4000) * 2.0**-23)).astype(np.float32)
    c[::2] = generator.normal(size=2000) * 2.0 ** generator.integers(-40, 40, 2000)
    tiny = np.float32(2.0**-70)
    # Where the product is half-way between two numbers, and a last bit beyond those of float64 decides.
    a[:4], b[:4], c[:4] = 1 + 2.0**-12, 1 + 2.0**-12, [2.0**-100, -(2.0**-100), 2.0**-60, 0]
    a[4:8], b[4:8], c[4:8] = [tiny, tiny, 3 * tiny, -tiny], tiny, [2.0**-149, 0, 2.0**-130, 2.0**-126]
    result = fused_multiply_add(a, b, c)
    for x, y, z, r in zip(*(v.tolist() for v in (a, b, c, result)), strict=True):
        assert r == rounded(Fraction(x) * Fraction(y) + Fraction(z)), (x, y, z)


def test_sums_and_products(draw_floats):
    a, b = draw_floats(), draw_floats()[::-1].copy()
    text = 'FADD R8, R2, -|R3|\nFMUL R9, -R2, R3\nFADD.FTZ R10, R2, -RZ\nFSET.BF.LTU.AND R11, R2, R3, PT'
    registers, _ = run_one(text, {2: a, 3: b})
    x, y = floats_of(a), floats_of(b)
    with np.errstate(all='ignore'):
        flushed = np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)
        for at, expected in ((8, x - np.abs(y)), (9, -x * y), (10, flushed), (11, ~(x >= y))):
            np.testing.assert_array_equal(floats_of(registers[at]), expected)


def test_minimum_and_comparisons_know_nan_and_zero():
    a, b = (np.array(x, np.float32) for x in zip(*((x, y) for x in SPECIAL for y in SPECIAL), strict=True))
    for function, choose in ((minimum, min), (maximum, max)):
        for x, y, r in zip(a.tolist(), b.tolist(), function(a, b).tolist(), strict=True):
            numbers = [v for v in (x, y) if not math.isnan(v)]
            expected = choose(numbers, key=lambda v: (v, math.copysign(1, v)), default=math.nan)
            assert (math.isnan(r) and math.isnan(expected)) or (r, math.copysign(1, r)) == (
                expected,
                math.copysign(1, expected),
            )
    for how in ('LT', 'LE', 'GT', 'GE', 'EQ', 'NE'):
        ordered = ~np.isnan(a) & ~np.isnan(b)
        plain = getattr(np.ndarray, f'__{how.lower()}__')(a, b)
        assert (compare_floats(how, a, b) == (plain & ordered)).all()
        assert (compare_floats(f'{how}U', a, b) == (plain | ~ordered)).all()


@pytest.mark.parametrize('name', ('F16', 'BF16'))
def test_packing_rounds_as_torch(name, draw_floats):
    a, b = draw_floats(), draw_floats()[::-1].copy()
    registers, _ = run_one(f'F2FP.{name}.F32.PACK_AB R8, R2, R3\nF2F.{name}.F32 R9, R2', {2: a, 3: b})
    dtype = torch.float16 if name == 'F16' else torch.bfloat16
    for half, source in ((registers[8] >> 16, a), (registers[8] & 0xFFFF, b), (registers[9], a)):
        expected = torch.from_numpy(floats_of(source).copy()).to(dtype)
        actual = torch.from_numpy(half.astype(np.uint16).view(np.int16)).view(dtype)
        assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_halves():
    values = np.array([*SPECIAL[:7], 6e-8, -1e-7, 0.333, 65504, 2049], np.float16)
    words = np.resize(values.view(np.uint16).astype(np.uint32) << 16 | 0x3C00, 32)  # 1 in the lower half
    text = """
        HADD2.F32 R8, -RZ, R2.H1_H1
        HADD2.F32 R9, -RZ, R2.H0_H0
        HFMA2.MMA R10, -RZ, RZ, 1.875, -5.9604644775390625e-08
        HFMA2 R11, R2, R3, -R3
        HMUL2.BF16_V2 R12, R4, R4
    """
    half = np.float16(1 + 2.0**-10)
    registers, _ = run_one(text, {2: words, 3: np.uint32(0x3C013C01), 4: np.uint32(0x3F813F81)})
    np.testing.assert_array_equal(floats_of(registers[8]), np.resize(values, 32).astype(np.float32))
    assert (floats_of(registers[9]) == 1).all()
    assert (registers[10] == 0x3F808001).all()
    with np.errstate(all='ignore'):
        exact = (np.resize(values, 32).astype(np.float64) * float(half) - float(half)).astype(np.float16)
    np.testing.assert_array_equal((registers[11] >> 16).astype(np.uint16).view(np.float16), exact)
    assert (registers[12] == 0x3F823F82).all()  # (1 + 2^-7)^2 in bfloat16


def test_conversions(draw):
    a, b = draw(), draw()
    text = 'I2F.RP R8, R2\nI2F.U64.RP R9, R2\nI2F.S64 R10, R2\nI2FP.F32.S32 R11, R2'
    registers, _ = run_one(text, {2: a, 3: b})
    for lane in range(32):
        wide = int(b[lane]) << 32 | int(a[lane])
        up, up_wide, near_wide, near = (float(floats_of(registers[i, lane])) for i in (8, 9, 10, 11))
        wide_signed = wide - (1 << 64) if wide >> 63 else wide
        for result, exact in ((up, signed(a[lane])), (up_wide, wide)):
            below = float(np.nextafter(np.float32(result), np.float32(-np.inf)))
            assert below < exact <= result  # which Python compares exactly
        assert near == rounded(Fraction(signed(a[lane]))) and near_wide == rounded(Fraction(wide_signed))


def test_conversions_to_integers_stay_within_the_type():
    x = np.array([0.9, -0.9, 3e9, -3e9, 5e9, 1e30, -1e30, math.nan], np.float32)
    assert float_to_integer(x, 32, True, 0).tolist() == [0, 0, 2**31 - 1, -(2**31), 2**31 - 1, 2**31 - 1, -(2**31), 0]
    assert float_to_integer(x, 32, False, 0).tolist() == [0, 0, 3_000_000_000, 0, MASK, MASK, 0, 0]
    assert float_to_integer(x, 64, False, 5).tolist()[4:] == [5_000_000_000, 2**64 - 1, 0, 5]
    registers, _ = run_one('F2I.FTZ.U32.TRUNC.NTZ R8, R2\nF2I.S64.TRUNC R10, R2', {2: bits_of(np.resize(x, 32))})
    assert registers[8, :4].tolist() == [0, 0, 3_000_000_000, 0]
    assert registers[10, 2:5].tolist() == [3_000_000_000, -3_000_000_000 & MASK, 5_000_000_000 & MASK]
    assert registers[11, 2:5].tolist() == [0, MASK, 1]


def test_special_functions():
    x = np.array([0.5, 3, 1e-40, -200, 127.5, math.inf, 3e38, 1], np.float32)
    registers, _ = run_one('MUFU.EX2 R8, R2\nMUFU.RCP R9, R2', {2: bits_of(np.resize(x, 32))})
    power, inverse = floats_of(registers[8])[:8].tolist(), floats_of(registers[9])[:8].tolist()
    assert power[1:4] == [8, 1, 0] and power[5] == math.inf  # without subnormal numbers
    assert inverse[0] == 2 and inverse[2] == math.inf and inverse[6] == 0 and inverse[7] == 1


# ---- lanes -----------------------------------------------------------------------------------------------------------


def test_shuffles():
    lane = np.arange(32)
    text = """
        SHFL.BFLY PT, R8, R2, 0x4, 0x1f
        SHFL.UP P0, R9, R2, 0x3, RZ
        SHFL.IDX PT, R10, R2, R3, 0x1f
        SHFL.DOWN P1, R11, R2, 0x2, 0x181f
    """
    registers, predicates = run_one(text, {2: lane * 10, 3: lane * 7})
    assert (registers[8] == (lane ^ 4) * 10).all()
    assert (registers[9] == np.where(lane >= 3, lane - 3, lane) * 10).all() and (predicates[0] == (lane >= 3)).all()
    assert (registers[10] == lane * 7 % 32 * 10).all()
    assert (registers[11] == np.where(lane % 8 < 6, lane + 2, lane) * 10).all()  # segments of eight
    assert (predicates[1] == (lane % 8 < 6)).all()


def test_votes_and_uniform_registers():
    some = np.arange(32) == 5
    text = 'VOTEU.ANY UP0, P0\nVOTE.ALL P1, P0\nUMOV UR4, 0x7\n@UP0 UIADD3 UR4, UR4, 0x1, URZ\nMOV R8, UR4\n'
    text += 'UP2UR UR5, UPR, UR4, 0x3\nMOV R9, UR5'
    instructions = assemble(text)
    launch = Launch(Kernel('test', (*instructions, *assemble('EXIT'))), (1, 1, 1), 1, 0, Memory(0, str), 0, {})
    warps = Warps(launch, np.arange(1))
    warps.predicates[0] = some
    warps.run()
    assert (warps.registers[8] == 8).all() and (warps.registers[9] == 9).all() and not warps.predicates[1].any()


# ---- programs --------------------------------------------------------------------------------------------------------


def run_program(text, tensors=None, warps=2, grid=(1, 1, 1), shared=0, at_once=128):
    """Run instructions over a grid; the addresses of the tensors are the parameters."""
    tensors = tensors or {}
    kernel = Kernel('test', assemble(text), tuple((PARAMETERS + 8 * i, 8) for i in range(len(tensors))), stack=16)
    arena = Arena(tensors)
    numbers = [arena.address(t) for t in tensors.values()]
    launch = Launch(kernel, grid, warps, shared, arena.memory, BASE, constants(kernel, numbers, grid, warps))
    launch.run(at_once)
    arena.write_back()
    return launch


def kinds(launch):
    return {fault.kind for fault in launch.faults}


THREAD = """
    S2R R0, SR_TID.X
    LDC.64 R2, c[0x0][0x210]
    IMAD.WIDE R4, R0, 0x4, R2           // the address of this thread's place
    LEA R6, R0, 0x400, 0x2              // and in shared memory
    LOP3.LUT R7, R0, 0x3f, RZ, 0x3c, !PT
    LEA R7, R7, 0x400, 0x2              // in shared memory that of a thread of the other warp
"""


def test_halves_of_words_are_kept_with_their_sign():
    text = """
        IMAD.WIDE R4, R0, 0x8, R2
        LDC R1, c[0x0][0x28]
        VIADD R1, R1, -0x10
        MOV R8, 0x1fffe
        STL.S16 [R1], R8
        LDL.S16 R10, [R1]
        LDL.U16 R11, [R1]
        STG.E.64 desc[UR4][R4.64], R10
        EXIT
    """
    result = unwritten(32, 2)
    launch = run_program(THREAD + text, {'y': result}, warps=1)
    assert not launch.faults and (result == torch.tensor([-2, 0xFFFE])).all()


def unwritten(*shape):
    return torch.full(shape, POISON_WORD, dtype=torch.int32)


def test_warps_exchange_through_shared_memory():
    out = unwritten(64)
    text = f'{THREAD}\nSTS [R6], R0\nBAR.SYNC.DEFER_BLOCKING 0x0\nLDS R8, [R7]\nSTG.E desc[UR4][R4.64], R8\nEXIT'
    launch = run_program(text, dict(out=out), shared=256)
    assert not launch.faults and out.tolist() == list(range(63, -1, -1))
    assert launch.counts()['STS'] == 2 and launch.barriers == 1
    assert kinds(launch.again(skipped=7)) == {'race, read and written by two warps'}
    assert launch.again(traces_barriers=True).needed_barriers == {7}
    assert not launch.again(order=(1, 0)).faults


@pytest.mark.parametrize('again', (True, False))
def test_which_barriers_are_needed(again):
    """Two between the same accesses: neither is needed by itself. Each between other accesses: both are."""
    between, place = ('NOP', 'R7') if again else ('LDS R8, [R7]', 'R6')
    text = f"""{THREAD}
        STS [R6], R0
        BAR.SYNC.DEFER_BLOCKING 0x0             // 7
        {between}
        BAR.SYNC.DEFER_BLOCKING 0x0             // 9
        STS [{place}], R0
        EXIT
    """
    launch = run_program(text, shared=256, tensors=dict(out=unwritten(64)))
    assert not launch.faults
    needed = launch.again(traces_barriers=True).needed_barriers
    assert needed == (set() if again else {7, 9})
    assert needed == {i for i in (7, 9) if launch.again(skipped=i).faults}


def test_a_barrier_in_a_loop_is_needed():
    text = f"""{THREAD}
        MOV R9, 0x3
        STS [R6], R9                            // 7
        BAR.SYNC.DEFER_BLOCKING 0x0
        LDS R8, [R7]
        IADD3 R9, R9, -0x1, RZ
        BAR.SYNC.DEFER_BLOCKING 0x0
        ISETP.NE.AND P0, PT, R9, RZ, PT
        @P0 BRA 0x70
        BAR.SYNC.DEFER_BLOCKING 0x0
        EXIT
    """
    launch = run_program(text, shared=256, tensors=dict(out=unwritten(64)))
    assert not launch.faults and launch.barriers == 7
    assert launch.again(traces_barriers=True).needed_barriers == {8, 11}


FAULTS = {  # what follows the addresses of THREAD, and what is found
    'read after write': ('STS [R6], R0\nLDS R8, [R7]', {'race, read and written by two warps'}),
    'write after read': (
        'STS [R6], R0\nBAR.SYNC.DEFER_BLOCKING 0x0\nLDS R8, [R6]\nSTS [R7], R0',
        {'race, read and written by two warps'},
    ),
    'write after write, of halves': (
        'STS [R6], R0\nBAR.SYNC.DEFER_BLOCKING 0x0\nSTS.U16 [R6], R0\nSTS.U16 [R7], RZ',
        {'race, written by two warps'},
    ),
    'write after write': ('STS [R6], R0\nSTS [R7], R0', {'race, written by two warps'}),
    'one place, one value': ('STS [RZ+0x400], RZ', set()),
    'one place, two values': (
        'STS [RZ+0x400], R0',
        {'race, written by two warps', 'lanes write different values'},
    ),
    'race on global memory': (
        'STG.E desc[UR4][R4.64], R0\nLOP3.LUT R0, R0, 0x3f, RZ, 0x3c, !PT\nIMAD.WIDE R4, R0, 0x4, R2\n'
        'LDG.E R8, desc[UR4][R4.64]',
        {'race, read and written by two warps'},
    ),
    'unwritten global memory': ('LDG.E R8, desc[UR4][R4.64]', {'read before it was written'}),
    'unwritten shared memory': ('LDS R8, [R6]', {'read before it was written'}),
    'beyond a tensor': ('STG.E desc[UR4][R4.64+0x4], R0', {'address outside'}),
    'before a tensor': ('STG.E desc[UR4][R4.64+-0x4], R0', {'address outside'}),
    'far away': ('IADD3 R5, R5, 0x10000, RZ\nSTG.E desc[UR4][R4.64], R0', {'address outside'}),
    'beyond shared memory': ('STS [R6+0x4], R0', {'address outside'}),
    'before shared memory': ('STS [R6+-0x4], R0', {'address outside'}),
    'beyond the stack': ('LDC R1, c[0x0][0x28]\nSTL [R1], R0', {'address outside'}),
    'misaligned': ('STG.E.64 desc[UR4][R4.64+-0x4], R0', {'misaligned address', 'address outside'}),
    'read past the caches': (
        'STG.E desc[UR4][R4.64], R0\nLDG.E.CONSTANT R8, desc[UR4][R4.64]',
        {'constant read of what was written'},
    ),
    'shuffle': (
        'ISETP.LT.AND P0, PT, R0, 0x5, PT\n@P0 SHFL.BFLY PT, R8, R0, 0x8, 0x1f',
        {'shuffle from a lane that takes no part'},
    ),
    'not uniform': ('R2UR UR4, R0', {'a register for the whole warp differs between lanes'}),
    'clean': ('STG.E desc[UR4][R4.64], R0\nLDG.E R8, desc[UR4][R4.64]\nSTS [R6], R8\nLDS R8, [R6]', set()),
    'clean, with the stack': ('LDC R1, c[0x0][0x28]\nVIADD R1, R1, -0x10\nSTL [R1], R0\nLDL R8, [R1]', set()),
}


@pytest.mark.parametrize(('text', 'expected'), FAULTS.values(), ids=FAULTS)
def test_faults(text, expected):
    assert kinds(run_program(f'{THREAD}\n{text}\nEXIT', dict(out=unwritten(64)), shared=256)) == expected


def test_the_fault_names_the_instruction_and_the_tensor():
    launch = run_program(f'{THREAD}\nLDG.E R8, desc[UR4][R4.64]\nEXIT', dict(first=unwritten(64), second=unwritten(1)))
    (fault,) = launch.faults
    assert str(fault) == 'read before it was written: first, by 0x0060 LDG.E R8, desc[UR4][R4.64]'


def test_a_part_of_a_storage_is_not_the_rest():
    whole = torch.zeros(128, dtype=torch.int32)
    launch = run_program(f'{THREAD}\nLDG.E R8, desc[UR4][R4.64]\nEXIT', dict(part=whole[:48]))
    assert kinds(launch) == {'address outside'} and sum(launch.faults.values()) == 16


PROGRAMS = {
    'each its own': ('IMAD R0, R1, 0x40, R0', '', set()),
    'one place': ('', '', {'written, written by another program'}),
    'the place of the next': (
        'IMAD R0, R1, 0x40, R0',
        'LDG.E R8, desc[UR4][R4.64+0x100]',
        {'read, written by another program', 'written, read by another program'},
    ),
}


@pytest.mark.parametrize(('place', 'after', 'expected'), PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize('at_once', (2, 64))
def test_two_programs(place, after, expected, at_once):
    text = f"""
        S2R R0, SR_TID.X
        S2R R1, SR_CTAID.X
        LDC.64 R2, c[0x0][0x210]
        {place}
        IMAD.WIDE R4, R0, 0x4, R2
        STG.E desc[UR4][R4.64], R1
        {after}
        EXIT
    """
    out = torch.zeros(5 * 64, dtype=torch.int32)
    launch = run_program(text, dict(out=out), grid=(4, 1, 1), at_once=at_once)
    assert kinds(launch) <= expected and bool(launch.faults) == bool(expected)


def test_threads_part_and_meet():
    """Each thread goes round a loop as often as its number says; where they meet, all take part in a shuffle."""
    text = """
        S2R R0, SR_TID.X
        LDC.64 R2, c[0x0][0x210]
        IMAD.WIDE R4, R0, 0x4, R2
        MOV R6, R0
        MOV R7, RZ
        BSSY B0, 0xa0
        ISETP.EQ.AND P0, PT, R6, RZ, PT         // 0x60
        @P0 BRA 0x90
        IADD3 R7, R7, R6, RZ                    // 0x80
        @!P0 BRA 0xd0                           // 0x90: the others go on far below
        BSYNC B0                                // 0xa0
        SHFL.BFLY PT, R8, R7, 0x1, 0x1f
        BRA 0xf0
        IADD3 R6, R6, -0x1, RZ                  // 0xd0
        BRA 0x60
        STG.E desc[UR4][R4.64], R8              // 0xf0
        EXIT
    """
    out = unwritten(64)
    launch = run_program(text, dict(out=out))
    assert not launch.faults
    assert out.tolist() == [(n ^ 1) * ((n ^ 1) + 1) // 2 for n in range(64)]


def test_calls_return_to_where_they_came_from():
    text = """
        S2R R0, SR_TID.X
        LDC.64 R2, c[0x0][0x210]
        IMAD.WIDE R4, R0, 0x4, R2
        MOV R20, 0x70
        ISETP.GE.AND P0, PT, R0, 0x7, PT
        @P0 MOV R20, 0x80
        CALL.REL.NOINC 0xa0
        IADD3 R0, R0, 0x64, RZ                  // 0x70
        STG.E desc[UR4][R4.64], R0              // 0x80
        EXIT
        IADD3 R0, R0, R0, RZ                    // 0xa0
        RET.REL.NODEC R20 0x0
    """
    out = unwritten(32)
    assert not run_program(text, dict(out=out), warps=1).faults
    assert out.tolist() == [2 * n + (100 if n < 7 else 0) for n in range(32)]


def test_some_wait_for_those_that_ended_elsewhere():
    text = """
        S2R R0, SR_TID.X
        ISETP.LT.AND P0, PT, R0, 0x20, PT
        @P0 BRA 0x50
        BAR.SYNC.DEFER_BLOCKING 0x0
        EXIT
        BSSY B0, 0x60
        BSYNC B0
        EXIT
    """
    assert run_program(text).barriers == 1  # those that have ended are not waited for
    with pytest.raises(Deadlock, match='BSYNC B0'):
        run_program(text.replace('BSYNC B0', 'ISETP.LT.AND P0, PT, R0, 0x5, PT\n@P0 BSYNC B0\nBRA 0x30'))


UNKNOWN = [
    'FROB R1, R2',
    'FADD.RZ R1, R2, R3',
    'FADD R1, R2',
    'FADD R1, R2, R3, R4',
    'FADD R1, R2, gdesc[UR4]',
    'LDG.E.U8 R1, desc[UR4][R2.64]',
    'BAR.SYNC.DEFER_BLOCKING 0x1',
    'BAR.ARV 0x0, 0x80',
    'BRA.DIV 0x10',
    'LDS R1, [R2.X4]',
    'HMMA.16816.F16 R4, R8, R12, R4',
    'HGMMA.64x16x16.F32 R8, gdesc[UR4].tnspA, RZ, !UPT',
    'HGMMA.64x16x16.F16 R8, gdesc[UR4], RZ, !UPT',
    'HGMMA.64x16x16.F32 R8, gdesc[UR4], R16',
    'P2R R8, UPR, RZ, 0x7',
    'ATOMG.E.ADD R1, desc[UR4][R2.64], R3',
]


@pytest.mark.parametrize('text', UNKNOWN)
def test_an_unknown_instruction_is_named(text):
    with pytest.raises(UnknownInstruction) as error:
        run_program(f'NOP\n{text}\nEXIT')
    assert text in str(error.value)


def test_an_unknown_constant_is_named():
    with pytest.raises(UnknownInstruction, match=r'c\[0x3\]\[0x8\]'):
        run_program('LDC R1, c[0x3][0x8]\nEXIT')


@pytest.mark.parametrize('mode', (0, 2 << 30 | 1 << 17), ids=('other pieces', 'amid a table'))
def test_a_matrix_that_lies_in_another_way_is_named(mode):
    text = f'UMOV UR6, 0x40\nUMOV UR7, {mode:#x}\nHGMMA.64x8x16.F32 R8, R4, gdesc[UR4], RZ, !UPT'
    with pytest.raises(UnknownInstruction, match='HGMMA.*another way'):
        run_program(text + '\nEXIT', warps=4, shared=2048)


# ---- compiled by Triton ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.parametrize('name', cases.PLANTED)
def test_planted_faults_are_found(name, emulated):
    assert emulated(cases.planted, name) == cases.PLANTED[name]


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_products_of_matrices(dtype, emulated):
    for rows, warps in ((16, 1), (32, 4), (64, 4), (128, 8)):  # the last two by four warps together
        error = emulated(cases.product_error, rows, warps, dtype)
        assert error < (2e-3 if dtype == torch.float32 else 1e-6)
