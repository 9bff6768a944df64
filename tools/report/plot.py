# SPDX-License-Identifier: Apache-2.0
"""The rows as a picture."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .row import SHARED, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart, without yellow, which is faint on white.
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00', '#000000')
MARKERS = 'osD^vPX*<>hp'


def draw(rows: Sequence[Row]) -> 'Figure':
    """Draw accuracy against throughput, or with several sizes throughput and memory against them, 800 pixels wide."""
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
        style |= dict(markerfacecolor='none', markeredgewidth=2)  # a hollow marker lets another be seen through it
        yield label, rows, style


def _draw_accuracy(figure: 'Figure', series: dict[str, list[Row]]) -> None:
    axes: Any = figure.subplots()
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
        axes.set_xticks(sorted({row.size for rows in series.values() for row in rows if isinstance(row.size, int)}))
        axes.set_ylim(bottom=0)
