# SPDX-License-Identifier: Apache-2.0
"""Measure models, ours and timm's: cost, speed, memory.

Counts are of one image: parameters, activations (what convolutions and matrix products give) and billions of multiply-
accumulates, GMACs by fvcore as the papers count them and torch by PyTorch's FlopCounterMode. A model that is timed
has random weights. Inference runs in the dtype; a training step is forward, cross entropy and backward without an
optimizer, with float32 weights under autocast. All models take turns, a round each; shown are the median over the
rounds and, after ±, half of the interquartile range. ms is the latency of one image. MB is the most that model, images
and one step hold, in 10^6 bytes. When memory does not suffice, the batch is halved and a note says so; on a CPU the
system may end the process first.

--json is a list of rows, --csv a line a row; both hold every figure with its unit in its name and the conditions it was
taken under. Sizes are one number where an image is square. FILE may be - for the standard output.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ._common import UsageError, find_timm_model, read_config, write_file
from .published import IMAGENET_TOP1

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

EXAMPLE = "vssm report 'vmamba_*' swin_tiny_patch4_window7_224 --sizes 224 384 --plot report.png"

DTYPES = ('float32', 'bfloat16', 'float16')


@dataclasses.dataclass
class Row:
    """One model at one size, batch size and dtype; None is what was not asked for or cannot be had."""

    name: str
    size: int | str | None = None
    batch_size: int | None = None  # the one that ran
    asked_batch_size: int | None = None
    dtype: str | None = None
    device: str | None = None
    published_top1: float | None = None  # on ImageNet-1K, at 224x224 alone
    params: int | None = None
    activations: int | None = None
    gmacs: float | None = None
    gmacs_torch: float | None = None
    images_per_s: float | None = None
    images_per_s_spread: float | None = None
    train_images_per_s: float | None = None
    train_images_per_s_spread: float | None = None
    latency_ms: float | None = None
    latency_ms_spread: float | None = None
    peak_memory_mb: float | None = None
    train_peak_memory_mb: float | None = None
    rounds: int | None = None
    note: str | None = None
    error: str | None = None
    modules: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    conditions: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add_note(self, note: str) -> None:
        self.note = f'{self.note}; {note}' if self.note else note

    def fail(self, error: str) -> None:
        self.error = self.error or error

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """What fails within is this row's reason."""
        from ._measure import one_line

        try:
            yield
        except Exception as error:
            self.fail(one_line(error))

    def record(self) -> dict[str, Any]:
        """The row without depth, the conditions beside the figures."""
        record = dataclasses.asdict(self)
        return {**{k: v for k, v in record.items() if k not in ('modules', 'conditions')}, **self.conditions}


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('models', metavar='MODEL', nargs='*', help='a timm name, or a pattern, * for any text')
    parser.add_argument(
        '--sizes', metavar='N', nargs='+', type=positive, help="sides of the image (default: each model's own)"
    )
    parser.add_argument('--batch-sizes', metavar='N', nargs='+', type=positive, default=[8], help='(default: 8)')
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, default=['float32'], help='(default: float32)')
    parser.add_argument('--device', help='cpu or cuda or cuda:N (default: a GPU where there is one)')
    parser.add_argument('--threads', metavar='N', type=positive, help="of the CPU (default: PyTorch's choice)")
    parser.add_argument('--compile', action='store_true', help='torch.compile the models')
    parser.add_argument('--channels-last', action='store_true', help='models and images in channels-last memory')
    parser.add_argument('--train', action='store_true', help='time and weigh a training step, too')
    parser.add_argument('--no-throughput', action='store_true', help='count, time nothing')
    parser.add_argument('--rounds', metavar='N', type=positive, default=9, help='rounds to time (default: 9)')
    parser.add_argument('--warmup', metavar='N', type=positive, default=2, help='rounds before them (default: 2)')
    parser.add_argument('--depth', metavar='N', type=positive, default=0, help='list the modules of N levels, too')
    parser.add_argument(
        '--config',
        metavar='CONFIG',
        help='count the whole segmentor or Mask R-CNN of a config, by name or path; with 1000 proposals and 100 masks, '
        'without an auxiliary head',
    )
    parser.add_argument(
        '--shape',
        metavar=('H', 'W'),
        nargs=2,
        type=positive,
        help='image of --config (default: 512 2048 for a segmentor, 800 1280 for a detector)',
    )
    for name, what in dict(md='a table in Markdown', csv='the rows', json='the rows, with the modules').items():
        parser.add_argument(f'--{name}', metavar='FILE', help=f'write {what}')
    parser.add_argument(
        '--plot',
        metavar='FILE',
        type=Path,
        help='draw published accuracy against throughput, or with several sizes throughput and memory against them',
    )


