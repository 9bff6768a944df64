# SPDX-License-Identifier: Apache-2.0
"""A miniature run really learns: each task, by its shipped config, overfits eight images.

On crops of photographs lie a disc, a square and a triangle in colours that say nothing about the shape. What is
evaluated is what was trained on.
"""

import importlib
import itertools
import json
import math
import uuid

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import RUNNERS
from PIL import Image, ImageDraw

from vssm.models import mm  # noqa: F401  # registers the adapters, and stands in for mmcv's operators
from vssm.tools._common import find_config

for package in ('mmcv', 'mmdet', 'mmseg', 'sklearn'):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[mmlab,demo]'")
for module in ('mmcv.ops', 'mmdet.registry', 'mmseg.registry'):  # these need operators: the stand-in's, thanks to mm
    importlib.import_module(module)

IMAGES = 8
SIDE = 96  # of an image, in pixels
SHAPES = ('disc', 'square', 'triangle')
ADE20K = ('building', 'flower', 'ball', 'box', 'tent')  # the photographs and the shapes, by names that ADE20K has
COCO = ('sports ball', 'book', 'kite')  # the shapes, by names that COCO has
TEST_DIMS = [32, 48, 64, 96]  # of every test model

pytestmark = pytest.mark.usefixtures('one_thread')


# ---- the images ------------------------------------------------------------------------------------------------------


def outline(shape, x, y, size):
    """Corners of a shape in the square box whose top left corner is x, y: (corners, 2)."""
    if shape == 'disc':
        angles = np.linspace(0, 2 * math.pi, 32, endpoint=False)
        corners = 0.5 + 0.5 * np.stack([np.cos(angles), np.sin(angles)], 1)
    else:
        corners = np.array(dict(square=[(0, 0), (1, 0), (1, 1), (0, 1)], triangle=[(0.5, 0), (1, 1), (0, 1)])[shape])
    return size * corners + (x, y)


def paint(image, corners, fill):
    ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners.tolist()], fill=fill)


def scenes():
    """Of each image (picture, which photograph, [(which shape, corners), ...])."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(array) for array in load_sample_images().images]  # a building and a flower
    for i in range(IMAGES):
        photograph = photographs[i % 2]
        left, top = rng.integers(0, np.array(photograph.size) - 2 * SIDE)
        picture = photograph.crop((left, top, left + 2 * SIDE, top + 2 * SIDE)).resize((SIDE, SIDE))
        objects = []
        for shape, quarter in enumerate(rng.permutation(4)[:3]):  # apart, so that none covers another
            size = rng.integers(24, 41)
            x, y = SIDE // 2 * np.array(divmod(quarter, 2)) + rng.integers(2, SIDE // 2 - 2 - size, 2, endpoint=True)
            corners = outline(SHAPES[shape], x, y, size)
            paint(picture, corners, tuple(rng.permutation([255, 128, 0]).tolist()))
            objects.append((shape, corners))
        yield picture, i % 2, objects


def make_imagenet(root):
    """train/CLASS/NAME.jpg and the same for val: two images a class, which have nothing in common."""
    for i, (picture, *_) in enumerate(scenes()):
        for split in ('train', 'val'):
            path = root / split / f'n{i // 2:08d}' / f'{i}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, quality=95)


def make_ade20k(root):
    """images/training/NAME.jpg and annotations/training/NAME.png, in which 0 is no class and 1 is ADE20K's first."""
    from mmseg.datasets import ADE20KDataset

    labels = [1 + ADE20KDataset.METAINFO['classes'].index(name) for name in ADE20K]
    images, annotations = (root / kind / 'training' for kind in ('images', 'annotations'))
    images.mkdir(parents=True)
    annotations.mkdir(parents=True)
    for i, (picture, photograph, objects) in enumerate(scenes()):
        annotation = Image.new('L', picture.size, labels[photograph])
        for shape, corners in objects:
            paint(annotation, corners, labels[2 + shape])
        annotation.paste(0, (0, 0, SIDE, 2))
        picture.save(images / f'ADE_train_{i + 1:08d}.jpg', quality=95)
        annotation.save(annotations / f'ADE_train_{i + 1:08d}.png')


