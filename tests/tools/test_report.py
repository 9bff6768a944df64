# SPDX-License-Identifier: Apache-2.0
"""`vssm report`: what it counts, how it times, what it writes. No figure of time is judged here."""

import csv
import io
import itertools
import json

import pytest
import timm
import torch
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from torch import nn

from vssm.tools import _bench
from vssm.tools._bench import Timing, median_and_spread, median_seconds, time_interleaved
from vssm.tools._memory import NO_PEAK, fit_batch, peak_growth
from vssm.tools.main import main
from vssm.tools.report import counts, measure
from vssm.tools.report.cli import find_models
from vssm.tools.report.counts import accuracy_of, count
from vssm.tools.report.plot import draw
from vssm.tools.report.row import Row

FAMILIES = {'2dvmamba': 'vmamba2d', 'spatialmamba': 'spatial_mamba', 'vmamba': 'vmamba'}
QUICK = ['--rounds', '2', '--warmup', '1']

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def short_turns(monkeypatch):
    """Let every turn be a single step."""
    timed = measure.time_interleaved
    monkeypatch.setattr(
        measure, 'time_interleaved', lambda *args, min_seconds, **kwargs: timed(*args, **kwargs, min_seconds=0.0)
    )


@pytest.mark.parametrize('size', ['tiny', pytest.param('base', marks=pytest.mark.slow)])
@pytest.mark.parametrize('family', FAMILIES)
def test_counts_of_ours_are_those_of_the_references(family, size, golden):
    variants = golden('reported.json')['variants']
    (measured,) = (v['measured'] for name, v in variants.items() if name.startswith(f'{family}_{size}'))
    row = count(f'{FAMILIES[family]}_{size}', None, depth=2)
    assert row.error is None and row.size == 224 and row.note is None
    assert row.params == measured['params']
    assert row.gmacs == pytest.approx(measured['flops_224'] / 1e9, rel=1e-3)
    assert row.gmacs_torch == pytest.approx(row.gmacs, rel=0.02)  # PyTorch counts no norm
    parts = {m['name']: m for m in row.modules}
    assert {'stem', 'stages', 'stages.0', 'head.fc'} <= parts.keys() and 'stages.0.blocks' not in parts
    for key, total in dict(params=row.params, activations=row.activations, gmacs=row.gmacs).items():
        assert sum(parts[name][key] for name in ('stem', 'stages', 'head')) == pytest.approx(total, rel=1e-3)
        assert sum(parts[f'stages.{i}'][key] for i in range(4)) == pytest.approx(parts['stages'][key])


@pytest.mark.parametrize(
    'name',
    [
        'test_vit',
        'test_convnext',
        'test_resnet',
        pytest.param('swin_tiny_patch4_window7_224', marks=pytest.mark.slow),
    ],
)
def test_counts_of_peers_are_those_of_fvcore(name):
    row = count(name, None, 0)
    model = timm.create_model(name).eval()
    image = torch.zeros(1, *model.pretrained_cfg['input_size'])
    for kind, counted in ((FlopCountAnalysis, 1e9 * row.gmacs), (ActivationCountAnalysis, row.activations)):
        analysis = kind(model, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        assert counted == pytest.approx(analysis.total(), rel=1e-12), kind
    assert row.params == sum(p.numel() for p in model.parameters())
    assert (row.note is not None and 'scaled_dot_product_attention' in row.note) == (name == 'test_vit')
    assert row.note is None or 'misses' not in row.note


class Uncounted(nn.Module):
    """Parameters in all the ways that a count can see them, and miss them."""

    def __init__(self, missed):
        super().__init__()
        self.stem, self.norm, self.scale = nn.Conv2d(3, 4, 16, 16), nn.LayerNorm(4), nn.Parameter(torch.ones(4))
        self.act, self.token = nn.PReLU(), nn.Parameter(torch.zeros(1, 1, 4))
        self.mixers = nn.ModuleList(nn.LSTM(4, 4, batch_first=True) for _ in range(7)) if missed else ()
        self.bank = nn.Parameter(torch.eye(4)) if missed else None
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x).flatten(2).mT)) * self.scale
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for mixer in self.mixers:
            x = mixer(x)[0]
        if self.bank is not None:
            x = torch.cdist(x, self.bank.double().exp().float())
        return self.fc(x[:, 0])


