# SPDX-License-Identifier: Apache-2.0
"""Slides as a data set: bags of patches, one for each slide or case; and samples of it in which classes are equal."""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import DefaultSampler
from mmengine.logging import print_log
from mmengine.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS
from torch import Tensor
from torch.utils.data import Dataset

from ..mil.slides import Bag, SlideFolder, count_patches, read_slide
from ..mil.survival import time_bin, time_edges
from ..mil.tables import SPLITS, Slide, apply_splits, class_name, read_table, recognised_cases, split_cases
from .utils import RunError

__all__ = ['BalancedSampler', 'SlideDataset', 'list_bags', 'table_digest', 'table_files']


@DATASETS.register_module()
class SlideDataset(Dataset):
    """Bags of patches: the slides of a split, or for survival its cases with all their slides.

    Gives dict(inputs, data_samples). The inputs are the arguments of the networks of `vssm.models.mil`, dict(features,
    coords, lengths, steps): (n, width), (n, 2) or None where a slide has no coordinates, and the number and the step
    of the patches of each slide. The data samples are dict(name, case, label), with `weight` where classes have
    weights, or dict(name, months, censored), with `bin` where the edges of the bins are known. Features are read when a
    sample is asked for. Slides without patches are left out.

    Args:
        data_root: The folder with the slides' files, see `SlideFolder`.
        ann_file: The table, see `read_table`; a relative path begins in data_root.
        split: 'train', 'val' or 'test'; or 'all' for every slide of the table, as of another hospital's.
        task: 'classification' or 'survival'.
        classes: Labels in order; unless given, all labels of the training data, sorted.
        class_weights: Weights of the classes in the loss, by their names, or 'balanced' for such by which all classes
            of the training data count as much, and a slide 1 in the mean; None for 1 each.
        bins: Number of time bins for the discrete-time likelihood, whose edges come from the events of the training
            data; None for Cox's loss.
        split_file: A file of splits, see `read_splits`, in place of the table's column; a relative path begins in
            data_root, and %d in it stands for the fold.
        folds: Number of folds to split the cases into, see `split_cases`, instead of by the table's column split.
        fold: Number of the fold for the test; the next one is for validation.
        fold_seed: Seed of the division into folds.
        edges: Edges between the time bins, as a training has found them and its checkpoint notes; unless given, those
            of the training data.
        barcodes: Whether TCGA's barcodes tell which slides are of one patient, see `read_table`.
        columns: Names in the table of columns that have others in `read_table`; %d in them stands for the fold.
        encoder: Name of the encoder whose features are meant, where a file or the folder has those of several.
        cache: Whether to keep in memory what was read; each worker of a loader keeps its own.

    Raises:
        RunError: A table or a file is unfit; the message names the row and the slide.
    """

    def __init__(
        self,
        data_root: str,
        ann_file: str,
        split: str,
        task: str = 'classification',
        classes: Sequence[str] | None = None,
        class_weights: Mapping[str, float] | str | None = None,
        bins: int | None = 4,
        split_file: str | None = None,
        folds: int | None = None,
        fold: int = 0,
        fold_seed: int = 0,
        edges: Sequence[float] | None = None,
        barcodes: bool = True,
        columns: dict[str, str] | None = None,
        encoder: str | None = None,
        cache: bool = False,
    ) -> None:
        files = table_files(data_root, ann_file, split_file, fold)
        self.table, self.split_file = files[0], files[-1] if split_file else None
        if split_file and folds:
            raise RunError(f'split_file and folds must not both be given, got {split_file} and {folds}.')
        classes = [class_name(name) for name in classes] if classes is not None else None  # a config may give numbers
        try:
            named = {ours: theirs.replace('%d', str(fold)) for ours, theirs in (columns or {}).items()}
            slides, problems = read_table(self.table, task, classes, barcodes, named)
            said = recognised_cases(slides)
            notes = [f'{self.table.name} has no case_id: {said}'] if said else []
            if self.split_file is not None and not problems:
                slides, problems, said = apply_splits(slides, self.split_file, barcodes)
                notes += [said] if said else []
            splits = split_cases(slides, folds, fold, fold_seed) if folds and not problems else {}
            if folds and any(slide.fold is not None for slide in slides):
                notes.append(f'the folds are those of the column fold of {self.table.name}.')
        except (FileNotFoundError, ValueError) as error:
            raise RunError(str(error)) from error
        if problems:
            how = f'{len(problems)} problems in all.'
            if self.split_file is None:
                how = f'`vssm wsi-check {self.table} {data_root}` lists all {len(problems)} problems.'
            raise RunError(f'{problems[0]} {how}')
        for note in notes if split == 'train' else ():  # once for the data of a run
            print_log(note, 'current', logging.WARNING)
        by_split: dict[str | None, list[Slide]] = defaultdict(list)
        for slide in slides:
            by_split[splits.get(slide.case_id, slide.split)].append(slide)
        wanted = slides if split == 'all' else by_split[split] if split in SPLITS else []
        if not wanted:
            raise RunError(self._no_slides(split))
        self.task, self.split, self.encoder = task, split, encoder
        chosen, files_of = self._find(data_root, wanted)
        self.cache: dict[int, list[Bag]] | None = {} if cache else None
        self.told: set[str] = set()  # slides of which it was said that patches are left out
        self.metainfo: dict[str, Any] = {}
        if task == 'classification':
            self.bags = [[slide] for slide in chosen]
            self.classes = tuple(classes or sorted({str(slide.label) for slide in by_split['train']}))
            self.metainfo['classes'] = self.classes
            for slide in chosen:
                if slide.label not in self.classes:
                    raise self._error(slide, f'label must be one of the training data, got {slide.label!r}.')
        else:
            self.bags = _by_case(chosen)
            self.edges = torch.tensor(edges or (), dtype=torch.float64)
            if bins is not None and edges is None and split in ('train', 'val'):
                self.edges = self._time_edges(_by_case(by_split['train']), bins)
            if len(self.edges):
                self.metainfo['classes'] = tuple(f'from {edge:g} months' for edge in [0.0, *self.edges.tolist()])
        self.weights = self._class_weights(class_weights, Counter(slide.label for slide in by_split['train']))
        self._tell_undefined()
        self.files = [[files_of[slide.slide_id] for slide in bag] for bag in self.bags]
        # What a checkpoint notes of the data that its network was trained on, of plain values.
        self.notes = dict(
            task=task,
            classes=list(self.metainfo.get('classes', ())),
            class_weights=self.weights,
            edges=[] if task == 'classification' else self.edges.tolist(),
            barcodes=barcodes,
            columns=dict(columns) if columns else None,
            encoder=encoder,
            split_file=split_file,
            folds=folds,
            fold=fold,
            fold_seed=fold_seed,
            table=table_digest(files),
        )

    @property
    def groups(self) -> list[str]:
        """What BalancedSampler makes equal: the label of each slide, or whether a case has an event."""
        if self.task == 'classification':
            return [str(bag[0].label) for bag in self.bags]
        return ['censored' if bag[0].censored else 'event' for bag in self.bags]

    def _class_weights(
        self, given: Mapping[str, float] | str | None, counts: Mapping[Any, int]
    ) -> dict[str, float] | None:
        """The weight of each class, from the numbers of slides in the training data where they balance these."""
        if given is None:
            return None
        if self.task == 'survival':
            raise RunError(f'class_weights must be None for survival, got {given}.')
        if given == 'balanced':
            if not all(counts.get(name) for name in self.classes):
                raise RunError(f'class_weights=balanced needs training slides of each class, got {dict(counts)}.')
            return {name: sum(counts.values()) / len(self.classes) / counts[name] for name in self.classes}
        weights = {class_name(name): weight for name, weight in given.items()} if isinstance(given, Mapping) else {}
        if weights.keys() != set(self.classes) or not all(
            isinstance(weight, int | float) and 0 < weight < float('inf') for weight in weights.values()
        ):
            raise RunError(
                f"class_weights must be 'balanced' or a positive number for each of {', '.join(self.classes)}, by "
                f'name, got {given}.'
            )
        return weights

    def _no_slides(self, split: str) -> str:
        if self.split_file is not None and split in SPLITS:
            return (
                f'{self.split_file} must have slides in its column {split}, got none. Where a published split has no '
                'test, test_dataloader.dataset.split=val tests on the validation data.'
            )
        return (
            f'{self.table.name}: split must be train, val or test and have slides, by a column of that name, by '
            f'split_file or by folds, got {split!r} with none; test_dataloader.dataset.split=all tests on every slide.'
        )

    def _tell_undefined(self) -> None:
        """Say where a split is such that the metric of the task has no value; refuse a training without an event."""
        if self.task == 'classification':
            labels = {bag[0].label for bag in self.bags}
            why = f'the slides of {self.split} are all of class {min(map(str, labels))!r}, so that AUC'
            defined = len(labels) > 1
        else:
            why = f'no case of {self.split} has an event, so that the concordance index'
            defined = not all(bag[0].censored for bag in self.bags)
            if self.split == 'train' and not defined:
                raise RunError(
                    f'{self.table.name}: the cases of the training must have events, got none of {len(self)} cases.'
                )
        if not defined and self.split != 'train':
            what = ': the last weights count as the best.' if self.split == 'val' else '.'
            print_log(f'{self.table.name}: {why} is not defined{what}', 'current', logging.WARNING)

    def _time_edges(self, bags: list[list[Slide]], bins: int) -> Tensor:
        months, censored = (torch.tensor([getattr(bag[0], key) for bag in bags]) for key in ('months', 'censored'))
        try:
            return time_edges(months, censored, bins)
        except ValueError as error:
            raise RunError(f'{self.table.name}: {error}') from error

    def _find(self, data_root: str, slides: Sequence[Slide]) -> tuple[list[Slide], dict[str, tuple[Path, ...]]]:
        """The slides that have patches, and their files; what is left out is told."""
        folder, files, empty = SlideFolder(data_root, self.encoder), {}, []
        for slide in slides:
            try:
                paths = folder.find(slide.slide_id)
                if count_patches(*paths, encoder=self.encoder):
                    files[slide.slide_id] = paths
                else:
                    empty.append(slide.slide_id)
            except (FileNotFoundError, ValueError) as error:
                raise self._error(slide, error) from error
        if empty:
            such = ', '.join(empty[:5]) + (', ...' if len(empty) > 5 else '')
            said = f'{self.table.name}: {len(empty)} of {len(slides)} slides of {self.split} have no patches: {such}'
            if not files:
                raise RunError(f'{said}.')
            print_log(f'{said}. They are left out.', 'current', logging.WARNING)
        return [slide for slide in slides if slide.slide_id in files], files

    def _error(self, slide: Slide, problem: Any) -> RunError:
        return RunError(f'{self.table.name} row {slide.row}, slide {slide.slide_id!r}: {problem}')

    def __len__(self) -> int:
        return len(self.bags)

    def __getitem__(self, index: int) -> dict[str, Any]:
        bag = self.bags[index]
        parts = self.cache.get(index) if self.cache is not None else None
        if parts is None:
            parts = [self._read(slide, paths) for slide, paths in zip(bag, self.files[index], strict=True)]
            if self.cache is not None:
                self.cache[index] = parts
        coords = [part.coords for part in parts if part.coords is not None]
        inputs = dict(
            features=_join([part.features for part in parts]),
            coords=_join(coords) if len(coords) == len(parts) else None,
            lengths=[len(part.features) for part in parts],
            steps=[part.step for part in parts],
        )
        first = bag[0]
        if self.task == 'classification':
            data_samples = dict(name=first.slide_id, case=first.case_id, label=self.classes.index(first.label))
            if self.weights is not None:
                data_samples['weight'] = self.weights[str(first.label)]
            return dict(inputs=inputs, data_samples=data_samples)
        data_samples = dict(name=first.case_id, months=first.months, censored=first.censored)
        if len(self.edges):
            data_samples['bin'] = time_bin(torch.tensor([first.months]), self.edges).item()
        return dict(inputs=inputs, data_samples=data_samples)

    def _read(self, slide: Slide, paths: tuple[Path, ...]) -> Bag:
        try:
            bag = read_slide(*paths, encoder=self.encoder)
        except (FileNotFoundError, ValueError) as error:
            raise self._error(slide, error) from error
        if bag.left_out and slide.slide_id not in self.told:
            self.told.add(slide.slide_id)
            print_log(
                f'{paths[0].name}: {bag.left_out} of {bag.total} patches are left out, each in the cell of a patch '
                'of another piece of tissue.',
                'current',
                logging.WARNING,
            )
        return bag


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)  # without a copy of a single slide


