# SPDX-License-Identifier: Apache-2.0
"""Adapters for mmengine, mmdetection and mmsegmentation, under the names that our configs use.

This is the only folder of the models that needs mmengine. A config imports it:
`custom_imports = dict(imports=['vssm.models.mm'], allow_failed_imports=False)`.

* `classification`, `features`, `wsi`, `wsi_metrics`: networks as models of mmengine, with losses and metrics.
* `data`, `readers`, `wsi_data`: data sets and samplers.
* `optim`, `hooks`, `progress`: what happens in and around an iteration.
* `runner`, `resume`, `failures`: the Runner, which can be killed and resumed, and what it cannot write.
* `identity`, `saved`, `compare`: whose a checkpoint is, how it is read, and whether it fits the config.
* `sources`, `content`, `loading`: files by whatever name, what they hold, and how it gets into a model.
* `inference`, `inspection`: what detectors and segmentors find in photographs; what is wrong with a data set.
* `mmcv_ext`: a stand-in for mmcv's compiled operators.
* `complexity`: what our ops cost, for mmengine's analysis.

To import it changes five things for the whole process: classes are registered with mmengine, `import mmcv._ext` finds
the stand-in wherever it finds nothing else, so that this import must stand before those of mmdet's and mmseg's models
and apis; mmengine loads checkpoints by our reader, which runs no code of theirs; PyTorch's weights-only reader takes
mmengine's training checkpoints; and mmengine's analysis counts our ops.
"""

from . import mmcv_ext

mmcv_ext.install()  # before the first config imports mmdet's or mmseg's models

from .classification import Accuracy, ImageClassifier, ImagePreprocessor, NamedModel, load_weights  # noqa: E402
from .complexity import count_ops  # noqa: E402
from .data import Digits, GuardedDataset, ImageFolder, SeededSampler  # noqa: E402
from .features import Float32RoIExtractor, TimmFeatures  # noqa: E402
from .hooks import (  # noqa: E402
    BestHook,
    EarlyStopHook,
    FiniteLossHook,
    MESAHook,
    MissedEvaluationHook,
    PendingGradientsHook,
    SafetensorsHook,
    SeedHook,
    SharedBuffersHook,
    UnreadableImagesHook,
    note_images,
    save_for_timm,
)
from .identity import current_run  # noqa: E402
from .loading import install  # noqa: E402
from .optim import BFloat16OptimWrapper, StateAverage, TimmOptimWrapperConstructor  # noqa: E402
from .progress import ProgressHook, progress_bar  # noqa: E402
from .readers import TimmDataset, TimmStream  # noqa: E402
from .runner import TimmRunner  # noqa: E402
from .saved import allow_histories, numbered_checkpoints, read_run  # noqa: E402
from .utils import RunError  # noqa: E402

allow_histories()
install()
count_ops()

__all__ = [
    'Accuracy',
    'BFloat16OptimWrapper',
    'BestHook',
    'Digits',
    'EarlyStopHook',
    'FiniteLossHook',
    'Float32RoIExtractor',
    'GuardedDataset',
    'ImageClassifier',
    'ImageFolder',
    'ImagePreprocessor',
    'MESAHook',
    'MissedEvaluationHook',
    'NamedModel',
    'PendingGradientsHook',
    'ProgressHook',
    'RunError',
    'SafetensorsHook',
    'SeedHook',
    'SharedBuffersHook',
    'SeededSampler',
    'StateAverage',
    'TimmDataset',
    'TimmFeatures',
    'TimmOptimWrapperConstructor',
    'TimmRunner',
    'TimmStream',
    'UnreadableImagesHook',
    'current_run',
    'load_weights',
    'note_images',
    'numbered_checkpoints',
    'progress_bar',
    'read_run',
    'save_for_timm',
]