@pytest.mark.parametrize('missed', [False, True], ids=['all counted', 'some missed'])
def test_parameters_that_a_count_misses_are_named(missed, monkeypatch, capsys):
    """Products and norms are counted, and what takes each value by itself costs nothing, by fvcore's rule."""
    monkeypatch.setattr(counts, 'create_for_size', lambda *args: Uncounted(missed).eval())
    row = count('test_vmamba', 32, 0)
    assert row.error is None and row.note == (
        'fvcore counts no cdist, and so misses parameters of bank; '
        'fvcore counts no lstm, and so misses parameters of mixers.0, mixers.1, mixers.2, mixers.3, mixers.4 and 2 more'
        if missed
        else None
    )
    assert main(['report', 'test_vmamba', '--sizes', '32', '--no-throughput']) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if 'misses' in line]
    assert lines == ([f'test_vmamba (size 32): {row.note}'] if missed else [])


def test_counts_follow_the_size():
    small, large = (count('test_spatial_mamba', size, 0) for size in (32, 64))
    assert (small.size, large.size) == (32, 64)
    assert large.activations == pytest.approx(4 * small.activations, rel=0.1)
    assert count('test_vit', 96, 0).error is None  # its size is fixed when it is made


@pytest.mark.parametrize(
    'config, shape, params, gmacs',
    [
        ('coco/mask-rcnn_vmamba_tiny_fpn_8xb2-1x_coco', ['--shape', '800', '1280'], 50, 271),
        ('ade20k/upernet_spatial_mamba_tiny_4xb4-160k_ade20k-512x512', [], 57, 936),
    ],
)
def test_a_config_is_counted_whole(config, shape, params, gmacs, tmp_path):
    for package in ('mmdet', 'mmseg'):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[mmlab]'")
    file = tmp_path / 'a.json'
    assert main(['report', '--config', config, *shape, '--json', str(file)]) == 0
    (row,) = json.loads(file.read_text())
    assert row['name'] == config and row['error'] is None
    assert row['size'] == ('800x1280' if shape else '512x2048')
    assert row['params'] / 1e6 == pytest.approx(params, rel=0.02)
    assert row['gmacs'] == pytest.approx(gmacs, rel=0.005) and row['gmacs_torch'] < row['gmacs']


@pytest.mark.parametrize(
    'config, said',
    [
        ('finetune/mask-rcnn_vmamba_tiny_fpn_1xb2-12e_folder', 'must have its number of classes'),
        ('finetune/faster-rcnn_vmamba_tiny_fpn_1xb2-12e_folder', 'must be of a segmentor or a Mask R-CNN'),
        ('finetune/vmamba_tiny_1xb64-50e_folder', 'must be of a segmentor or a Mask R-CNN'),
    ],
)
def test_a_config_that_cannot_be_counted_is_refused(config, said, capsys):
    pytest.importorskip('mmdet', reason="mmdet is not installed: pip install '.[mmlab]'")
    assert main(['report', '--config', config]) == 2
    assert said in capsys.readouterr().err


class Clock:
    """A clock that steps move."""

    def __init__(self, monkeypatch):
        self.now, self.order = 0.0, []
        monkeypatch.setattr(_bench.time, 'perf_counter', lambda: self.now)

    def step(self, name, *seconds):
        pace = itertools.chain(seconds, itertools.repeat(seconds[-1]))

        def step():
            self.order.append(name)
            self.now += next(pace)

        return step


def test_rounds_are_interleaved(monkeypatch):
    clock = Clock(monkeypatch)
    a, b = Timing(clock.step('a', 9.0, 1.0, 2.0, 5.0)), Timing(clock.step('b', 3.0))
    time_interleaved([a, b], rounds=3, warmup=1)
    assert clock.order == ['a', 'b'] * 4
    assert a.seconds == [1.0, 2.0, 5.0] and b.seconds == [3.0] * 3
    assert median_and_spread(a.seconds) == (2.0, 1.0)
    assert median_and_spread([4.0]) == (4.0, None) and median_and_spread([]) == (None, None)


