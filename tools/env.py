# SPDX-License-Identifier: Apache-2.0
"""Show versions, and which kernels run here and why."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys

import torch

from ..version import __version__
from ._common import console
from ._tables import print_table

EXAMPLE = 'vssm env'

PACKAGES = (
    'torch',
    'torchvision',
    'timm',
    'numpy',
    'safetensors',
    'fvcore',
    'mmengine',
    'scikit-learn',
    'matplotlib',
    'onnx',
    'onnxscript',
    'onnxruntime',
    'gdown',
    'huggingface_hub',
    'h5py',
    'torchmetrics',
    'torchsurv',
    'lifelines',
    'openslide-python',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    versions = dict(vssm=__version__, python=platform.python_version())
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = 'not installed'
    print_table(['package', 'version'], list(versions.items()))
    print_table(['backend', 'state'], list(backends().items()))
    console.print(f'{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads')
    return 0


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
