# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels: how they cut a walk, what they keep in memory, what they compile to, and what only a GPU shows.

Values and gradients are held to the reference in test_ops.py, test_selective_scan.py and test_state_fusion.py, beside
those of the CPU.
"""

import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fresh_processes import run_fresh
from op_cases import OPS
from scan_cases import (
    assert_matches_oracle,
    convert,
    describe,
    make_case,
    oracle,
    random_like,
    values_and_grads,
)
from torch.utils._python_dispatch import TorchDispatchMode

import vssm
from vssm.ops import selective_scan, selective_scan_ref, state_fusion

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.triton
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='PyTorch finds no CUDA device')


@pytest.fixture
def kernels(triton_path):
    from vssm.ops.scan.triton import launch

    return launch


def on_device(tensors, interpreted):
    """For calls past the operator, which moves them itself."""
    return {name: t if t is None or interpreted else t.cuda() for name, t in tensors.items()}


# ---- cutting a walk --------------------------------------------------------------------------------------------------

CUTS = {  # tile (J, S), bands
    'strips': ((2, 2), 1),
    'one-warp': ((2, 1), 1),
    'bands': ((4, 4), 2),
    'strips-in-bands': ((1, 2), 3),
    'more-bands-than-lines': ((4, 4), 5),
}


def tiles(*which):
    """Tiles (J, S) in place of those that the kernels have."""
    every = {1 << 62: tuple((J, S, 128) for J, S in which)}
    return {1: every, 2: every}


@pytest.mark.parametrize(('ndim', 'orders'), ((1, (1, 2)), (2, (1, 2)), (2, (2, 3))), ids=('1d', '2d', '2d-pair'))
@pytest.mark.parametrize(('tile', 'bands'), CUTS.values(), ids=CUTS)
def test_strips_and_bands(tile, bands, ndim, orders, kernels, monkeypatch):
    monkeypatch.setattr(kernels, 'TILES', tiles(tile))
    monkeypatch.setattr(kernels, 'choose_bands', lambda *args: bands)
    tensors, options = make_case(1, 4, 5, channels=3, rank=2, orders=orders, ndim=ndim, states=1, dtype=torch.float32)
    grad_y = random_like(tensors['x'])
    expected = oracle(tensors, options, grad_y)
    actual = values_and_grads(tensors, options, grad_y)
    assert_matches_oracle(actual, expected, tensors, options, grad_y, describe(tensors, options))


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16), ids=str)
def test_offsets_of_64_bits(dtype, kernels, monkeypatch):
    """Maps of 2^31 elements: the same kernels with wide offsets."""
    monkeypatch.setattr(kernels, 'WIDE_FROM', 0)
    tensors, options = make_case(1, 2, 3, channels=3, rank=2, orders=(3, 0), states=1, dtype=dtype)
    grad_y = random_like(tensors['x'])
    expected = oracle(tensors, options, grad_y)
    actual = values_and_grads(tensors, options, grad_y)
    assert_matches_oracle(actual, expected, tensors, options, grad_y, describe(tensors, options))


def test_64_states(kernels):
    tensors, options = make_case(1, 1, 2, channels=3, rank=2, orders=(2,), states=64, dtype=torch.float32)
    grad_y = random_like(tensors['x'])
    expected = oracle(tensors, options, grad_y)
    actual = values_and_grads(tensors, options, grad_y)
    assert_matches_oracle(actual, expected, tensors, options, grad_y, describe(tensors, options))


@pytest.mark.parametrize(
    ('programs', 'size', 'ndim', 'bands'),
    [
        (384, (56, 56), 2, 1),  # a batch of 128 at the first stage: enough for any card
        (3, (256, 256), 2, 32),  # one image of 1024x1024: at least 8 lines a band
        (3, (256, 256), 1, 176),  # at least four programs a processor
        (3, (14, 14), 1, 1),  # too small to be worth a second launch
        (100, (1024, 1024), 2, 5),
    ],
)
def test_number_of_bands(programs, size, ndim, bands):
    from vssm.ops.scan.triton.bands import choose_bands

    assert choose_bands(programs, *size, ndim, wanted=132) == bands


class Allocations(TorchDispatchMode):
    """Elements of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.empty.memory_format, torch.ops.aten.clone.default, torch.ops.aten.sum.dim_IntList):
            self.elements.append(result.numel())
        return result


