# SPDX-License-Identifier: Apache-2.0
"""Whole slides: the data set, classification and survival with their losses, metrics, and predictions as a table.

Needs the extra wsi, and so is imported by the configs of slides alone, beside `vssm.models.mm`.
"""

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.dist import collect_results
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, FUNCTIONS, HOOKS, METRICS, MODELS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..mil import checkpoint_filter_fn, create_mil_model
from ..mil.slides import SPLITS, Slide, find_slide, read_slide, read_table, split_cases
from ..mil.survival import cox_loss, risk_score, survival_nll, time_bin, time_edges
from .classification import NamedModel
from .utils import RunError, check_init, replacing

__all__ = [
    'ConcordanceIndex',
    'PredictionsHook',
    'SlideAccuracy',
    'SlideClassifier',
    'SlideDataset',
    'SlideSurvival',
    'list_bags',
]


# ---- data ------------------------------------------------------------------------------------------------------------


@DATASETS.register_module()
class SlideDataset(Dataset):
    """Bags of patches: the slides of a split, or for survival its cases with all their slides.

    Gives dict(inputs, data_samples). The former is dict(features, coords, lengths), (n, width), (n, 2) and how many
    patches each slide has, as the networks of `vssm.models.mil` take them; the latter dict(name, label) or dict(name,
    months, censored), and for a training bin. Features are read when they are asked for.

    Args:
        data_root: The folder with the slides' files, see `find_slide`.
        ann_file: The table, see `read_table`; a relative path begins in data_root.
        split: 'train', 'val' or 'test'.
        task: 'classification' or 'survival'.
        classes: The labels in order, all of the training data, sorted, unless given.
        bins: Of time, for the discrete-time likelihood; their edges come from the events of the training data. None
            for Cox's loss.
        folds: Split the cases into so many folds, see `split_cases`, instead of by the table's column.
        fold: Which of them is for the test; the next one is for validation.
        fold_seed: Of the division.
        cache: Keep in memory what was read; each worker of a loader keeps its own.

    Raises:
        RunError: Table or files are not as needed; with the row and the slide.
    """

    def __init__(
        self,
        data_root: str,
        ann_file: str,
        split: str,
        task: str = 'classification',
        classes: Sequence[str] | None = None,
        bins: int | None = 4,
        folds: int | None = None,
        fold: int = 0,
        fold_seed: int = 0,
        cache: bool = False,
    ) -> None:
        self.table = Path(data_root, ann_file)
        classes = [str(name) for name in classes] if classes is not None else None  # numbers, perhaps
        try:
            slides, problems = read_table(self.table, task, classes)
            splits = split_cases(slides, folds, fold, fold_seed) if folds and not problems else {}
        except (FileNotFoundError, ValueError) as error:
            raise RunError(str(error)) from error
        if problems:
            raise RunError(
                f'{problems[0]} `vssm wsi-check {self.table} {data_root}` lists all {len(problems)} problems.'
            )
        by_split: dict[str | None, list[Slide]] = defaultdict(list)
        for slide in slides:
            by_split[splits.get(slide.case_id, slide.split)].append(slide)
        if split not in SPLITS or not by_split[split]:
            raise RunError(
                f'{self.table.name}: split must be train, val or test and have slides, by a column of that name or by '
                f'folds, got {split!r} with none.'
            )
        self.task = task
        self.cache: dict[int, tuple] | None = {} if cache else None
        self.metainfo: dict[str, Any] = {}
        if task == 'classification':
            self.bags = [[slide] for slide in by_split[split]]
            self.classes = tuple(classes or sorted({slide.label for slide in by_split['train']}))
            self.metainfo['classes'] = self.classes
            for slide in by_split[split]:
                if slide.label not in self.classes:
                    raise self._error(slide, f'label must be one of the training data, got {slide.label!r}.')
        else:
            self.bags = _by_case(by_split[split])
            self.edges = torch.empty(0)  # of the time bins, which a training alone needs
            if bins is not None and split == 'train':
                self.edges = self._time_edges(bins)
                edges = [0.0, *self.edges.tolist()]
                self.metainfo['classes'] = tuple(f'from {edge:g} months' for edge in edges)
        self.files = [[self._find(data_root, slide) for slide in bag] for bag in self.bags]

    def _time_edges(self, bins: int) -> Tensor:
        months, censored = (torch.tensor([getattr(bag[0], key) for bag in self.bags]) for key in ('months', 'censored'))
        try:
            return time_edges(months, censored, bins)
        except ValueError as error:
            raise RunError(f'{self.table.name}: {error}') from error

    def _find(self, data_root: str, slide: Slide) -> Path:
        try:
            return find_slide(data_root, slide.slide_id)
        except FileNotFoundError as error:
            raise self._error(slide, error) from error

    def _error(self, slide: Slide, problem: Any) -> RunError:
        return RunError(f'{self.table.name} row {slide.row}, slide {slide.slide_id!r}: {problem}')

    def __len__(self) -> int:
        return len(self.bags)

    def __getitem__(self, index: int) -> dict[str, Any]:
        bag = self.bags[index]
        parts = self.cache.get(index) if self.cache is not None else None
        if parts is None:
            parts = [self._read(slide, path) for slide, path in zip(bag, self.files[index], strict=True)]
            if self.cache is not None:
                self.cache[index] = parts
        features, coords = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        inputs = dict(features=features, coords=coords, lengths=[len(part[0]) for part in parts])
        first = bag[0]
        if self.task == 'classification':
            return dict(inputs=inputs, data_samples=dict(name=first.slide_id, label=self.classes.index(first.label)))
        data_samples = dict(name=first.case_id, months=first.months, censored=first.censored)
        if len(self.edges):
            data_samples['bin'] = time_bin(torch.tensor([first.months]), self.edges).item()
        return dict(inputs=inputs, data_samples=data_samples)

    def _read(self, slide: Slide, path: Path) -> tuple[Tensor, Tensor]:
        try:
            return read_slide(path)
        except (FileNotFoundError, ValueError) as error:
            raise self._error(slide, error) from error


