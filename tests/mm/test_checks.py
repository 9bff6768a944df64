# SPDX-License-Identifier: Apache-2.0
"""What is wrong with data or config is said in a sentence before the first iteration."""

import copy
import importlib
import json
import logging
import os
import shutil
import signal
import types
import uuid
from pathlib import Path

import make_datasets
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, RUNNERS, init_default_scope
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vssm.models import mm
from vssm.models.mm import checks
from vssm.tools._common import find_config

pytestmark = pytest.mark.usefixtures('one_thread', 'quick_configs')

CELLS = ('cell', 'nucleus', 'debris')
FIELDS = ('soil', 'wheat', 'maize', 'road', 'water')


@pytest.mark.parametrize('wanted, processes, workers', [(0, 1, 0), (1, 1, 1), (8, 1, 4), (8, 2, 2), (2, 8, 1)])
def test_workers_follow_the_cores(wanted, processes, workers, monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(4), raising=False)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))  # as torchrun sets it
    runner = types.SimpleNamespace(logger=logging.getLogger('test'))
    assert mm.TimmRunner._count_workers(runner, wanted) == workers


# ---- errors as sentences ---------------------------------------------------------------------------------------------


class Killed(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    'fail, said',
    [
        (lambda: torch.empty(1 << 55), r"memory ran out \(.*can't allocate memory: you tried.*batch_size"),
        (lambda: np.ones((1 << 50,)), r'memory ran out .*Unable to allocate.*with_cp=True'),
        (
            lambda: list(DataLoader(Killed(), num_workers=1)),
            r'was ended from outside \(DataLoader worker .*num_workers',
        ),
        (lambda: nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1)), r'batch norm cannot normalise a single .*drop_last=True'),
    ],
    ids=['memory of a tensor', 'memory of an array', 'worker', 'batch norm'],
)
def test_errors_that_a_run_may_meet_say_what_helps(fail, said):
    with pytest.raises(mm.RunError, match=said) as caught, checks.explained():
        fail()
    assert '\n' not in str(caught.value)


def test_other_errors_stay_what_they_are():
    for error in (ValueError('no'), ZeroDivisionError(), mm.RunError('a sentence.')):
        with pytest.raises(type(error)) as caught, checks.explained():
            raise error
        assert caught.value is error


def test_what_stops_one_process_stops_all(monkeypatch):
    """For which what the other process reports stands in."""
    sent = []
    monkeypatch.setattr(checks, 'all_gather_object', lambda mine: sent.append(mine) or [None, 'the other has no data.'])
    with pytest.raises(mm.RunError, match='the other has no data'), checks.agreed():
        pass
    with pytest.raises(mm.RunError, match='the other has no data'), checks.agreed():
        raise mm.RunError('mine.')
    assert sent == [None, 'mine.']


# ---- batches ---------------------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    def __init__(self, mixup):
        super().__init__()
        self.data_preprocessor = mm.ImagePreprocessor(mixup=dict(num_classes=2) if mixup else None)


@pytest.mark.parametrize(
    'images, batch_size, drop_last, mixup, said',
    [
        (5, 6, True, False, r'batch_size must be at most 5, the samples of a process in an epoch.*got 6'),
        (5, 6, False, False, None),
        (6, 6, True, True, None),
        (9, 3, True, True, 'batch_size must be even, as images are mixed in pairs, got 3'),
        (9, 4, False, True, 'drop_last must be True, as images are mixed in pairs and the last .* holds 1'),
        (9, 4, True, True, None),
        (9, 3, False, False, None),
        (10, 4, False, True, None),
    ],
)
def test_batches_of_an_epoch(images, batch_size, drop_last, mixup, said):
    loader = DataLoader(TensorDataset(torch.zeros(images)), batch_size, drop_last=drop_last)
    if said is None:
        checks.check_batches(loader, Mixing(mixup))
        return
    with pytest.raises(mm.RunError, match=said):
        checks.check_batches(loader, Mixing(mixup))


def test_an_endless_sampler_fills_every_batch():
    dataset = TensorDataset(torch.zeros(3))
    sampler = mm.SeededSampler(dataset, dict(type='InfiniteSampler'), seed=0)
    checks.check_batches(DataLoader(dataset, 4, sampler=sampler, drop_last=True), Mixing(True))


