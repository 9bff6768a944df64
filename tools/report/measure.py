# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of models, which take turns."""

import argparse
import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

from .._bench import Timing, conditions, median_and_spread, synchronizer, time_interleaved
from .._memory import NO_PEAK, fit_batch, peak_growth
from .._models import create_for_size, image_of
from .counts import count, count_config
from .row import Row

Say = Callable[[str], Any]


def sizes_of(args: argparse.Namespace) -> list[int | None]:
    return list(dict.fromkeys(args.sizes or [None]))


def conditions_of(args: argparse.Namespace) -> dict[str, Any]:
    timed = args.models and not args.no_throughput
    options = dict(compile=args.compile, channels_last=args.channels_last, warmup=args.warmup) if timed else {}
    return conditions(args.device if timed else 'cpu') | options


def measure(args: argparse.Namespace, names: Sequence[str], rows: list[Row]) -> None:
    """Append the rows as they come, so that an interrupt finds what is done."""
    with contextlib.ExitStack() as stack:
        if args.compile:  # else, after so many models, it goes on uncompiled with a mere warning
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=10**6, accumulated_recompile_limit=10**6))
        say = stack.enter_context(Console(stderr=True).status('')).update
        if args.config:
            say(f'counting {args.config}')
            rows.append(count_config(args.config, args.shape))
        for size in sizes_of(args) if names else []:
            counts: list[Row] = []
            start = len(rows)
            for name in names:
                say(f'counting {name}')
                counts.append(count(name, size, args.depth))
                rows.append(counts[-1])
            if args.no_throughput:
                continue
            for group in time_groups(args, size, counts, say):
                if rows[start] is counts[0]:  # the timed rows take the place of the counts alone
                    del rows[start:]
                rows += group


def time_groups(args: argparse.Namespace, size: int | None, counts: Sequence[Row], say: Say) -> Iterator[list[Row]]:
    """A row for each model, at one size, in every dtype and with every batch size.

    A group is given before it is timed and filled afterwards, so that an interrupt finds what is done.
    """
    for dtype in dict.fromkeys(args.dtype):
        models = [dataclasses.replace(row, dtype=dtype, device=args.device) for row in counts]
        subjects = {}
        for row in models:
            say(f'building {row.name}')
            if row.params is not None:  # else it could not be built
                with row.failing():
                    subjects[row.name] = Subject(row.name, size, dtype, args)
        for batch_size in dict.fromkeys(args.batch_sizes):
            say(f'timing {len(models)} models, size {size or "their own"}, batch {batch_size}, {dtype}')
            group = [dataclasses.replace(row, batch_size=batch_size, asked_batch_size=batch_size) for row in models]
            yield group
            time_group(group, subjects, batch_size, args)
            taken = conditions_of(args)  # the clock is that of now
            for row in group:
                row.conditions = taken


class Subject:
    """A model on its device, and the steps of it that are timed."""

    def __init__(self, name: str, size: int | None, dtype: str, args: argparse.Namespace) -> None:
        model = create_for_size(name, size)
        self.shape = image_of(name, size).shape[1:]
        self.device, self.dtype = torch.device(args.device), getattr(torch, dtype)
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.models = {}
        if args.train:  # a model of its own, as the other may get another dtype
            self.models['training'] = copy.deepcopy(model).train()
        self.models['inference'] = model.to(self.dtype)
        self.kinds = ['inference', *(['training'] if args.train else [])]
        for part in self.models.values():
            part.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.calls = {
            kind: torch.compile(part, dynamic=False) if args.compile else part for kind, part in self.models.items()
        }

    def step(self, kind: str, batch_size: int) -> tuple[Callable[[], None], int]:
        """One step of inference or training, and the bytes that it holds before: model and images."""
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


PREFIX = dict(inference='', training='train_')


@dataclasses.dataclass
class Turn:
    """A step of a row's model that is timed, and how its figures come into the row."""

    row: Row
    kind: str  # inference, training, or latency, which is inference with one image
    batch_size: int
    timing: Timing

    def fill(self, rounds: int) -> None:
        row, seconds = self.row, self.timing.seconds
        if self.timing.error:
            row.fail(self.timing.error)
        row.rounds = min(rounds if row.rounds is None else row.rounds, len(seconds))
        if self.kind == 'latency':
            row.latency_ms, row.latency_ms_spread = median_and_spread([1e3 * s for s in seconds])
        else:
            rate, spread = median_and_spread([self.batch_size / s for s in seconds])
            setattr(row, f'{PREFIX[self.kind]}images_per_s', rate)
            setattr(row, f'{PREFIX[self.kind]}images_per_s_spread', spread)


def time_group(group: Sequence[Row], subjects: dict[str, Subject], batch_size: int, args: argparse.Namespace) -> None:
    """Time the models of a group in turns and fill their rows, after an interrupt with what is done."""
    turns = [turn for row in group if row.name in subjects for turn in prepare(row, subjects[row.name], batch_size)]
    wait = synchronizer(args.device)
    try:
        timings = [turn.timing for turn in turns]
        time_interleaved(timings, args.rounds, args.warmup, min_seconds=0.2, synchronize=wait)
    finally:
        for turn in turns:
            turn.fill(args.rounds)


def prepare(row: Row, subject: Subject, asked: int) -> list[Turn]:
    """Fit the batch into memory, weigh the steps, and return the turns of those that ran."""
    wait = synchronizer(subject.device)
    batch_size, ready, turns = asked, [], []
    for kind in subject.kinds:

        def trial(batch_size: int, kind: str = kind) -> None:
            subject.step(kind, batch_size)[0]()
            wait()

        with row.failing():
            batch_size = fit_batch(trial, batch_size)
            ready.append(kind)
    row.batch_size = batch_size
    if batch_size < asked:
        row.add_note(f'out of memory with batch {asked}, halved to {batch_size} for all of its steps')
    for kind in ready:
        with row.failing():
            step, held = subject.step(kind, batch_size)
            growth = peak_growth(step, subject.device)
            if growth is not None:
                setattr(row, f'{PREFIX[kind]}peak_memory_mb', (held + growth) / 1e6)
            elif kind == 'inference':
                row.add_note(NO_PEAK)
            turns.append(Turn(row, kind, batch_size, Timing(step)))
    if 'inference' in ready:
        with row.failing():
            one = subject.step('inference', 1)[0]
            turns.append(Turn(row, 'latency', 1, Timing(lambda: (one(), wait()))))
    return turns
