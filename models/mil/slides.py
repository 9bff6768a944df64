# SPDX-License-Identifier: Apache-2.0
"""Slides on disk, in CLAM's layout: tables of slides, files of features with coordinates, and splits by case.

Rows of tables are counted as a spreadsheet counts them, the header being row 1; rows of arrays from 0.
"""

import csv
import math
import pickle
import random
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

__all__ = ['SPLITS', 'TASKS', 'Slide', 'find_slide', 'read_slide', 'read_table', 'split_cases']

SPLITS = ('train', 'val', 'test')
TASKS = dict(  # and the columns that each needs
    classification=('slide_id', 'label'),
    survival=('case_id', 'slide_id', 'censorship', 'survival_months'),
)


@dataclass(frozen=True)
class Slide:
    """A row of a table; what a task does not have is None."""

    row: int
    slide_id: str
    case_id: str  # slide_id where the table has no cases
    split: str | None = None
    label: str | None = None
    months: float | None = None
    censored: bool | None = None


# ---- tables ----------------------------------------------------------------------------------------------------------


def read_table(
    path: str | Path,
    task: str,
    classes: Sequence[str] | None = None,
) -> tuple[list[Slide], list[str]]:
    """The slides of a CSV, and what is wrong with it, each with its row.

    Args:
        path: `slide_id,label` for classification, `case_id,slide_id,censorship,survival_months` for survival, where
            censorship is 1 if the event was not seen. Either may have `split`, the former `case_id` too. A case has one
            split and, in survival, one outcome.
        task: 'classification' or 'survival'.
        classes: The labels that there may be, any unless given.

    Raises:
        ValueError: It is no table with these columns.
        FileNotFoundError: There is no such file.
    """
    if task not in TASKS:
        raise ValueError(f'task must be one of {", ".join(TASKS)}, got {task!r}.')
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'table {path} does not exist.')
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:  # spreadsheets begin with a mark
            reader = csv.DictReader(file)
            missing = [column for column in TASKS[task] if column not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(
                    f'table {path} must have the columns {", ".join(TASKS[task])} for {task}, got '
                    f'{", ".join(reader.fieldnames or ()) or "none"}.'
                )
            records = [(reader.line_num, {key: value for key, value in record.items() if key}) for record in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f'table {path} must be a CSV, got one that cannot be read: {error}') from error

    slides, problems = [], []
    for row, record in records:
        try:
            slides.append(_parse(row, record, task, classes))
        except ValueError as error:
            problems.append(f'{path.name} row {row}, slide {record["slide_id"]!r}: {error}')
    if not records:
        problems.append(f'{path.name}: must hold slides, got none.')
    return slides, problems + [f'{path.name} {problem}' for problem in _contradictions(slides)]


def _parse(row: int, record: dict[str, str | None], task: str, classes: Sequence[str] | None) -> Slide:
    record = {key: (value or '').strip() for key, value in record.items()}
    for key in ('slide_id', *(['case_id'] if 'case_id' in record else [])):
        if not record[key] or Path(record[key]).name != record[key]:
            raise ValueError(f'{key} must be a name, got {record[key]!r}.')
    split = record.get('split')
    if split is not None and split not in SPLITS:
        raise ValueError(f'split must be one of {", ".join(SPLITS)}, got {split!r}.')
    common = dict(row=row, slide_id=record['slide_id'], case_id=record.get('case_id', record['slide_id']), split=split)
    if task == 'classification':
        label = record['label']
        if not label or classes is not None and label not in classes:
            allowed = f'one of {", ".join(classes)}' if classes is not None else 'a name'
            raise ValueError(f'label must be {allowed}, got {label!r}.')
        return Slide(**common, label=label)
    try:
        months, censorship = float(record['survival_months']), float(record['censorship'])
    except ValueError:
        months, censorship = math.nan, math.nan
    if not (0 <= months < math.inf and censorship in (0, 1)):
        raise ValueError(
            'survival_months must be a number from 0 up and censorship 0 or 1, got '
            f'{record["survival_months"]!r} and {record["censorship"]!r}.'
        )
    return Slide(**common, months=months, censored=bool(censorship))


def _contradictions(slides: Sequence[Slide]) -> list[str]:
    """Slides that are there twice, and cases with two splits or outcomes."""
    problems, known, cases = [], {}, {}
    for slide in slides:
        if slide.slide_id in known:
            problems.append(f'row {slide.row}, slide {slide.slide_id!r}: is in row {known[slide.slide_id]} already.')
        known.setdefault(slide.slide_id, slide.row)
        first = cases.setdefault(slide.case_id, slide)
        for name in ('split', 'months', 'censored'):
            here, there = getattr(slide, name), getattr(first, name)
            if here != there:
                problems.append(
                    f'row {slide.row}, slide {slide.slide_id!r}: {name} must be that of case {slide.case_id!r} in row '
                    f'{first.row}, {there!r}, got {here!r}.'
                )
    return problems


def split_cases(slides: Sequence[Slide], folds: int, fold: int, seed: int = 0) -> dict[str, str]:
    """The split of each case in one of k folds: 'test' in this fold, 'val' in the next one, 'train' in the others.

    Cases are dealt out at random, those of each label, or with and without an event, in turn: a fold has its share of
    each. A case of several labels counts as one of its most frequent.

    Args:
        slides: Of all cases.
        folds: k, at least 3.
        fold: Which one, from 0.
        seed: Of the order; the same for all folds of one division.

    Raises:
        ValueError: There are not so many folds or cases.
    """
    strata: dict[str, list[Hashable]] = defaultdict(list)
    for slide in slides:
        strata[slide.case_id].append(slide.label if slide.label is not None else slide.censored)
    if folds < 3 or not 0 <= fold < folds or len(strata) < folds:
        raise ValueError(
            f'folds must be 3 or more, one for each case at most, and fold one of them, from 0; got {folds} folds of '
            f'{len(strata)} cases, and fold {fold}.'
        )
    cases = sorted(strata)
    random.Random(seed).shuffle(cases)
    cases.sort(key=lambda case: str(Counter(strata[case]).most_common(1)[0][0]))  # stable: at random within a stratum
    names = {fold: 'test', (fold + 1) % folds: 'val'}
    return {case: names.get(i % folds, 'train') for i, case in enumerate(cases)}


# ---- files -----------------------------------------------------------------------------------------------------------


def find_slide(folder: str | Path, slide_id: str) -> Path:
    """The file of a slide's features: SLIDE.h5 or else SLIDE.pt, in the folder or in CLAM's h5_files and pt_files.

    Args:
        folder: Where to look.
        slide_id: SLIDE, or the name of the slide's own file, such as SLIDE.svs, which some tables have.

    Raises:
        FileNotFoundError: There is none.
    """
    folder = Path(folder)
    slide_id = re.sub(r'\.(svs|ndpi|tiff?|mrxs|scn|bif)$', '', slide_id)
    candidates = [folder / f'{slide_id}.h5', folder / 'h5_files' / f'{slide_id}.h5']
    candidates += [folder / f'{slide_id}.pt', folder / 'pt_files' / f'{slide_id}.pt']
    for path in candidates:
        if path.is_file() and not (path.suffix == '.h5' and _lacks_features(path)):
            return path
    raise FileNotFoundError(f'no features, neither {slide_id}.h5 nor {slide_id}.pt, in {folder}.')


def _lacks_features(path: Path) -> bool:
    """Whether a file has coordinates alone, to those features that lie in a .pt file."""
    try:
        with h5py.File(path) as file:
            return 'coords' in file and 'features' not in file
    except OSError:
        return False  # whoever reads it will say


def read_slide(path: str | Path) -> tuple[Tensor, Tensor]:
    """Features, (n, width), float32, and pixel coordinates, (n, 2), int64, x before y, of one slide.

    Args:
        path: SLIDE.h5 with `features` and `coords`; or SLIDE.pt with a dictionary of the two, or with the features
            alone, and beside it SLIDE_coords.pt, or SLIDE.h5 there or in the folder's neighbour h5_files.

    Raises:
        ValueError: The file cannot be read, or its contents are not as said above, or not finite.
        FileNotFoundError: There are no coordinates.
    """
    path = Path(path)
    if path.suffix == '.h5':
        features, coords = (_read_h5(path, key) for key in ('features', 'coords'))
    else:
        features = _read_pt(path)
        if isinstance(features, dict):
            if not {'features', 'coords'} <= features.keys():
                raise ValueError(f'{path.name} must hold features and coords, got {", ".join(map(str, features))}.')
            features, coords = features['features'], features['coords']
        else:
            coords = _read_coords(path)
    return _check(path, features, coords)


def _read_coords(path: Path) -> Tensor:
    beside = path.with_name(f'{path.stem}_coords.pt')
    if beside.is_file():
        return _read_pt(beside)
    for folder in (path.parent, path.parent.parent / 'h5_files'):
        if (folder / f'{path.stem}.h5').is_file():
            return _read_h5(folder / f'{path.stem}.h5', 'coords')
    raise FileNotFoundError(f'no coordinates to {path.name}, neither {beside.name} nor {path.stem}.h5.')


def _read_h5(path: Path, key: str) -> Tensor:
    try:
        with h5py.File(path) as file:  # for this read alone: an open one must not reach another process
            if key not in file:
                raise ValueError(f'{path.name} must hold features and coords, got {", ".join(file) or "nothing"}.')
            array = file[key][()]
    except OSError as error:
        raise ValueError(f'{path.name} cannot be read as HDF5: {error}') from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in 'iuf':
        raise ValueError(
            f'{path.name} must hold numbers as {key}, got {getattr(array, "dtype", type(array).__name__)}.'
        )
    return torch.from_numpy(array.astype(np.float32 if array.dtype.kind == 'f' else np.int64, copy=False))


def _read_pt(path: Path) -> Tensor | dict[str, Tensor]:
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except (EOFError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f'{path.name} cannot be read as tensors ({type(error).__name__}).') from error
    values = content.values() if isinstance(content, dict) else [content]
    if not all(isinstance(value, Tensor) for value in values):
        raise ValueError(f'{path.name} must hold tensors, got {type(content).__name__}.')
    return content


def _check(path: Path, features: Tensor, coords: Tensor) -> tuple[Tensor, Tensor]:
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f'{path.name}: features must be (n, width), got {tuple(features.shape)} of {features.dtype}.')
    if not len(features):
        raise ValueError(f'{path.name}: features must be those of one patch or more, got none.')
    if coords.shape != (len(features), 2):
        raise ValueError(f'{path.name}: coords must be {(len(features), 2)}, got {tuple(coords.shape)}.')
    for name, array in (('features', features), ('coords', coords)):
        finite = array.isfinite().all(1)
        if not finite.all():
            row = (~finite).nonzero()[0].item()
            raise ValueError(f'{path.name}: {name} row {row} must be finite, got {_shorten(array[row])}.')
    whole = (coords == coords.floor()).all(1) if coords.is_floating_point() else torch.ones(len(coords), dtype=bool)
    if not whole.all():
        row = (~whole).nonzero()[0].item()
        raise ValueError(f'{path.name}: coords row {row} must be whole pixels, got {coords[row].tolist()}.')
    return features.float(), coords.long()


def _shorten(row: Tensor) -> str:
    """The first number of a row that is not finite, and where it stands."""
    column = (~row.isfinite()).nonzero()[0].item()
    return f'{row[column].item()} in column {column}'