def make_coco(root):
    """train2017/ID.jpg and annotations/instances_train2017.json: polygons."""
    for folder in ('train2017', 'annotations'):
        (root / folder).mkdir(parents=True)
    images, annotations = [], []
    for i, (picture, _, objects) in enumerate(scenes()):
        images.append(dict(id=i + 1, file_name=f'{i + 1:012d}.jpg', width=SIDE, height=SIDE))
        picture.save(root / 'train2017' / images[-1]['file_name'], quality=95)
        for shape, corners in objects:
            (x1, y1), (x2, y2) = corners.min(0).tolist(), corners.max(0).tolist()
            edges = itertools.pairwise([*corners.tolist(), corners[0].tolist()])
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=i + 1,
                    category_id=shape + 1,
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    segmentation=[corners.ravel().tolist()],
                    area=abs(sum(x * v - u * y for (x, y), (u, v) in edges)) / 2,
                    iscrowd=0,
                )
            )
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(COCO)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (root / 'annotations' / 'instances_train2017.json').write_text(json.dumps(content))


# ---- the runs --------------------------------------------------------------------------------------------------------


def classification(family, root, work_dir):
    """60 iterations on all images, learnt by heart, and the moving average evaluated as in the recipe."""
    make_imagenet(root)
    cfg = Config.fromfile(find_config(f'imagenet/{family}_tiny_8xb128-300e_in1k'))
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(batch_size=IMAGES, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(root)
        loader.dataset.transform = dict(input_size=SIDE, crop_pct=1.0)
    cfg.merge_from_dict(
        {
            'model': dict(model_name=f'test_{family}', drop_path_rate=0.0, num_classes=IMAGES // 2),
            'model.data_preprocessor': dict(mixup=None, random_erasing=None),
            'optim_wrapper': dict(type='OptimWrapper', optimizer=dict(lr=2e-3)),
            'param_scheduler': [dict(type='CosineAnnealingLR', T_max=60)],
            'train_cfg': dict(max_epochs=60, val_interval=60),
            'val_evaluator.topk': (1,),
            'default_hooks.checkpoint.interval': 60,
            'custom_hooks.0.momentum': 0.2,  # an average over all of so few iterations would not know the last
        }
    )
    cfg.work_dir, cfg.experiment_name = str(work_dir), uuid.uuid4().hex
    return cfg


def load_config(name, family, root, work_dir, classes, **options):
    """A dense config with the family's test model, which trains on the eight images and evaluates them."""
    cfg = Config.fromfile(find_config(name))
    # All images are of one size already; crops, scales and colours would only be more to learn.
    kept = ('LoadImageFromFile', 'LoadAnnotations', 'Resize', 'RandomFlip', 'PackSegInputs', 'PackDetInputs')
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(data_root=str(root), metainfo=dict(classes=classes))
        loader.dataset.pipeline = [step for step in loader.dataset.pipeline if step.type in kept]
        for step in loader.dataset.pipeline:
            if step.type == 'Resize':  # which also notes what a detector needs to know, a scale of 1
                step.scale = (SIDE, SIDE)
    cfg.val_dataloader.dataset.data_prefix = cfg.train_dataloader.dataset.data_prefix
    backbone = dict(model_name=f'test_{family}', pretrained=False, init_cfg=None, drop_path_rate=0.0)
    cfg.merge_from_dict({'model.backbone': backbone, 'randomness': dict(seed=0), **options})
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = uuid.uuid4().hex  # mmengine hands out loggers and histories by it
    return cfg


def segmentation(family, root, work_dir):
    """300 iterations in the proportions of the 160k: a warm-up, then a line down to zero."""
    make_ade20k(root)
    options = {
        # With 32 channels and a rate of 1e-3 a class or two stay unfound for hundreds of iterations: at half of their
        # positions all channels of the head's last ReLU have become zero, and pass no gradient.
        'model.decode_head': dict(in_channels=TEST_DIMS, channels=64, num_classes=len(ADE20K)),
        'model.auxiliary_head': dict(in_channels=TEST_DIMS[2], channels=32, num_classes=len(ADE20K)),
        'model.data_preprocessor.size': (SIDE, SIDE),
        # A batch is all the images, so that its statistics in the batch norms are those that the evaluation takes.
        'train_dataloader.batch_size': IMAGES,
        'train_cfg': dict(max_iters=300, val_interval=300),
        'optim_wrapper.optimizer.lr': 4e-3,
        'param_scheduler.0.end': 3,
        'param_scheduler.1': dict(begin=3, end=300),
    }
    return load_config(
        f'ade20k/upernet_{family}_tiny_4xb4-160k_ade20k-512x512', family, root, work_dir, ADE20K, **options
    )


def detection(family, root, work_dir):
    """The 12 epochs of the schedule, each of ten times the images: 240 iterations."""
    make_coco(root)
    proposals = dict(nms_pre=100, max_per_img=50)
    options = {
        'model.neck': dict(in_channels=TEST_DIMS, out_channels=32),
        'model.rpn_head': dict(in_channels=32, feat_channels=32),
        'model.roi_head.bbox_roi_extractor.out_channels': 32,
        'model.roi_head.mask_roi_extractor.out_channels': 32,
        'model.roi_head.bbox_head': dict(in_channels=32, fc_out_channels=128, num_classes=len(COCO)),
        'model.roi_head.mask_head': dict(in_channels=32, conv_out_channels=16, num_convs=2, num_classes=len(COCO)),
        'model.train_cfg.rpn_proposal': proposals,
        'model.train_cfg.rcnn.sampler.num': 32,
        'model.test_cfg.rpn': proposals,
        'train_dataloader.batch_size': 4,
        'train_cfg.val_interval': 12,
        'default_hooks.checkpoint.interval': 12,
        'optim_wrapper.optimizer.lr': 1e-3,
        'param_scheduler.0.end': 20,  # the warm-up within the first epoch
    }
    cfg = load_config(f'coco/mask-rcnn_{family}_tiny_fpn_8xb2-1x_coco', family, root, work_dir, COCO, **options)
    dataset = cfg.train_dataloader.dataset
    cfg.val_dataloader.dataset.ann_file = dataset.ann_file
    cfg.val_evaluator.ann_file = str(root / dataset.ann_file)
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=10, dataset=dataset)
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize(
    'task, metric, least, family',
    [
        *[
            pytest.param(classification, 'accuracy/top1', 99.9, family, id=f'classification-{family}')
            for family in ('spatial_mamba', 'vmamba2d', 'vmamba')
        ],
        # Of one family each: in all else in which their configs differ, the test changes them.
        pytest.param(segmentation, 'mIoU', 90, 'vmamba2d', id='segmentation-vmamba2d'),
        pytest.param(detection, 'coco/bbox_mAP', 0.5, 'spatial_mamba', id='detection-spatial_mamba'),
    ],
)
def test_eight_images_are_learnt(task, metric, least, family, tmp_path):
    """On one core in 3 to 10 s, and 22 to 50 s; to a mIoU of 99 and a box AP of 0.95, at a rate of zero 11 and 0.00.

    The dense heads learn the images even on a backbone that stays random (98.5, and 0.92): that every weight of the
    backbone moves is for test_dense.py to say.
    """
    runner = RUNNERS.build(task(family, tmp_path / 'data', tmp_path / 'run'))
    runner.train()
    value = runner.message_hub.get_scalar(f'val/{metric}').current()
    assert value > least, f'{metric} {value}'
