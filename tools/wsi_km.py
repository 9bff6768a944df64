# SPDX-License-Identifier: Apache-2.0
"""Draw Kaplan-Meier curves of high and low risk, with the p value of the log-rank test.

Takes the predictions.csv that tests of survival write; of several, such as those of all folds, the cases are pooled. In
each file the cases above the median risk are those of high risk, so that models of different scales go together.
"""

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..models.files import state_of
from ._common import UsageError, console
from ._pictures import check_output, pyplot, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLE = 'vssm wsi-km work_dirs/wsi/survival/fold*/predictions.csv --output km.png'

COLUMNS = ('case_id', 'risk', 'censorship', 'survival_months')


class Case(NamedTuple):
    months: float
    event: bool
    high: bool  # whether the risk is high


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('predictions', metavar='CSV', type=Path, nargs='+', help=f'table with {", ".join(COLUMNS)}')
    parser.add_argument(
        '--output', metavar='FILE', type=Path, default=Path('km.png'), help='picture to write (default: km.png)'
    )


def run(args: argparse.Namespace) -> int:
    check_output(args.output)
    cases = [case for path in args.predictions for case in read_predictions(path)]
    p = log_rank_p(cases)
    save_figure(draw(cases, p), args.output)
    high = sum(case.high for case in cases)
    console.print(
        f'{len(cases) - high} cases of low and {high} of high risk, log-rank p = {p:.3g}. Picture: {args.output}',
        highlight=False,
        soft_wrap=True,
    )
    return 0


def read_predictions(path: Path) -> list[Case]:
    """The cases of a file, those above its median risk being of high risk.

    Raises:
        UsageError: The file is not a table of predictions, or its risks are all the same.
    """
    if not path.is_file():
        raise UsageError(f'CSV must be a file, got {path}, which {state_of(path)}.')
    with open(path, newline='') as file:
        reader = csv.DictReader(file)
        if not set(COLUMNS) <= set(reader.fieldnames or ()):
            raise UsageError(
                f'{path} must have the columns {", ".join(COLUMNS)}, got {", ".join(reader.fieldnames or ())}.'
            )
        rows = []
        for row in reader:
            try:
                risk, censorship, months = (float(row[key]) for key in COLUMNS[1:])
            except (TypeError, ValueError):
                risk = math.nan
            if not (math.isfinite(risk) and math.isfinite(months) and months >= 0 and censorship in (0, 1)):
                raise UsageError(
                    f'{path} row {reader.line_num}, case {row["case_id"]!r}: must hold numbers, got {row}.'
                )
            rows.append((months, censorship == 0, risk))
    median = statistics.median(risk for _, _, risk in rows) if rows else math.nan
    cases = [Case(months, event, risk > median) for months, event, risk in rows]
    if len({case.high for case in cases}) < 2:
        raise UsageError(f'{path} must hold cases of different risks, got {len(cases)} of one.')
    return cases


def log_rank_p(cases: Sequence[Case]) -> float:
    """The probability that curves differ as much as those of high and low risk by chance alone."""
    from lifelines.statistics import logrank_test

    high, low = ([case for case in cases if case.high == group] for group in (True, False))
    return float(
        logrank_test(
            [case.months for case in high],
            [case.months for case in low],
            [case.event for case in high],
            [case.event for case in low],
        ).p_value
    )


def draw(cases: Sequence[Case], p: float) -> 'Figure':
    """Draw both curves with their 95 % bands, and below them how many cases are at risk."""
    from lifelines import KaplanMeierFitter
    from lifelines.plotting import add_at_risk_counts

    plt = pyplot()
    fig, ax = plt.subplots(figsize=(6.5, 5.5), layout='constrained')
    fitters = []
    for high, name, colour in ((False, 'low risk', 'tab:blue'), (True, 'high risk', 'tab:red')):
        group = [case for case in cases if case.high == high]
        fitter = KaplanMeierFitter(label=f'{name} ({len(group)})')
        fitter.fit([case.months for case in group], [case.event for case in group])
        fitter.plot_survival_function(ax=ax, color=colour, show_censors=True, censor_styles=dict(ms=5, marker='|'))
        fitters.append(fitter)
    ax.set(
        xlabel='time (months)',
        ylabel='share that survives',
        xlim=(0, None),
        ylim=(0, 1.02),
        title=f'log-rank p = {p:.2g}',
    )
    ax.legend(loc='best')
    add_at_risk_counts(*fitters, ax=ax, rows_to_show=['At risk'])
    return fig


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['wsi-km', *sys.argv[1:]]))
