# SPDX-License-Identifier: Apache-2.0
"""What a detector or segmentor finds in photographs, as values and as pictures."""

import copy
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.visualization import Visualizer
from PIL import Image
from torch import nn

from ..files import printable, state_of
from ..images import read_rgb
from ..weights import read_structure
from .checks import class_counts
from .loading import load_whole
from .own_classes import fill_classes
from .sources import local_file

__all__ = ['DensePredictor', 'load_predictor']


class DensePredictor(NamedTuple):
    """A detector or segmentor with its weights.

    Args:
        name: Name of the kind of model, such as MaskRCNN.
        model: The model, in evaluation mode.
        pipeline: Function from dict(img, img_id) to what the model takes of an image.
        classes: Names of the classes, in their order.
        visualizer: What draws its answers.
    """

    name: str
    model: Any
    pipeline: Compose
    classes: list[str]
    visualizer: Visualizer

    @property
    def is_detector(self) -> bool:
        return not hasattr(self.model, 'decode_head')

    @torch.inference_mode()
    def __call__(self, path: str | Path, threshold: float = 0.3) -> tuple[list[dict[str, Any]], Image.Image]:
        """What an image shows.

        Args:
            path: File of the image.
            threshold: Least score of an object.

        Returns:
            Of a detector its objects, the surest first, each as dict(index, class, score, box) with the corners of the
            box in pixels, x0, y0, x1, y1; of a segmentor its classes, the largest first, each as dict(index, class,
            share) with the share of the pixels. And the image with them drawn on it.

        Raises:
            ValueError: There is no such file, or it cannot be read.
        """
        picture = np.asarray(read_rgb(path))
        data = self.pipeline(dict(img=picture[..., ::-1].copy(), img_id=0))  # OpenCV's order of colours
        sample = self.model.test_step(dict(inputs=[data['inputs']], data_samples=[data['data_samples']]))[0].cpu()
        if self.is_detector:
            sample.pred_instances = sample.pred_instances[sample.pred_instances.scores >= threshold]
            answer, shown = self._objects(sample.pred_instances), dict(pred_score_thr=-1.0)
        else:
            answer, shown = self._areas(sample.pred_sem_seg.data), {}
        self.visualizer.add_datasample('image', picture, sample, draw_gt=False, **shown)
        return answer, Image.fromarray(self.visualizer.get_image())

    def _objects(self, found: Any) -> list[dict[str, Any]]:
        rows = zip(found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist(), strict=True)
        return [
            dict(index=label, **{'class': self.classes[label]}, score=score, box=[round(x, 1) for x in box])
            for label, score, box in sorted(rows, key=lambda row: -row[1])
        ]

    def _areas(self, labels: torch.Tensor) -> list[dict[str, Any]]:
        counts = labels.flatten().bincount(minlength=len(self.classes))
        order = counts.argsort(descending=True, stable=True)
        return [
            dict(index=i, **{'class': self.classes[i]}, share=int(counts[i]) / labels.numel())
            for i in order.tolist()
            if counts[i]
        ]


def load_predictor(cfg: Config, checkpoint: str | Path, device: str = 'cpu') -> DensePredictor:
    """A detector or segmentor with its weights.

    The names of the classes are those that the checkpoint of a training notes, or else those of the config.

    Args:
        cfg: The config that it was trained with.
        checkpoint: What `local_file` takes.
        device: Device of the model.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The checkpoint cannot be read safely or is of another model, or the config is none of a detector or
            segmentor.
    """
    init_default_scope(cfg.get('default_scope'))
    cfg = copy.deepcopy(cfg)
    names, palette = _classes(cfg, checkpoint)
    fill_classes(cfg, names or None)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    kinds = [kind for kind, head in dict(mmseg='decode_head', mmdet='bbox_head').items() if _has(model, head)]
    if not kinds:
        raise ValueError(f'config {cfg.filename} must be one of a detector or segmentor, got {type(model).__name__}.')
    load_whole(model, checkpoint)
    leaf = types.SimpleNamespace(metainfo=dict(classes=names), cat_ids=None)
    if kinds[0] == 'mmseg':
        leaf = types.SimpleNamespace(metainfo=leaf.metainfo, seg_map_suffix='', reduce_zero_label=None)
    for key, need, got in class_counts(leaf, model):
        if need != got:
            raise ValueError(
                f'checkpoint {checkpoint} must name the {got} classes of model.{key}, got {need} names '
                f'({", ".join(names[:5])}{" ..." * (need > 5)}): metainfo.classes of the config names them, too.'
            )
    return DensePredictor(
        type(model).__name__, model.eval().to(device), _pipeline(cfg), names, _visualizer(kinds[0], names, palette)
    )


def _has(model: nn.Module, head: str) -> bool:
    return any(name.rpartition('.')[2] == head for name, _ in model.named_modules())


def _classes(cfg: Config, checkpoint: str | Path) -> tuple[list[str], Any]:
    """The names of the classes, and their colours if there are any."""
    with local_file(checkpoint) as path:
        if not path.is_file():
            raise FileNotFoundError(f'checkpoint {checkpoint} {state_of(path)}.')
        content = read_structure(path) if path.suffix != '.safetensors' else {}
    meta = content.get('meta') if isinstance(content, dict) else None
    noted = meta.get('dataset_meta') if isinstance(meta, dict) else None
    if isinstance(noted, dict) and isinstance(noted.get('classes'), (list, tuple)):
        return [printable(str(name)) for name in noted['classes']], None
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    known = {**getattr(DATASETS.get(dataset.type), 'METAINFO', {}), **(dataset.get('metainfo') or {})}
    return [str(name) for name in known.get('classes') or ()], known.get('palette')


def _pipeline(cfg: Config) -> Compose:
    """The steps of a test, for an image in memory and without its truth."""
    dataset = copy.deepcopy(cfg.test_dataloader.dataset)
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset.dataset
    first, *rest = dataset.pipeline
    load = dict(type='LoadImageFromNDArray', to_float32=first.get('to_float32', False))
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope')):
        return Compose([load, *(step for step in rest if not str(step['type']).endswith('LoadAnnotations'))])


def _visualizer(kind: str, names: list[str], palette: Any) -> Visualizer:
    if not palette or len(palette) != len(names):
        palette = np.random.RandomState(42).randint(0, 255, (len(names), 3)).tolist()  # mmdetection's own seed
    if kind == 'mmdet':
        from mmdet.visualization import DetLocalVisualizer

        drawer: Visualizer = DetLocalVisualizer()
    else:
        from mmseg.visualization import SegLocalVisualizer

        drawer = SegLocalVisualizer(alpha=0.5)
    drawer.dataset_meta = dict(classes=names, palette=[tuple(colour) for colour in palette])
    return drawer