def test_quick_steps_are_repeated_and_waited_for(monkeypatch):
    clock = Clock(monkeypatch)
    a, b = Timing(clock.step('a', 0.25)), Timing(clock.step('b', 2.0))
    time_interleaved([a, b], rounds=1, warmup=1, min_seconds=1.0, synchronize=lambda: clock.order.append('|'))
    assert ''.join(clock.order) == '|a||b|' + '|aaaa||b|'
    assert a.seconds == [0.25]


def test_medians_by_name_of_turns_of_several_steps(monkeypatch):
    clock = Clock(monkeypatch)
    steps = dict(a=clock.step('a', 9.0, 9.0, 1.0, 2.0, 5.0), b=clock.step('b', 3.0))
    assert median_seconds(steps, rounds=1, warmup=1, repeats=2) == dict(a=1.5, b=3.0)
    assert clock.order == ['a', 'a', 'b', 'b'] * 2
    with pytest.raises(RuntimeError, match='bad failed: ZeroDivisionError'):
        median_seconds(dict(bad=lambda: 1 / 0), rounds=1)


def test_a_step_that_fails_is_left_out(monkeypatch):
    clock = Clock(monkeypatch)

    def fail():
        raise ValueError('no\nmore')

    bad, good = Timing(fail), Timing(clock.step('a', 1.0))
    time_interleaved([bad, good], rounds=2)
    assert bad.error == 'ValueError: no' and good.seconds == [1.0, 1.0] and not bad.seconds


@pytest.mark.parametrize(
    'error',
    [
        torch.OutOfMemoryError('CUDA out of memory.'),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.'),
    ],
)
def test_the_batch_is_halved_until_it_fits(error):
    tried = []

    def trial(batch_size):
        tried.append(batch_size)
        if batch_size > fits:
            raise error

    fits = 3
    assert fit_batch(trial, 12) == 3 and tried == [12, 6, 3]
    fits = 0
    with pytest.raises(type(error)):
        fit_batch(trial, 2)


def test_other_errors_halve_nothing():
    def trial(batch_size):
        raise RuntimeError('shapes differ')

    with pytest.raises(RuntimeError, match='shapes differ'):
        fit_batch(trial, 4)


def test_the_peak_is_seen_again_when_the_allocator_keeps_what_was_freed():
    def step():
        kept = [torch.ones(2**20) for _ in range(16)]  # 4 MiB each, which glibc comes to keep for the next
        del kept

    peaks = [peak_growth(step, torch.device('cpu')) for _ in range(3)]
    if peaks[0] is None:
        pytest.skip(NO_PEAK)
    assert all(0.9 * 2**26 < peak < 1.5 * 2**26 for peak in peaks), peaks


KEYS = {
    *(
        'name',
        'size',
        'batch_size',
        'dtype',
        'device',
        'params',
        'activations',
        'gmacs',
        'gmacs_torch',
        'error',
        'note',
    ),
    *('images_per_s', 'images_per_s_spread', 'train_images_per_s', 'latency_ms', 'peak_memory_mb', 'rounds'),
    *('processor', 'threads', 'torch', 'timm', 'vssm', 'compile', 'channels_last'),
}


def test_what_is_written_says_the_same(tmp_path, capsys, short_turns):
    files = {kind: tmp_path / f'a.{kind}' for kind in ('md', 'csv', 'json', 'png')}
    options = [option for kind in ('md', 'csv', 'json') for option in (f'--{kind}', str(files[kind]))]
    models = ['test_vmamba', 'test_convnext', 'test_vmamba*']
    argv = [*models, '--sizes', '32', '64', '--batch-sizes', '2', '--depth', '1', '--plot', str(files['png']), *options]
    assert main(['report', *argv, '--train', '--channels-last', *QUICK]) == 0
    rows = json.loads(files['json'].read_text())
    names = ['test_vmamba', 'test_convnext', 'test_vmamba2d']
    assert [(row['name'], row['size']) for row in rows] == [(name, size) for size in (32, 64) for name in names]
    for row in rows:
        assert KEYS <= row.keys() and row['modules']
        assert row['error'] is None and row['rounds'] == 2 and row['channels_last'] and not row['compile']
        for key in ('images_per_s', 'train_images_per_s', 'latency_ms'):
            assert row[key] > 0 and row[f'{key}_spread'] >= 0
        if row['peak_memory_mb'] is not None:
            assert row['params'] * 4 / 1e6 < row['peak_memory_mb'] and row['train_peak_memory_mb']
    written = list(csv.DictReader(io.StringIO(files['csv'].read_text())))
    assert [{k: '' if v is None else str(v) for k, v in row.items() if k != 'modules'} for row in rows] == written
    out, markdown = capsys.readouterr().out, files['md'].read_text()
    for table in (out.replace('│', '|'), markdown):
        lines = [line for line in table.splitlines() if line.startswith(('| test_', '| model'))]
        assert not lines or all(line.count('|') == lines[0].count('|') for line in lines)
    for row in rows:
        assert f'{row["gmacs"]:.4f}' in out and f'{row["gmacs"]:.4f}' in markdown
    assert files['png'].read_bytes().startswith(b'\x89PNG')
    assert {file.name for file in tmp_path.iterdir()} == {'a.md', 'a.csv', 'a.json', 'a.png'}