def test_mixed_labels_are_as_many_as_the_classes():
    """They are by themselves; another number is refused."""
    args = dict(type='ImageClassifier', model_name='test_vmamba', num_classes=7)
    preprocessor = dict(type='ImagePreprocessor', mixup=dict(mixup_alpha=1.0))
    assert MODELS.build(dict(args, data_preprocessor=preprocessor)).data_preprocessor.mixup.num_classes == 7
    preprocessor['mixup']['num_classes'] = 1000
    with pytest.raises(ValueError, match=r'mixup\.num_classes must be num_classes, 7, .*, got 1000'):
        MODELS.build(dict(args, data_preprocessor=preprocessor))


# ---- classes ---------------------------------------------------------------------------------------------------------

mmdet = pytest.importorskip('mmdet', reason="mmdet is not installed: pip install '.[mmlab]'")
for module in ('mmdet.models', 'mmdet.datasets', 'mmseg.models', 'mmseg.datasets'):
    importlib.import_module(module)


@pytest.fixture(scope='session')
def own_data(made_once):
    """COCO's format with three classes, ADE20K's with five."""

    def make(folder):
        make_datasets.make_coco(folder / 'cells', CELLS)
        make_datasets.make_ade20k(folder / 'fields', len(FIELDS))

    return made_once('own_data', make)


ROOTS = dict(coco='cells', ade20k='fields')


@pytest.fixture(scope='module')
def small(small_config, own_data):
    """small(task, **options): a shipped config, small, on data of one's own."""

    def small(task, **options):
        name, changes = small_config(task, 'test_vmamba')
        cfg = Config.fromfile(find_config(name))
        cfg.merge_from_dict(changes)
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            loader.update(num_workers=0, persistent_workers=False)
            loader.dataset.update(data_root=f'{own_data / ROOTS[task]}/', serialize_data=False)
            if task == 'ade20k':
                loader.dataset.update(type='BaseSegDataset', reduce_zero_label=True, metainfo=dict(classes=FIELDS))
            else:
                loader.dataset.metainfo = dict(classes=CELLS)
        cfg.merge_from_dict(options)
        init_default_scope(cfg.default_scope)
        return cfg

    return small


@pytest.fixture(scope='module')
def models(small):
    """A detector and a segmentor for as many classes as in the papers."""
    with torch.device('meta'):
        return {task: MODELS.build(small(task).model) for task in ROOTS}


def stops(runner):
    with pytest.raises(mm.RunError) as caught:
        runner.train()
    assert isinstance(runner._train_loop, dict), 'the loop was built'
    return str(caught.value)


@pytest.mark.parametrize('task', ROOTS)
def test_a_run_with_other_classes_stops_before_its_first_iteration(task, small, tmp_path):
    cfg = small(task)
    if task == 'coco':  # whose classes leave no image with a box
        del cfg.train_dataloader.dataset['metainfo'], cfg.train_dataloader.dataset['serialize_data']
    cfg.work_dir, cfg.experiment_name = str(tmp_path), uuid.uuid4().hex
    said = dict(
        coco='in their order there (cell, nucleus, debris), got person, bicycle,',
        ade20k='model.decode_head.num_classes, model.auxiliary_head.num_classes must be 5, the number of classes',
    )
    assert said[task] in stops(RUNNERS.build(cfg))


def test_a_detector_for_other_classes(small, models):
    dataset, heads = small('coco').train_dataloader.dataset, models['coco'].roi_head

    def said(classes, count=80):
        heads.bbox_head.num_classes = heads.mask_head.num_classes = count
        guarded = mm.GuardedDataset(dict(dataset, metainfo=dict(classes=classes)))
        try:
            checks.check_classes(guarded, models['coco'])
        except mm.RunError as error:
            return str(error)
        return None

    assert said(CELLS, 3) is None
    for part in (
        'metainfo.classes must be names of categories in ',
        'instances_train2017.json, in their order there (cell, nucleus, debris), got person, bicycle, car, motorcycle',
        "metainfo=dict(classes=('cell', 'nucleus', 'debris')) in the dataset of every dataloader",
        'model.roi_head.bbox_head.num_classes, model.roi_head.mask_head.num_classes to their number, 3.',
    ):
        assert part in said(mmdet.datasets.CocoDataset.METAINFO['classes'])
    assert said(CELLS) == (
        'model.roi_head.bbox_head.num_classes, model.roi_head.mask_head.num_classes must be 3, the number of classes '
        'in the data (cell, nucleus, debris), got roi_head.bbox_head.num_classes 80, roi_head.mask_head.num_classes 80'
        ': --cfg-options model.roi_head.bbox_head.num_classes=3 model.roi_head.mask_head.num_classes=3'
    )
    # mmdet numbers the classes by the file, whatever the order of their names.
    assert 'in their order there (cell, nucleus, debris), got nucleus, cell' in said(('nucleus', 'cell', 'debris'), 3)
    assert "must be a tuple of names, such as ('cell',), got 'cell'" in said('cell', 3)
    assert 'must be 2, the number of classes in the data (cell, debris)' in said(('cell', 'debris'), 3)


