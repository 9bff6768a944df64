# SPDX-License-Identifier: Apache-2.0
"""Tables, in the terminal and in Markdown."""

import re
import sys
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table

from ._common import console

Rows = Sequence[Sequence[str]]


def print_table(
    header: Sequence[str],
    rows: Rows,
    title: str | None = None,
    to: Console = console,
    fold: bool = False,
    rules: Collection[int] = (),
) -> None:
    """Print a table whose columns of figures are aligned at the right.

    Args:
        header: Headings of the columns.
        rows: Cells of each row.
        title: Line above the table.
        to: Console to print to.
        fold: Whether a narrow console breaks all cells, so that nothing is lost; else it breaks the words behind the
            first column alone.
        rules: Indices of the rows above which a rule is drawn.
    """
    table = Table(title=title, title_justify='left')
    for i, heading in enumerate(header):
        figures = all(re.fullmatch(r'-|nan|-?\d+(\.\d+)?(x| ?%| s| GB| ±.+)?', row[i]) for row in rows)
        whole = not fold and (figures or i == 0)
        table.add_column(heading, justify='right' if figures else 'left', overflow='fold', no_wrap=whole)
    for i, row in enumerate(rows):
        if i in rules:
            table.add_section()
        table.add_row(*row)
    to.print(table)


def wide_console() -> Console:
    """A console for tables of many columns, which have their room in a file or a pipe, where rich takes 80 columns."""
    return Console(width=None if sys.stdout.isatty() else 240, highlight=False, markup=False, emoji=False)


def markdown_table(header: Sequence[str], rows: Rows, align_right: bool = False) -> str:
    """A table in Markdown, a row a line.

    Args:
        header: Headings of the columns.
        rows: Cells of each row.
        align_right: Whether all columns but the first are aligned at the right.
    """
    ruler = ['---', *['---:' if align_right else '---'] * (len(header) - 1)]
    return ''.join(f'| {" | ".join(line)} |\n' for line in (header, ruler, *rows))
