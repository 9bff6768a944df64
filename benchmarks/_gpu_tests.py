# SPDX-License-Identifier: Apache-2.0
"""Run pytest, and keep in a file what every test came to, as soon as it is known.

    python benchmarks/_gpu_tests.py FILE OPTION...

So that a run which is ended before its time still says what it found, and no test passes that was only begun.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vssm.tools._common import write_json


class Recorder:
    """A plugin that writes how many tests were chosen, passed, failed and were skipped, which failed, and why others
    were skipped. With pytest-xdist it hears of the workers' tests from the process that began them.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.chosen = 0
        self.outcomes: dict[str, str] = {}
        self.reasons: Counter[str] = Counter()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.chosen = max(self.chosen, len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        self.chosen = max(self.chosen, len(ids))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or report.when == 'call' or report.skipped:
            self.outcomes[report.nodeid] = report.outcome
            if report.skipped:
                self.reasons[report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)] += 1
            self.write()

    def write(self) -> None:
        counts = Counter(self.outcomes.values())
        found = {outcome: counts[outcome] for outcome in ('passed', 'failed', 'skipped')}
        failures = [name for name, outcome in self.outcomes.items() if outcome == 'failed']
        write_json(self.file, dict(chosen=self.chosen, **found, failures=failures, reasons=dict(self.reasons)))


if __name__ == '__main__':
    sys.exit(pytest.main(sys.argv[2:], plugins=[Recorder(Path(sys.argv[1]))]))