def test_a_segmentor_for_other_classes(small, models):
    model, dataset = models['ade20k'], mm.GuardedDataset(small('ade20k').train_dataloader.dataset)
    with pytest.raises(mm.RunError, match='--cfg-options .*decode_head.num_classes=5 .*auxiliary_head.num_classes=5$'):
        checks.check_classes(dataset, model)
    model.decode_head.num_classes = 5
    with pytest.raises(mm.RunError, match=r'^model\.auxiliary_head\.num_classes must be 5, .*got auxiliary_head.* 150'):
        checks.check_classes(dataset, model)
    model.auxiliary_head = nn.ModuleList([model.auxiliary_head, copy.copy(model.auxiliary_head)])
    model.auxiliary_head[0].num_classes = 5
    with pytest.raises(mm.RunError, match=r'^model\.auxiliary_head\.1\.num_classes must be 5'):
        checks.check_classes(dataset, model)
    model.auxiliary_head[1].num_classes = 5
    checks.check_classes(dataset, model)


@pytest.fixture
def fields(own_data, tmp_path):
    """fields(change, zero, **changes): the training data of five classes, whose first mask, (H, W), is changed."""
    shutil.copytree(own_data / 'fields', tmp_path / 'fields')

    def fields(change=lambda mask: mask, zero=True, **changes):
        spoil(change)
        steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=zero)]
        cfg = dict(
            type='mmseg.BaseSegDataset',
            data_root=str(tmp_path / 'fields'),
            data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
            reduce_zero_label=True,
            serialize_data=False,  # which would collect garbage for seconds
            metainfo=dict(classes=FIELDS),
            pipeline=[*steps, dict(type='PackSegInputs')],
        )
        init_default_scope('mmseg')
        return mm.GuardedDataset(dict(cfg, **changes))

    def spoil(change):
        path = tmp_path / 'fields' / 'annotations' / 'training' / 'ADE_train_00000001.png'
        mask = change(np.asarray(Image.open(path)).copy())
        path.unlink()
        if mask is not None:
            Image.fromarray(mask).save(path)

    fields.spoil = spoil
    return fields


def beyond(mask):
    mask[10, 10] = 6
    return mask


@pytest.mark.parametrize(
    'change, said',
    [
        (beyond, 'must have values from 1 to 5 for the 5 classes, or 255 for none, got 6.'),
        (lambda mask: mask.astype(np.uint16) + 300, 'from 1 to 5 for the 5 classes, or 255 for none, got 300, '),
        (lambda mask: np.stack([mask] * 3, 2), 'must have one channel, whose values number the classes, got 3'),
        (lambda mask: mask[:, ::2], 'must have the shape of its image, 96x72, got 48x72'),
        (lambda mask: None, 'training/ADE_train_00000001.png does not exist'),
    ],
    ids=['value', '16 bits', 'colours', 'size', 'missing'],
)
def test_masks_that_do_not_fit(change, said, fields):
    checks.check_masks(fields())
    with pytest.raises(mm.RunError) as caught:
        checks.check_masks(fields(change))
    assert said in str(caught.value)


def test_masks_that_number_from_zero(fields):
    hint = 'from 0 to 4 for the 5 classes, or 255 for none, got 5; where 0 is no class, set reduce_zero_label=True'
    with pytest.raises(mm.RunError, match=hint):
        checks.check_masks(fields(zero=None, reduce_zero_label=False))
    with pytest.raises(mm.RunError, match='of LoadAnnotations .* that of its dataset, False, or None, got True'):
        checks.check_masks(fields(reduce_zero_label=False))