def table_files(data_root: str, ann_file: str, split_file: str | None = None, fold: int = 0, **_: Any) -> list[Path]:
    """The files that say what a SlideDataset with these arguments holds: its table, and that of its splits if any."""
    splits = [Path(data_root, split_file.replace('%d', str(fold)))] if split_file else []
    return [Path(data_root, ann_file), *splits]


def table_digest(files: Sequence[Path]) -> str:
    """What tells the content of such files from any other; empty where one is missing."""
    if not all(path.is_file() for path in files):
        return ''
    return hashlib.sha256(b''.join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()[:16]


def _by_case(slides: Sequence[Slide]) -> list[list[Slide]]:
    cases: dict[str, list[Slide]] = defaultdict(list)
    for slide in slides:
        cases[slide.case_id].append(slide)
    return list(cases.values())


@DATA_SAMPLERS.register_module()
class BalancedSampler(DefaultSampler):
    """Draws as many samples as there are, with replacement, so that all classes of a SlideDataset come as often.

    Of survival, these are the cases with an event and those without. Arguments are those of DefaultSampler; it always
    shuffles.
    """

    def __iter__(self) -> Iterator[int]:
        groups = self.dataset.groups  # type: ignore[attr-defined]
        counts = Counter(groups)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        chances = torch.tensor([1 / counts[group] for group in groups], dtype=torch.float64)
        drawn = chances.multinomial(self.total_size, replacement=True, generator=generator).tolist()
        return iter(drawn[self.rank : self.total_size : self.world_size])


@FUNCTIONS.register_module()
def list_bags(samples: Sequence[dict[str, Any]]) -> dict[str, list]:
    """A batch of samples of a SlideDataset, as lists, since bags differ in size."""
    return {key: [sample[key] for sample in samples] for key in ('inputs', 'data_samples')}