@pytest.mark.parametrize('bands', (1, 2))
def test_nothing_is_a_multiple_of_the_map(bands, kernels, monkeypatch, interpreted):
    """No tensor that a call makes is larger than the map, whatever the number of orders and states."""
    monkeypatch.setattr(kernels, 'choose_bands', lambda *args: bands)
    most = []
    for orders, states in (((0,), 1), ((0, 1), 2)):
        tensors, options = make_case(1, 12, 12, channels=32, rank=1, orders=orders, states=states, dtype=torch.float32)
        tensors = on_device(tensors, interpreted)
        arguments = (*tensors.values(), 2, orders, True)
        with Allocations() as allocations:
            kernels.selective_scan_triton(*arguments)
            kernels.selective_scan_triton_backward(tensors['x'], *arguments)
        most.append(max(allocations.elements) / tensors['x'].numel())
    assert max(most) <= 1


def test_backward_inside_autocast_is_as_precise(kernels, interpreted):
    tensors, options = make_case(1, 1, 2, channels=3, rank=2, orders=(0,), states=1, dtype=torch.float32)
    tensors = on_device(tensors, interpreted)
    arguments = (*tensors.values(), *options.values())
    expected = kernels.selective_scan_triton_backward(tensors['x'], *arguments)
    with torch.autocast(tensors['x'].device.type, torch.bfloat16):
        actual = kernels.selective_scan_triton_backward(tensors['x'], *arguments)
    assert all(map(torch.equal, actual, expected))


def test_an_infinite_input_is_infinite_and_no_more(kernels, interpreted):
    """It lays out the tile of the step sizes, and is no part of them."""
    tensors, options = make_case(batch=1, height=4, width=6, channels=32, states=1, rank=2, orders=(0,))
    tensors = convert(tensors, torch.float32)
    tensors['x'][0, 1, 2, 3] = float('inf')
    tensors = on_device(tensors, interpreted)
    y = kernels.selective_scan_triton(*tensors.values(), *options.values())
    expected = selective_scan_ref(**tensors, **options)
    assert expected.isinf().any() and torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(y.isnan(), expected.isnan())


# ---- tiles for several processes -------------------------------------------------------------------------------------


