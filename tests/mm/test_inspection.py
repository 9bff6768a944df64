# SPDX-License-Identifier: Apache-2.0
"""`vssm data-check`: each kind of problem is told with its file, and what there is is counted."""

import json
import shutil

import make_datasets
import numpy as np
import pytest
from mmengine.registry import init_default_scope
from PIL import Image

from vssm.models.mm.inspection import inspect, wrong_heads
from vssm.tools.main import main

for package in ('mmdet', 'mmseg'):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[mmlab]'")

pytestmark = pytest.mark.usefixtures('one_thread', 'quick_configs')

CELLS = ('cell', 'nucleus', 'debris')
FIELDS = ('soil', 'wheat', 'maize', 'road', 'water')


@pytest.fixture(scope='session')
def sound(made_once):
    """Sound data of each kind."""

    def make(folder):
        make_datasets.make_imagenet(folder / 'images')
        make_datasets.make_coco(folder / 'cells', CELLS)
        make_datasets.make_ade20k(folder / 'fields', len(FIELDS))

    return made_once('sound', make)


@pytest.fixture
def data(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / 'data')


def config_of(kind, data):
    split = dict(images='train', cells='train2017', fields='training')[kind]
    root = str(data / kind)
    return dict(
        images=dict(type='ImageFolder', data_root=root, split=split),
        cells=dict(
            type='CocoDataset',
            data_root=root,
            ann_file=f'annotations/instances_{split}.json',
            data_prefix=dict(img=split),
            metainfo=dict(classes=CELLS),
        ),
        fields=dict(
            type='BaseSegDataset',
            data_root=root,
            data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'annotations/{split}'),
            metainfo=dict(classes=FIELDS),
            reduce_zero_label=True,
        ),
    )[kind]


def look(kind, data, **changes):
    scope = dict(images=None, cells='mmdet', fields='mmseg')[kind]
    if scope:
        init_default_scope(scope)
    return inspect(config_of(kind, data) | changes, 32, scope)


@pytest.mark.parametrize('kind, unit', [('images', 'images'), ('cells', 'objects'), ('fields', 'pixels')])
def test_sound_data_are_counted(kind, unit, sound):
    report = look(kind, sound)
    assert (report.problems, report.images, report.unit) == ([], 4, unit)
    if kind == 'images':
        assert report.counts == dict(n00000001=2, n00000002=2)
    elif kind == 'cells':
        content = json.loads((sound / 'cells/annotations/instances_train2017.json').read_text())
        numbers = [entry['category_id'] for entry in content['annotations']]
        assert report.counts == {name: numbers.count(i + 1) for i, name in enumerate(CELLS)}
    else:
        masks = [np.asarray(Image.open(path)) for path in (sound / 'fields/annotations/training').iterdir()]
        assert [report.counts[name] for name in FIELDS] == [
            sum((mask == i + 1).sum() for mask in masks) for i in range(len(FIELDS))
        ]


def test_data_sets_within_others_are_added(sound):
    whole = dict(type='RepeatDataset', dataset=dict(type='Concat', datasets=[config_of('images', sound)] * 2))
    assert inspect(whole, 32).images == 8 and inspect(whole, 32).counts['n00000001'] == 4


def first_of(data, kind):
    return sorted((data / kind).rglob('*.JPEG' if kind == 'images' else '*.jpg'))[0]


def shorten(path):
    path.write_bytes(path.read_bytes()[:500])


SPOILT = {
    'unreadable': (shorten, 'cannot be read'),
    'tiny': (lambda path: Image.new('RGB', (90, 31)).save(path), 'must have at least 32 pixels a side, got 90x31.'),
}


@pytest.mark.parametrize('kind', ['images', 'cells', 'fields'])
@pytest.mark.parametrize('spoil, said', SPOILT.values(), ids=SPOILT)
def test_images_that_are_no_use(spoil, said, kind, data):
    path = first_of(data, kind)
    spoil(path)
    problems = look(kind, data).problems
    assert str(path) in problems[0] and said in problems[0]


def test_folders_that_are_no_classes(data):
    shutil.move(data / 'images/train/n00000002', data / 'images/val/other')
    (problem,) = look('images', data, split='val').problems
    assert 'got [' in problem and 'other' in problem
    (problem,) = look('images', data, split='none').problems
    assert 'must be a folder with one folder of images per class' in problem


def edited(change):
    def spoil(folder):
        path = folder / 'annotations/instances_train2017.json'
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return spoil


def first(**changes):
    return edited(lambda content: content['annotations'][0].update(changes))


