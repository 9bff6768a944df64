# SPDX-License-Identifier: Apache-2.0
"""Whole slides from files to figures: tables, splits, features, metrics, and the commands from check to heat map."""

import argparse
import csv
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fresh_processes import run_fresh, run_script
from PIL import Image
from processes import finish, losses, options, start, wait_for
from torch.nn.functional import cross_entropy

from vssm.models.mil import create_mil_model, current_name, list_mil_models
from vssm.models.mil.survival import time_edges
from vssm.models.weights import read_checkpoint
from vssm.tools import wsi_compare, wsi_repeat
from vssm.tools._common import UsageError, read_config
from vssm.tools.main import main
from vssm.tools.wsi_repeat import Trial, plan, summarise

h5py = pytest.importorskip('h5py', reason="h5py is not installed: pip install '.[wsi]'")
pytest.importorskip('mmengine', reason="mmengine is not installed: pip install '.[wsi]'")

from mmengine.evaluator import Evaluator  # noqa: E402
from mmengine.logging import MessageHub  # noqa: E402

from vssm.models.mil.slides import SlideFolder, read_slide  # noqa: E402
from vssm.models.mil.tables import read_table, split_cases  # noqa: E402
from vssm.models.mm import BestHook, RunError  # noqa: E402
from vssm.models.mm.wsi import (  # noqa: E402
    ConcordanceIndex,
    SlideAccuracy,
    SlideClassifier,
    SlideDataset,
    SlideSurvival,
)
from vssm.models.mm.wsi_data import BalancedSampler  # noqa: E402
from vssm.models.mm.wsi_metrics import bootstrap, confusion_matrix  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread', 'quick_configs')
BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'
WIDTH = 6
PATCHES = 9

# Of both tasks: a network and a training that take a second.
SMALL = {
    'model.in_dim': WIDTH,
    'model.dim': 16,
    'train_dataloader.num_workers': 0,
    'train_dataloader.persistent_workers': False,
    'val_dataloader.num_workers': 0,
    'val_dataloader.persistent_workers': False,
    'test_dataloader.num_workers': 0,
    'train_cfg.max_epochs': 2,
    'num_threads': 1,
    'device': 'cpu',
    'default_hooks.logger.interval': 1,
    'log_processor.window_size': 1,
}


def write_table(path, header, rows):
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows([header, *rows])


