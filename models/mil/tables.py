# SPDX-License-Identifier: Apache-2.0
"""Tables of slides, in CLAM's layout, and splits of their cases into folds.

Rows are counted as a spreadsheet counts them, the header being row 1.
"""

import csv
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ['SPLITS', 'TASKS', 'Slide', 'class_name', 'read_table', 'recognised_cases', 'slide_name', 'split_cases']

SPLITS = ('train', 'val', 'test')
TASKS = dict(  # with the columns that each needs
    classification=('slide_id', 'label'),
    survival=('case_id', 'slide_id', 'censorship', 'survival_months'),
)

# What slides' own files and those of their features end with, which some tables have and others leave out.
_SUFFIX = re.compile(r'(\.(svs|ndpi|(ome\.)?tiff?|mrxs|scn|bif|czi|vsi|dcm|h5|pt))+$', re.IGNORECASE)
_BARCODE = re.compile(r'TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?=-|$)', re.IGNORECASE)  # the part that names the patient
_MISSING = {'', 'nan', 'na', 'n/a', '#n/a', '<na>', 'null'}  # as programs write a cell without a value


@dataclass(frozen=True)
class Slide:
    """A row of a table; what a task does not have is None."""

    row: int
    slide_id: str
    case_id: str  # where the table has no cases, the patient of the slide's barcode, or else the slide's name
    split: str | None = None
    label: str | None = None
    months: float | None = None
    censored: bool | None = None
    by_barcode: bool = False  # whether case_id is what the slide's barcode says


def read_table(
    path: str | Path,
    task: str,
    classes: Sequence[str] | None = None,
    barcodes: bool = True,
) -> tuple[list[Slide], list[str]]:
    """The slides of a CSV, and a list of what is wrong with it, each problem with its row.

    Args:
        path: A table with the columns `slide_id,label` for classification, or
            `case_id,slide_id,censorship,survival_months` for survival, where censorship is 1 if the event was not seen.
            Either may have a column `split`, and the former a column `case_id` too. All slides of a case have the same
            split and, in survival, the same outcome.
        task: 'classification' or 'survival'.
        classes: Labels that are allowed, all unless given.
        barcodes: Whether slides with TCGA's barcodes are known by them to be of the same patient: they are one case in
            a table without cases, and must be one in a table with them.

    Raises:
        ValueError: The file is no table with these columns.
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
    classes = None if classes is None else [class_name(name) for name in classes]
    for row, record in records:
        try:
            slides.append(_parse(row, record, task, classes, barcodes))
        except ValueError as error:
            problems.append(f'{path.name} row {row}, slide {record["slide_id"]!r}: {error}')
    if not records:
        problems.append(f'{path.name}: must hold slides, got none.')
    return slides, problems + [f'{path.name} {problem}' for problem in _contradictions(slides, barcodes)]


def slide_name(slide_id: str) -> str:
    """The name of a slide, whether a table has it or the name of a file."""
    return _SUFFIX.sub('', slide_id)


def class_name(label: Any) -> str:
    """The name of a class: whole numbers without a point, as which they are written where their column has a gap."""
    return re.sub(r'^([+-]?\d+)\.0*$', r'\1', str(label).strip())


def _patient(slide_id: str) -> str | None:
    """The patient of a TCGA barcode; None for other names."""
    found = _BARCODE.match(slide_id)
    return found[0].upper() if found else None


def _is_missing(value: str) -> bool:
    return value.lower() in _MISSING


def _parse(row: int, cells: dict[str, str | None], task: str, classes: Sequence[str] | None, barcodes: bool) -> Slide:
    record = {key: (value or '').strip() for key, value in cells.items()}
    for key in ('slide_id', *(['case_id'] if 'case_id' in record else [])):
        if _is_missing(record[key]) or Path(record[key]).name != record[key]:
            raise ValueError(f'{key} must be a name, got {record[key]!r}.')
    split = record.get('split')
    if split is not None and split not in SPLITS:
        raise ValueError(f'split must be one of {", ".join(SPLITS)}, got {split!r}.')
    slide_id = record['slide_id']
    patient = _patient(slide_id) if barcodes and 'case_id' not in record else None
    case_id = record.get('case_id', patient or slide_name(slide_id))
    slide = Slide(row, slide_id, case_id, split, by_barcode=patient is not None)
    if task == 'classification':
        label = class_name(record['label'])
        if label not in classes if classes is not None else _is_missing(label):
            allowed = f'one of {", ".join(classes)}' if classes is not None else 'a name'
            raise ValueError(f'label must be {allowed}, got {label!r}.')
        return replace(slide, label=label)
    try:
        months, censorship = float(record['survival_months']), float(record['censorship'])
    except ValueError:
        months, censorship = math.nan, math.nan
    if not (0 <= months < math.inf and censorship in (0, 1)):
        raise ValueError(
            'survival_months must be a number from 0 up and censorship 0 or 1, got '
            f'{record["survival_months"]!r} and {record["censorship"]!r}.'
        )
    return replace(slide, months=months, censored=bool(censorship))


def _contradictions(slides: Sequence[Slide], barcodes: bool) -> list[str]:
    """The slides that are there twice, the cases that have two splits or outcomes, and the patients of two cases."""
    problems: list[str] = []
    known: dict[str, int] = {}  # rows of slides
    cases: dict[str, Slide] = {}  # their first slides
    patients: dict[str, Slide] = {}  # theirs, by barcodes
    for slide in slides:
        where = f'row {slide.row}, slide {slide.slide_id!r}'
        name = slide_name(slide.slide_id)
        if name in known:
            problems.append(f'{where}: is in row {known[name]} already.')
            continue
        known[name] = slide.row
        patient = _patient(slide.slide_id) if barcodes else None
        other = patients.setdefault(patient, slide) if patient else slide
        if other.case_id != slide.case_id:
            problems.append(
                f'{where}: case_id must be that of row {other.row}, {other.case_id!r}, as both slides are of patient '
                f'{patient}, got {slide.case_id!r}; dataset.barcodes=False takes no notice of barcodes.'
            )
        first = cases.setdefault(slide.case_id, slide)
        hint = '; dataset.barcodes=False takes each slide for a case' if slide.by_barcode else ''
        for key in ('split', 'months', 'censored'):
            here, there = getattr(slide, key), getattr(first, key)
            if here != there:
                problems.append(
                    f'{where}: {key} must be that of case {slide.case_id!r} in row {first.row}, {there!r}, got '
                    f'{here!r}{hint}.'
                )
    return problems


def recognised_cases(slides: Sequence[Slide]) -> str | None:
    """A sentence on the cases of several slides that these slides' barcodes alone tell; None where there are none."""
    known = [slide for slide in slides if slide.by_barcode]
    patients = {slide.case_id for slide in known}
    if len(patients) == len(known):
        return None
    return (
        f'the barcodes of {len(known)} slides say that they are of {len(patients)} patients, whose slides stay together'
        '; dataset.barcodes=False takes each slide for a case.'
    )


def split_cases(slides: Sequence[Slide], folds: int, fold: int, seed: int = 0) -> dict[str, str]:
    """The split of each case by folds: 'test' in one fold, 'val' in the next one, 'train' in the others.

    Cases are dealt out at random, those of each label, or with and without an event, in turn, so that each fold has its
    share of them. A case of several labels counts as one of its most frequent label.

    Args:
        slides: Slides of all cases.
        folds: Number of folds, at least 3.
        fold: Number of the fold for the test, from 0.
        seed: Seed of the random order, the same for all folds of a division.

    Raises:
        ValueError: folds is too small or larger than the number of cases, or fold is none of them.
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
