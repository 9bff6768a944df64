# SPDX-License-Identifier: Apache-2.0
"""Metrics of slides and cases, with bootstrap intervals, and the predictions behind them as tables."""

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import collect_results
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, METRICS
from mmengine.runner import Runner
from torch import Tensor

from ..mil.survival import cox_loss
from .utils import replacing

__all__ = ['BOUNDS', 'ConcordanceIndex', 'PredictionsHook', 'SlideAccuracy', 'bootstrap', 'confusion_matrix']

BOUNDS = ('_2.5%', '_97.5%')  # what the names of an interval's ends have behind that of the metric

Columns = dict[str, Tensor]  # one number, or one row, for each slide or case


class _SlideMetric(BaseMetric):
    """Metrics of the results of all slides or cases.

    Args:
        bootstrap: Number of resamplings of the cases, which give each metric a 95 % interval, 'NAME_2.5%' and
            'NAME_97.5%'; 0 for none.
        seed: Seed of the resamplings.
        kwargs: Keyword arguments of mmengine's BaseMetric.
    """

    default_prefix = 'wsi'

    def __init__(self, bootstrap: int = 0, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bootstrap = bootstrap
        self.seed = seed

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        self.results.extend(data_samples)  # of plain values, to be sent between processes

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        columns = self.columns(results)
        metrics = self.measure(columns)
        if self.bootstrap:
            cases = [result.get('case', result['name']) for result in results]
            for name, ends in bootstrap(self.measure, columns, cases, self.bootstrap, self.seed).items():
                metrics |= {name + bound: end for bound, end in zip(BOUNDS, ends, strict=True)}
        return metrics

    def columns(self, results: Sequence[dict[str, Any]]) -> Columns:
        """The numbers that the metrics are made of."""
        raise NotImplementedError

    def measure(self, columns: Columns) -> dict[str, float]:
        """The metrics by their names."""
        raise NotImplementedError


@METRICS.register_module()
class SlideAccuracy(_SlideMetric):
    """Metrics of a classification, 'wsi/NAME', from what SlideClassifier predicts.

    accuracy; macro_f1, the mean over the classes; auc, the mean over the classes that occur, one against the rest;
    balanced_accuracy, the mean over the classes that occur of the share of their slides that is found; quadratic_kappa,
    Cohen's kappa with quadratic weights, for classes in the order of a grade; loss, as in the training; and auc/CLASS,
    where there are more than two classes. One that is not defined, as AUC where all slides are of one class, is NaN.
    """

    def columns(self, results: Sequence[dict[str, Any]]) -> Columns:
        return {name: torch.tensor([result[name] for result in results]) for name in ('scores', 'label', 'loss')}

    def measure(self, columns: Columns) -> dict[str, float]:
        from torchmetrics.functional import classification as tm

        scores, labels = columns['scores'], columns['label']  # [slides, classes], [slides]
        count = scores.shape[1]
        present = labels.unique().tolist()
        aucs = [math.nan] * count
        for k in present if len(present) > 1 else ():
            aucs[k] = tm.binary_auroc(scores[:, k], (labels == k).int(), validate_args=False).item()
        found = tm.multiclass_recall(scores, labels, count, average=None, validate_args=False)[present]
        f1 = tm.multiclass_f1_score(scores, labels, count, average='macro', validate_args=False)
        kappa = tm.multiclass_cohen_kappa(scores, labels, count, weights='quadratic', validate_args=False)
        metrics = dict(
            accuracy=tm.multiclass_accuracy(scores, labels, count, average='micro', validate_args=False).item(),
            macro_f1=f1.item(),
            auc=math.nan if len(present) < 2 else sum(aucs[k] for k in present) / len(present),
            balanced_accuracy=found.mean().item(),
            quadratic_kappa=kappa.item(),
            loss=columns['loss'].mean().item(),
        )
        if count > 2:
            names = (self.dataset_meta or {}).get('classes', range(count))
            metrics |= {f'auc/{name}': auc for name, auc in zip(names, aucs, strict=True)}
        return metrics


@METRICS.register_module()
class ConcordanceIndex(_SlideMetric):
    """Metrics of a survival, 'wsi/NAME', from what SlideSurvival predicts.

    c_index, Harrell's concordance index of risk and survival, from 0 to 1: of two cases at the same time, the one with
    an event is the first to have it if the other is censored. It is NaN without a pair to compare. loss, as in the
    training: Cox's is over all cases at once, NaN without an event; the discrete-time one needs the edges of the bins.
    """

    def columns(self, results: Sequence[dict[str, Any]]) -> Columns:
        columns = {name: torch.tensor([r[name] for r in results]).double() for name in ('risk', 'months', 'censored')}
        for name in ('loss', 'survival'):
            if name in results[0]:
                columns[name] = torch.tensor([result[name] for result in results])
        return columns

    def measure(self, columns: Columns) -> dict[str, float]:
        from torchsurv.metrics.cindex import ConcordanceIndex as Concordance

        risks, months, censored = columns['risk'], columns['months'], columns['censored'].bool()
        events = ~censored
        last = months == months.max()  # where an event is compared with a censoring, which comes after it
        compared = (events & ~last).any() or len(events[last].unique()) == 2
        metrics = dict(c_index=Concordance()(risks, events, months).item() if compared else math.nan)
        if 'loss' in columns:
            metrics['loss'] = columns['loss'].mean().item()
        elif 'survival' not in columns:
            metrics['loss'] = cox_loss(risks[:, None], months, censored).item() if events.any() else math.nan
        return metrics


def bootstrap(
    measure: Callable[[Columns], dict[str, float]], columns: Columns, cases: Sequence[str], times: int, seed: int
) -> dict[str, tuple[float, float]]:
    """The percentiles 2.5 and 97.5 of metrics, by cases drawn with replacement.

    Args:
        measure: Function that gives the metrics of such columns.
        columns: Numbers of all slides or cases.
        cases: Case of each of their rows; all rows of a case are drawn together.
        times: Number of resamplings. Those in which a metric is not defined, that is NaN, do not count for it.
        seed: Seed of the resamplings.
    """
    rows = defaultdict(list)
    for row, case in enumerate(cases):
        rows[case].append(row)
    members = [torch.tensor(own) for own in rows.values()]
    generator = torch.Generator().manual_seed(seed)
    found = defaultdict(list)
    for _ in range(times):
        drawn = torch.randint(len(members), (len(members),), generator=generator).tolist()
        chosen = torch.cat([members[i] for i in drawn])
        for name, value in measure({key: values[chosen] for key, values in columns.items()}).items():
            found[name].append(value)
    levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
    ends = {name: torch.tensor(values, dtype=torch.float64).nanquantile(levels) for name, values in found.items()}
    return {name: (low.item(), high.item()) for name, (low, high) in ends.items()}


def confusion_matrix(results: Sequence[dict[str, Any]], count: int) -> Tensor:
    """The number of slides of each class, in rows, that are taken for each, in columns, (count, count)."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    scores, labels = (torch.tensor([result[name] for result in results]) for name in ('scores', 'label'))
    return multiclass_confusion_matrix(scores, labels, count)


@HOOKS.register_module()
class PredictionsHook(Hook):
    """Writes the predictions of a test to WORK_DIR/predictions.csv, a row for each slide or case.

    Of a classification the columns are `slide_id,label`, a probability for each class, `p_CLASS`, and `case_id,loss`;
    and confusion.csv has the number of slides of each class that are taken for each. Of a survival they are
    `case_id,risk,censorship,survival_months`; with time bins also the probability to survive each, `s_MONTHS` with the
    end of the bin and `s_end` for the last one, which has none; and the loss, where it is one of single cases.
    """

    confusion: tuple[Sequence[str], Tensor] | None = None  # the classes and the matrix, in the first process

    def before_test_epoch(self, runner: Runner) -> None:
        self.rows: list[dict[str, Any]] = []

    def after_test_iter(self, runner: Runner, outputs: Sequence[dict[str, Any]], **kwargs: Any) -> None:
        self.rows.extend(outputs)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        dataset = runner.test_dataloader.dataset
        rows = collect_results(self.rows, len(dataset))
        if rows is None:  # not the first process
            return
        if dataset.task == 'survival':
            _write(Path(runner.work_dir, 'predictions.csv'), *_survival_table(rows, dataset.edges.tolist()))
            return
        classes = dataset.classes
        header = ['slide_id', 'label', *(f'p_{name}' for name in classes), 'case_id', 'loss']
        cells = [[r['name'], classes[r['label']], *r['scores'], r['case'], r['loss']] for r in rows]
        _write(Path(runner.work_dir, 'predictions.csv'), header, cells)
        matrix = confusion_matrix(rows, len(classes))
        table = [[name, *counts] for name, counts in zip(classes, matrix.tolist(), strict=True)]
        _write(Path(runner.work_dir, 'confusion.csv'), ['label', *classes], table)
        self.confusion = classes, matrix


def _survival_table(rows: Sequence[dict[str, Any]], edges: Sequence[float]) -> tuple[list[str], list[list[Any]]]:
    header = ['case_id', 'risk', 'censorship', 'survival_months']
    cells = [[row['name'], row['risk'], int(row['censored']), row['months']] for row in rows]
    if 'survival' in rows[0]:
        bins = len(rows[0]['survival'])
        ends = [*map(repr, edges), 'end'] if len(edges) == bins - 1 else range(1, bins + 1)
        header += [f's_{end}' for end in ends]
        cells = [[*line, *row['survival']] for line, row in zip(cells, rows, strict=True)]
    if 'loss' in rows[0]:
        header += ['loss']
        cells = [[*line, row['loss']] for line, row in zip(cells, rows, strict=True)]
    return header, cells


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with replacing(path) as temporary, open(temporary, 'w', newline='') as file:
        csv.writer(file).writerows([header, *rows])
