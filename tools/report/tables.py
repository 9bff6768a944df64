# SPDX-License-Identifier: Apache-2.0
"""The rows as tables and as CSV."""

import csv
import io
from collections.abc import Iterator, Sequence

from .._bench import describe
from .._common import console
from .._tables import markdown_table, print_table
from .row import FIGURES, SHARED, Row


def tables(rows: Sequence[Row]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, header, cells) of the table of all rows, and of a table of each model's modules."""
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
    """Lines for what does not fit into a table: notes, why a model failed, the conditions."""
    lines = []
    for row in rows:
        of = ', '.join(f'{h} {getattr(row, k)}' for k, h in SHARED.items() if getattr(row, k) is not None)
        for text in (row.note, row.error and f'failed: {row.error}'):
            if text:
                lines.append(f'{row.name} ({of}): {text}')
    for conditions in {str(row.conditions): row.conditions for row in rows if row.conditions}.values():
        lines.append(describe(conditions))
    return list(dict.fromkeys(lines))


def show(rows: Sequence[Row], interrupted: bool) -> None:
    for title, header, cells in tables(rows):
        print_table(header, cells, title)
    for line in remarks(rows):
        console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if interrupted:
        console.print('Interrupted: this is what was done so far.')


def to_markdown(rows: Sequence[Row]) -> str:
    blocks: list[str] = []
    for title, header, cells in tables(rows):
        blocks += [title, markdown_table(header, cells, align_right=True).rstrip()]
    blocks += [f'- {line}' for line in remarks(rows)]
    return '\n\n'.join(filter(None, blocks)) + '\n'


def to_csv(rows: Sequence[Row]) -> str:
    records = [row.record() for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for record in records for key in record)))
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