def test_no_image_ends_so(fields):
    dataset = fields(img_suffix='.tif')
    assert not len(dataset) and ', no file ends with .tif in ' in checks.where_none_were(dataset)


def test_a_mask_that_was_not_among_those_looked_at(fields):
    """It is found when its turn comes, with the class that a loss on a GPU would meet without a word."""
    dataset = fields()
    assert dataset[0]['data_samples'].gt_sem_seg.data.max() == 255  # no class
    fields.spoil(beyond)
    with pytest.raises(mm.RunError, match=r'00000001\.png must have labels below 5, .*, got 5'):
        dataset[0]
    fields.spoil(lambda mask: mask[:, ::2])
    with pytest.raises(mm.RunError, match='must have the shape of its image, 96x72, got 48x72'):
        dataset[0]


def test_a_mask_of_another_resolution_or_with_a_turned_image(tmp_path):
    image, mask = str(tmp_path / 'image.jpg'), str(tmp_path / 'mask.png')
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new('RGB', (90, 60)).save(image, exif=exif)
    for size, fits in (((60, 90), True), ((30, 45), True), ((31, 45), True), ((90, 60), False), ((60, 60), False)):
        Image.new('L', size).save(mask)
        problem = checks.misplaced(image, mask)
        assert (problem is None) == fits
    assert 'the shape of its image, 60x90, turned as its EXIF orientation says, got 60x60' in problem


def test_categories_that_no_class_names_are_left_out_with_a_word(own_data, monkeypatch):
    init_default_scope('mmdet')
    said = []
    dataset = DATASETS.build(
        dict(
            type='mmdet.CocoDataset',
            data_root=str(own_data / 'cells'),
            ann_file='annotations/instances_train2017.json',
            data_prefix=dict(img='train2017/'),
            metainfo=dict(classes=('cell', 'debris')),
        )
    )
    monkeypatch.setattr(checks.MMLogger, 'get_current_instance', lambda: type('', (), dict(warning=said.append)))
    checks.check_classes(dataset, nn.Module())
    assert len(said) == 1 and 'the categories nucleus are no classes of the config' in said[0]


class Leaf:
    """What is left of a data set of mmdetection where only its classes matter."""

    cat_ids = ()

    def __init__(self, metainfo):
        self.metainfo = metainfo

    def load_data_list(self):
        raise NotImplementedError


DETECTORS = {
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco': 2,
    'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco': 6,
    'retinanet/retinanet_r50_fpn_1x_coco': 1,
    'htc/htc_r50_fpn_1x_coco': 6,
    'ssd/ssd300_coco': 1,
    'detr/detr_r50_8xb2-150e_coco': 1,
    'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco': 6,
    'maskformer/maskformer_r50_ms-16xb1-75e_coco': 4,
    'mask2former/mask2former_r50_8xb2-lsj-50e_coco': 4,
    'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco': 3,
    'seesaw_loss/mask-rcnn_r50_fpn_seesaw-loss_random-ms-2x_lvis-v1': 3,
    'guided_anchoring/ga-faster-rcnn_r50_fpn_1x_coco': 1,
    'yolact/yolact_r50_1xb8-55e_coco': 2,
    'solov2/solov2_r50_fpn_1x_coco': 1,
    'queryinst/queryinst_r50_fpn_1x_coco': 12,
}


@pytest.mark.slow
@pytest.mark.parametrize('name', DETECTORS)
def test_heads_of_detectors(name):
    """Of every kind: one, several, cascades, things and stuff; what counts something else is left alone."""
    cfg = Config.fromfile(Path(mmdet.__file__).parent / '.mim' / 'configs' / f'{name}.py')
    init_default_scope('mmdet')
    dataset = cfg.train_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    metainfo = copy.deepcopy(DATASETS.get(f'mmdet.{dataset.type}').METAINFO)
    leaf = Leaf(metainfo)
    counts = list(checks.class_counts(leaf, model))
    checks.check_classes(leaf, model)
    assert len(counts) == DETECTORS[name], counts
    for key in ('classes', 'thing_classes'):
        if key in metainfo:
            metainfo[key] = metainfo[key][:-1]
    with pytest.raises(mm.RunError, match='the number of classes in the data'):
        checks.check_classes(leaf, model)


