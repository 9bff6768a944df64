# SPDX-License-Identifier: Apache-2.0
"""Show versions, and which kernels run here and why."""

import argparse
import importlib.util
import os
import platform
import sys

import torch

from ..version import __version__
from ._common import console, find_distribution
from ._tables import print_table

EXAMPLE = 'vssm env'

# The modules that this package uses, and the distributions that bring them: the usual one, and others that may.
PACKAGES = {
    'torch': ('torch',),
    'torchvision': ('torchvision',),
    'triton': ('triton', 'pytorch-triton', 'triton-windows'),
    'timm': ('timm',),
    'numpy': ('numpy',),
    'PIL': ('pillow', 'pillow-simd'),
    'safetensors': ('safetensors',),
    'fvcore': ('fvcore',),
    'filelock': ('filelock',),
    'rich': ('rich',),
    'mmengine': ('mmengine', 'mmengine-lite', 'onedl-mmengine'),
    'mmcv': ('mmcv-lite', 'mmcv', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
    'cv2': ('opencv-python', 'opencv-python-headless', 'opencv-contrib-python', 'opencv-contrib-python-headless'),
    'ftfy': ('ftfy',),
    'regex': ('regex',),
    'setuptools': ('setuptools',),
    'sklearn': ('scikit-learn',),
    'matplotlib': ('matplotlib',),
    'pytorch_grad_cam': ('grad-cam',),
    'tensorboard': ('tensorboard',),
    'onnx': ('onnx',),
    'onnxscript': ('onnxscript',),
    'onnxruntime': ('onnxruntime', 'onnxruntime-gpu'),
    'torchao': ('torchao',),
    'gdown': ('gdown',),
    'huggingface_hub': ('huggingface_hub',),
    'h5py': ('h5py',),
    'torchmetrics': ('torchmetrics',),
    'torchsurv': ('torchsurv',),
    'lifelines': ('lifelines',),
    'scipy': ('scipy',),
    'openslide': ('openslide-python',),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    versions = dict(vssm=__version__, python=platform.python_version())
    for distributions in PACKAGES.values():
        found = {name: version for name in distributions if (version := find_distribution(name))}
        versions |= found or {distributions[0]: 'not installed'}  # several of one module hide each other
    print_table(['package', 'version'], list(versions.items()))
    print_table(['backend', 'state'], list(backends().items()))
    counts = ', '.join(
        _counted(n, word) for n, word in ((os.cpu_count() or 1, 'CPU'), (torch.get_num_threads(), 'thread'))
    )
    console.print(f'{platform.system()} {platform.machine()}, {counts}', highlight=False, soft_wrap=True)
    return 0


def _counted(count: int, word: str) -> str:
    return f'{count} {word}' if count == 1 else f'{count} {word}s'


def backends() -> dict[str, str]:
    """Whether each way to compute the scan is on, and if not, why."""
    if not torch.cuda.is_available():
        cuda = 'off: PyTorch finds no CUDA device'
    elif importlib.util.find_spec('triton') is None:
        cuda = 'off: Triton is not installed: pip install triton'
    else:
        cuda = f'on: {torch.cuda.get_device_name()}'
    if os.environ.get('VSSM_REFERENCE', '0') == '1':
        cpu, reference = 'off: VSSM_REFERENCE=1', 'on: VSSM_REFERENCE=1'
    else:
        reference = 'off: VSSM_REFERENCE is not 1'
        try:
            cpu = f'on: {torch.ops.vssm.cpu_capability()}'
        except RuntimeError as error:  # VSSM_CPU_CAPABILITY asks for instructions that this CPU lacks
            cpu = f'off: {error}'
    return {'CPU': cpu, 'CUDA': cuda, 'reference': reference}


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['env', *sys.argv[1:]]))
