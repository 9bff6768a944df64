# SPDX-License-Identifier: Apache-2.0
"""Tables of slides, in CLAM's layout, and splits of their cases into folds.

Rows are counted as a spreadsheet counts them, the header being row 1.
"""

import codecs
import csv
import io
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

__all__ = [
    'SPLITS',
    'TASKS',
    'Slide',
    'apply_splits',
    'class_name',
    'read_rows',
    'read_splits',
    'read_table',
    'recognised_cases',
    'slide_name',
    'split_cases',
]

SPLITS = ('train', 'val', 'test')
TASKS = dict(  # with the columns that each needs
    classification=('slide_id', 'label'),
    survival=('case_id', 'slide_id', 'censorship', 'survival_months'),
)

# What slides' own files and those of their features end with, which some tables have and others leave out.
_SUFFIX = re.compile(
    r'(\.(svs|ndpi|(ome\.)?tiff?|mrxs|scn|bif|czi|vsi|dcm|h5|hdf5|h5ad|pth?|np[yz]|features(\.\d+)?))+$', re.IGNORECASE
)
_BARCODE = re.compile(r'TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?=-|$)', re.IGNORECASE)  # the part that names the patient
_SPLIT_NAMES = dict(training='train', valid='val', validation='val', testing='test')
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
    fold: str | None = None  # as the table names it


def read_table(
    path: str | Path,
    task: str,
    classes: Sequence[str] | None = None,
    barcodes: bool = True,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[Slide], list[str]]:
    """The slides of a CSV, and a list of what is wrong with it, each problem with its row.

    Args:
        path: A table with the columns `slide_id,label` for classification, or
            `case_id,slide_id,censorship,survival_months` for survival, where censorship is 1 if the event was not seen.
            Either may have a column `split`, or `fold`, see `split_cases`, and the former a column `case_id` too. All
            slides of a case have the same split and, in survival, the same outcome. See `read_rows` for how it may be
            written.
        task: 'classification' or 'survival'.
        classes: Labels that are allowed, all unless given.
        barcodes: Whether slides with TCGA's barcodes are known by them to be of the same patient: they are one case in
            a table without cases, and must be one in a table with them.
        columns: Names in this table of columns that have others here, such as dict(label='subtype').

    Raises:
        ValueError: The file is no table with these columns.
        FileNotFoundError: There is no such file.
    """
    if task not in TASKS:
        raise ValueError(f'task must be one of {", ".join(TASKS)}, got {task!r}.')
    path = Path(path)
    header, records, decimal_comma = read_rows(path)
    names = {'split': 'data_split'} if 'split' not in header and 'data_split' in header else {}
    names |= {ours: column_name(theirs) for ours, theirs in (columns or {}).items()}
    absent = [theirs for theirs in names.values() if theirs not in header]
    absent += [name for name in TASKS[task] if name not in names and name not in header]
    if absent:
        hint = ': is it a dataset.split_file?' if {'train', 'val'} <= set(header) else '.'
        needed = ', '.join(dict.fromkeys([*(names.get(name, name) for name in TASKS[task]), *absent]))
        raise ValueError(
            f'table {path} must have the columns {needed} for {task}, got {", ".join(filter(None, header)) or "none"}'
            f'{hint}'
        )

    slides, problems = [], []
    classes = None if classes is None else [class_name(name) for name in classes]
    for row, cells in records:
        record = {**cells, **{ours: cells[theirs] for ours, theirs in names.items()}}
        if decimal_comma and task == 'survival':
            for key in ('survival_months', 'censorship'):
                record[key] = re.sub(r'^(\d+),(\d+)$', r'\1.\2', record[key])
        try:
            slides.append(_parse(row, record, task, classes, barcodes))
        except ValueError as error:
            problems.append(f'{path.name} row {row}, slide {record["slide_id"]!r}: {error}')
    if not records:
        problems.append(f'{path.name}: must hold slides, got none.')
    return slides, problems + [f'{path.name} {problem}' for problem in _contradictions(slides, barcodes)]