def run(args: argparse.Namespace) -> int:
    files = {name: getattr(args, name) for name in ('md', 'csv', 'json') if getattr(args, name)}
    to_stdout = '-' in files.values()
    names = check(args, files)
    rows: list[Row] = []
    interrupted = False
    with contextlib.redirect_stdout(sys.stderr) if to_stdout else contextlib.nullcontext():
        try:
            measure(args, names, rows)
        except KeyboardInterrupt:
            interrupted = True
            rows = [row for row in rows if row.params or row.error]
        for row in rows:
            row.conditions = row.conditions or conditions_of(args)
        show(rows, interrupted)
    texts = dict(md=to_markdown, csv=to_csv, json=to_json)
    for name, file in files.items():
        text = texts[name](rows)
        if file == '-':
            sys.stdout.write(text)
        else:
            write_file(Path(file), text.encode())
    if args.plot:
        with contextlib.redirect_stdout(sys.stderr):
            plot(rows, args.plot)
    return 130 if interrupted else int(bool(rows) and all(row.error for row in rows))


# ---- what is asked for -----------------------------------------------------------------------------------------------


def check(args: argparse.Namespace, files: dict[str, str]) -> list[str]:
    """Refuse what cannot be, before minutes are spent; return the models' names."""
    import torch

    names = find_models(args.models)
    if not names and not args.config:
        raise UsageError('MODEL must be at least one name or pattern, or --config be given, got none.')
    if list(files.values()).count('-') > 1:
        raise UsageError(f'one of --md, --csv and --json can be -, the standard output, got {" ".join(files)}.')
    paths = [Path(file) for file in (*files.values(), args.plot) if file and file != '-']
    for path in paths:
        if not path.parent.is_dir() or path.is_dir() or paths.count(path) > 1:
            raise UsageError(f'FILE must be one of its own in a folder that exists, got {path}.')
    if args.shape and not args.config:
        raise UsageError('--shape needs --config; --sizes is for models.')
    if args.plot:
        import matplotlib  # noqa: F401  better missed now than after the measuring

        if args.no_throughput or not names:
            raise UsageError('--plot needs what is timed: MODEL, without --no-throughput.')
        if args.plot.suffix not in ('.png', '.svg', '.pdf'):
            raise UsageError(f'--plot must end in .png, .svg or .pdf, got {args.plot}.')
        if len(sizes_of(args)) == 1 and not any(accuracy_of(name) for name in names):
            known = ', '.join(IMAGENET_TOP1)
            raise UsageError(f'--plot with one size needs a model whose accuracy is published: {known}; or --sizes.')
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(args.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ('cpu', 'cuda'):
        raise UsageError(f'--device must be cpu, cuda or cuda:N, got {args.device}.')
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == 'cuda' and (device.index or 0) >= count:
        raise UsageError(f'--device must be there, got {args.device}, where PyTorch finds {count} CUDA devices.')
    if args.threads:
        torch.set_num_threads(args.threads)
    return names


def find_models(patterns: Sequence[str]) -> list[str]:
    """The names of timm's registry, ours among them, that names and patterns stand for, each once."""
    import timm

    names = []
    for pattern in patterns:
        if any(c in pattern for c in '*?['):
            found = timm.list_models(pattern)
            if not found:
                raise UsageError(f'MODEL must match a model of timm, got {pattern!r}.')
        else:
            found = [find_timm_model(pattern)]
        names += found
    return list(dict.fromkeys(names))


def sizes_of(args: argparse.Namespace) -> list[int | None]:
    return list(dict.fromkeys(args.sizes or [None]))


def accuracy_of(name: str) -> float | None:
    return IMAGENET_TOP1.get(name.partition('.')[0])


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, names: Sequence[str], rows: list[Row]) -> None:
    """Append to rows, so that an interrupt finds what is done."""
    import torch

    with contextlib.ExitStack() as stack:
        if args.compile:  # or it goes on uncompiled, with a warning alone, after so many models
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=10**6, accumulated_recompile_limit=10**6))
        say = stack.enter_context(Console(stderr=True).status('')).update
        if args.config:
            say(f'counting {args.config}')
            rows.append(count_config(args))
        for size in sizes_of(args) if names else []:
            start = len(rows)
            for name in names:
                say(f'counting {name}')
                rows.append(count(name, size, args.depth))
            if args.no_throughput:
                continue
            costs = rows[start:]
            for dtype in dict.fromkeys(args.dtype):
                models = [dataclasses.replace(cost, dtype=dtype, device=args.device) for cost in costs]
                subjects = {}
                for row in models:
                    say(f'building {row.name}')
                    if row.params is not None:  # or it cannot be built
                        with row.failing():
                            subjects[row.name] = Subject(row.name, size, dtype, args)
                for batch_size in dict.fromkeys(args.batch_sizes):
                    say(f'timing {len(names)} models, size {size or "their own"}, batch {batch_size}, {dtype}')
                    group = [
                        dataclasses.replace(row, batch_size=batch_size, asked_batch_size=batch_size) for row in models
                    ]
                    if rows[start] is costs[0]:  # these take the place of the counts alone
                        del rows[start:]
                    rows += group
                    time_group(group, subjects, args)
                    taken = conditions_of(args)  # the clock is that of now
                    for row in group:
                        row.conditions = taken


