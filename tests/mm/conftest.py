# SPDX-License-Identifier: Apache-2.0
"""Small trainings: miniature data sets, and shipped configs cut down to them."""

import functools

import make_datasets
import pytest


@pytest.fixture(scope='session')
def data(made_once):
    """Miniature data sets in the real layout, see make_datasets.py."""
    pytest.importorskip('mmdet', reason="mmdet is not installed: pip install '.[mmlab]'")
    return made_once('data', make_datasets.main)


@pytest.fixture(scope='module')
def quick_configs():
    """Spare what takes mmengine seconds: looking for a base in all metafiles first, and setting a config's text."""
    module = pytest.importorskip('mmengine.config.config')

    def in_no_metafile(*args):
        raise ValueError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, '_get_external_cfg_path', in_no_metafile)
        patch.setattr(module, 'is_installed', functools.cache(module.is_installed))
        patch.setattr(module, 'FormatCode', lambda text, **kwargs: (text, True), raising=False)  # a fork has none
        yield


@pytest.fixture(scope='session')
def small_config():
    """small_config(task, model_name): a shipped config, and changes to it for a test model and two steps on `data`."""
    dims = [32, 48, 64, 96]  # of every test model

    def imagenet(model_name):
        mesa = 'spatial' in model_name
        return f'imagenet/{"spatial_mamba" if mesa else "vmamba"}_tiny_8xb128-300e_in1k', {
            'model.model_name': model_name,
            'model.num_classes': 2,
            'model.data_preprocessor.mixup.num_classes': 2,
            'train_dataloader.batch_size': 2,
            'train_dataloader.num_workers': 0,
            'train_dataloader.persistent_workers': False,
            'train_dataloader.dataset.transform.input_size': 64,
            'val_dataloader.num_workers': 0,
            'val_dataloader.persistent_workers': False,
            'val_dataloader.dataset.transform.input_size': 64,
            'test_dataloader.num_workers': 0,
            'test_dataloader.persistent_workers': False,
            'test_dataloader.dataset.transform.input_size': 64,
            'val_evaluator.topk': (1, 2),
            'test_evaluator.topk': (1, 2),
            'param_scheduler': [dict(type='CosineAnnealingLR', T_max=4, end=4, convert_to_iter_based=True)],
            'train_cfg.max_epochs': 1,
        }

    def ade20k(model_name):
        return 'ade20k/upernet_vmamba_tiny_4xb4-160k_ade20k-512x512', {
            'model.backbone.model_name': model_name,
            'model.backbone.pretrained': False,
            'model.decode_head': dict(in_channels=dims, channels=32),
            'model.auxiliary_head': dict(in_channels=dims[2], channels=16),
            'model.data_preprocessor.size': (64, 64),
            'train_cfg': dict(max_iters=2, val_interval=2),
            'train_dataloader.batch_size': 2,
            'train_dataloader.dataset.pipeline.2.scale': (256, 64),
            'train_dataloader.dataset.pipeline.3.crop_size': (64, 64),
            'val_dataloader.dataset.pipeline.1.scale': (256, 64),
            'test_dataloader.dataset.pipeline.1.scale': (256, 64),
            'default_hooks.checkpoint.interval': 2,
            'param_scheduler.0.start_factor': 1.0,  # a warm-up's first steps are too small to be seen
        }

    def coco(model_name):
        return 'coco/mask-rcnn_vmamba_tiny_fpn_8xb2-1x_coco', {
            'model.backbone.model_name': model_name,
            'model.backbone.pretrained': False,
            'model.neck': dict(in_channels=dims, out_channels=32),
            'model.rpn_head': dict(in_channels=32, feat_channels=32),
            'model.roi_head.bbox_roi_extractor.out_channels': 32,
            'model.roi_head.mask_roi_extractor.out_channels': 32,
            'model.roi_head.bbox_head': dict(in_channels=32, fc_out_channels=32),
            'model.roi_head.mask_head': dict(in_channels=32, conv_out_channels=16),
            'model.test_cfg.rcnn.score_thr': 0.0,  # two steps make no confident detector
            'train_cfg.max_epochs': 1,
            'train_dataloader.dataset.pipeline.2.scale': (128, 96),
            'val_dataloader.dataset.pipeline.1.scale': (128, 96),
            'test_dataloader.dataset.pipeline.1.scale': (128, 96),
            'param_scheduler.0.start_factor': 1.0,
        }

    return lambda task, model_name: dict(imagenet=imagenet, ade20k=ade20k, coco=coco)[task](model_name)