def _by_case(slides: Sequence[Slide]) -> list[list[Slide]]:
    cases: dict[str, list[Slide]] = defaultdict(list)
    for slide in slides:
        cases[slide.case_id].append(slide)
    return list(cases.values())


@FUNCTIONS.register_module()
def list_bags(samples: Sequence[dict[str, Any]]) -> dict[str, list]:
    """A batch of what SlideDataset gives: bags of different sizes stay apart."""
    return {key: [sample[key] for sample in samples] for key in ('inputs', 'data_samples')}


# ---- models ----------------------------------------------------------------------------------------------------------


class SlideModel(NamedModel):
    """A network of `vssm.models.mil` on a batch of bags, one bag after the other.

    Args:
        model_name: Name for `create_mil_model`.
        data_preprocessor: What moves a batch to the device, mmengine's BaseDataPreprocessor unless given.
        init_cfg: dict(type='Pretrained', checkpoint=FILE) starts from what `read_checkpoint` reads.
        model_args: Further keyword arguments of `create_mil_model`, such as in_dim and num_classes.
    """

    def __init__(
        self,
        model_name: str,
        data_preprocessor: dict[str, Any] | nn.Module | None = None,
        init_cfg: dict[str, Any] | None = None,
        **model_args: Any,
    ) -> None:
        check_init(type(self).__name__, False, init_cfg)
        model = create_mil_model(model_name, **model_args)
        super().__init__(model_name, model, model_args, data_preprocessor, init_cfg)

    def rename(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return checkpoint_filter_fn(state_dict, self.model)

    def forward(
        self,
        inputs: Sequence[dict[str, Any]],
        data_samples: Sequence[dict[str, Any]] | None = None,
        mode: str = 'tensor',
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Any]]:
        """Logits, the loss, or one prediction per bag.

        Args:
            inputs: Of each bag what SlideDataset gives.
            data_samples: Likewise.
            mode: 'tensor', 'loss' or 'predict'.

        Returns:
            Logits, (batch, num_classes); or the parts of the loss; or for each bag a dictionary.

        Raises:
            RunError: A bag is not as the network needs it; with its name.
        """
        logits = []
        for i, bag in enumerate(inputs):
            try:
                logits.append(self.model(**bag))
            except ValueError as error:
                raise RunError(f'{data_samples[i]["name"] if data_samples else f"bag {i}"}: {error}') from error
        logits = torch.cat(logits)  # [batch, num_classes]
        if mode == 'tensor':
            return logits
        if mode == 'loss':
            return self.loss(logits, data_samples)
        if mode == 'predict':
            return self.predict(logits.float(), data_samples)
        raise ValueError(f"{type(self).__name__}: mode must be 'tensor', 'loss' or 'predict', got {mode!r}.")

    def loss(self, logits: Tensor, data_samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        raise NotImplementedError

    def predict(self, logits: Tensor, data_samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        raise NotImplementedError


def _column(data_samples: Sequence[dict[str, Any]], key: str, like: Tensor) -> Tensor:
    return torch.tensor([sample[key] for sample in data_samples], device=like.device)


@MODELS.register_module()
class SlideClassifier(SlideModel):
    """With a cross-entropy loss. Predicts dict(name, label, scores) for each slide, scores being probabilities."""

    def loss(self, logits: Tensor, data_samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return dict(loss_cls=F.cross_entropy(logits, _column(data_samples, 'label', logits)))

    def predict(self, logits: Tensor, data_samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            dict(name=sample['name'], label=sample['label'], scores=scores)
            for sample, scores in zip(data_samples, logits.softmax(1).tolist(), strict=True)
        ]


@MODELS.register_module()
class SlideSurvival(SlideModel):
    """With a survival loss. Predicts dict(name, months, censored, risk) for each case.

    Args:
        args: As SlideModel's.
        loss: 'nll', the discrete-time likelihood, with a class for each time bin; or 'cox', with one output, over the
            cases of a batch, of which there must be two or more.
        alpha: See `survival_nll`.
        kwargs: As SlideModel's.
    """

    def __init__(self, *args: Any, loss: str = 'nll', alpha: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        outputs = self.model.num_classes
        if loss not in ('nll', 'cox') or (loss == 'cox') != (outputs == 1):
            raise ValueError(
                f"SlideSurvival: loss must be 'nll', with num_classes time bins, or 'cox', with num_classes=1; got "
                f'{loss!r} and {outputs}.'
            )
        if not 0 <= alpha <= 1:
            raise ValueError(f'SlideSurvival: alpha must be within 0 and 1, got {alpha!r}.')
        self.loss_name = loss
        self.alpha = alpha

    def loss(self, logits: Tensor, data_samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        logits, censored = logits.float(), _column(data_samples, 'censored', logits)
        if self.loss_name == 'nll':
            return dict(loss_nll=survival_nll(logits, _column(data_samples, 'bin', logits), censored, self.alpha))
        if len(logits) < 2:
            raise RunError(
                f'the Cox loss compares the cases of a batch, of which there must be two or more, got {len(logits)}: '
                'set train_dataloader.batch_size and drop_last=True.'
            )
        return dict(loss_cox=cox_loss(logits, _column(data_samples, 'months', logits), censored))

    def predict(self, logits: Tensor, data_samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            dict(name=sample['name'], months=sample['months'], censored=sample['censored'], risk=risk)
            for sample, risk in zip(data_samples, risk_score(logits).tolist(), strict=True)
        ]


# ---- evaluation ------------------------------------------------------------------------------------------------------


class _SlideMetric(BaseMetric):
    default_prefix = 'wsi'

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        self.results.extend(data_samples)  # of plain values, which may travel between processes


@METRICS.register_module()
class SlideAccuracy(_SlideMetric):
    """Accuracy, F1 as the mean over the classes, and AUC as the mean over those that occur, one against the rest.

    All from 0 to 1, as 'wsi/accuracy', 'wsi/macro_f1', 'wsi/auc'; the last is NaN where all slides are of one class.
    """

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        from torchmetrics.functional.classification import (
            binary_auroc,
            multiclass_accuracy,
            multiclass_f1_score,
        )

        scores = torch.tensor([result['scores'] for result in results])  # [slides, classes]
        labels = torch.tensor([result['label'] for result in results])
        classes = scores.shape[1]
        present = labels.unique().tolist()
        aucs = [binary_auroc(scores[:, k], (labels == k).int()) for k in present] if len(present) > 1 else []
        return dict(
            accuracy=multiclass_accuracy(scores, labels, classes, average='micro').item(),
            macro_f1=multiclass_f1_score(scores, labels, classes, average='macro').item(),
            auc=torch.stack(aucs).mean().item() if aucs else float('nan'),
        )


@METRICS.register_module()
class ConcordanceIndex(_SlideMetric):
    """Harrell's concordance index of risk and survival, 0 to 1, as 'wsi/c_index'; NaN without a pair to compare."""

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        from torchsurv.metrics.cindex import ConcordanceIndex as Concordance

        risks, months = (torch.tensor([r[key] for r in results], dtype=torch.float64) for key in ('risk', 'months'))
        events = ~torch.tensor([result['censored'] for result in results])
        if not (events & (months < months.max())).any():  # no event before another's time
            return dict(c_index=float('nan'))
        return dict(c_index=Concordance()(risks, events, months).item())


@HOOKS.register_module()
class PredictionsHook(Hook):
    """Writes what a test predicts to WORK_DIR/predictions.csv, one row for each slide or case.

    The columns are `slide_id,label` and a probability for each class, or `case_id,risk,censorship,survival_months`.
    """

    def before_test_epoch(self, runner: Runner) -> None:
        self.rows: list[dict[str, Any]] = []

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence | None = None
    ) -> None:
        self.rows.extend(outputs)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        dataset = runner.test_dataloader.dataset
        rows = collect_results(self.rows, len(dataset))
        if rows is None:  # not the first process
            return
        with replacing(Path(runner.work_dir, 'predictions.csv')) as path, open(path, 'w', newline='') as file:
            writer = csv.writer(file)
            if dataset.task == 'classification':
                writer.writerow(['slide_id', 'label', *(f'p_{name}' for name in dataset.classes)])
                writer.writerows([row['name'], dataset.classes[row['label']], *row['scores']] for row in rows)
            else:
                writer.writerow(['case_id', 'risk', 'censorship', 'survival_months'])
                writer.writerows([row['name'], row['risk'], int(row['censored']), row['months']] for row in rows)