def conditions_of(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ._measure import conditions

    timed = args.models and not args.no_throughput
    options = dict(compile=args.compile, channels_last=args.channels_last, warmup=args.warmup) if timed else {}
    return conditions(torch.device(args.device if timed else 'cpu')) | options


def build(name: str, size: int | None) -> tuple['nn.Module', 'Tensor']:
    """A model with random weights in evaluation mode, and an image, (1, in_chans, H, W)."""
    import timm
    import torch

    cfg = timm.get_pretrained_cfg(name)
    channels, *own = cfg.input_size
    fixed = dict(img_size=size) if size and cfg.fixed_input_size else {}
    model = timm.create_model(name, **fixed).eval()
    return model, torch.zeros(1, channels, *((size, size) if size else own))


def count(name: str, size: int | None, depth: int) -> Row:
    """The row of a model with its counts."""
    from ._count import count_fvcore, count_torch

    row = Row(name, size)
    with row.failing():
        model, image = build(name, size)
        row.size = written_size(image.shape[2:])
        row.published_top1 = accuracy_of(name) if row.size == 224 else None
        row.params = sum(p.numel() for p in model.parameters())
        cost = count_fvcore(model, image, depth)
        row.activations, row.gmacs, row.modules = cost.activations, cost.macs / 1e9, cost.modules
        if cost.uncounted:
            row.add_note(f'fvcore counts no {", ".join(cost.uncounted)}')
        row.gmacs_torch = count_torch(model.to('meta'), image.to('meta')) / 1e9
    return row


def written_size(shape: Sequence[int]) -> int | str:
    height, width = shape
    return height if height == width else f'{height}x{width}'


def count_config(args: argparse.Namespace) -> Row:
    """The row of a config's whole model."""
    import torch

    options = dict(cfg_options=[], data_root=None, work_dir=None, launcher='none')
    cfg = read_config(argparse.Namespace(config=args.config, **options))
    from mmengine.registry import MODELS, init_default_scope

    from ._count import multiply_adds

    kind = 'segmentor' if 'decode_head' in cfg.model else 'detector' if 'roi_head' in cfg.model else None
    if kind is None:
        raise UsageError(f'--config must be of a segmentor or a Mask R-CNN, got {args.config}.')
    shape = args.shape or ((512, 2048) if kind == 'segmentor' else (800, 1280))
    row = Row(args.config, written_size(shape))
    with row.failing():
        init_default_scope(cfg.default_scope)
        with torch.device('meta'):
            model = MODELS.build(cfg.model).eval()
        row.params = sum(p.numel() for p in model.parameters())
        row.gmacs = multiply_adds(model, shape) / 1e9
        row.gmacs_torch = multiply_adds(model, shape, rules=None) / 1e9
    return row


class Subject:
    """A model on its device, and the steps of it that are timed."""

    def __init__(self, name: str, size: int | None, dtype: str, args: argparse.Namespace) -> None:
        import torch

        model, image = build(name, size)
        self.shape = image.shape[1:]
        self.device, self.dtype = torch.device(args.device), getattr(torch, dtype)
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.models = {}
        if args.train:  # of its own, as the other may be of another dtype
            self.models['training'] = copy.deepcopy(model).train()
        self.models['inference'] = model.to(self.dtype)
        self.kinds = ['inference', *(['training'] if args.train else [])]
        for part in self.models.values():
            part.to(self.device, memory_format=self.memory_format)
        self.calls = {
            kind: torch.compile(part, dynamic=False) if args.compile else part for kind, part in self.models.items()
        }

    def step(self, kind: str, batch_size: int) -> tuple[Callable[[], None], int]:
        """One step of inference or training, and the bytes that it holds before: model and images."""
        import torch
        from torch.nn.functional import cross_entropy

        model, call = self.models[kind], self.calls[kind]
        images = torch.randn(batch_size, *self.shape, device=self.device)
        images = images.to(self.dtype if kind == 'inference' else torch.float32, memory_format=self.memory_format)
        labels = torch.zeros(batch_size, dtype=torch.long, device=self.device)

        def infer() -> None:
            with torch.inference_mode():
                call(images)

        def train() -> None:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                y = call(images)
            cross_entropy(y.float(), labels).backward()
            model.zero_grad()

        held = [*model.parameters(), *model.buffers(), images, labels]
        return infer if kind == 'inference' else train, sum(t.nbytes for t in held)


def time_group(group: Sequence[Row], subjects: dict[str, Subject], args: argparse.Namespace) -> None:
    """Fill rows, whose models take turns; an interrupt leaves what is done in them."""
    import torch

    from ._measure import NO_PEAK, Timing, fit_batch, median_and_spread, peak_growth, time_interleaved

    device = torch.device(args.device)
    synchronize = (lambda: torch.cuda.synchronize(device)) if device.type == 'cuda' else (lambda: None)
    timings: dict[tuple[int, str], Timing] = {}
    for i, row in enumerate(group):
        if row.name not in subjects:
            continue
        subject, asked, ready = subjects[row.name], row.batch_size, []

        def trial(batch_size: int, kind: str, subject: Subject = subject) -> None:
            subject.step(kind, batch_size)[0]()
            synchronize()

        for kind in subject.kinds:
            with row.failing():
                row.batch_size = fit_batch(functools.partial(trial, kind=kind), row.batch_size)
                ready.append(kind)
        if row.batch_size < asked:
            row.add_note(f'out of memory with batch {asked}, halved to {row.batch_size} for all of its steps')
        for kind in ready:
            with row.failing():
                step, held = subject.step(kind, row.batch_size)
                growth = peak_growth(step, device)
                if growth is not None:
                    setattr(row, f'{PREFIX[kind]}peak_memory_mb', (held + growth) / 1e6)
                elif kind == 'inference':
                    row.add_note(NO_PEAK)
                timings[i, kind] = Timing(step)
        if 'inference' in ready:
            with row.failing():
                one = subject.step('inference', 1)[0]
                timings[i, 'latency'] = Timing(lambda one=one: (one(), synchronize()))
    try:
        time_interleaved(timings.values(), args.rounds, args.warmup, min_seconds=0.2, synchronize=synchronize)
    finally:
        for (i, kind), timing in timings.items():
            row = group[i]
            if timing.error:
                row.fail(timing.error)
            row.rounds = min(args.rounds if row.rounds is None else row.rounds, len(timing.seconds))
            if kind == 'latency':
                row.latency_ms, row.latency_ms_spread = median_and_spread([1e3 * s for s in timing.seconds])
            else:
                rate, spread = median_and_spread([row.batch_size / s for s in timing.seconds])
                setattr(row, f'{PREFIX[kind]}images_per_s', rate)
                setattr(row, f'{PREFIX[kind]}images_per_s_spread', spread)


PREFIX = dict(inference='', training='train_')


# ---- telling ---------------------------------------------------------------------------------------------------------

SHARED = dict(size='size', batch_size='batch', dtype='dtype', device='device', rounds='rounds')  # in the title if equal
FIGURES = (  # heading, key, unit of it, digits after the point; None: as many as the figure's size asks for
    ('published top-1/%', 'published_top1', 1, 1),
    ('params/M', 'params', 1e6, 3),
    ('activations/M', 'activations', 1e6, 2),
    ('GMACs', 'gmacs', 1, 4),
    ('torch', 'gmacs_torch', 1, 4),
    ('images/s', 'images_per_s', 1, None),
    ('train images/s', 'train_images_per_s', 1, None),
    ('ms', 'latency_ms', 1, None),
    ('MB', 'peak_memory_mb', 1, 0),
    ('train MB', 'train_peak_memory_mb', 1, 0),
)


def tables(rows: Sequence[Row]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, header, cells) of the table of all rows, and of the modules of each."""
    shared, header, columns = [], ['model'], [[row.name for row in rows]]
    for key, heading in SHARED.items():
        values = [getattr(row, key) for row in rows]
        if len(set(values)) > 1:
            header.append(heading)
            columns.append(['-' if value is None else str(value) for value in values])
        elif values and values[0] is not None:
            shared.append(f'{heading} {values[0]}')
    for heading, key, unit, digits in FIGURES:
        if any(getattr(row, key) is not None for row in rows):
            header.append(heading)
            columns.append([figure(row, key, unit, digits) for row in rows])
    yield ', '.join(shared), header, [list(cells) for cells in zip(*columns, strict=True)]

    told = set()
    for row in rows:
        if row.modules and (row.name, row.size) not in told:
            told.add((row.name, row.size))
            header = ['module', 'params/M', 'activations/M', 'GMACs']
            parts = [
                [m['name'], f'{m["params"] / 1e6:.3f}', f'{m["activations"] / 1e6:.2f}', f'{m["gmacs"]:.4f}']
                for m in row.modules
            ]
            yield f'{row.name}, size {row.size}', header, parts


def figure(row: Row, key: str, unit: float, digits: int | None) -> str:
    value, spread = getattr(row, key), getattr(row, f'{key}_spread', None)
    if value is None:
        return '-'
    if digits is None:
        digits = 0 if value >= 1000 else 1 if value >= 100 else 2
    return f'{value / unit:.{digits}f}' + ('' if spread is None else f' ±{spread:.{digits}f}')


def remarks(rows: Sequence[Row]) -> list[str]:
    """What does not fit into a table: notes, why a model failed, the conditions."""
    lines = []
    for row in rows:
        of = ', '.join(f'{h} {getattr(row, k)}' for k, h in SHARED.items() if getattr(row, k) is not None)
        for text in (row.note, row.error and f'failed: {row.error}'):
            if text:
                lines.append(f'{row.name} ({of}): {text}')
    for conditions in {str(row.conditions): row.conditions for row in rows if row.conditions}.values():
        lines.append(', '.join(f'{key} {value}' for key, value in conditions.items() if value not in (None, False)))
    return list(dict.fromkeys(lines))


def show(rows: Sequence[Row], interrupted: bool) -> None:
    # A table needs its room in a file or a pipe, where rich would take 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 240, highlight=False, markup=False, emoji=False)
    for title, header, cells in tables(rows):
        table = Table(title=title, title_justify='left')
        for i, heading in enumerate(header):
            table.add_column(heading, justify='right' if i else 'left', overflow='fold')
        for line in cells:
            table.add_row(*line)
        console.print(table)
    for line in remarks(rows):
        console.print(line, soft_wrap=True)
    if interrupted:
        console.print('Interrupted: this is what was done so far.')


def to_markdown(rows: Sequence[Row]) -> str:
    blocks = []
    for title, header, cells in tables(rows):
        ruler = ['---', *['---:'] * (len(header) - 1)]
        lines = [f'| {" | ".join(line)} |' for line in (header, ruler, *cells)]
        blocks += [title, '\n'.join(lines)]
    blocks += [f'- {line}' for line in remarks(rows)]
    return '\n\n'.join(filter(None, blocks)) + '\n'


def to_csv(rows: Sequence[Row]) -> str:
    records = [row.record() for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for record in records for key in record)))
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def to_json(rows: Sequence[Row]) -> str:
    return json.dumps([row.record() | dict(modules=row.modules) for row in rows], indent=2) + '\n'


# ---- drawing ---------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which the colour-blind tell apart, less yellow, which is faint on white; markers differ, too.
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00', '#000000')
MARKERS = 'osD^vPX*<>hp'


def draw(rows: Sequence[Row]) -> 'Figure':
    """Accuracy against throughput, or with several sizes throughput and memory against them; 800 pixels wide."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.images_per_s is not None and isinstance(row.size, int)]
    series: dict[str, list[Row]] = {}
    keys = dict(dtype='dtype', asked_batch_size='batch')  # a batch that had to be halved stays on its line
    varying = [key for key in keys if len({getattr(row, key) for row in rows}) > 1]
    for row in rows:
        series.setdefault(', '.join([row.name, *(f'{keys[k]} {getattr(row, k)}' for k in varying)]), []).append(row)
    legend_rows = -(-len(series) // 2)
    with rc_context({'font.size': 11, 'axes.grid': True, 'grid.alpha': 0.3}):
        figure = Figure(figsize=(8, 4.5 + 0.25 * legend_rows), dpi=100, layout='constrained')
        if any(len({row.size for row in line}) > 1 for line in series.values()):
            _draw_over_sizes(figure, series)
        else:
            _draw_accuracy(figure, series)
        figure.suptitle(_what_ran(rows), fontsize=11)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=2, frameon=False)
    return figure


def _what_ran(rows: Sequence[Row]) -> str:
    values = {heading: {getattr(row, key) for row in rows} for key, heading in SHARED.items()}
    processors = {str(row.conditions.get('processor')) for row in rows}
    return ', '.join([*(f'{h} {next(iter(v))}' for h, v in values.items() if len(v) == 1), *processors])


def _styles(series: dict[str, list[Row]]) -> Iterator[tuple[str, list[Row], dict[str, Any]]]:
    for i, (label, rows) in enumerate(series.items()):
        style = dict(color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], markersize=8)
        style |= dict(markerfacecolor='none', markeredgewidth=2)  # one lets another be seen through it
        yield label, rows, style