def labels(classes):
    """The rows of a table of twelve slides, whose classes take turns."""
    return [[f's{i}', classes[i % 2], ('train', 'train', 'val', 'test')[i // 3]] for i in range(12)]


def write_slide(path, features=None, coords=None):
    """A 3 x 3 grid of patches, beginning one cell from the corner and off the cells' corners."""
    if features is None:
        features = torch.randn(PATCHES, WIDTH)
    if coords is None:
        coords = torch.cartesian_prod(torch.arange(3), torch.arange(3)).flip(1) * 512 + 600
    with h5py.File(path, 'w') as file:
        file['features'], file['coords'] = features.numpy(), coords.numpy()


@pytest.fixture
def classification(tmp_path):
    """A folder with twelve slides of two classes, of which the first feature speaks, and its labels.csv."""
    folder = tmp_path / 'data'
    folder.mkdir()
    for i in range(12):
        features = torch.randn(PATCHES, WIDTH)
        features[:, 0] += 3 * (i % 2)
        write_slide(folder / f's{i}.h5', features)
    write_table(folder / 'labels.csv', LABELS, labels('ab'))
    return folder


@pytest.fixture
def cases(tmp_path):
    """A folder with twelve cases of one or two slides, every third one censored, and its survival.csv."""
    folder = tmp_path / 'data'
    folder.mkdir()
    rows = []
    for i in range(12):
        for j in range(1 + i % 2):
            rows.append([f'c{i}', f'c{i}_{j}', int(i % 3 == 2), 1.5 * i + 1])
            write_slide(folder / f'c{i}_{j}.h5')
    write_table(folder / 'survival.csv', ['case_id', 'slide_id', 'censorship', 'survival_months'], rows)
    return folder


@pytest.fixture
def warnings_of_a_run(monkeypatch):
    """What data sets and runs warn of, a sentence each."""
    said = []
    for module in ('wsi', 'wsi_data'):
        monkeypatch.setattr(f'vssm.models.mm.{module}.print_log', lambda text, *_: said.append(text), raising=False)
    return said


# ---- tables and splits -----------------------------------------------------------------------------------------------

LABELS = ['slide_id', 'label', 'split']
SURVIVAL = ['case_id', 'slide_id', 'censorship', 'survival_months']


@pytest.mark.parametrize(
    'task, header, rows, said',
    [
        ('classification', LABELS, [['s', 'c', 'train']], "row 2, slide 's': label must be one of a, b, got 'c'"),
        ('classification', LABELS, [['s', '', 'train']], "row 2, slide 's': label must be one of a, b, got ''"),
        ('classification', LABELS, [['s', 'a', 'dev']], "split must be one of train, val, test, got 'dev'"),
        ('classification', LABELS, [['', 'a', 'val']], "slide_id must be a name, got ''"),
        ('classification', LABELS, [['../s', 'a', 'val']], "slide_id must be a name, got '../s'"),
        ('classification', LABELS, [['s', 'a', 'val'], ['s', 'b', 'val']], "row 3, slide 's': is in row 2 already"),
        ('classification', LABELS, [['s', 'a', 'val'], ['s.svs', 'a', 'val']], "row 3, slide 's.svs': is in row 2 al"),
        ('classification', LABELS, [['s.SVS', 'a', 'val'], ['s.h5', 'a', 'test']], "row 3, slide 's.h5': is in row 2 "),
        ('classification', LABELS, [['s', 'NaN', 'val']], "row 2, slide 's': label must be one of a, b, got 'NaN'"),
        ('classification', LABELS, [['n/a', 'a', 'val']], "slide_id must be a name, got 'n/a'"),
        ('classification', ['case_id', *LABELS], [['nan', 's', 'a', 'val']], "case_id must be a name, got 'nan'"),
        ('classification', LABELS, [], 'must hold slides, got none'),
        ('classification', LABELS, [['s']], "row 2, slide 's': split must be one of"),
        (
            'classification',
            ['case_id', *LABELS],
            [['c', 's', 'a', 'train'], ['c', 't', 'a', 'test']],
            "row 3, slide 't': split must be that of case 'c' in row 2, 'train', got 'test'",
        ),
        ('survival', SURVIVAL, [['c', 's', '2', '5']], "got '5' and '2'"),
        (
            'survival',
            SURVIVAL,
            [['c', 's', '0', '-1']],
            "survival_months must be a number from 0 up .* got '-1' and '0'",
        ),
        ('survival', SURVIVAL, [['c', 's', '0', 'nan']], "got 'nan' and '0'"),
        ('survival', SURVIVAL, [['c', 's', '', 'soon']], "got 'soon' and ''"),
        (
            'survival',
            SURVIVAL,
            [['c', 's', '0', '5'], ['c', 't', '0', '6']],
            "row 3, slide 't': months must be that of case 'c' in row 2, 5.0, got 6.0",
        ),
    ],
)
def test_what_is_wrong_with_a_table_is_told_with_row_and_slide(task, header, rows, said, tmp_path):
    write_table(tmp_path / 'table.csv', header, rows)
    _, problems = read_table(tmp_path / 'table.csv', task, ['a', 'b'] if task == 'classification' else None)
    assert len(problems) == 1
    assert re.search(said, problems[0]), problems


@pytest.mark.parametrize('missing', ['', 'NaN', 'nan', 'NA', 'N/A', '#N/A', '<NA>', 'null'])
def test_a_missing_label_is_no_class(missing, tmp_path):
    write_table(tmp_path / 'table.csv', LABELS, [['s', 'a', 'train'], ['t', missing, 'train']])
    slides, problems = read_table(tmp_path / 'table.csv', 'classification')
    assert [slide.label for slide in slides] == ['a']
    assert problems == [f"table.csv row 3, slide 't': label must be a name, got {missing!r}."]
    assert not read_table(tmp_path / 'table.csv', 'classification', ['a', missing])[1]


def test_whole_numbers_are_one_class_however_they_are_written(tmp_path):
    """Tables that once held a gap have 0.0 in place of 0."""
    labels = ['0', '0.0', '1.', '1', '0.5', 'v1.0', '-1.00']
    write_table(tmp_path / 'table.csv', LABELS, [[f's{i}', label, 'train'] for i, label in enumerate(labels)])
    classes = ['0', 1.0, '0.5', 'v1.0', -1]
    slides, problems = read_table(tmp_path / 'table.csv', 'classification', classes)
    assert not problems and [slide.label for slide in slides] == ['0', '0', '1', '1', '0.5', 'v1.0', '-1']
    for i in range(len(labels)):
        write_slide(tmp_path / f's{i}.h5')
    given = SlideDataset(str(tmp_path), 'table.csv', 'train', classes=classes)
    assert given.classes == ('0', '1', '0.5', 'v1.0', '-1')
    assert [sample['data_samples']['label'] for sample in given] == [0, 0, 1, 1, 2, 3, 4]


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
@pytest.mark.parametrize('separator', [',', ';', '\t'])
def test_a_table_is_read_however_a_spreadsheet_wrote_it(encoding, separator, tmp_path):
    """With the names of its columns in any case, Windows' line ends, cells of nothing at the end, umlauts."""
    point = '.' if separator == ',' else ','
    rows = [
        ['Case ID', 'SLIDE_ID', 'Censorship', 'Survival-Months', 'Data Split', ''],
        ['p\u00e4', 's1', '0', f'14{point}5', 'Train', ''],
        ['p2', 's2', f'1{point}0', '3', 'validation'],
        ['', '', '', '', '', ''],
        ['p3', 's3', '1', f'0{point}25', 'TESTING', ''],
    ]
    (tmp_path / 'table.csv').write_bytes('\r\n'.join(map(separator.join, rows)).encode(encoding))
    slides, problems = read_table(tmp_path / 'table.csv', 'survival')
    assert not problems
    assert [(s.row, s.case_id, s.slide_id, s.months, s.censored, s.split) for s in slides] == [
        (2, 'p\u00e4', 's1', 14.5, False, 'train'),
        (3, 'p2', 's2', 3.0, True, 'val'),
        (5, 'p3', 's3', 0.25, True, 'test'),
    ]


@pytest.mark.parametrize(
    'content, said',
    [
        (b'PK\x03\x04...', 'must be a CSV, got a workbook: save its sheet as CSV'),
        ('slide_id,label\ns,b\u00f6se\n'.encode('latin-1'), "UTF-8 or UTF-16, got .*'utf-8' codec can't decode"),
        ('slide_id,label\ns,a\n'.encode('utf-16-le'), 'it holds zeros, as UTF-16 without its mark does'),
        (b'slide_id,label,Label\ns,a,b\n', 'it has the column label twice'),
        (
            b'case_id,slide_id,censorship,survival_months\nc,s,0,14,5\n',
            'row 2 has 5 cells for 4 columns: is there a dec',
        ),
        (b',train,val,test\n0,s,t,\n', 'must have the columns slide_id, label .* is it a dataset.split_file'),
    ],
)
def test_what_keeps_a_table_from_being_read_is_named(content, said, tmp_path):
    (tmp_path / 'table.csv').write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_table(tmp_path / 'table.csv', 'survival' if b'months' in content else 'classification')


def test_columns_of_other_names(tmp_path):
    """As release notes of public data sets have them."""
    write_table(tmp_path / 'table.csv', ['File Name', 'Class', 'label', 'Data Split'], [['s.svs', 'a', 'x', 'Train']])
    columns = dict(slide_id='File Name', label='Class')
    slides, problems = read_table(tmp_path / 'table.csv', 'classification', columns=columns)
    assert not problems and [(s.slide_id, s.label, s.split) for s in slides] == [('s.svs', 'a', 'train')]
    with pytest.raises(
        ValueError, match='must have the columns slide_id, kind for classification, got file_name, class'
    ):
        read_table(tmp_path / 'table.csv', 'classification', columns=dict(label='Kind'))


# ---- published splits ------------------------------------------------------------------------------------------------


def write_splits(path, train, val, test, layout='names'):
    """CLAM's files: names in columns that end where they end, after the rows' numbers; or a row for each name."""
    if layout == 'bool':
        rows = [[name, *(name in names for names in (train, val, test))] for name in train + val + test]
        write_table(path, ['', 'train', 'val', 'test'], rows)
    else:
        rows = [[i, *(names[i] if i < len(names) else '' for names in (train, val, test))] for i in range(len(train))]
        write_table(path, ['', 'train', 'val', 'test'], rows)


@pytest.mark.parametrize('layout', ['names', 'bool'])
@pytest.mark.parametrize('by', ['slide', 'file', 'number'])
def test_splits_of_slides(layout, by, tmp_path, warnings_of_a_run):
    """Slides that the file does not name are left out, and told; numbers have a point where their column has a gap."""
    name = dict(slide='s{}', file='s{}', number='{}')[by]
    ids = [name.format(i) + ('.svs' if by == 'file' else '') for i in range(8)]
    write_table(tmp_path / 'labels.csv', LABELS[:2], [[slide, 'ab'[i % 2]] for i, slide in enumerate(ids)])
    for i in range(8):
        write_slide(tmp_path / f'{name.format(i)}.h5')
    split = [name.format(i) + ('.0' if by == 'number' and i > 3 else '') for i in range(7)]
    write_splits(tmp_path / 'splits_3.csv', [*split[:4], name.format(99)], split[4:6], split[6:], layout)
    options = dict(split_file='splits_%d.csv', fold=3)
    got = {
        each: [bag[0].slide_id for bag in SlideDataset(str(tmp_path), 'labels.csv', each, **options).bags]
        for each in ('train', 'val', 'test')
    }
    assert got == dict(train=ids[:4], val=ids[4:6], test=ids[6:7])
    said = 'left out are slides of the table that are in no split (1) and names that are not in the table (1).'
    assert warnings_of_a_run[0] == f'splits_3.csv: {said}'


def test_splits_of_cases_without_a_test(cases, tmp_path, capsys):
    """As the first fold of survival sets has them: trained on as it is, and refused before the time of a wsi-repeat."""
    names = [f'c{i}' for i in range(12)]
    write_splits(cases / 'splits_0.csv', names[:8], names[8:], [])
    for fold in (1, 2):
        write_splits(cases / f'splits_{fold}.csv', names[:8], names[8:10], names[10:])
    dataset = SlideDataset(str(cases), 'survival.csv', 'val', task='survival', split_file='splits_0.csv')
    assert [bag[0].case_id for bag in dataset.bags] == names[8:]
    assert [len(bag) for bag in dataset.bags] == [1, 2, 1, 2]
    with pytest.raises(RunError, match='splits_0.csv must have slides in its column test, got none'):
        SlideDataset(str(cases), 'survival.csv', 'test', task='survival', split_file='splits_0.csv')
    changes = SMALL | {'dataset.split_file': 'splits_%d.csv', 'dataset.bins': 2, 'model.num_classes': 2}
    arguments = ['--folds', 3, '--data-root', cases, '--work-dir', tmp_path / 'runs']
    assert run('wsi-repeat', 'wsi/survival', *arguments, *options(**changes)) == 2
    error = capsys.readouterr().err
    assert 'fold0: ' in error and 'test_dataloader.dataset.split=val tests on the validation data' in error
    assert not (tmp_path / 'runs').exists()
    changes['dataset.split_file'] = 'splits_0.csv'
    assert run('wsi-repeat', 'wsi/survival', *arguments, *options(**changes)) == 2
    assert 'must name the file of each of --folds by %d, got splits_0.csv' in capsys.readouterr().err


def test_folds_in_columns_of_their_own(classification, tmp_path):
    """A column for each fold, as some tables have them, tells who is tested in it."""
    names = ('train', 'val', 'test')
    rows = [[f's{i}', 'ab'[i % 2], names[i // 4], names[2 - i // 4]] for i in range(12)]
    write_table(classification / 'labels.csv', ['slide_id', 'label', 'Fold 0', 'Fold 1'], rows)
    options = ['dataset.columns.split=fold_%d', *(f'{key}={value}' for key, value in SMALL.items())]
    arguments = argparse.Namespace(
        config='wsi/classification',
        cfg_options=options,
        data_root=str(classification),
        work_dir=tmp_path / 'runs',
        launcher='none',
    )
    cfg = read_config(arguments)
    configs = plan(cfg, folds=2)
    assert [trial.name for trial in configs] == ['fold0', 'fold1']
    for trial, config in configs.items():
        dataset = SlideDataset(**{key: value for key, value in config.dataset.items() if key != 'type'}, split='test')
        first = 8 - 8 * trial.fold
        assert [bag[0].slide_id for bag in dataset.bags] == [f's{i}' for i in range(first, first + 4)]
    with pytest.raises(
        UsageError,
        match='fold2: table .* must have the columns slide_id, label, fold_2 for classification, got .*fold_1',
    ):
        plan(cfg, folds=3)


@pytest.mark.parametrize(
    'splits, options, said',
    [
        ([['s0', 's1'], ['s1', 's2'], []], {}, "row 3: 's1' must be in one split, got val and train"),
        ([['x', 'y'], ['z', ''], []], {}, 'splits.csv must name slides or cases of the table, such as s0, got none of'),
        ([['s0', 's1'], ['s2', ''], []], dict(folds=3), 'split_file and folds must not both be given'),
    ],
)
def test_bad_splits_are_refused(splits, options, said, classification):
    write_splits(classification / 'splits.csv', *splits)
    with pytest.raises(RunError, match=said):
        SlideDataset(str(classification), 'labels.csv', 'train', split_file='splits.csv', **options)


def test_splits_that_part_a_patient_are_refused(barcodes):
    slides = sorted(path.stem for path in barcodes.glob('*.h5'))
    write_splits(barcodes / 'splits.csv', slides[:31], slides[31:45], slides[45:])
    with pytest.raises(RunError, match="split must be that of case 'TCGA-15-A015' .*, 'train', got 'val'"):
        SlideDataset(str(barcodes), 'labels.csv', 'train', split_file='splits.csv')
    assert len(SlideDataset(str(barcodes), 'labels.csv', 'train', split_file='splits.csv', barcodes=False)) == 31


# ---- patients --------------------------------------------------------------------------------------------------------

BARCODE = 'TCGA-{:02}-A{:03}-01{}-00-DX1.0a1b.svs'  # of one patient, samples A and B


@pytest.fixture
def barcodes(tmp_path):
    """Thirty patients with two slides each, and their labels.csv without cases."""
    names = [BARCODE.format(i, i, sample) for i in range(30) for sample in 'AB']
    write_table(tmp_path / 'labels.csv', LABELS[:2], [[name, 'ab'[i // 2 % 2]] for i, name in enumerate(names)])
    for name in names:
        write_slide(tmp_path / f'{name[:-4]}.h5')
    return tmp_path


def patients(folder, **options):
    """The patients of each split."""
    return {
        split: {bag[0].slide_id[:12] for bag in SlideDataset(str(folder), 'labels.csv', split, folds=3, **options).bags}
        for split in ('train', 'val', 'test')
    }


def test_barcodes_keep_the_slides_of_a_patient_together(barcodes, warnings_of_a_run):
    split = patients(barcodes)
    assert [len(names) for names in split.values()] == [10, 10, 10] and len(set.union(*split.values())) == 30
    said = 'labels.csv has no case_id: the barcodes of 60 slides say that they are of 30 patients'
    assert len(warnings_of_a_run) == 1 and said in warnings_of_a_run[0]
    assert 'dataset.barcodes=False' in warnings_of_a_run[0]
    split = patients(barcodes, barcodes=False)
    assert sum(map(len, split.values())) > 30  # some in two
    assert len(warnings_of_a_run) == 1


@pytest.mark.parametrize(
    'header, rows, said',
    [
        (
            LABELS,
            [[BARCODE.format(1, 1, 'A'), 'a', 'train'], [BARCODE.format(1, 1, 'B').lower(), 'a', 'test']],
            "split must be that of case 'TCGA-01-A001' in row 2, 'train', got 'test'",
        ),
        (
            ['case_id', *LABELS],
            [['x', BARCODE.format(1, 1, 'A'), 'a', 'train'], ['y', BARCODE.format(1, 1, 'B'), 'a', 'train']],
            "case_id must be that of row 2, 'x', as both slides are of patient TCGA-01-A001, got 'y'",
        ),
    ],
)
def test_a_patient_in_two_splits_is_an_error(header, rows, said, tmp_path):
    write_table(tmp_path / 'table.csv', header, rows)
    _, problems = read_table(tmp_path / 'table.csv', 'classification')
    assert len(problems) == 1 and said in problems[0] and 'barcodes=False' in problems[0]
    assert not read_table(tmp_path / 'table.csv', 'classification', barcodes=False)[1]


@pytest.mark.parametrize(
    'content, task, said',
    [
        (
            'slide,label\n',
            'classification',
            'must have the columns slide_id, label for classification, got slide, label',
        ),
        ('', 'survival', 'must have the columns .* for survival, got none'),
        ('slide_id,label\n', 'regression', "task must be one of classification, survival, got 'regression'"),
        (b'slide_id,label\n\xff\xfe,a\n', 'classification', 'must be a CSV'),
    ],
)
def test_what_is_no_table_is_refused(content, task, said, tmp_path):
    (tmp_path / 'table.csv').write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said):
        read_table(tmp_path / 'table.csv', task)


def test_a_spreadsheets_table_is_read(tmp_path):
    (tmp_path / 'table.csv').write_bytes('\ufeffslide_id,label,site\r\n s1 ,a,x\r\n\r\ns2,b,y\r\n'.encode())
    slides, problems = read_table(tmp_path / 'table.csv', 'classification')
    assert not problems and [(s.row, s.slide_id, s.case_id, s.label) for s in slides] == [
        (2, 's1', 's1', 'a'),
        (4, 's2', 's2', 'b'),
    ]


def slides_of(labels, slides_per_case=2):
    return [
        SimpleNamespace(case_id=f'c{i}', label=label, censored=None, fold=None)
        for i, label in enumerate(labels)
        for _ in range(slides_per_case)
    ]


@pytest.mark.parametrize('folds', [3, 5])
def test_folds_divide_the_cases(folds):
    """Every case is tested once; no fold has a case in two splits; each label is spread evenly."""
    labels = dict(zip((f'c{i}' for i in range(40)), 'a' * 30 + 'b' * 10, strict=True))
    tested = Counter()
    for fold in range(folds):
        splits = split_cases(slides_of(labels.values()), folds, fold)
        assert splits.keys() == labels.keys() and set(splits.values()) == {'train', 'val', 'test'}
        test = [case for case, split in splits.items() if split == 'test']
        tested.update(test)
        after = split_cases(slides_of(labels.values()), folds, (fold + 1) % folds)
        assert {case for case, split in splits.items() if split == 'val'} == {
            case for case, split in after.items() if split == 'test'
        }
        counts = Counter(labels[case] for case in test)
        assert abs(counts['a'] - 30 / folds) <= 1 and abs(counts['b'] - 10 / folds) <= 1
    assert tested == Counter(labels.keys())
    assert split_cases(slides_of(labels.values()), folds, 0) != split_cases(
        slides_of(labels.values()), folds, 0, seed=1
    )


@pytest.mark.parametrize('folds, fold', [(2, 0), (5, 5), (5, -1), (41, 0)])
def test_bad_folds_are_refused(folds, fold):
    with pytest.raises(ValueError, match=f'got {folds} folds of 40 cases, and fold {fold}'):
        split_cases(slides_of('ab' * 20), folds, fold)


def test_folds_of_the_table():
    """In the order of their numbers, whatever these are, and whatever the seed."""
    slides = [
        SimpleNamespace(row=i, slide_id=f's{i}', case_id=f'c{i // 2}', label='a', censored=None, fold=fold)
        for i, fold in enumerate(['10', '10', '2', '2', '7', '7'])
    ]
    assert split_cases(slides, 3, 0) == split_cases(slides, 3, 0, seed=1) == dict(c0='train', c1='test', c2='val')
    assert split_cases(slides, 3, 2) == dict(c0='test', c1='val', c2='train')
    with pytest.raises(ValueError, match='folds must be 2, as many as the column fold has, got 3'):
        split_cases([*slides[:4], *(SimpleNamespace(**{**vars(s), 'fold': '2'}) for s in slides[4:])], 3, 0)
    for fold, said in (('2', "fold must be that of its case 'c0', 10, got 2"), (None, "whole number, got 'none'")):
        slides[1].fold = fold
        with pytest.raises(ValueError, match=f"row 1, slide 's1': .*{said}"):
            split_cases(slides, 3, 0)


# ---- files -----------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return print, ('this code must not run',)


def h5(**arrays):
    def write(path):
        with h5py.File(path / 's.h5', 'w') as file:
            for key, value in arrays.items():
                file[key] = value

    return write


def features_with(row, value):
    features = torch.randn(PATCHES, WIDTH)
    features[row, 2] = value
    return features


CELLS = torch.cartesian_prod(torch.arange(3), torch.arange(3)) * 512
FILES = {
    'missing': (lambda path: None, 'no features, neither s.h5 nor s.pt'),
    'nan': (
        lambda path: write_slide(path / 's.h5', features_with(4, math.nan)),
        'features row 4 must be finite, got nan',
    ),
    'inf': (lambda path: write_slide(path / 's.h5', features_with(7, math.inf)), 'features row 7 .* inf in column 2'),
    'lengths': (lambda path: write_slide(path / 's.h5', coords=CELLS[:4]), r'coords must be \(9, 2\), got \(4, 2\)'),
    'fraction': (
        lambda path: write_slide(path / 's.h5', coords=CELLS + torch.eye(9)[:, :2] / 2),
        r'coords row 0 must be whole pixels, got \[0.5, 0.0\]',
    ),
    'negative': (
        lambda path: write_slide(path / 's.h5', coords=CELLS - 1),
        r'coords row 0 must lie on the slide, got \(-1, -1\)',
    ),
    'one axis': (lambda path: write_slide(path / 's.h5', torch.randn(9)), r'features must be \(n, width\), got \(9,\)'),
    'integers': (lambda path: write_slide(path / 's.h5', torch.ones(9, 2).int()), 'features .* torch.int64'),
    'text': (h5(features='abc', coords='abc'), r'known layout .*, got coords \(a single object\), features'),
    'no HDF5': (lambda path: (path / 's.h5').write_bytes(b'nonsense'), 's.h5 cannot be read as HDF5'),
    'no pt': (lambda path: (path / 's.pt').write_bytes(b'nonsense'), 's.pt cannot be read as tensors'),
    'code': (lambda path: torch.save([Evil()], path / 's.pt'), 's.pt cannot be read as tensors'),
}
GRIDS = {
    'far off': (
        lambda path: write_slide(path / 's.h5', coords=CELLS + 10**8 * torch.eye(9)[:, :1].long()),
        'coords must span at most .* is patch_size right',
    ),
    'twice': (
        lambda path: write_slide(path / 's.h5', coords=CELLS[[0, 1, 2, 3, 4, 5, 6, 7, 1]]),
        r'one patch into a cell .* rows 1 and 8 in one',
    ),
    'width': (
        lambda path: write_slide(path / 's.h5', torch.randn(9, 5)),
        'as wide as those of the first slide, 6, got 5',
    ),
}


@pytest.mark.parametrize('name', FILES)
def test_odd_files_are_refused(name, tmp_path, capsys):
    write, said = FILES[name]
    write(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        read_slide(*SlideFolder(tmp_path).find('s'))
    assert not capsys.readouterr().out


@pytest.mark.parametrize('name', FILES | GRIDS)
def test_check_names_slide_and_row(name, tmp_path, capsys):
    write, said = (FILES | GRIDS)[name]
    write_slide(tmp_path / 'first.h5')
    write(tmp_path)
    write_table(tmp_path / 'labels.csv', LABELS, [['first', 'a', 'train'], ['s', 'b', 'test']])
    assert main(['wsi-check', str(tmp_path / 'labels.csv'), str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert re.search(f"labels.csv row 3, slide 's': .*{said}", captured.out), captured.out
    assert captured.out.count('\n') == 1 and '1 problems in' in captured.err


def test_check_lists_all_problems(classification, capsys):
    (classification / 's3.h5').unlink()
    write_slide(classification / 's5.h5', features_with(1, math.nan))
    command = ['wsi-check', str(classification / 'labels.csv'), str(classification), '--classes', 'a', 'c']
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out.count("must be one of a, c, got 'b'") == 6
    assert '6 problems' in captured.err  # slides of a wrong row are not looked at
    assert main(command[:3] + ['--grid-size', '3', '4']) == 2
    assert capsys.readouterr().out.count('must lie on a grid of 3 x 4 cells') == 10


def test_check_knows_splits_columns_and_barcodes(barcodes, capsys):
    """All that a data set takes beside its table, so that nothing is told by a training first."""
    (barcodes / 'labels.csv').write_bytes((barcodes / 'labels.csv').read_bytes().replace(b'label', b'Kind'))
    command = ['wsi-check', str(barcodes / 'labels.csv'), str(barcodes), '--columns', 'label=Kind']
    assert main(command) == 0
    assert 'labels.csv has no case_id: the barcodes of 60 slides' in capsys.readouterr().out
    slides = sorted(path.stem for path in barcodes.glob('*.h5'))
    write_splits(barcodes / 'splits.csv', slides[:31], slides[31:45], slides[45:])
    command += ['--split-file', str(barcodes / 'splits.csv')]
    assert main(command) == 2
    assert "split must be that of case 'TCGA-15-A015'" in capsys.readouterr().out
    assert main([*command, '--no-barcodes']) == 0
    assert 'slides of train' in capsys.readouterr().out
    assert main([*command[:4], 'Kind']) == 2
    assert '--columns must be OURS=THEIRS' in capsys.readouterr().err


@pytest.mark.parametrize('task', ['classification', 'survival'])
def test_check_counts(task, request, capsys):
    folder = request.getfixturevalue('classification' if task == 'classification' else 'cases')
    table = 'labels.csv' if task == 'classification' else 'survival.csv'
    assert main(['wsi-check', str(folder / table), str(folder)]) == 0
    counts = dict(re.split('  +', line) for line in capsys.readouterr().out.splitlines())
    assert counts['largest grid, height x width'] == '4 x 4' and counts['patches of a slide'] == '9 to 9'
    if task == 'classification':
        assert (counts['slides'], counts['slides of train'], counts['slides of class b']) == ('12', '6', '6')
    else:
        assert (counts['slides'], counts['cases'], counts['cases with an event']) == ('18', '12', '8')


@pytest.mark.parametrize(
    'argv, said',
    [
        (['no.csv', '.'], 'CSV must be a file, got no.csv'),
        (['labels.csv', 'nowhere'], 'DIR must be a folder, got nowhere'),
        (['labels.csv', '.', '--patch-size', '0'], '--patch-size must be at least 1, got 0'),
        (['labels.csv', '.', '--task', 'survival'], 'must have the columns case_id'),
    ],
)
def test_bad_arguments_of_check(argv, said, classification, capsys, monkeypatch):
    monkeypatch.chdir(classification)
    assert main(['wsi-check', *argv]) == 2
    assert said in capsys.readouterr().err


# ---- data set --------------------------------------------------------------------------------------------------------


def test_slides_are_read_when_asked_for_and_kept_by_an_option(classification, monkeypatch):
    reads = []
    monkeypatch.setattr(
        'vssm.models.mm.wsi_data.read_slide', lambda path, **_: reads.append(path.stem) or read_slide(path)
    )
    for cache, expected in ((False, ['s0', 's1', 's0']), (True, ['s0', 's1'])):
        reads.clear()
        dataset = SlideDataset(str(classification), 'labels.csv', 'train', cache=cache)
        assert not reads and dataset.metainfo['classes'] == ('a', 'b') and len(dataset) == 6
        samples = [dataset[0], dataset[1], dataset[0]]
        assert reads == expected
        assert torch.equal(samples[0]['inputs']['features'], samples[2]['inputs']['features'])
        assert [sample['data_samples']['label'] for sample in samples] == [0, 1, 0]


def test_a_case_has_all_its_slides(cases):
    dataset = SlideDataset(str(cases), 'survival.csv', 'test', task='survival', folds=4)
    names = [dataset[i]['data_samples']['name'] for i in range(len(dataset))]
    assert len(names) == 3
    for i, name in enumerate(names):
        inputs = dataset[i]['inputs']
        count = 1 + int(name[1:]) % 2
        assert inputs['lengths'] == [PATCHES] * count
        first = read_slide(cases / f'{name}_0.h5')
        assert torch.equal(inputs['features'][:PATCHES], first.features) and len(inputs['coords']) == PATCHES * count


def test_time_bins_come_from_the_training_data(cases):
    """What the cases of validation and test lived is not looked at."""

    def dataset(split):
        return SlideDataset(str(cases), 'survival.csv', split, task='survival', folds=4)

    rows = list(csv.reader(open(cases / 'survival.csv')))
    splits = split_cases(read_table(cases / 'survival.csv', 'survival')[0], 4, 0)
    lived = {row[0]: (float(row[3]), row[2] == '1') for row in rows[1:] if splits[row[0]] == 'train'}
    times, censored = map(torch.tensor, zip(*lived.values(), strict=True))
    train = dataset('train')
    assert torch.equal(train.edges, time_edges(times, censored, 4)) and len(train.metainfo['classes']) == 4
    for sample in train:
        samples = sample['data_samples']
        assert samples['bin'] == (train.edges <= samples['months']).sum()
    for row in rows[1:]:
        if splits[row[0]] != 'train':
            row[3] = '9999'
    write_table(cases / 'survival.csv', rows[0], rows[1:])
    assert torch.equal(dataset('train').edges, train.edges)
    assert set(dataset('test')[0]['data_samples']) == {'name', 'months', 'censored'}


@pytest.mark.parametrize(
    'change, options, said',
    [
        (lambda path: (path / 'labels.csv').unlink(), {}, 'labels.csv does not exist'),
        (lambda path: (path / 's4.h5').unlink(), {}, "labels.csv row 6, slide 's4': no features, neither s4.h5"),
        (lambda path: None, dict(classes=['a', 'c']), "row 3, slide 's1': label must be .* lists all 6 problems"),
        (lambda path: None, dict(split='some'), "split must be train, val or test and have slides, .* got 'some'"),
        (lambda path: None, dict(folds=2), 'folds must be 3 or more'),
        (
            lambda path: write_table(path / 'labels.csv', LABELS[:2], [['s0', 'a'], ['s1', 'b']]),
            {},
            "split must be .* by a column of that name, by split_file or by folds, got 'train' with none",
        ),
        (
            lambda path: write_table(path / 'labels.csv', LABELS, [['s0', 'a', 'train'], ['s1', 'b', 'val']]),
            dict(split='val'),
            "row 3, slide 's1': label must be one of the training data, got 'b'",
        ),
        (lambda path: None, dict(task='survival'), 'must have the columns case_id, slide_id'),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(change, options, said, classification):
    change(classification)
    with pytest.raises(RunError, match=said):
        SlideDataset(str(classification), 'labels.csv', **dict(dict(split='train'), **options))


def test_a_slide_that_breaks_later_is_named(classification):
    dataset = SlideDataset(str(classification), 'labels.csv', 'train')
    write_slide(classification / 's4.h5', features_with(3, math.nan))
    with pytest.raises(RunError, match="labels.csv row 6, slide 's4': s4.h5: features row 3 must be finite"):
        dataset[4]


@pytest.mark.parametrize(
    'split, kind, said',
    [
        (
            'val',
            'label',
            "the slides of val are all of class 'a', so that AUC is not defined: the last weights count as",
        ),
        ('test', 'label', "the slides of test are all of class 'a', so that AUC is not defined."),
        ('val', 'event', 'no case of val has an event, so that the concordance index is not defined: the last weights'),
        ('test', 'event', 'no case of test has an event, so that the concordance index is not defined.'),
    ],
)
def test_a_split_without_a_metric_is_told(split, kind, said, tmp_path, warnings_of_a_run):
    """Before a training, and it does not end it."""
    rows, header = [], LABELS if kind == 'label' else [*SURVIVAL, 'split']
    for i in range(12):
        name = f's{i}'
        write_slide(tmp_path / f'{name}.h5')
        of = ('train', 'train', 'val', 'test')[i // 3]
        odd = of == split
        rows.append([name, 'a' if odd else 'ab'[i % 2], of] if kind == 'label' else [name, name, int(odd), i + 1, of])
    write_table(tmp_path / 'table.csv', header, rows)
    task = dict(task='classification') if kind == 'label' else dict(task='survival', bins=2)
    for each in ('train', 'val', 'test'):
        SlideDataset(str(tmp_path), 'table.csv', each, **task)
    assert len(warnings_of_a_run) == 1 and said in warnings_of_a_run[0]
    if split == 'test':
        return
    changes = SMALL | {'dataset.ann_file': 'table.csv', 'train_dataloader.batch_size': 2}
    if kind == 'event':
        changes |= {'dataset.bins': 2, 'model.num_classes': 2}
    arguments = ['--data-root', tmp_path, '--work-dir', tmp_path / 'run', *options(**changes)]
    assert run('train', 'wsi/classification' if kind == 'label' else 'wsi/survival', *arguments) == 0
    _, metadata = read_checkpoint(tmp_path / 'run' / 'best.safetensors')
    assert metadata['wsi/auc' if kind == 'label' else 'wsi/c_index'] == 'nan' and metadata['epoch'] == '2'


def test_a_training_without_events_is_refused(cases):
    rows = list(csv.reader(open(cases / 'survival.csv')))
    write_table(cases / 'survival.csv', rows[0], [[row[0], row[1], 1, row[3]] for row in rows[1:]])
    with pytest.raises(
        RunError, match='survival.csv: the cases of the training must have events, got none of .* cases'
    ):
        SlideDataset(str(cases), 'survival.csv', 'train', task='survival', bins=None, folds=3)


# ---- models and metrics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'options, said',
    [
        (dict(loss='cox', num_classes=4), "'cox', with num_classes=1; got 'cox' and 4"),
        (dict(loss='nll', num_classes=1), "got 'nll' and 1"),
        (dict(loss='mse', num_classes=4), "got 'mse' and 4"),
        (dict(alpha=1.5, num_classes=4), 'alpha must be within 0 and 1, got 1.5'),
    ],
)
def test_bad_losses_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        SlideSurvival('mean_mil', in_dim=WIDTH, **options)


def evaluate(metric, samples):
    for i in range(0, len(samples), 3):
        metric.process(None, samples[i : i + 3])
    return metric.evaluate(len(samples))


def predicted(labels, scores, losses=None):
    """What a SlideClassifier predicts."""
    losses = losses or [0.0] * len(labels)
    rows = enumerate(zip(labels, scores, losses, strict=True))
    return [dict(name=f's{i}', case=f'c{i}', label=y, scores=s, loss=loss) for i, (y, s, loss) in rows]


@pytest.mark.parametrize('classes', [2, 4])
def test_metrics_of_classes_are_scikit_learns(classes):
    sklearn = pytest.importorskip('sklearn.metrics')
    scores, labels = torch.randn(50, classes).softmax(1), torch.randint(classes, (50,))
    samples = predicted(labels.tolist(), scores.tolist(), torch.arange(50.0).tolist())
    metric = SlideAccuracy()
    metric.dataset_meta = dict(classes=tuple('abcd'[:classes]))
    got, guesses = evaluate(metric, samples), scores.argmax(1)
    aucs = {f'wsi/auc/{"abcd"[k]}': sklearn.roc_auc_score(labels == k, scores[:, k]) for k in range(classes)}
    assert got == pytest.approx(
        {
            'wsi/accuracy': sklearn.accuracy_score(labels, guesses),
            'wsi/macro_f1': sklearn.f1_score(labels, guesses, average='macro'),
            'wsi/auc': statistics.fmean(aucs.values()),
            'wsi/balanced_accuracy': sklearn.balanced_accuracy_score(labels, guesses),
            'wsi/quadratic_kappa': sklearn.cohen_kappa_score(labels, guesses, weights='quadratic'),
            'wsi/loss': 24.5,
            **(aucs if classes > 2 else {}),
        }
    )
    expected = sklearn.confusion_matrix(labels, guesses, labels=range(classes))
    assert confusion_matrix(samples, classes).tolist() == expected.tolist()


def test_metrics_of_classes_by_hand():
    """Grades 0, 0, 0, 1, 2 taken for 0, 0, 2, 1, 1, in which a fourth does not occur."""
    guesses = torch.eye(4)[[0, 0, 2, 1, 1]].tolist()
    got = evaluate(SlideAccuracy(), predicted([0, 0, 0, 1, 2], guesses))
    assert got['wsi/balanced_accuracy'] == pytest.approx((2 / 3 + 1 + 0) / 3)
    observed = 2**2 + 1**2  # squared distances of grade and guess; by chance those of all pairs, over 5
    by_chance = (3 * (2 * 0 + 2 * 1 + 1 * 4) + 1 * (2 * 1 + 2 * 0 + 1 * 1) + 1 * (2 * 4 + 2 * 1 + 1 * 0)) / 5
    assert got['wsi/quadratic_kappa'] == pytest.approx(1 - observed / by_chance)
    assert math.isnan(got['wsi/auc/3']) and got['wsi/auc/1'] == 3.5 / 4  # a tie with the last slide is half a pair
    assert confusion_matrix(predicted([0, 0, 0, 1, 2], guesses), 4).tolist() == [
        [2, 0, 1, 0],
        [0, 1, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 0, 0],
    ]


def test_auc_of_classes_that_do_not_occur():
    samples = predicted([0, 1], [[0.8, 0.1, 0.1], [0.3, 0.6, 0.1]])
    assert evaluate(SlideAccuracy(), samples)['wsi/auc'] == 1.0
    assert math.isnan(evaluate(SlideAccuracy(), samples[:1])['wsi/auc'])


def test_cases_are_drawn_whole():
    """Of a case of one slide and one of three, means of 0, 3/4 and 1 can come, and no others."""
    means = []

    def measure(columns):
        means.append(columns['x'].mean().item())
        return dict(mean=means[-1], undefined=math.nan if means[-1] == 1 else 2.0)

    columns, cases = dict(x=torch.tensor([1.0, 0.0, 1.0, 1.0])), ['b', 'a', 'b', 'b']
    ends = bootstrap(measure, columns, cases, times=200, seed=0)
    assert set(means) == {0.0, 0.75, 1.0} and ends == dict(mean=(0.0, 1.0), undefined=(2.0, 2.0))
    assert bootstrap(measure, columns, cases, times=3, seed=1) == bootstrap(measure, columns, cases, times=3, seed=1)


def test_the_interval_of_a_mean_is_the_textbooks():
    x = torch.randn(400, dtype=torch.float64)
    ends = bootstrap(lambda columns: dict(mean=columns['x'].mean().item()), dict(x=x), list(range(400)), 1000, 0)
    half = 1.96 * x.std().item() / 20
    assert ends['mean'] == pytest.approx((x.mean().item() - half, x.mean().item() + half), abs=0.1 * half)


def test_metrics_have_intervals():
    samples = predicted([i % 2 for i in range(40)], torch.rand(40, 2).tolist())
    got = evaluate(SlideAccuracy(bootstrap=20), samples)
    assert (
        evaluate(SlideAccuracy(bootstrap=20), samples) == got != evaluate(SlideAccuracy(bootstrap=20, seed=1), samples)
    )
    for name, value in evaluate(SlideAccuracy(), samples).items():
        assert got[name] == value and got[f'{name}_2.5%'] <= value <= got[f'{name}_97.5%']


@pytest.mark.parametrize('ties', [False, True])
def test_the_concordance_index_is_lifelines(ties):
    lifelines = pytest.importorskip('lifelines.utils')
    risk, months, censored = torch.randn(60), torch.rand(60) * 50, torch.rand(60) < 0.4
    if ties:
        risk, months = risk.round(decimals=1), (months / 5).round()
    rows = zip(risk.tolist(), months.tolist(), censored.tolist(), strict=True)
    samples = [dict(name='', risk=r, months=m, censored=c) for r, m, c in rows]
    expected = lifelines.concordance_index(months, -risk, ~censored)
    assert evaluate(ConcordanceIndex(), samples)['wsi/c_index'] == pytest.approx(expected, abs=1e-6)
    order = torch.randperm(60).tolist()
    assert evaluate(ConcordanceIndex(), [samples[i] for i in order])['wsi/c_index'] == pytest.approx(expected, abs=1e-6)
    for sample in samples:
        sample['censored'] = True
    assert math.isnan(evaluate(ConcordanceIndex(), samples)['wsi/c_index'])


@pytest.mark.parametrize(
    'months, censored, risks, expected',
    [
        ([10.0, 10.0], [False, True], [2.0, 1.0], 1.0),
        ([10.0, 10.0], [False, True], [1.0, 2.0], 0.0),
        ([10.0, 10.0], [False, False], [1.0, 2.0], math.nan),
        ([3.0, 10.0, 10.0], [True, False, True], [9.0, 2.0, 2.0], 0.5),
        ([3.0, 10.0], [True, False], [1.0, 2.0], math.nan),
    ],
)
def test_an_event_counts_against_a_censoring_at_the_same_last_month(months, censored, risks, expected):
    rows = zip(months, censored, risks, strict=True)
    samples = [dict(name='', months=m, censored=c, risk=r) for m, c, r in rows]
    assert evaluate(ConcordanceIndex(), samples)['wsi/c_index'] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    'censored, expected',
    [
        # Hazards 1, 2 and 3: the first of all three has the event, and the second of two.
        ([False, False, True], (math.log(6 / 1) + math.log(5 / 2)) / 2),
        ([True, True, True], math.nan),
    ],
)
def test_the_loss_of_cox_is_over_all_cases(censored, expected):
    rows = zip((1, 2, 3), (1.0, 2.0, 3.0), censored, strict=True)
    samples = [dict(name='', risk=math.log(r), months=m, censored=c) for r, m, c in rows]
    assert evaluate(ConcordanceIndex(), samples)['wsi/loss'] == pytest.approx(expected, nan_ok=True)
    for sample in samples:  # of time bins whose edges are not known
        sample['survival'] = [0.5, 0.2]
    assert set(evaluate(ConcordanceIndex(), samples)) == {'wsi/c_index'}


# ---- classes of unequal size, and the end of a training --------------------------------------------------------------


@pytest.fixture
def unequal(classification):
    """The slides with three of class a to train on and one of b."""
    splits = ['train'] * 4 + ['val'] * 4 + ['test'] * 4
    rows = [[f's{i}', 'b' if i % 4 == 3 else 'a', split] for i, split in enumerate(splits)]
    write_table(classification / 'labels.csv', LABELS, rows)
    return classification


@pytest.mark.parametrize('weights', ['balanced', dict(a=2 / 3, b=2.0)])
def test_weights_count_in_batches_of_one(weights, unequal):
    """Where cross-entropy's own weights cancel out: 4 slides of 2 classes, 3 of a and 1 of b."""
    dataset = SlideDataset(str(unequal), 'labels.csv', 'train', class_weights=weights)
    assert dataset.notes['class_weights'] == pytest.approx(dict(a=4 / (2 * 3), b=4 / (2 * 1)))
    model = SlideClassifier('mean_mil', in_dim=WIDTH).eval()
    for i, weight in ((0, 2 / 3), (3, 2.0)):
        inputs, samples = ([dataset[i][key]] for key in ('inputs', 'data_samples'))
        expected = -weight * model(inputs).log_softmax(1)[0, int(i == 3)].item()
        assert model(inputs, samples, 'predict')[0]['loss'] == pytest.approx(expected)
        assert model(inputs, samples, 'loss')['loss_cls'].item() == pytest.approx(expected)
    validation = SlideDataset(str(unequal), 'labels.csv', 'val', class_weights=weights)
    assert validation.notes['class_weights'] == dataset.notes['class_weights']


@pytest.mark.parametrize(
    'options, said',
    [
        (dict(class_weights=dict(a=1.0)), "must be 'balanced' or a positive number for each of a, b"),
        (dict(class_weights=dict(a=1.0, b=0.0)), 'got .* 0.0'),
        (dict(class_weights='even'), 'got even'),
        (dict(class_weights='balanced', classes=['a', 'b', 'c']), 'slides of each class, got .*3'),
    ],
)
def test_bad_weights_are_refused(options, said, unequal):
    with pytest.raises(RunError, match=said):
        SlideDataset(str(unequal), 'labels.csv', 'train', **options)


def test_balanced_samples(unequal):
    dataset = SlideDataset(str(unequal), 'labels.csv', 'train')
    sampler = BalancedSampler(dataset, seed=0)
    drawn = []
    for epoch in range(200):
        sampler.set_epoch(epoch)
        indices = list(sampler)
        assert len(indices) == len(sampler) == 4 and list(sampler) == indices
        drawn += indices
    counts = Counter(drawn)
    assert abs(counts[3] / 800 - 1 / 2) < 0.05 and all(abs(counts[i] / 800 - 1 / 6) < 0.05 for i in range(3))


def test_balanced_samples_of_a_survival_have_as_many_events(cases):
    dataset = SlideDataset(str(cases), 'survival.csv', 'all', task='survival')
    censored = [sample['data_samples']['censored'] for sample in dataset]
    assert 0 < sum(censored) < len(censored) / 2
    drawn = [censored[i] for seed in range(100) for i in BalancedSampler(dataset, seed=seed)]
    assert abs(sum(drawn) / len(drawn) - 1 / 2) < 0.1


def test_a_training_ends_by_its_validation_loss(unequal, tmp_path, monkeypatch, capsys):
    """Of the losses the second is the lowest; two more, and six in all, are the end. A repetition goes no further."""
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: math.nan, 5: 2.0}
    evaluated = []

    def evaluate(self, size):
        evaluated.append((MessageHub.get_current_instance().get_info('epoch') or 0) + 1)  # none in a test
        return {'wsi/loss': losses.get(evaluated[-1], 9.0), 'wsi/auc': 0.5}

    monkeypatch.setattr(Evaluator, 'evaluate', evaluate)
    changes = SMALL | {
        'model.model_name': 'mean_mil',
        'train_cfg.max_epochs': 9,
        'default_hooks.early_stop.patience': 2,
        'default_hooks.early_stop.begin': 6,
        'train_dataloader.sampler.type': 'BalancedSampler',
        'dataset.class_weights': 'balanced',
    }
    arguments = ['--seeds', 0, '--data-root', unequal, '--work-dir', tmp_path / 'runs', *options(**changes)]
    assert run('wsi-repeat', 'wsi/classification_clam', *arguments) == 0
    folder = tmp_path / 'runs' / 'seed0'
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob('epoch_*.pth')}
    assert written.keys() == {'epoch_5.pth', 'epoch_6.pth'}
    metadata = read_checkpoint(folder / 'best.safetensors')[1]
    assert (metadata['epoch'], metadata['wsi/loss']) == ('2', '1.0')
    before = len(evaluated)
    assert run('wsi-repeat', 'wsi/classification_clam', *arguments) == 0
    assert written == {path.name: path.stat().st_mtime_ns for path in folder.glob('epoch_*.pth')}
    assert len(evaluated) == before + 2 and read_checkpoint(folder / 'best.safetensors')[1] == metadata


# ---- the way from check to heat map ----------------------------------------------------------------------------------


def run(*argv):
    return main([str(argument) for argument in argv])


def test_the_whole_path(classification, tmp_path, capsys):
    """Check, train, killed and resumed as if nothing had happened, test, heat map: from the command line."""
    assert run('wsi-check', classification / 'labels.csv', classification) == 0
    changes = SMALL | {'train_cfg.max_epochs': 6, 'optim_wrapper.optimizer.lr': 3e-3}
    arguments = ['vssm.tools.train', 'wsi/classification', '--data-root', classification, *options(**changes)]
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    unbroken = start(*arguments, '--work-dir', whole)
    workers = {'train_dataloader.num_workers': 1, 'val_dataloader.num_workers': 1}
    process = start(*arguments[: -len(changes)], *options(**changes | workers)[1:], '--work-dir', killed)
    wait_for(killed / 'epoch_2.pth', process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / 'epoch_6.pth').exists()
    finish(start(*arguments, '--work-dir', killed, '--resume'))
    finish(unbroken)
    assert losses(killed) == losses(whole) and len(losses(whole)) == 36
    for name in ('checkpoint.safetensors', 'best.safetensors'):
        (expected, expected_metadata), (weights, metadata) = (read_checkpoint(f / name) for f in (whole, killed))
        assert all(torch.equal(value, expected[key]) for key, value in weights.items())
        assert {**metadata, 'run': ''} == {**expected_metadata, 'run': ''}
    assert float(metadata['wsi/auc']) >= 0.5 and metadata['seed'] == '0' and metadata['model'] == 'mamba2d_mil'

    best, test = killed / 'best.safetensors', tmp_path / 'test'
    arguments = ['--data-root', classification, '--work-dir', test, *options(**changes)]
    assert run('test', 'wsi/classification', best, *arguments) == 0
    said = capsys.readouterr().out
    assert all(metric in said for metric in ('wsi/accuracy', 'wsi/macro_f1', 'wsi/auc'))
    rows = list(csv.DictReader(open(test / 'predictions.csv')))
    assert [row['slide_id'] for row in rows] == ['s9', 's10', 's11']
    model = create_mil_model('mamba2d_mil', **json.loads(metadata['model_args'])).eval()
    model.load_state_dict(weights)
    for row in rows:
        bag = read_slide(classification / f'{row["slide_id"]}.h5')
        probabilities = model(bag.features, bag.coords).softmax(1)[0]
        torch.testing.assert_close(torch.tensor([float(row['p_a']), float(row['p_b'])]), probabilities)

    picture = tmp_path / 'heatmap.png'
    assert run('wsi-heatmap', best, classification / 's9.h5', '--output', picture) == 0
    assert 'drawn on the grid: no --slide is given' in capsys.readouterr().out.replace('\n', ' ')
    assert Image.open(picture).size == (750, 650)


HERE = {key: value for key, value in SMALL.items() if not key.startswith('model.')}  # where and how fast it runs
TRAINED = {
    'model.crop': True,
    'model.pad_token': 'zero',
    'model.drop_rate': 0.1,
    'dataset.classes': ['b', 'a'],
    'dataset.columns': {'label': 'Subtype'},
}


@pytest.mark.slow
def test_the_way_from_features_to_a_heat_map_is_as_the_page_says(tmp_path, monkeypatch, capsys):
    """Its commands as they stand, but with a network and a training that take a second."""
    page = (BENCHMARKS.parent / 'docs' / 'whole-slides.md').read_text()
    section = re.search(r'^## From a folder.*?^## ', page, re.DOTALL | re.MULTILINE)[0]
    commands = re.findall(r'^vssm (.*)', section, flags=re.MULTILINE)
    assert [command.split()[0] for command in commands] == ['wsi-check', 'wsi-repeat', 'wsi-heatmap']
    monkeypatch.chdir(tmp_path)
    Path('features').mkdir()
    rows = [(f's{i:03}', 'luad' if i % 2 else 'lusc') for i in range(1, 16)]
    write_table('features/labels.csv', ['slide_id', 'label'], rows)
    for name, _ in rows:
        write_slide(Path('features', f'{name}.h5'))
    for command in commands:
        changes = options(**{**SMALL, 'train_cfg.max_epochs': 1}) if 'wsi-repeat' in command else []
        assert main([*command.split(), *changes]) == 0
    said = capsys.readouterr().out
    assert re.search(r'fold4 .*\n.*mean', said)
    assert Image.open('s001.png').size > (100, 100)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A work dir and its data: a network cropped to the tissue, that was told its classes in another order."""
    folder = tmp_path_factory.mktemp('trained')
    for i in range(12):
        write_slide(folder / f's{i}.h5', torch.randn(PATCHES, WIDTH) + 3 * (i % 2))
    write_table(folder / 'labels.csv', ['slide_id', 'Subtype', 'split'], labels('ab'))
    arguments = ['--data-root', folder, '--work-dir', folder / 'run', *options(**SMALL | TRAINED)]
    assert run('train', 'wsi/classification', *arguments) == 0
    return folder


def predictions(config, checkpoint, folder, tmp_path, *extra, **changes):
    """The table of a test."""
    arguments = ['--data-root', folder, '--work-dir', tmp_path / 'test', *options(**HERE | changes), *extra]
    assert run('test', config, checkpoint, *arguments) == 0
    return (tmp_path / 'test' / 'predictions.csv').read_text()


@pytest.mark.parametrize('file', ['best.safetensors', 'epoch_2.pth'])
def test_the_checkpoint_decides(file, trained, tmp_path, capsys):
    """A test without the options of the training is that with them, and says what it has taken over."""
    checkpoint = trained / 'run' / file
    expected = predictions('wsi/classification', checkpoint, trained, tmp_path, **SMALL | TRAINED)
    assert expected.startswith('slide_id,label,p_b,p_a')
    assert 'As in the training' not in capsys.readouterr().out
    assert predictions('wsi/classification', checkpoint, trained, tmp_path) == expected
    said = capsys.readouterr().out
    assert all(f'{key}={value}' in said for key, value in TRAINED.items() if key != 'model.drop_rate'), said


@pytest.mark.parametrize('file', ['best.safetensors', 'epoch_2.pth'])
@pytest.mark.parametrize(
    'changes, said',
    [
        ({'model.crop': False}, 'model.crop=True, not False'),
        ({'model.depth': 2}, 'model.depth=1, not 2'),
        ({'model.model_name': 'mamba_mil'}, 'model.model_name=mamba2d_mil, not mamba_mil'),
        ({'dataset.classes': ['a', 'b']}, "dataset.classes=['b', 'a'], not ['a', 'b']"),
        ({'test_dataloader.dataset.classes': ['a', 'b']}, "dataset.classes=['b', 'a'], not ['a', 'b']"),
        ({'dataset.folds': 3}, 'dataset.folds=None, not 3'),
        ({'dataset.columns': {'label': 'split'}}, "dataset.columns={'label': 'Subtype'}, not {'label': 'split'}"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(file, changes, said, trained, tmp_path, capsys):
    arguments = ['--data-root', trained, '--work-dir', tmp_path, *options(**HERE | changes)]
    assert run('test', 'wsi/classification', trained / 'run' / file, *arguments) == 2
    error = capsys.readouterr().err
    assert f'was trained with {said}' in error and error.count('\n') == 1
    assert not (tmp_path / 'predictions.csv').exists()


def test_what_contradicts_the_checkpoint_can_be_forced(trained, tmp_path):
    checkpoint = trained / 'run' / 'best.safetensors'
    changes = {'dataset.classes': ['a', 'b']}
    table = predictions('wsi/classification', checkpoint, trained, tmp_path, '--force', **changes)
    assert table.startswith('slide_id,label,p_a,p_b')


def test_a_checkpoint_of_another_task_is_refused(trained, tmp_path, capsys):
    arguments = ['--data-root', trained, '--work-dir', tmp_path, *options(**HERE)]
    assert run('test', 'wsi/survival', trained / 'run' / 'best.safetensors', *arguments) == 2
    assert 'must be a checkpoint of survival, as the config is, got one of classification' in capsys.readouterr().err


def test_an_external_cohort(trained, tmp_path, capsys):
    """Another table in another folder, without splits: all its slides are tested, in the classes of the training."""
    folder = tmp_path / 'hospital'
    folder.mkdir()
    for i in range(6):
        write_slide(folder / f'x{i}.h5', torch.randn(PATCHES, WIDTH) + 3 * (i % 2))
    rows = [[f'x{i}', f'p{i // 2}', 'ab'[i // 3]] for i in range(6)]
    write_table(folder / 'other.csv', ['slide_id', 'case_id', 'label'], rows)
    changes = {'dataset.ann_file': 'other.csv', 'test_dataloader.dataset.split': 'all'}
    checkpoint = trained / 'run' / 'best.safetensors'
    table = predictions('wsi/classification', checkpoint, folder, tmp_path, '--bootstrap', 20, **changes)
    out = capsys.readouterr().out
    assert (
        f'other.csv is not the table of the training of {checkpoint}, whose network and classes b, a are taken' in out
    )
    assert re.search(r'wsi/auc .* 0\.\d+ to [01]\.\d+', out) and re.search(r'class .* as b .* as a', out)
    rows = list(csv.DictReader(table.splitlines()))
    assert list(rows[0]) == ['slide_id', 'label', 'p_b', 'p_a', 'case_id', 'loss']
    assert [(row['slide_id'], row['case_id']) for row in rows] == [(f'x{i}', f'p{i // 2}') for i in range(6)]
    for row in rows:
        assert float(row['loss']) == pytest.approx(-math.log(float(row[f'p_{row["label"]}'])), abs=1e-6)
    taken = Counter((row['label'], max('ab', key=lambda name: float(row[f'p_{name}']))) for row in rows)
    confusion = list(csv.DictReader(open(tmp_path / 'test' / 'confusion.csv')))
    assert confusion == [{'label': x, 'b': str(taken[x, 'b']), 'a': str(taken[x, 'a'])} for x in 'ba']


def test_a_test_on_all_slides_of_the_training_is_told(trained, tmp_path, capsys):
    changes = {'test_dataloader.dataset.split': 'all'}
    table = predictions('wsi/classification', trained / 'run' / 'best.safetensors', trained, tmp_path, **changes)
    assert table.count('\n') == 13
    assert 'All slides of the table are tested, those that were trained on too.' in capsys.readouterr().out


def test_folds_of_another_table_are_not_known(trained, tmp_path, capsys):
    """A table that was mended after the training may deal its cases out in another way."""
    rows = list(csv.reader(open(trained / 'labels.csv')))
    write_table(tmp_path / 'labels.csv', rows[0][:2], [row[:2] for row in rows[1:]])
    changes = {'dataset.ann_file': str(tmp_path / 'labels.csv'), 'dataset.folds': 3}
    changes['dataset.columns'] = TRAINED['dataset.columns']
    predictions('wsi/classification', trained / 'run' / 'best.safetensors', trained, tmp_path, **changes)
    assert 'whether cases that are tested were trained on is not known' in capsys.readouterr().out.replace('\n', ' ')


@pytest.mark.parametrize('notes', [dict(model_args='[1]'), dict(data='{"table": ""}'), dict(model_args='{"x": 1}')])
def test_notes_that_are_none_of_ours_are_refused(notes, trained, tmp_path, capsys):
    from safetensors.torch import save_file

    tensors, metadata = read_checkpoint(trained / 'run' / 'best.safetensors')
    save_file(tensors, tmp_path / 'odd.safetensors', {**metadata, **notes})
    arguments = ['--data-root', trained, '--work-dir', tmp_path, *options(**HERE)]
    assert run('test', 'wsi/classification', tmp_path / 'odd.safetensors', *arguments) == 2
    assert 'odd.safetensors must note a network and its data' in capsys.readouterr().err


@pytest.mark.parametrize('config', ['wsi/survival', 'wsi/survival_cox'])
def test_fold_and_time_bins_are_those_of_the_checkpoint(config, cases, tmp_path, capsys):
    """Another fold would test on cases of the training."""
    changes = {**SMALL, 'train_cfg.max_epochs': 1, 'train_dataloader.batch_size': 2, 'dataset.folds': 3}
    if config == 'wsi/survival':
        changes |= {'dataset.bins': 2, 'model.num_classes': 2}
    changes['dataset.fold'] = 2
    arguments = ['--data-root', cases, '--work-dir', tmp_path / 'run', *options(**changes)]
    assert run('train', config, *arguments) == 0
    best = tmp_path / 'run' / 'best.safetensors'
    table = predictions(config, best, cases, tmp_path)
    splits = split_cases(read_table(cases / 'survival.csv', 'survival')[0], 3, 2)
    tested = {row['case_id'] for row in csv.DictReader(table.splitlines())}
    assert tested == {case for case, split in splits.items() if split == 'test'}
    edges = json.loads(read_checkpoint(best)[1]['data'])['edges']
    train = SlideDataset(str(cases), 'survival.csv', 'train', task='survival', bins=2, folds=3, fold=2)
    assert edges == (train.edges.tolist() if config == 'wsi/survival' else [])
    capsys.readouterr()
    arguments = ['--data-root', cases, '--work-dir', tmp_path / 'no', *options(**HERE | {'dataset.fold': 0})]
    assert run('test', config, best, *arguments) == 2
    assert 'was trained with dataset.fold=2, not 0' in capsys.readouterr().err


def test_an_evaluation_that_a_kill_cut_off_is_made_up_for(classification, tmp_path, monkeypatch):
    """The run stops after its second checkpoint and before the evaluation of it, which is the best, has counted."""
    judge, cut_off = BestHook.after_val_epoch, True

    def after_val_epoch(self, runner, metrics=None):
        if cut_off and runner.epoch == 2:
            raise KeyboardInterrupt
        judge(self, runner, {'wsi/auc': {1: 0.5, 2: 0.9, 3: 0.7}[runner.epoch]})

    monkeypatch.setattr(BestHook, 'after_val_epoch', after_val_epoch)
    work_dir = tmp_path / 'run'
    changes = SMALL | {'train_cfg.max_epochs': 3}
    command = ['train', 'wsi/classification', '--data-root', classification, '--work-dir', work_dir, '--resume']
    assert run(*command, *options(**changes)) == 130
    best = work_dir / 'best.safetensors'
    assert (work_dir / 'epoch_2.pth').exists() and read_checkpoint(best)[1]['epoch'] == '1'
    cut_off = False
    assert run(*command, *options(**changes)) == 0
    weights, metadata = read_checkpoint(best)
    assert (metadata['epoch'], metadata['wsi/auc']) == ('2', '0.9')
    expected, _ = read_checkpoint(work_dir / 'epoch_2.pth')
    assert all(torch.equal(value, expected[f'model.{name}']) for name, value in weights.items())


@pytest.mark.parametrize('config', ['wsi/survival', 'wsi/survival_cox'])
def test_survival_with_folds(config, cases, tmp_path, capsys):
    """Every fold trained and tested, all cases predicted once, one table, curves; a second call trains nothing."""
    changes = dict(SMALL)
    changes['train_dataloader.batch_size'] = 2
    if config == 'wsi/survival':
        changes |= {'dataset.bins': 2, 'model.num_classes': 2, 'model.alpha': 0.5}
    work_dir = tmp_path / 'runs'
    command = ['wsi-repeat', config, '--folds', 3, '--data-root', cases, '--work-dir', work_dir, *options(**changes)]
    assert run(*command) == 0
    out = capsys.readouterr().out
    results = json.loads((work_dir / 'results.json').read_text())
    values = [results['runs'][f'fold{i}']['wsi/c_index'] for i in range(3)]
    assert results['mean']['wsi/c_index'] == pytest.approx(statistics.fmean(values))
    assert results['deviation']['wsi/c_index'] == pytest.approx(statistics.stdev(values))
    assert f'{statistics.fmean(values):.4f}' in out and 'deviation' in out

    predictions = [work_dir / f'fold{i}' / 'predictions.csv' for i in range(3)]
    rows = [row for path in predictions for row in csv.DictReader(open(path))]
    assert sorted(row['case_id'] for row in rows) == sorted(f'c{i}' for i in range(12))
    assert all(float(row['survival_months']) == 1.5 * int(row['case_id'][1:]) + 1 for row in rows)
    for i, path in enumerate(predictions if config == 'wsi/survival' else ()):
        edge = json.loads(read_checkpoint(path.with_name('best.safetensors'))[1]['data'])['edges'][0]
        for row in csv.DictReader(open(path)):
            assert list(row)[4:] == [f's_{edge!r}', 's_end', 'loss'], i
            first, second = float(row[f's_{edge!r}']), float(row['s_end'])
            assert float(row['risk']) == pytest.approx(-(first + second))
            late = float(row['survival_months']) >= edge
            if row['censorship'] == '1':
                expected = -0.5 * math.log(second if late else first)
            else:
                expected = -math.log(first - second if late else 1 - first)
            assert float(row['loss']) == pytest.approx(expected, rel=1e-4)
    assert run('wsi-km', *predictions, '--output', tmp_path / 'km.png') == 0
    assert '6 cases of low and 6 of high risk, log-rank p = ' in capsys.readouterr().out
    assert Image.open(tmp_path / 'km.png').size[0] > 500

    written = {path: path.stat().st_mtime_ns for path in work_dir.glob('fold*/epoch_*.pth')}
    assert len(written) == 6 and run(*command) == 0
    assert written == {path: path.stat().st_mtime_ns for path in work_dir.glob('fold*/epoch_*.pth')}
    assert json.loads((work_dir / 'results.json').read_text()) == results


@pytest.fixture(scope='module')
def repeated(tmp_path_factory):
    """The options of a finished wsi-repeat, with its data, and what it left."""
    folder = tmp_path_factory.mktemp('repeated')
    for i in range(12):
        write_slide(folder / f's{i}.h5', torch.randn(PATCHES, WIDTH) + 3 * (i % 2))
    write_table(folder / 'labels.csv', LABELS, labels('ab'))
    changes = SMALL | {'train_cfg.max_epochs': 1}
    assert run(*repeat(folder, folder / 'runs', changes)) == 0
    return folder, changes


def repeat(folder, work_dir, changes):
    arguments = ['--data-root', folder, '--work-dir', work_dir, *options(**changes)]
    return ['wsi-repeat', 'wsi/classification', '--seeds', 0, 1, *arguments]


@pytest.fixture
def finished(repeated, tmp_path):
    """A copy of its runs for each test."""
    folder, changes = repeated
    shutil.copytree(folder / 'runs', tmp_path / 'runs')
    return folder, tmp_path / 'runs', changes


def test_repeat_says_what_it_reuses(finished, capsys):
    folder, work_dir, changes = finished
    results = (work_dir / 'results.json').read_text()
    (work_dir / 'seed1' / 'run.json').unlink()  # as if it had not begun
    assert run(*repeat(folder, work_dir, {**changes, 'default_hooks.logger.interval': 5})) == 0
    out = capsys.readouterr().out
    assert f'seed0: the finished training of {work_dir}/seed0 is tested again' in out and 'seed1: ' not in out
    assert json.loads((work_dir / 'results.json').read_text()) == json.loads(results)


@pytest.mark.parametrize(
    'changes, said',
    [
        ({'model.dim': 8}, 'model.dim: 16 -> 8'),
        ({'optim_wrapper.optimizer.lr': 3e-3}, 'optim_wrapper.optimizer.lr: 0.0001 -> 0.003'),
        ({'dataset.classes': ['b', 'a']}, "dataset.classes: not set -> ['b', 'a']"),
        ({'model.model_name': 'mean_mil'}, "model.model_name: 'mamba2d_mil' -> 'mean_mil'"),
    ],
)
def test_repeat_reuses_no_runs_of_other_options(changes, said, finished, capsys):
    folder, work_dir, before = finished
    results = (work_dir / 'results.json').read_bytes()
    assert run(*repeat(folder, work_dir, before | changes)) == 2
    error = capsys.readouterr().err
    assert f'{work_dir}/seed0 holds a run of other options, {said}' in error and error.count('\n') == 1
    assert (work_dir / 'results.json').read_bytes() == results


def test_repeat_reuses_no_runs_of_another_table(finished, capsys):
    """Of the same name and size, whose labels are turned."""
    folder, work_dir, changes = finished
    table = (folder / 'labels.csv').read_bytes()
    try:
        write_table(folder / 'labels.csv', LABELS, labels('ba'))
        assert run(*repeat(folder, work_dir, changes)) == 2
        assert (
            f'{work_dir}/seed0 holds a run of another table, {folder}/labels.csv has changed' in capsys.readouterr().err
        )
        arguments = ['--data-root', folder, '--work-dir', work_dir / 'seed0', '--resume']
        changes = changes | {'train_cfg.max_epochs': 2}
        assert run('train', 'wsi/classification', *arguments, *options(**changes)) == 2
        assert 'with other data (table: ' in capsys.readouterr().err
    finally:
        (folder / 'labels.csv').write_bytes(table)


def test_folds_and_seeds_make_runs_of_their_own(classification, tmp_path, warnings_of_a_run):
    """By the table's column fold, whose numbers begin with 1."""
    rows = [[f's{i}', 'ab'[i % 2], 1 + i % 3] for i in range(12)]
    write_table(classification / 'labels.csv', ['slide_id', 'label', 'Fold'], rows)
    changes = SMALL | {'model.model_name': 'mean_mil', 'train_cfg.max_epochs': 1}
    arguments = ['--data-root', classification, '--work-dir', tmp_path / 'runs', *options(**changes)]
    assert run('wsi-repeat', 'wsi/classification', '--folds', 3, '--seeds', 3, 4, *arguments) == 0
    assert 'the folds are those of the column fold of labels.csv.' in warnings_of_a_run
    results = json.loads((tmp_path / 'runs' / 'results.json').read_text())
    assert list(results['runs']) == [f'fold{fold}-seed{seed}' for fold in range(3) for seed in (3, 4)]
    values = [metrics['wsi/accuracy'] for metrics in results['runs'].values()]
    assert results['mean']['wsi/accuracy'] == pytest.approx(statistics.fmean(values))
    assert results['deviation']['wsi/accuracy'] == pytest.approx(statistics.stdev(values))
    for fold in range(3):
        folders = [tmp_path / 'runs' / f'fold{fold}-seed{seed}' for seed in (3, 4)]
        weights = [read_checkpoint(folder / 'best.safetensors') for folder in folders]
        assert [metadata['seed'] for _, metadata in weights] == ['3', '4']
        assert not torch.equal(weights[0][0]['head.weight'], weights[1][0]['head.weight'])
        for folder in folders:
            tested = {row['slide_id'] for row in csv.DictReader(open(folder / 'predictions.csv'))}
            assert tested == {f's{i}' for i in range(12) if i % 3 == fold}


def test_the_mean_is_over_the_runs_with_a_metric():
    runs = [dict(a=1.0, b=math.nan, c=5.0), dict(a=3.0, b=math.nan, c=math.nan)]
    summary = summarise(runs)
    assert summary['mean'] == pytest.approx(dict(a=2.0, b=math.nan, c=5.0), nan_ok=True)
    assert summary['deviation'] == pytest.approx(dict(a=math.sqrt(2), b=math.nan, c=0.0), nan_ok=True)


@pytest.mark.parametrize('network', ['mamba_mil', 'transmil', 'dtfd_mil', 'max_mil'])
def test_the_other_networks_train(network, classification, tmp_path):
    arguments = ['--data-root', classification, '--work-dir', tmp_path / 'run']
    changes = {**SMALL, 'model.model_name': network, 'train_cfg.max_epochs': 1}
    assert run('train', 'wsi/classification', *arguments, *options(**changes)) == 0
    assert read_checkpoint(tmp_path / 'run' / 'best.safetensors')[1]['model'] == current_name(network)


def test_parts_of_bags_learn_the_labels_of_their_bags():
    """Those of DTFD-MIL, by the same loss, in classification and survival."""
    bags = [dict(features=torch.randn(n, WIDTH)) for n in (9, 3)]
    samples = [dict(name='a', label=1), dict(name='b', label=0)]
    model = SlideClassifier('dtfd_mil', in_dim=WIDTH, dim=16).eval()
    losses = model(bags, samples, mode='loss')
    assert losses.keys() == {'loss_cls', 'loss_cls_parts'}
    logits, parts = (torch.cat(rows) for rows in zip(*(model.model.forward_train(**bag) for bag in bags), strict=True))
    labels = torch.tensor([1] * 5 + [0] * 3)
    torch.testing.assert_close(losses['loss_cls'], cross_entropy(logits, torch.tensor([1, 0])))
    torch.testing.assert_close(losses['loss_cls_parts'], cross_entropy(parts, labels))
    samples = [dict(name=name, months=m, censored=c) for name, m, c in (('a', 3.0, False), ('b', 5.0, True))]
    model = SlideSurvival('dtfd_mil', in_dim=WIDTH, dim=16, num_classes=1, loss='cox')
    assert model(bags, samples, mode='loss').keys() == {'loss_cox', 'loss_cox_parts'}
    assert SlideClassifier('mean_mil', in_dim=WIDTH)(bags, [dict(label=0)] * 2, mode='loss').keys() == {'loss_cls'}


def test_a_checkpoint_under_a_former_name(tmp_path):
    """A heat map, a test and a training that begins with it know the network; so does one of other classes."""
    from safetensors.torch import save_file

    from vssm.models.mm.classification import load_weights
    from vssm.models.mm.wsi_notes import follow_checkpoint
    from vssm.tools._common import load_config
    from vssm.tools.wsi_heatmap import load_model

    args = dict(in_dim=WIDTH, dim=16)
    path, weights = tmp_path / 'old.safetensors', create_mil_model('mamba1d_mil', **args).state_dict()
    save_file(weights, path, dict(model='mamba_mil', model_args=json.dumps(args)))
    assert load_model(path).scan_ndim == 1
    cfg = load_config('wsi/classification')
    follow_checkpoint(cfg, path, {'model.model_name': 'mamba_mil'})
    assert cfg.model.model_name == 'mamba1d_mil'
    model = SlideClassifier('mamba1d_mil', **args, num_classes=3)
    load_weights(model, str(path), start=True)
    assert torch.equal(model.model.embed.weight, weights['embed.weight'])


@pytest.mark.parametrize(
    'config, changes, said',
    [
        ('wsi/classification', {'model.num_classes': 5}, 'model.num_classes must be 2, the number of classes'),
        ('wsi/classification', {'model.in_dim': 7}, 's[0-9]: MambaMIL: features must be .n, 7.'),
        ('wsi/classification', {'model.patch_size': 1024}, 's[0-9]: patch_size must be .*512 pixels, got 1024'),
        ('wsi/classification', {'dataset.ann_file': 'none.csv'}, 'none.csv does not exist'),
        (
            'wsi/classification',
            {'custom_hooks.1.metric': 'wsi/f2'},
            'BestHook needs wsi/f2, got None: evaluated are wsi/accuracy',
        ),
        ('wsi/survival', {'dataset.ann_file': 'labels.csv'}, 'must have the columns case_id'),
        ('wsi/classification', {'model.model_name': 'resnet50'}, "must be one of mamba2d_mil, .*got 'resnet50'"),
    ],
)
def test_what_stops_a_training_is_one_sentence(config, changes, said, classification, tmp_path, capsys):
    arguments = ['--data-root', classification, '--work-dir', tmp_path / 'run', *options(**SMALL | changes)]
    assert run('train', config, *arguments) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count('\n') == 1, error


def test_cox_needs_two_cases_a_batch(cases, tmp_path, capsys):
    changes = SMALL | {'dataset.folds': 3, 'train_dataloader.batch_size': 1}
    arguments = ['--data-root', cases, '--work-dir', tmp_path / 'run', *options(**changes)]
    assert run('train', 'wsi/survival_cox', *arguments) == 2
    assert 'two or more, got 1: set train_dataloader.batch_size' in capsys.readouterr().err
    changes['train_dataloader.batch_size'] = 16
    arguments = ['--data-root', cases, '--work-dir', tmp_path / 'run', *options(**changes)]
    assert run('train', 'wsi/survival_cox', *arguments) == 2
    assert 'train_dataloader.batch_size must be at most 4, the samples of a process' in capsys.readouterr().err


def test_training_goes_on_from_published_weights(classification, tmp_path, golden):
    tensors, _ = golden('mil_micro')
    published = {
        n.removeprefix('cls1d.state_dict.'): t for n, t in tensors.items() if n.startswith('cls1d.state_dict.')
    }
    torch.save(published, tmp_path / 'published.pth')
    for i in range(12):
        write_slide(classification / f's{i}.h5', torch.randn(PATCHES, 20))
    changes = {
        'model.in_dim': 20,
        'model.dim': 24,
        'model.model_name': 'mamba1d_mil',
        'model.depth': 2,
        'model.d_state': 4,
        'model.init_cfg': dict(type='Pretrained', checkpoint=str(tmp_path / 'published.pth')),
        'optim_wrapper.optimizer.lr': 0.0,
    }
    arguments = ['--data-root', classification, '--work-dir', tmp_path / 'run', *options(**SMALL | changes)]
    assert run('train', 'wsi/classification', *arguments) == 0
    weights, _ = read_checkpoint(tmp_path / 'run' / 'checkpoint.safetensors')
    assert torch.equal(weights['embed.weight'], published['_fc1.0.weight'])
    assert weights['head.weight'].shape == (2, 24)  # of other classes: the network's own


def test_the_missing_extra_of_slides_is_named(classification):
    argv = ['train', 'wsi/classification']  # which meets it in the middle of building its data
    code = f'import sys; sys.modules["h5py"] = None; from vssm.tools.main import main; sys.exit(main({argv}))'
    result = run_fresh(code, cwd=classification)
    assert (
        result.returncode == 2 and 'needs the package h5py' in result.stderr and 'pip install ".[wsi]"' in result.stderr
    )


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    from safetensors.torch import save_file

    args = dict(in_dim=WIDTH, dim=16)
    model = create_mil_model('mamba2d_mil', **args)
    path = tmp_path / 'best.safetensors'
    save_file(dict(model.state_dict()), path, dict(model='mamba2d_mil', model_args=json.dumps(args)))
    return path


def colours(path):
    return len(Image.open(path).convert('RGB').getcolors(1 << 24))


class FakeSlide:
    """openslide's, as far as it is used: a slide of 2,560 x 2,048 pixels, all green."""

    dimensions = (2560, 2048)

    def __init__(self, path):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def get_thumbnail(self, size):
        return Image.new('RGB', (size[0], size[0] * 4 // 5), (0, 200, 0))


def test_a_heat_map_lies_on_the_thumbnail(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'openslide', SimpleNamespace(OpenSlide=FakeSlide, OpenSlideError=OSError))
    write_slide(tmp_path / 's.h5')
    slide = tmp_path / 's.svs'
    command = ['wsi-heatmap', checkpoint, tmp_path / 's.h5', '--output', tmp_path / 'map.png', '--slide', slide]
    assert run(*command) == 0
    assert f'drawn on the grid: {slide} does not exist' in capsys.readouterr().out.replace('\n', '')
    grid = Image.open(tmp_path / 'map.png').convert('RGB')
    slide.touch()
    assert run(*command) == 0
    assert f'drawn on the thumbnail of {slide}' in capsys.readouterr().out.replace('\n', '')
    on_slide = Image.open(tmp_path / 'map.png').convert('RGB')
    assert dict(map(reversed, on_slide.getcolors(1 << 24))).get((0, 200, 0), 0) > 10_000
    assert (0, 200, 0) not in dict(map(reversed, grid.getcolors(1 << 24)))
    monkeypatch.setitem(sys.modules, 'openslide', None)
    assert run(*command) == 0
    assert 'drawn on the grid: openslide is not installed' in capsys.readouterr().out.replace('\n', '')


def test_the_heat_map_names_the_classes_of_the_checkpoint(trained, tmp_path, monkeypatch):
    from vssm.tools import wsi_heatmap

    titles = []
    draw = wsi_heatmap.draw
    monkeypatch.setattr(wsi_heatmap, 'draw', lambda *args: titles.append(args[-1]) or draw(*args))
    best, features = trained / 'run' / 'best.safetensors', trained / 's9.h5'
    assert run('wsi-heatmap', best, features, '--output', tmp_path / 'map.png') == 0
    tensors, metadata = read_checkpoint(best)
    model = create_mil_model('mamba2d_mil', **json.loads(metadata['model_args'])).eval()
    model.load_state_dict(tensors)
    with h5py.File(features) as file:
        logits = model(*(torch.from_numpy(file[key][()]) for key in ('features', 'coords')))[0].tolist()
    assert titles == [f's9\noutputs b {logits[0]:.2f}, a {logits[1]:.2f}']


@pytest.fixture
def colourful(tmp_path):
    """Two slides of 3 x 3 patches of 64 pixels, one without patches, one that is damaged; and a picture of the first.

    Each patch in it has a colour of its own, whose red is 20 times the number of its row in the file.
    """
    features, slides = tmp_path / 'features', tmp_path / 'slides'
    features.mkdir()
    slides.mkdir()
    coords = torch.cartesian_prod(torch.arange(3), torch.arange(3)).flip(1) * 64 + 75
    picture = Image.new('RGB', (300, 280))
    for row, (x, y) in enumerate(coords.tolist()):
        picture.paste((20 * row, 0, 0), (x, y, x + 64, y + 64))
    picture.save(slides / 's0.png')
    for name in ('s0', 's1'):
        write_slide(features / f'{name}.h5', coords=coords)
    write_slide(features / 's2.h5', torch.zeros(0, WIDTH), torch.zeros(0, 2))
    write_slide(features / 's3.h5', torch.full((PATCHES, WIDTH), math.nan), coords)
    return features, slides


def test_heat_maps_of_a_folder_with_galleries(colourful, checkpoint, tmp_path, monkeypatch, capsys):
    from vssm.tools import wsi_heatmap

    features, slides = colourful
    galleries = []
    draw_gallery = wsi_heatmap.draw_gallery
    monkeypatch.setattr(wsi_heatmap, 'draw_gallery', lambda *args: galleries.append(args) or draw_gallery(*args))
    monkeypatch.setattr(wsi_heatmap, 'draw', lambda *_: wsi_heatmap.pyplot().figure())  # which other tests judge
    output = tmp_path / 'maps'
    assert run('wsi-heatmap', checkpoint, features, '--slide', slides, '--top', 5, '--output', output) == 2
    out, error = capsys.readouterr()
    assert f'{output}/s0.png, drawn on the image {slides}/s0.png; {output}/s0-top.png' in out
    assert (
        f'{output}/s1.png, drawn on the grid: {slides}/s1 does not exist; without the slide there is no gallery' in out
    )
    assert 's2: without patches, and left out' in out and 's3: s3.h5: features row 0 must be finite' in out
    assert f'1 of the 4 slides in {features} could not be drawn' in error
    assert sorted(path.name for path in output.iterdir()) == ['s0-top.png', 's0.png', 's1.png']
    bag = read_slide(features / 's0.h5')
    weights = wsi_heatmap.load_model(checkpoint).attention(bag.features, bag.coords, steps=[64])
    order = weights.argsort(descending=True)[:5].tolist()
    ((images, relative, corners, _),) = galleries
    assert [image.getpixel((112, 112)) for image in images] == [(20 * row, 0, 0) for row in order]
    assert all(len(image.getcolors()) == 1 for image in images)
    assert relative == pytest.approx((weights / weights.mean())[order].tolist())
    assert corners == [tuple(bag.pixels[row].tolist()) for row in order]


def test_squares_of_a_slide_come_from_its_nearest_level(tmp_path, monkeypatch):
    """512 pixels shown as 128 come from the level of a quarter; coordinates of 1 um are two pixels of 0.5 um each."""
    from vssm.tools._slide_images import read_squares

    regions = []

    class Slide(FakeSlide):
        level_downsamples = (1.0, 4.0)
        properties = {'openslide.mpp-x': '0.5', 'openslide.mpp-y': '0.5'}

        def get_best_level_for_downsample(self, downsample):
            return max(level for level, factor in enumerate(self.level_downsamples) if factor <= downsample)

        def read_region(self, corner, level, size):
            regions.append((corner, level, size))
            return Image.new('RGBA', size, (0, 200, 0, 255))

    monkeypatch.setitem(sys.modules, 'openslide', SimpleNamespace(OpenSlide=Slide, OpenSlideError=OSError))
    images = read_squares(tmp_path / 's.svs', [(600, 1112)], 512, shown=128)
    assert images[0].size == (128, 128) and images[0].getpixel((0, 0)) == (0, 200, 0)
    read_squares(tmp_path / 's.svs', [(600, 1112)], 256, mpp=1.0, shown=128)
    read_squares(tmp_path / 's.svs', [(600, 1112)], 256)
    assert regions == [
        ((600, 1112), 1, (128, 128)),
        ((1200, 2224), 1, (128, 128)),
        ((600, 1112), 0, (256, 256)),
    ]


@torch.no_grad()
@pytest.mark.parametrize('network', list_mil_models())
def test_every_network_embeds(network):
    from vssm.tools.wsi_embed import embed

    model = create_mil_model(network, in_dim=WIDTH).eval()
    features, coords = torch.randn(PATCHES, WIDTH), 512 * torch.cartesian_prod(torch.arange(3), torch.arange(3))
    embedding = embed(model, features, coords, [512])
    torch.testing.assert_close(model.head(embedding), model(features, coords, steps=[512])[0])


def test_embeddings_are_what_the_classifier_is_given(trained, tmp_path, capsys):
    """The slides that were trained on, and one without patches, as a tool writes it that found no tissue."""
    write_slide(tmp_path / 'x.h5', torch.zeros(0, WIDTH), torch.zeros(0, 2))
    best, output = trained / 'run' / 'best.safetensors', tmp_path / 'embeddings.h5'
    files = [trained / f's{i}.h5' for i in range(3)]
    assert run('wsi-embed', best, *files, tmp_path / 'x.h5', '--output', output) == 0
    assert '3 slides of 16 numbers each; 1 slides without patches are left out' in capsys.readouterr().out
    tensors, metadata = read_checkpoint(best)
    model = create_mil_model('mamba2d_mil', **json.loads(metadata['model_args'])).eval()
    model.load_state_dict(tensors)
    with h5py.File(output) as file:
        assert file['slide_ids'].asstr()[()].tolist() == ['s0', 's1', 's2']
        assert file.attrs['checkpoint_sha256'] == hashlib.sha256(best.read_bytes()).hexdigest()
        assert (file.attrs['model'], file.attrs['checkpoint']) == ('mamba2d_mil', 'best.safetensors')
        embeddings = torch.from_numpy(file['embeddings'][()])
    for path, embedding in zip(files, embeddings, strict=True):
        bag = read_slide(path)
        torch.testing.assert_close(model.head(embedding), model(bag.features, bag.coords, steps=[bag.step])[0])
    assert not list(tmp_path.glob('.*.tmp'))


@pytest.mark.parametrize(
    'argv, said',
    [
        (['best.safetensors', 'no'], 'got no, which does not exist'),
        (['best.safetensors', 'empty'], 'got empty with none'),
        (['best.safetensors', 's.h5', 'wide.h5'], 'wide.h5: MambaMIL: features must be (n, 6)'),
        (['best.safetensors', 's.h5', 's.h5'], 'must hold each slide once, got s again'),
        (['best.safetensors', 's.h5', '--output', 'a.csv'], '--output must be a .h5 file'),
    ],
)
def test_bad_arguments_of_embed(argv, said, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_slide('s.h5')
    write_slide('wide.h5', torch.randn(PATCHES, 20))
    Path('empty').mkdir()
    assert main(['wsi-embed', *argv]) == 2
    assert said in capsys.readouterr().err and not Path('embeddings.h5').exists()


@pytest.mark.parametrize(
    'argv, said',
    [
        (['no.safetensors', 's.h5'], 'no.safetensors does not exist'),
        (['best.safetensors', '.', '--slide', 's.h5'], '--slide must be the folder of the slides'),
        (['best.safetensors', 's.h5', '--top', '-1'], '--top must be at least 1, got -1'),
        (['best.safetensors', 'no.h5'], 'FEATURES must be a file, such as SLIDE.h5, or a folder of such, got no.h5'),
        (['best.safetensors', 's.h5', '--output', 'map.svg'], '--output must be a .png file'),
        (['best.safetensors', 's.h5', '--patch-size', '-1'], '--patch-size must be at least 1, got -1'),
        (['best.safetensors', 'wide.h5'], 'features must be (n, 6)'),
        (
            ['other.safetensors', 's.h5'],
            'must be the .safetensors file of a training on slides, got one of test_vmamba',
        ),
        (['s4mil.safetensors', 's.h5'], 'S4MIL: attention needs a pooling with weights, got that by the maximum'),
    ],
)
def test_bad_arguments_of_the_heat_map(argv, said, checkpoint, tmp_path, capsys, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    write_slide('s.h5')
    write_slide('wide.h5', torch.randn(PATCHES, 20))
    save_file(dict(x=torch.ones(1)), 'other.safetensors', dict(model='test_vmamba'))
    args = dict(in_dim=WIDTH, dim=8)
    notes = dict(model='s4mil', model_args=json.dumps(args))
    save_file(create_mil_model('s4mil', **args).state_dict(), 's4mil.safetensors', notes)
    assert main(['wsi-heatmap', *argv]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count('\n') == 1
    assert not list(tmp_path.glob('*.png'))


PREDICTED = ['case_id', 'risk', 'censorship', 'survival_months']


def test_the_log_rank_p_is_the_textbooks(tmp_path, capsys):
    """Observed less expected events of the group of high risk, with hypergeometric variances."""
    stats = pytest.importorskip('scipy.stats')
    months = [4.0, 1.0, 7.0, 3.0, 9.0, 3.0, 8.0, 12.0, 5.0, 6.0]
    censored = [0, 0, 0, 0, 1, 0, 0, 1, 1, 0]
    risks = [5, 9, 2, 8, 1, 7, 3, 0, 4, 6]
    write_table(tmp_path / 'p.csv', PREDICTED, zip('abcdefghij', risks, censored, months, strict=True))
    difference, variance = 0.0, 0.0
    for t in sorted({m for m, c in zip(months, censored, strict=True) if not c}):
        at_risk = [r > 4.5 for r, m in zip(risks, months, strict=True) if m >= t]
        events = [r > 4.5 for r, m, c in zip(risks, months, censored, strict=True) if m == t and not c]
        n, high, d = len(at_risk), sum(at_risk), len(events)
        difference += sum(events) - d * high / n
        variance += d * high / n * (1 - high / n) * (n - d) / (n - 1) if n > 1 else 0
    p = stats.chi2.sf(difference**2 / variance, 1)
    assert run('wsi-km', tmp_path / 'p.csv', '--output', tmp_path / 'km.png') == 0
    assert f'5 cases of low and 5 of high risk, log-rank p = {p:.3g}' in capsys.readouterr().out.replace('\n', ' ')
    assert colours(tmp_path / 'km.png') > 50


@pytest.mark.parametrize(
    'header, rows, said',
    [
        (['case_id', 'risk'], [], 'must have the columns'),
        (PREDICTED, [], 'cases of different risks, got 0'),
        (PREDICTED, [['a', 1, 0, 3], ['b', 1, 0, 4]], 'cases of different risks, got 2 of one'),
        (PREDICTED, [['a', 1, 0, 3], ['b', 'x', 0, 4]], "row 3, case 'b'"),
    ],
)
def test_bad_predictions_are_named(header, rows, said, tmp_path, capsys):
    write_table(tmp_path / 'p.csv', header, rows)
    assert run('wsi-km', tmp_path / 'p.csv', '--output', tmp_path / 'km.png') == 2
    assert said in capsys.readouterr().err and not (tmp_path / 'km.png').exists()


@pytest.mark.parametrize(
    'argv, said',
    [
        (['digits/vmamba_test', '--seeds', '0'], 'whose dataset is a SlideDataset'),
        (['wsi/classification', '--seeds', '0', '0'], '--seeds must differ'),
        (['wsi/classification', '--folds', '2'], '--folds must be at least 3'),
        (['wsi/classification'], '--folds or --seeds must be given, or both'),
    ],
)
def test_bad_arguments_of_repeat(argv, said, tmp_path, capsys):
    assert run('wsi-repeat', *argv, '--work-dir', tmp_path) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---- comparison of networks ------------------------------------------------------------------------------------------


def trials(**aucs):
    """The results of networks, a trial for each AUC."""
    return {
        name: {Trial(None, seed): {'wsi/auc': auc, 'wsi/accuracy': 0.5} for seed, auc in enumerate(values)}
        for name, values in aucs.items()
    }


def test_what_a_comparison_says():
    """Means, deviations of n - 1, mean ranks with ties, and the exact p of pairs that all differ in one direction."""
    rows = wsi_compare.compare(
        trials(
            b=[0.5, 0.6, 0.7, 0.6, 0.5, 0.7],
            a=[0.6, 0.72, 0.83, 0.74, 0.65, 0.86],
            same=[0.6, 0.72, 0.83, 0.74, 0.65, 0.86],
        ),
        'wsi/auc',
    )
    assert [row.network for row in rows] == ['a', 'same', 'b']
    assert [row.rank for row in rows] == [1.5, 1.5, 3]
    assert [row.p for row in rows] == [None, 1.0, pytest.approx(2 / 2**6)]
    assert rows[0].mean['wsi/auc'] == pytest.approx(4.4 / 6)
    assert rows[2].deviation['wsi/auc'] == pytest.approx(math.sqrt(4 / 3 * 0.1**2 * 3 / 5))
    assert rows[0].mean['wsi/accuracy'] == 0.5 and rows[0].deviation['wsi/accuracy'] == 0


def test_a_comparison_is_of_trials_that_all_networks_share():
    rows = wsi_compare.compare(trials(a=[0.9, math.nan, 0.7, 0.8, 0.6], b=[0.8, 0.9, 0.6, math.nan, 0.7]), 'wsi/auc')
    assert [row.mean['wsi/auc'] for row in rows] == pytest.approx([2.2 / 3, 2.1 / 3])
    assert [row.p for row in rows] == [None, None]  # of three pairs nothing can be said
    runs = {name: {Trial(None, 0): {'wsi/loss': loss}} for name, loss in (('a', 0.7), ('b', 0.3))}
    assert [(row.network, row.rank) for row in wsi_compare.compare(runs, 'wsi/loss')] == [('b', 1), ('a', 2)]
    with pytest.raises(UsageError, match='defined in a run, one of wsi/accuracy, wsi/auc; got wsi/f1'):
        wsi_compare.compare(trials(a=[0.5]), 'wsi/f1')


def test_the_comparison_from_the_command_line(classification, tmp_path, capsys, monkeypatch):
    """One network trained, and a second whose runs are made up: folders, tables and the picture."""
    folders, results = [], {}

    def repeat(configs):
        ((trial, cfg),) = configs.items()
        assert (cfg.model.in_dim, cfg.model.num_classes) == (WIDTH, 2) and trial == Trial(None, 3)
        folders.append(Path(cfg.work_dir).parent.name)
        if results:
            return {trial: dict.fromkeys(results[trial], 0.25)}
        results.update(wsi_repeat.repeat(configs))
        return results

    monkeypatch.setattr(wsi_compare, 'repeat', repeat)
    changes = {**SMALL, 'train_cfg.max_epochs': 1}
    del changes['model.in_dim']  # which the data tell
    networks = ['mean_mil', 'mamba2d_mil:depth=2:pad_token=none']
    arguments = ['--models', *networks, '--seeds', 3, '--work-dir', tmp_path / 'runs', *options(**changes)]
    assert run('wsi-compare', classification / 'labels.csv', classification, *arguments) == 0
    assert folders == ['mean_mil', 'mamba2d_mil,depth=2,pad_token=none']
    assert 'mamba2d_mil:depth=2:pad_token=none' in capsys.readouterr().out
    rows = list(csv.DictReader(open(tmp_path / 'runs' / 'runs.csv')))
    assert [(row['network'], row['fold'], row['seed']) for row in rows] == [(n, '', '3') for n in networks]
    table = {row['network']: row for row in csv.DictReader(open(tmp_path / 'runs' / 'comparison.csv'))}
    aucs = [float(row['wsi/auc']) for row in rows if row['network'] == 'mean_mil']
    assert float(table['mean_mil']['wsi/auc mean']) == pytest.approx(statistics.fmean(aucs))
    assert float(table[networks[1]]['wsi/auc mean']) == 0.25
    assert (tmp_path / 'runs' / 'mean_mil' / 'seed3' / 'best.safetensors').is_file()
    assert colours(tmp_path / 'runs' / 'comparison.png') > 20


@pytest.mark.parametrize(
    'argv, said',
    [
        (['--models', 'resnet50'], 'resnet50 cannot be built: '),
        (['--models', 'mean_mil:depth=2'], "mean_mil:depth=2 cannot be built: .*unexpected keyword argument 'depth'"),
        (['--models', 'mean_mil:depth'], '--models must be NAME or NAME:KEY=VALUE, .* got mean_mil:depth'),
        (['--models', 'mean_mil', 'mean_mil'], '--models must differ, got mean_mil twice'),
        (['--seeds', '1', '1'], '--seeds must differ'),
        (['--folds', '2'], 'folds must be 3 or more'),
        (['--config', 'digits/vmamba2d_test'], '--config must be one whose dataset is a SlideDataset'),
    ],
)
def test_bad_arguments_of_a_comparison(argv, said, classification, tmp_path, capsys):
    command = ['wsi-compare', classification / 'labels.csv', classification, '--work-dir', tmp_path / 'runs', *argv]
    assert run(*command) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count('\n') == 1 and not (tmp_path / 'runs').exists(), error


def test_a_comparison_without_data(cases, tmp_path, capsys):
    """A table without splits, whose task is a survival; one that is not there; and a folder that is not."""
    for table, folder, said in (
        (cases / 'survival.csv', cases, 'is it --folds that is missing?'),
        (cases / 'none.csv', cases, 'none.csv does not exist'),
        (cases / 'survival.csv', cases / 'none', 'FEATURES must be a folder'),
    ):
        assert run('wsi-compare', table, folder, '--work-dir', tmp_path) == 2
        assert said in capsys.readouterr().err


# ---- benchmarks ------------------------------------------------------------------------------------------------------


def benchmark(task, folder, *arguments):
    file = folder / 'figures.json'
    arguments = (task, '--seeds', 0, '--json', file, *arguments, '--picture', folder / 'picture.png')
    result = run_script(BENCHMARKS / 'synthetic_slides.py', *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert colours(folder / 'picture.png') > 50
    return {row['name']: row for row in json.loads(file.read_text())['rows']}


@pytest.mark.slow
def test_tissues_that_touch_need_the_grid(tmp_path):
    rows = benchmark('touch', tmp_path, '--networks', '2DMambaMIL', 'mean')
    assert rows['2DMambaMIL']['test_accuracy'] >= 0.9
    assert abs(rows['mean']['test_accuracy'] - 0.5) < 0.1


@pytest.mark.slow
def test_all_kinds_of_networks_are_compared(tmp_path):
    """On few synthetic slides, and again from what is there, which gives the same."""
    networks = ['mamba2d_mil:depth=2', 'srmambamil', 's4mil', 'transmil', 'dtfd_mil', 'max_mil']
    command = [
        BENCHMARKS / 'compare_slides.py',
        '--models',
        *networks,
        '--seeds',
        0,
        1,
        '--train',
        8,
        '--test',
        30,
        '--epochs',
        1,
    ]
    command += ['--work-dir', tmp_path, '--json', tmp_path / 'figures.json', '--picture', tmp_path / 'picture.png']
    tables = []
    for _ in range(2):
        result = run_script(*command)
        assert result.returncode == 0, result.stdout + result.stderr
        tables.append(json.loads((tmp_path / 'figures.json').read_text())['rows'])
    assert tables[0] == tables[1] and 'is tested again' in result.stdout
    assert sorted(row['network'] for row in tables[0]) == sorted(networks)
    assert all(len(row['runs']) == 2 for row in tables[0])
    assert colours(tmp_path / 'picture.png') > 20


@pytest.mark.slow
def test_survival_with_a_known_risk(tmp_path):
    rows = benchmark('survival', tmp_path, '--train', 200, '--epochs', 6)  # to 0.83 and 0.80
    assert rows['wsi/survival']['test_c_index'] >= 0.75
    assert rows['wsi/survival_cox']['test_c_index'] >= 0.75
    assert rows['the log-risk itself']['test_c_index'] >= 0.75


@pytest.fixture(scope='module')
def synthetic():
    """The script's functions."""
    spec = importlib.util.spec_from_file_location('synthetic_slides', BENCHMARKS / 'synthetic_slides.py')
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(BENCHMARKS))
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCHMARKS))
    return module


def test_the_synthetic_classes_differ_in_nothing_but_the_touch(synthetic):
    import numpy as np

    rng = np.random.default_rng(0)
    for i in range(60):
        mask, kinds = synthetic.touching(rng, touch=i % 2 == 1)
        first, second = (kinds == kind for kind in (synthetic.FIRST, synthetic.SECOND))
        assert first.sum() == second.sum() == 8 and mask[first | second].all()
        assert (synthetic.neighbours(first) & second).any() == (i % 2 == 1)
        rows = np.flatnonzero(first.any(1)), np.flatnonzero(second.any(1))
        above, below = sorted(rows, key=min)
        assert below.min() == above.max() + 1  # the one begins where the other ends, in both classes


def test_the_synthetic_cases_are_in_no_order(synthetic, tmp_path):
    """Neither of risk nor of time; what the tables hold is not the risk."""
    import numpy as np

    risks = synthetic.write_survival(tmp_path, dict(train=40, val=10, test=50))
    slides, problems = read_table(tmp_path / 'survival.csv', 'survival')
    assert not problems
    case = {slide.case_id: slide for slide in slides}
    names = [name for name in risks if case[name].split == 'test']
    places = np.arange(len(names))
    assert len(names) == 50
    assert abs(np.corrcoef(places, [risks[name] for name in names])[0, 1]) < 0.3
    assert abs(np.corrcoef(places, [case[name].months for name in names])[0, 1]) < 0.3
    assert 0.2 < np.mean([slide.censored for slide in case.values()]) < 0.6
