# SPDX-License-Identifier: Apache-2.0
"""A row of the report, and its columns."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from .._bench import one_line


@dataclasses.dataclass
class Row:
    """One model at one size, batch size and dtype; None stands for what was not asked for or cannot be measured."""

    name: str
    size: int | str | None = None
    batch_size: int | None = None  # that ran; less than was asked for where memory did not suffice
    asked_batch_size: int | None = None
    dtype: str | None = None
    device: str | None = None
    published_top1: float | None = None  # on ImageNet-1K; only at 224x224
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
        """Keep what fails within as the row's error."""
        try:
            yield
        except Exception as error:
            self.fail(one_line(error))

    def nested(self) -> dict[str, Any]:
        """The record, with the list of modules."""
        return self.record() | dict(modules=self.modules)

    def record(self) -> dict[str, Any]:
        """The figures, and beside them the conditions; all values are numbers and texts."""
        record = dataclasses.asdict(self)
        return {**{k: v for k, v in record.items() if k not in ('modules', 'conditions')}, **self.conditions}


# Columns by their keys; where all rows agree, the title names their value instead.
SHARED = dict(size='size', batch_size='batch', dtype='dtype', device='device', rounds='rounds')
FIGURES = (  # heading, key, unit, digits after the point (None: as many as the figure's size asks for)
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