@pytest.mark.parametrize(
    'spoil, said',
    [
        (lambda folder: shutil.rmtree(folder / 'annotations'), ['must be a file of annotations, and does not exist.']),
        (edited(lambda content: content.pop('categories')), ["in the format of COCO (KeyError: 'categories')"]),
        (edited(lambda content: content['images'].append(3)), ['in the format of COCO (TypeError']),
        (edited(lambda content: content['annotations'].append(3)), ['(ValueError: an annotation is no object)']),
        (lambda folder: (folder / 'train2017/000000000002.jpg').unlink(), ['000000000002.jpg does not exist.']),
        (edited(lambda content: content['images'][1].update(width=70)), ['002.jpg must be 70x96, as ', 'got 72x96.']),
        (first(bbox=[8, 8, 0.5, 30]), ['annotation 1 must have a bbox of at least one pixel a side, got 0.5 x 30.']),
        (first(bbox=[8, 8, 400, 30]), ['1 must have a bbox within its image, 96x72, got x 8, y 8, width 400']),
        (first(bbox=[8, 8, None]), ['annotation 1 must have a bbox of four numbers, got [8, 8, None].']),
        (first(image_id=77), ['annotation 1 must have the image_id of an entry in the file, got 77.']),
        (first(category_id=[4]), ['annotation 1 must have the category_id of an entry in the file, got [4].']),
        (
            edited(lambda content: content['categories'][0].update(name='Cell')),
            ['must be names of categories (Cell, nucleus, debris), got cell.', 'the categories Cell (id 1) are no'],
        ),
        (edited(lambda content: content['categories'].reverse()), ['must have the order of the categories (debris,']),
        (edited(lambda content: content['categories'][1].update(id=1)), ['ids of categories and images must differ']),
    ],
    ids='file keys image annotation missing size no-area outside no-box no-image no-category names order ids'.split(),
)  # fmt: skip
def test_objects_that_do_not_fit(spoil, said, data):
    spoil(data / 'cells')
    problems = '\n'.join(look('cells', data).problems)
    assert all(part in problems for part in said), problems


def test_an_image_that_lies(data):
    """mmdetection turns it as its EXIF orientation says, so that its file must give the sizes of the turned one."""
    image = Image.open(data / 'cells/train2017/000000000001.jpg')
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(data / 'cells/train2017/000000000001.jpg', exif=exif)
    (problem,) = look('cells', data).problems
    assert '000000000001.jpg must be 96x72' in problem and 'got 72x96.' in problem


@pytest.mark.parametrize(
    'change, said',
    [
        (lambda mask: np.where(mask == 1, 9, mask), 'must have values from 1 to 5 for the 5 classes, or 255 for none'),
        (lambda mask: mask[::2, ::2], 'must have the size of its image, 96x72, got 48x36.'),
        (lambda mask: np.stack([mask] * 3, 2), 'must have one channel'),
        (None, 'ADE_train_00000001.png does not exist.'),
    ],
    ids=['values', 'size', 'colours', 'missing'],
)
def test_all_masks_are_looked_at(change, said, data):
    path = data / 'fields/annotations/training/ADE_train_00000001.png'
    mask = np.asarray(Image.open(path))
    path.unlink()
    if change is not None:
        Image.fromarray(change(mask)).save(path)
    (problem,) = look('fields', data).problems
    assert said in problem


def test_a_folder_without_images(sound):
    (problem,) = look('fields', sound, img_suffix='.tif').problems
    assert 'images/training must hold images *.tif, got none' in problem


def test_what_cannot_be_looked_at(sound):
    with pytest.raises(ValueError, match='must be one of images in folders .*, got Digits'):
        inspect(dict(type='Digits'), 32)
    with pytest.raises(ValueError, match='data_root must be a folder of this machine, got s3://bucket'):
        look('images', sound, data_root='s3://bucket')


def test_the_heads_are_compared_with_the_classes():
    model = dict(backbone=dict(num_classes=7), decode_head=[dict(num_classes=5), dict(num_classes=150)], num_classes=5)
    assert list(wrong_heads(model, 5)) == [
        'model.decode_head.1.num_classes must be 5, the number of classes in the data, got 150: --cfg-options '
        'model.decode_head.1.num_classes=5.'
    ]


def test_the_command_on_folders(data, capsys):
    command = ['data-check', 'finetune/vmamba_tiny_1xb64-50e_folder', '--data-root', str(data / 'images')]
    assert main(command) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[-3:] == [['all', 'images', '4', '4'], ['n00000001', '2', '2'], ['n00000002', '2', '2']]
    assert lines[-4] == ['class', 'train', 'val,', 'test']

    for path in (data / 'images/val').rglob('*.JPEG'):
        shorten(path)
    assert main([*command, '--most', '2', '--cfg-options', 'model.num_classes=3']) == 1
    out = capsys.readouterr().out
    assert out.count('cannot be read') == 2 and '... and 3 more; --most 5 tells all.' in out and '5 problems.' in out


def test_the_command_on_a_shipped_config(sound, capsys):
    """Whose classes these data lack."""
    name = 'coco/mask-rcnn_vmamba_tiny_fpn_8xb2-1x_coco'
    assert main(['data-check', name, '--data-root', f'{sound / "cells"}/']) == 1
    out = capsys.readouterr().out
    assert 'must be names of categories (cell, nucleus, debris), got person, bicycle' in out
    assert out.count('\nval, test: ') == 2 and '4 problems.' in out