def tune_in_processes(tiles, folder, number, trial):
    """The tiles that processes take which need one at once, None of one that died; `trial(process)` times a tile.

    No kernel is compiled or run.
    """
    import triton
    from compile_cuda import Card
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    def kernel(kind, J: triton.language.constexpr, S: triton.language.constexpr):
        pass

    def process(i):
        os.environ.update(TRITON_INTERPRET='0', TRITON_CACHE_DIR=str(folder))
        card = Card(90)
        card.get_benchmarker = lambda: lambda *_, **__: trial(i)
        driver.set_active(card)
        JITFunction.run = lambda *_, **__: None
        triton.runtime.autotuner.triton_key = lambda: ''  # which would read all of Triton
        choices = ((8, 1, 168), (4, 2, 128), (16, 4, 168))
        together.wait()
        tile = tiles.tune(JITFunction(kernel), choices, ('kind',), (1,), (), dict(kind=3))
        (folder / f'tile{i}').write_text(json.dumps(tile))

    folder.mkdir(exist_ok=True)
    fork = multiprocessing.get_context('fork')
    together = fork.Barrier(number)
    processes = [fork.Process(target=process, args=(i,)) for i in range(number)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
        assert p.exitcode is not None
    files = [folder / f'tile{i}' for i in range(number)]
    return [tuple(json.loads(file.read_text())) if file.exists() else None for file in files]


def test_one_process_tunes_for_all(kernels, tmp_path):
    from vssm.ops.scan.triton import tiles

    trials = tmp_path / 'trials'

    def trial(process):  # each would choose another tile
        with open(trials, 'a') as file:
            file.write(f'{process} ')
        time.sleep(0.1)
        return [(len(trials.read_text().split()) + process) % 3 + 1.0]

    chosen = tune_in_processes(tiles, tmp_path / 'cache', 3, trial)
    assert len(set(trials.read_text().split())) == 1 and len(trials.read_text().split()) == 3
    assert len(set(chosen)) == 1 and chosen[0] in ((8, 1, 168), (4, 2, 128), (16, 4, 168))


@pytest.mark.parametrize('holder', ('dies', 'waits'))
def test_who_holds_up_the_others_does_so_for_a_while(holder, kernels, monkeypatch, tmp_path):
    """A process that is killed while it tunes, or that waits for one that waits for it."""
    from vssm.ops.scan.triton import tiles

    monkeypatch.setattr(tiles, 'LONGEST_WAIT', 60 if holder == 'dies' else 0.2)
    held, done = tmp_path / 'held', tmp_path / 'done'

    def trial(process):
        try:
            held.touch(exist_ok=False)
        except FileExistsError:
            done.touch()
            return [1.0]
        if holder == 'dies':
            os.kill(os.getpid(), signal.SIGKILL)
        while not done.exists():
            time.sleep(0.01)
        return [1.0]

    chosen = tune_in_processes(tiles, tmp_path / 'cache', 2, trial)
    assert sorted(chosen, key=str) == [(8, 1, 168), None if holder == 'dies' else (8, 1, 168)]


def test_a_cache_that_cannot_be_written_is_read(kernels, tmp_path):
    """Triton finds there what it has compiled and timed; a file in the way refuses even who may write anywhere."""
    from vssm.ops.scan.triton import tiles

    cache = tmp_path / 'cache'
    tuned = tune_in_processes(tiles, cache, 1, lambda process: [1.0])
    (cache / 'tile0').unlink()
    shutil.rmtree(cache / 'vssm')
    (cache / 'vssm').touch()
    assert tune_in_processes(tiles, cache, 1, lambda process: os._exit(1)) == tuned != [None]


# ---- what they need --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('op', 'folder'), (('selective_scan', 'scan'), ('state_fusion', 'fusion')))
def test_without_triton_a_sentence_says_what_to_install(op, folder, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(f'vssm.ops.{folder}.triton')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'triton', None)  # which is how Python says that there is none
    with pytest.raises(ImportError, match=f'{op}: CUDA tensors need Triton.*pip install triton'):
        sys.modules['vssm.ops.backend'].import_triton(op, sys.modules[f'vssm.ops.{folder}.op']._cuda_kernels)


@pytest.mark.parametrize('op', OPS, ids=str)
def test_an_operator_finds_its_kernels_on_cuda(op):
    for name in (op.name, f'{op.name}_backward'):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f'vssm::{name}', 'CUDA')  # one that refuses, too
    if op.has_cuda:
        kernels = sys.modules[f'vssm.ops.{op.folder}.op']._cuda_kernels()
        assert [kernel.__name__ for kernel in kernels] == [f'{op.name}_triton', f'{op.name}_triton_backward']


def test_kernels_are_not_imported_before_a_cuda_tensor_arrives():
    script = (
        'import sys, torch, vssm, timm; timm.create_model("test_vmamba2d")(torch.zeros(1, 3, 64, 64)).sum().backward();'
        'print([name for name in sys.modules if name.startswith("vssm") and "triton" in name])'
    )
    assert run_fresh(script).stdout.strip() == '[]'


def test_the_operators_refuse_float64(kernels):
    """Which the public functions give to the reference on CUDA."""
    tensors, options = make_case(1, 1, 1, rank=1)
    with pytest.raises(NotImplementedError, match='selective_scan: .* float32, got torch.float64.*vssm.ops'):
        torch.ops.vssm.selective_scan(*tensors.values(), *options.values())
    with pytest.raises(NotImplementedError, match='state_fusion: .* float32, got torch.float64.*vssm.ops'):
        torch.ops.vssm.state_fusion(torch.zeros(1, 1, 1, 1).double(), torch.zeros(3, 1, 3, 3))


# ---- what they compile to --------------------------------------------------------------------------------------------


# For every card what networks use, in one type; of the alike 8.0, 8.6 and 8.9 one has maps, and two have tokens.
# test_sass.py compiles and runs all tiles and options for 9.0. By itself compile_cuda.py compiles all for all cards.
COMPILED = {
    'models': (('7.5', '9.0', '12.0'), ['--dtype', 'float32', '--options', 'models']),
    'models-bfloat16': (('10.0',), ['--dtype', 'bfloat16', '--options', 'models']),
    'models-float16': (('8.6',), ['--dtype', 'float16', '--options', 'models']),
    'models-amd': (('gfx942',), ['--dtype', 'float32', '--options', 'models']),
    'tokens-bfloat16': (('8.0',), ['--dtype', 'bfloat16', '--options', 'tokens']),
    'tokens-float16': (('8.9',), ['--dtype', 'float16', '--options', 'tokens']),
}