def _draw_accuracy(figure: 'Figure', series: dict[str, list[Row]]) -> None:
    axes = figure.subplots()
    for label, rows, style in _styles(series):
        speed, spread, top1 = rows[0].images_per_s, rows[0].images_per_s_spread, rows[0].published_top1
        if top1 is None:
            axes.axvline(speed, color=style['color'], linestyle=':', label=f'{label} (accuracy not known)')
        else:
            axes.errorbar(speed, top1, xerr=spread, label=label, linestyle='', capsize=3, **style)
    axes.set_xlabel('throughput (images/s)')
    axes.set_ylabel('published ImageNet-1K top-1 at 224 (%)')


def _draw_over_sizes(figure: 'Figure', series: dict[str, list[Row]]) -> None:
    speed, memory = figure.subplots(1, 2)
    for label, rows, style in _styles(series):
        sizes = [row.size for row in rows]
        spread = [row.images_per_s_spread or 0 for row in rows]
        speed.errorbar(sizes, [row.images_per_s for row in rows], yerr=spread, label=label, capsize=3, **style)
        weighed = [row for row in rows if row.peak_memory_mb is not None]
        memory.plot([row.size for row in weighed], [row.peak_memory_mb for row in weighed], **style)
    for axes, label in ((speed, 'throughput (images/s)'), (memory, 'peak memory (MB)')):
        axes.set_xlabel('side of the image (pixels)')
        axes.set_ylabel(label)
        axes.set_xticks(sorted({row.size for rows in series.values() for row in rows}))
        axes.set_ylim(bottom=0)


def plot(rows: Sequence[Row], path: Path) -> None:
    data = io.BytesIO()
    draw(rows).savefig(data, format=path.suffix[1:])
    write_file(path, data.getvalue())


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['report', *sys.argv[1:]]))
