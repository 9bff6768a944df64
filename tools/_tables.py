# SPDX-License-Identifier: Apache-2.0
"""Tables, in the terminal and in Markdown."""

import re
from collections.abc import Collection, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ._common import console

Rows = Sequence[Sequence[str]]

_FIGURE = re.compile(r'-|nan|-?\d+(\.\d+)?(x| ?%| s| GB| ±.+)?')
_WORDS = 20  # least width of a column of several words, in characters


def print_table(
    header: Sequence[str],
    rows: Rows,
    title: str | None = None,
    to: Console = console,
    rules: Collection[int] = (),
) -> None:
    """Print a table, of which no figure and no name is ever cut or broken.

    A terminal gets a frame, whose columns of figures are aligned at the right and whose words may be broken into lines;
    where that is too wide, a few lines for each row. Anything else, as a pipe, gets a plain line for each row, with two
    blanks or more between its cells.

    Args:
        header: Headings of the columns.
        rows: Cells of each row.
        title: Line above the table.
        to: Console to print to.
        rules: Indices of the rows above which a frame has a rule.
    """
    columns = [[header[i], *(row[i] for row in rows)] for i in range(len(header))]
    figures = [all(_FIGURE.fullmatch(cell) for cell in column[1:]) for column in columns]
    whole = [i == 0 or figures[i] for i in range(len(header))]
    if title:
        _print_plain(title, to)
    if not to.is_terminal:
        _print_lines(columns, figures, to)
    elif sum(map(_least_width, columns, whole)) + 3 * len(header) + 1 > to.width:
        _print_blocks(header, rows, to)
    else:
        table = Table()
        for heading, right, unbroken in zip(header, figures, whole, strict=True):
            table.add_column(heading, justify='right' if right else 'left', overflow='fold', no_wrap=unbroken)
        for i, row in enumerate(rows):
            if i in rules:
                table.add_section()
            table.add_row(*map(Text, row))  # text, which may look like markup
        to.print(table)


def _least_width(column: Sequence[str], whole: bool) -> int:
    """How narrow a column may be, in characters, if no word of it is to be broken."""
    natural = max(map(cell_len, column))
    longest = max(cell_len(word) for cell in column for word in cell.split() or [''])
    return natural if whole else max(longest, min(natural, _WORDS))


def _print_lines(columns: Rows, figures: Sequence[bool], to: Console) -> None:
    widths = [max(map(cell_len, column)) for column in columns]
    for cells in zip(*columns, strict=True):
        padded = []
        for cell, width, right in zip(cells, widths, figures, strict=True):
            blanks = ' ' * (width - cell_len(cell))
            padded.append(blanks + cell if right else cell + blanks)
        _print_plain('  '.join(padded).rstrip(), to)


def _print_blocks(header: Sequence[str], rows: Rows, to: Console) -> None:
    """Print each row as its first cell and, indented below it, the others with their headings."""
    for first, *others in rows:
        _print_plain(first, to)
        if len(others) == 1:
            parts, between = others[0].split(), ' '
        else:
            parts, between = [f'{heading} {cell}' for heading, cell in zip(header[1:], others, strict=True)], ', '
        line = ''
        for part in parts:
            if line and cell_len(f'  {line}{between}{part}') >= to.width:
                _print_plain(f'  {line}{between}'.rstrip(), to)
                line = ''
            line += f'{between}{part}' if line else part
        _print_plain(f'  {line}', to)


def _print_plain(text: str, to: Console) -> None:
    to.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def markdown_table(header: Sequence[str], rows: Rows, align_right: bool = False) -> str:
    """A table in Markdown, a row a line.

    Args:
        header: Headings of the columns.
        rows: Cells of each row.
        align_right: Whether all columns but the first are aligned at the right.
    """
    ruler = ['---', *['---:' if align_right else '---'] * (len(header) - 1)]
    return ''.join(f'| {" | ".join(line)} |\n' for line in (header, ruler, *rows))