def read_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]], bool]:
    """The header of a table; each row with its number; and whether numbers may have a decimal comma.

    Cells are separated by commas, semicolons or tabs. The text is UTF-8, or UTF-16 where the file begins with its mark.
    Names of columns are as `column_name` makes them. Where commas separate cells, they are in no number.

    Raises:
        ValueError: The file is no such table; the message says why.
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f'table {path} does not exist.')
    data = path.read_bytes()
    if data.startswith((b'PK\x03\x04', b'\xd0\xcf\x11\xe0')):
        raise ValueError(f'table {path} must be a CSV, got a workbook: save its sheet as CSV.')
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode('utf-16' if marked else 'utf-8-sig')  # spreadsheets begin with a mark
        if '\0' in text:
            raise ValueError('it holds zeros, as UTF-16 without its mark does')
        first = text.partition('\n')[0]
        separator = max(',;\t', key=first.count)
        reader = csv.reader(io.StringIO(text, newline=''), delimiter=separator, strict=True)
        header = [column_name(name) for name in next(reader, [])]
        twice = [name for name, count in Counter(header).items() if name and count > 1]
        if twice:
            raise ValueError(f'it has the column {twice[0]} twice')
        records = []
        for cells in reader:
            if len(cells) > len(header) and any(map(str.strip, cells[len(header) :])):
                raise ValueError(
                    f'row {reader.line_num} has {len(cells)} cells for {len(header)} columns: is there a decimal comma?'
                )
            if any(map(str.strip, cells)):
                cells = [*map(str.strip, cells), *[''] * len(header)][: len(header)]
                columns = list(zip(header, cells, strict=True))
                records.append((reader.line_num, dict(reversed(columns))))  # the first of those without a name
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f'table {path} must be a CSV in UTF-8 or UTF-16, got one that cannot be read: {error}.'
        ) from error
    except ValueError as error:
        raise ValueError(f'table {path} must be a CSV that can be read: {error}.') from error
    return header, records, separator != ','


def column_name(name: str) -> str:
    """The name of a column in lower case, with underscores for blanks and hyphens."""
    return re.sub(r'[\s-]+', '_', name.strip().lower())


def read_splits(path: str | Path) -> dict[str, str]:
    """The split of each slide or case, from a file of the columns train, val and test, as CLAM writes it.

    Its columns hold the names of slides, or of cases, and end where they end; or they are true or false for the name in
    the first column.

    Raises:
        ValueError: The file is none of these, or has a name in two splits.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    header, records, _ = read_rows(path)
    found = {_SPLIT_NAMES.get(name, name): name for name in header}
    if not {'train', 'val'} <= found.keys():
        raise ValueError(f'{path} must have the columns train, val and test, got {", ".join(filter(None, header))}.')
    cells = [(row, split, record[found[split]]) for row, record in records for split in SPLITS if split in found]
    if all(value.lower() in ('true', 'false', '') for _, _, value in cells):
        names = {row: record[header[0]] for row, record in records}
        cells = [(row, split, names[row]) for row, split, value in cells if value.lower() == 'true']
    splits: dict[str, str] = {}
    for row, split, value in cells:
        if not _is_missing(value) and splits.setdefault(_key(value), split) != split:
            raise ValueError(
                f'{path} row {row}: {value!r} must be in one split, got {splits[_key(value)]} and {split}.'
            )
    return splits