@pytest.mark.slow
@pytest.mark.parametrize(('cards', 'options'), COMPILED.values(), ids=COMPILED)
def test_kernels_compile_for_every_card(cards, options, tmp_path):
    """And none spills more than a little with its default tile, which the script's exit status says."""
    if 'gfx942' in cards and not importlib.util.find_spec('triton.backends.amd'):
        pytest.skip('this Triton cannot compile for AMD')
    file = tmp_path / 'kernels.json'
    command = [sys.executable, str(ROOT / 'benchmarks' / 'compile_cuda.py'), '--json', str(file), *options]
    result = subprocess.run([*command, '--capability', *cards], capture_output=True, text=True)
    print(result.stdout)  # the table
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    rows = json.loads(file.read_text())['rows']
    assert {row['capability'] for row in rows} == set(cards)
    of_maps = {'scan_forward_2d', 'scan_backward_2d', 'fusion_forward', 'fusion_backward'}
    expected = {'scan_forward_1d', 'scan_backward_1d'} | (set() if 'tokens' in options else of_maps)
    assert {row['kernel'] for row in rows} >= expected
    light = [row for row in rows if row['default'] and row['kernel'].startswith(('scan_forward', 'fusion'))]
    assert not any(row['spilled'] > 128 for row in light)


# Kernels that a training at 224 and a detection with images of twelve sizes compile at most; see count_kernels.py.
MOST_KERNELS = {
    'vmamba2d_tiny training default': 9,
    'vmamba2d_tiny training tuned': 17,
    'vmamba2d_tiny detection default': 19,
    'vmamba2d_tiny detection tuned': 27,
    'spatial_mamba_tiny training default': 13,
    'spatial_mamba_tiny training tuned': 21,
    'spatial_mamba_tiny detection default': 15,
    'spatial_mamba_tiny detection tuned': 23,
}


@pytest.mark.slow
def test_number_of_kernels():
    """And each states at its launch whether products and sums are fused."""
    script = Path(__file__).with_name('count_kernels.py')
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout)
    assert counts.keys() == MOST_KERNELS.keys()
    assert all(counts[what] <= most for what, most in MOST_KERNELS.items()), counts


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def cuda_case(**kwargs):
    tensors, options = make_case(**{**dict(batch=2, height=14, width=14, channels=96, states=1, rank=6), **kwargs})
    return {name: None if t is None else t.float().cuda() for name, t in tensors.items()}, options


@needs_gpu
def test_float64_is_the_references():
    tensors, options = cuda_case()
    tensors = convert(tensors, torch.float64)
    assert torch.equal(selective_scan(**tensors, **options), selective_scan_ref(**tensors, **options))