# ---- channels --------------------------------------------------------------------------------------------------------


def test_another_backbone_needs_other_channels(small):
    def said(task, **options):
        cfg = small(task, **{'model.backbone.dims': 16}, **options).model  # 16, 32, 64, 128 in place of 32, 48, 64, 96
        with torch.device('meta'):
            model = MODELS.build(cfg)
        try:
            checks.check_channels(model, cfg)
        except ValueError as error:
            return str(error)
        return None

    assert said('ade20k') == (
        'model.decode_head.in_channels must be [16, 32, 64, 128], the channels of test_vmamba, got [32, 48, 64, 96]: '
        '--cfg-options model.decode_head.in_channels=[16,32,64,128]'
    )
    assert said('ade20k', **{'model.decode_head.in_channels': [16, 32, 64, 128]}) is None
    assert said('coco').endswith(' --cfg-options model.neck.in_channels=[16,32,64,128]')


@pytest.mark.slow
@pytest.mark.parametrize('task', ['coco', 'ade20k'])
def test_the_file_of_another_backbone(task):
    """The shipped configs fit, and another backbone in one of them is refused with the numbers of all keys."""
    init_default_scope(dict(coco='mmdet', ade20k='mmseg')[task])
    name = dict(coco='mask-rcnn_vmamba_tiny_fpn_8xb2-1x_coco', ade20k='upernet_vmamba_tiny_4xb4-160k_ade20k-512x512')[
        task
    ]
    cfg = Config.fromfile(find_config(f'{task}/{name}'))
    with torch.device('meta'):
        checks.check_channels(MODELS.build(cfg.model), cfg.model)
        cfg.model.backbone.model_name = 'spatial_mamba_tiny'
        model = MODELS.build(cfg.model)
    keys = dict(
        coco='model.neck.in_channels=[64,128,256,512]',
        ade20k='model.decode_head.in_channels=[64,128,256,512] model.auxiliary_head.in_channels=256',
    )
    with pytest.raises(ValueError) as caught:
        checks.check_channels(model, cfg.model)
    assert str(caught.value).endswith(f'--cfg-options {keys[task]}')


# ---- values of the config --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'options, said',
    [
        ({'train_cfg': dict(by_epoch=True, max_epochs='abc')}, "train_cfg of the config cannot be used: .*'abc'"),
        ({'train_cfg': dict(max_epochs=1, by_epochs=True)}, 'train_cfg of the config cannot be used: '),
        ({'optim_wrapper.optimizer.lr': 'fast'}, 'optim_wrapper of the config cannot be used: '),
        ({'optim_wrapper.optimizer.type': 'SGDD'}, 'optim_wrapper of the config cannot be used: .*(?i:sgdd)'),
        ({'param_scheduler': [dict(type='CosineAnnealingLR', T_maxi=3)]}, 'param_scheduler of the config .*T_maxi'),
        ({'train_dataloader.batch_size': 'two'}, 'train_dataloader of the config cannot be used: '),
        ({'val_evaluator': dict(type='Accuracy', k=5)}, "evaluator of the config cannot be used: .*'k'"),
    ],
)
def test_values_in_a_file_that_nothing_takes(options, said, small_config, data, tmp_path):
    name, changes = small_config('imagenet', 'test_vmamba')
    cfg = Config.fromfile(find_config(name))
    cfg.merge_from_dict(changes)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = str(data / 'imagenet')
    for key, value in options.items():
        if isinstance(value, dict):
            value = dict(value, _delete_=True)
        cfg.merge_from_dict({key: value})
    cfg.work_dir, cfg.experiment_name = str(tmp_path), uuid.uuid4().hex
    runner = RUNNERS.build(cfg)
    with pytest.raises(mm.RunError, match=said):
        runner.train()


def test_categories_are_found_without_the_rest(own_data):
    path = own_data / 'cells' / 'annotations' / 'instances_train2017.json'
    assert [category['name'] for category in checks.categories(path.read_text())] == list(CELLS)
    text = json.dumps(dict(info=dict(categories='none', text='"categories": ['), images=[]))
    assert checks.categories(text) == []