@pytest.mark.parametrize('kind', ['json', 'csv', 'md'])
def test_standard_output_holds_the_file_alone(kind, capsys):
    assert main(['report', 'test_vmamba', '--no-throughput', f'--{kind}', '-']) == 0
    captured = capsys.readouterr()
    read = dict(json=json.loads, csv=lambda text: list(csv.DictReader(io.StringIO(text))), md=str.splitlines)[kind]
    content = read(captured.out)
    if kind == 'md':
        assert content[0].startswith('size ') and content[2].startswith('| model |')
    else:
        assert [row['name'] for row in content] == ['test_vmamba'] and not content[0]['images_per_s']
    assert 'test_vmamba' in captured.err


def test_half_precision_trains_under_autocast(tmp_path, short_turns):
    file = tmp_path / 'a.json'
    argv = ['test_spatial_mamba', '--dtype', 'float32', 'bfloat16', '--batch-sizes', '2', '--train']
    assert main(['report', *argv, *QUICK, '--json', str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row['dtype'] for row in rows] == ['float32', 'bfloat16']
    assert all(row['images_per_s'] and row['train_images_per_s'] and row['error'] is None for row in rows)


@pytest.mark.slow
def test_compiled(tmp_path, short_turns, fresh_dynamo):
    file = tmp_path / 'a.json'
    assert main(['report', 'test_vim', '--compile', '--sizes', '64', *QUICK, '--json', str(file)]) == 0
    assert all(row['compile'] and row['images_per_s'] for row in json.loads(file.read_text()))


def test_a_model_that_fails_is_a_row(tmp_path, capsys, short_turns):
    file = tmp_path / 'a.json'
    argv = ['test_vit', 'test_vmamba', '--sizes', '37', '--batch-sizes', '2', *QUICK, '--json', str(file)]
    assert main(['report', *argv]) == 0
    bad, good = json.loads(file.read_text())
    assert bad['name'] == 'test_vit' and 'divisible' in bad['error'] and bad['images_per_s'] is None
    assert good['error'] is None and good['images_per_s'] > 0
    assert f'test_vit (size 37, batch 2, dtype float32, device cpu): failed: {bad["error"]}' in capsys.readouterr().out
    assert main(['report', 'test_vit', '--sizes', '37', '--no-throughput']) == 1  # no row has a figure


def test_too_little_memory_is_said(tmp_path, monkeypatch, capsys, short_turns):
    step = measure.Subject.step

    def limited(self, kind, batch_size):
        if batch_size > 2:
            raise torch.OutOfMemoryError('CUDA out of memory.')
        return step(self, kind, batch_size)

    monkeypatch.setattr(measure.Subject, 'step', limited)
    file = tmp_path / 'a.json'
    assert main(['report', 'test_vmamba', *QUICK, '--json', str(file)]) == 0
    (row,) = json.loads(file.read_text())
    assert row['batch_size'] == 2 and row['images_per_s'] and row['error'] is None
    assert row['note'] == 'out of memory with batch 8, halved to 2 for all of its steps'
    assert row['note'] in capsys.readouterr().out


def test_an_interrupt_leaves_what_is_done(tmp_path, monkeypatch, capsys, short_turns):
    step, calls = measure.Subject.step, itertools.count()

    def interrupted(self, kind, batch_size):
        inner, held = step(self, kind, batch_size)

        def run():
            if next(calls) == 13:  # two trials of memory, two peaks, four calls of warm-up, a round, one call
                raise KeyboardInterrupt
            inner()

        return run, held

    monkeypatch.setattr(measure.Subject, 'step', interrupted)
    file = tmp_path / 'a.json'
    argv = ['test_vmamba', 'test_convnext', '--sizes', '64', '--batch-sizes', '2', '4', '--json', str(file)]
    assert main(['report', *argv, '--rounds', '5', '--warmup', '1']) == 130
    first, second = json.loads(file.read_text())
    assert first['name'] == 'test_vmamba' and first['images_per_s'] > 0 and first['rounds'] == 1
    assert second['images_per_s'] > 0 and second['latency_ms'] > 0 and second['batch_size'] == 2
    assert 'Interrupted' in capsys.readouterr().out


@pytest.mark.parametrize(
    'argv, said',
    [
        ([], 'MODEL must be at least one'),
        (['vmaba_tiny'], "got 'vmaba_tiny'. Did you mean 'vmamba_tiny' or 'vmamba2d_tiny'"),
        (['resnet50.nope'], 'nope'),
        (['nothing_*'], "must match a model of timm, got 'nothing_*'"),
        (['test_vmamba', '--json', '-', '--md', '-'], 'one of --md, --csv and --json'),
        (['test_vmamba', '--json', 'nowhere/a.json'], 'folder that exists, got nowhere/a.json'),
        (['test_vmamba', '--device', 'abacus'], '--device must be cpu, cuda or cuda:N, got abacus'),
        (['test_vmamba', '--device', 'cuda:99'], '--device must be there, got cuda:99'),
        (['test_vmamba', '--plot', 'a.png'], '--plot with one size needs a model whose accuracy is published'),
        (['test_vmamba', '--plot', 'a.png', '--no-throughput'], '--plot needs what is timed'),
        (['vmamba_tiny', '--plot', 'a.txt'], '--plot must end in .png, .svg or .pdf, got a.txt'),
        (['test_vmamba', '--shape', '32', '32'], '--shape needs --config'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_bad_input_gives_one_sentence(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['report', *argv]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count('\n') == 1 and not captured.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['2dvmamba_tiny', 'vmamba2d_tiny', 'vmamba2d_tiny.in1k'])
def test_names_of_ours(name):
    (found,) = find_models([name, name])
    assert found.partition('.')[0] == 'vmamba2d_tiny' and accuracy_of(found) == 82.8


def timed_row(name, size, images_per_s, **values):
    figures = dict(batch_size=8, dtype='float32', device='cpu', images_per_s_spread=1.0, peak_memory_mb=100.0 + size)
    return Row(name, size, published_top1=accuracy_of(name), images_per_s=images_per_s, **(figures | values))


def test_one_size_draws_accuracy_against_throughput():
    pytest.importorskip('matplotlib')
    failed = Row('vmamba_base', 224, error='ValueError')
    rows = [timed_row('vmamba_tiny', 224, 10.0), timed_row('vmamba2d_tiny', 224, 9.0), timed_row('resnet50', 224, 12.0)]
    figure = draw([*rows, failed])
    (axes,) = figure.axes
    assert axes.get_xlabel() == 'throughput (images/s)'
    assert axes.get_ylabel() == 'published ImageNet-1K top-1 at 224 (%)'
    assert tuple(figure.get_size_inches() * figure.dpi)[0] == 800
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {
        'vmamba_tiny',
        'vmamba2d_tiny',
        'resnet50 (accuracy not known)',
    }


def test_several_sizes_draw_throughput_and_memory_against_them():
    pytest.importorskip('matplotlib')
    names = ['vmamba_tiny', 'resnet50']
    rows = [
        timed_row(name, size, 1e4 / size, dtype=dtype)
        for name in names
        for size in (224, 384)
        for dtype in ('float32', 'bfloat16')
    ]
    figure = draw(rows)
    assert [axes.get_xlabel() for axes in figure.axes] == ['side of the image (pixels)'] * 2
    assert [axes.get_ylabel() for axes in figure.axes] == ['throughput (images/s)', 'peak memory (MB)']
    lines = figure.axes[1].get_lines()
    assert (
        len(lines) == 4 and len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 4
    )
    assert 'resnet50, dtype bfloat16' in {text.get_text() for text in figure.legends[0].get_texts()}