@needs_gpu
@pytest.mark.parametrize('tuned', (False, True))
def test_the_same_input_gives_the_same_bits(tuned):
    torch.use_deterministic_algorithms(not tuned)
    tensors, options = cuda_case(batch=3, height=33, width=70)
    grad_y = random_like(tensors['x'].cpu()).cuda()
    first, second = (values_and_grads(tensors, options, grad_y) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@needs_gpu
def test_other_sizes_of_images_tune_nothing_again():
    """But where lines become so much shorter or longer that other tiles suit them."""
    from vssm.ops.scan.triton.tiles import TILES, chosen

    torch.use_deterministic_algorithms(False)

    def tuned(size):
        tensors, options = cuda_case(batch=512, height=size, width=size)  # enough for one band
        selective_scan(**tensors, **options)
        return len(chosen)

    before = len(chosen)
    after = [tuned(size) for size in (7, 14, 28, 56)]
    assert max(after) - before <= len(TILES[2])
    assert {tuned(size) for size in (5, 8, 9, 12, 16, 17, 23, 32, 33, 40, 64)} == {after[-1]}


@needs_gpu
@pytest.mark.parametrize('bands', (1, 3))
@pytest.mark.parametrize('ndim', (1, 2))
def test_every_tile_again_and_again(ndim, bands, monkeypatch):
    """Each tile of the autotuner against the reference; and fifty times, for a race would show in the bits."""
    from vssm.ops.scan.triton import launch as kernels

    tensors, options = cuda_case(batch=1, height=30, width=70, channels=40, states=2, ndim=ndim)
    grad_y = random_like(tensors['x'].cpu()).cuda()
    expected = oracle(tensors, options, grad_y)
    monkeypatch.setattr(kernels, 'choose_bands', lambda *args: bands)
    for tile in {tile[:2] for choice in kernels.TILES[ndim].values() for tile in choice}:
        monkeypatch.setattr(kernels, 'TILES', tiles(tile))
        y, grads = values_and_grads(tensors, options, grad_y)
        assert_matches_oracle((y, grads), expected, tensors, options, grad_y, f'tile {tile}')
        for _ in range(50):
            again_y, again = values_and_grads(tensors, options, grad_y)
            assert torch.equal(y, again_y) and all(torch.equal(grads[n], again[n]) for n in grads), tile


@needs_gpu
def test_a_stream_of_its_own():
    tensors, options = cuda_case()
    expected = selective_scan(**tensors, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        x = tensors['x'] * 1  # late, and on this stream alone
        y = selective_scan(**{**tensors, 'x': x}, **options)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs a second CUDA device')
def test_a_device_other_than_the_current_one():
    tensors, options = cuda_case()
    expected = selective_scan(**tensors, **options)
    y = selective_scan(**{name: t.to('cuda:1') for name, t in tensors.items()}, **options)
    assert y.device.index == 1 and torch.equal(y.cpu(), expected.cpu())


@needs_gpu
@pytest.mark.parametrize('tuned', (False, True))
def test_cuda_graphs(tuned):
    torch.use_deterministic_algorithms(not tuned)
    tensors, options = cuda_case(height=33, width=70)
    selective_scan(**tensors, **options)  # tuned and compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = selective_scan(**tensors, **options)
    tensors['x'].copy_(torch.randn_like(tensors['x']))
    graph.replay()
    assert torch.equal(y, selective_scan(**tensors, **options))


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize('name', ('test_vmamba2d', 'test_spatial_mamba'))
def test_compiled_training_step_under_autocast(name, fresh_dynamo):
    import timm

    torch.use_deterministic_algorithms(False)  # bicubic and pooling layers have no such gradient on CUDA
    model = timm.create_model(name).cuda().eval()
    x = torch.randn(2, 3, 64, 64, device='cuda')

    def step(model, half=True):
        model.zero_grad()
        with torch.autocast('cuda', torch.bfloat16, enabled=half):
            y = model(x)
        y.float().square().sum().backward()
        return dict(y=y.detach().double()) | {n: p.grad.double() for n, p in model.named_parameters()}

    expected, eager = step(model, half=False), step(model)
    compiled = {n.removeprefix('_orig_mod.'): t for n, t in step(torch.compile(model, fullgraph=True)).items()}
    for n, t in expected.items():  # no further from float32 than what is not compiled
        error, of_eager = ((u[n] - t).norm() / t.norm() for u in (compiled, eager))
        assert error <= 1.5 * of_eager + 1e-2, (n, error, of_eager)


@needs_gpu
def test_models_agree_with_the_cpu(assert_close):
    import timm

    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = False
    for name in ('test_vmamba', 'test_vmamba2d', 'test_spatial_mamba'):
        model = timm.create_model(name).eval()
        x = torch.randn(2, 3, 72, 56)
        with torch.no_grad():
            expected = model(x)
            assert_close(model.cuda()(x.cuda()).cpu(), expected, 1e-4, name)


@needs_gpu
def test_beyond_two_to_the_31_elements(assert_close):
    """The far corner of a huge map begins two of the walks: it equals the same walks of a small map."""
    size, channels = 8200, 32
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip('needs 40 GB')
    x = torch.zeros(1, size, size, channels, dtype=torch.bfloat16, device='cuda')
    corner = torch.randn(1, 5, 6, channels, dtype=torch.bfloat16, device='cuda')
    x[:, -5:, -6:] = corner
    per_position = torch.full((1, size, size, 2, 1), 0.5, dtype=torch.bfloat16, device='cuda')
    A, weight = -torch.ones(2, channels, 1, device='cuda'), torch.ones(2, channels, 1, device='cuda')
    options = dict(dt_weight=weight, orders=(2, 3))
    y = selective_scan(x, per_position, A, per_position, per_position, **options)[:, -5:, -6:]
    small = per_position[:, :5, :6].contiguous()
    assert_close(y, selective_scan(corner, small, A, small, small, **options), 1e-2)


@needs_gpu
def test_state_fusion_on_cuda(assert_close):
    h, weight = torch.randn(2, 14, 14, 96), torch.randn(3, 96, 3, 3)
    with vssm.ops.use_reference():
        expected = state_fusion(h.double(), weight.double())
    assert_close(state_fusion(h.cuda(), weight.cuda()).cpu(), expected, 2e-6)