def apply_splits(
    slides: Sequence[Slide], path: str | Path, barcodes: bool = True
) -> tuple[list[Slide], list[str], str | None]:
    """Slides with the split that a file gives them, see `read_splits`, by their own name or that of their case.

    Args:
        slides: Slides of a table.
        path: File of the splits.
        barcodes: Whether slides with TCGA's barcodes are known by them to be of the same patient.

    Returns:
        The slides that are in a split; what is wrong with them; and a sentence on names that either has alone, or None.

    Raises:
        ValueError: The file has another form, or none of the slides.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    splits = read_splits(path)
    keys = [(slide, [key for key in (_key(slide.slide_id), _key(slide.case_id)) if key in splits]) for slide in slides]
    placed = [replace(slide, split=splits[own[0]]) for slide, own in keys if own]
    if not placed:
        raise ValueError(
            f'{path} must name slides or cases of the table, such as {slides[0].slide_id}, got none of them.'
        )
    unknown = len(splits.keys() - {key for _, own in keys for key in own})
    said = (
        [f'slides of the table that are in no split ({len(slides) - len(placed)})'] if len(placed) < len(slides) else []
    )
    said += [f'names that are not in the table ({unknown})'] if unknown else []
    problems = [f'{path.name}: {problem}' for problem in _contradictions(placed, barcodes)]
    return placed, problems, f'{path.name}: left out are {" and ".join(said)}.' if said else None


def _key(name: str) -> str:
    """What a name of a slide or case is compared by; where a column of numbers has a gap, they have a point."""
    return class_name(slide_name(name))


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


def _parse(row: int, record: Mapping[str, str], task: str, classes: Sequence[str] | None, barcodes: bool) -> Slide:
    for key in ('slide_id', *(['case_id'] if 'case_id' in record else [])):
        if _is_missing(record[key]) or Path(record[key]).name != record[key]:
            raise ValueError(f'{key} must be a name, got {record[key]!r}.')
    split = record.get('split')
    split = _SPLIT_NAMES.get(split.lower(), split.lower()) if split is not None else None
    if split is not None and split not in SPLITS:
        raise ValueError(f'split must be one of {", ".join(SPLITS)}, got {record["split"]!r}.')
    slide_id = record['slide_id']
    patient = _patient(slide_id) if barcodes and 'case_id' not in record else None
    case_id = record.get('case_id', patient or slide_name(slide_id))
    fold = None if _is_missing(record.get('fold', '')) else class_name(record['fold'])
    slide = Slide(row, slide_id, case_id, split, by_barcode=patient is not None, fold=fold)
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

    Where the table has a column `fold`, of whole numbers, the folds are these in their order. Otherwise cases are dealt
    out at random, those of each label, or with and without an event, in turn, so that each fold has its share of them.
    A case of several labels counts as one of its most frequent label.

    Args:
        slides: Slides of all cases.
        folds: Number of folds, at least 3.
        fold: Number of the fold for the test, from 0.
        seed: Seed of the random order, the same for all folds of a division.

    Raises:
        ValueError: folds is too small, larger than the number of cases or another than the table's, or fold is none of
            them; or a case has no fold in the table, or two.
    """
    strata: dict[str, list[Hashable]] = defaultdict(list)
    for slide in slides:
        strata[slide.case_id].append(slide.label if slide.label is not None else slide.censored)
    if folds < 3 or not 0 <= fold < folds or len(strata) < folds:
        raise ValueError(
            f'folds must be 3 or more, one for each case at most, and fold one of them, from 0; got {folds} folds of '
            f'{len(strata)} cases, and fold {fold}.'
        )
    names = {fold: 'test', (fold + 1) % folds: 'val'}
    if any(slide.fold is not None for slide in slides):
        return {case: names.get(own, 'train') for case, own in _folds_of_table(slides, folds).items()}
    cases = sorted(strata)
    random.Random(seed).shuffle(cases)
    cases.sort(key=lambda case: str(Counter(strata[case]).most_common(1)[0][0]))  # stable: at random within a stratum
    return {case: names.get(i % folds, 'train') for i, case in enumerate(cases)}


def _folds_of_table(slides: Sequence[Slide], folds: int) -> dict[str, int]:
    """The fold of each case by the table's column, counted from 0 in the order of its numbers."""
    found: dict[str, int] = {}
    for slide in slides:
        if slide.fold is None or not slide.fold.isdecimal():
            raise ValueError(
                f'row {slide.row}, slide {slide.slide_id!r}: fold must be a whole number, got {slide.fold or "none"!r}.'
            )
        if found.setdefault(slide.case_id, int(slide.fold)) != int(slide.fold):
            raise ValueError(
                f'row {slide.row}, slide {slide.slide_id!r}: fold must be that of its case {slide.case_id!r}, '
                f'{found[slide.case_id]}, got {slide.fold}.'
            )
    numbers = sorted(set(found.values()))
    if len(numbers) != folds:
        raise ValueError(f'folds must be {len(numbers)}, as many as the column fold has, got {folds}.')
    return {case: numbers.index(number) for case, number in found.items()}
