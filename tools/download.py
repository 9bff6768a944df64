# SPDX-License-Identifier: Apache-2.0
"""Download the published weights of a model, convert and cache them.

From then on pretrained=True finds them. Files on Google Drive and the Hugging Face Hub need the extra `hub`.
"""

import argparse
import sys
from pathlib import Path

import torch
from timm.models import resolve_pretrained_cfg

from ..models.weights import cached_path, download_pretrained, is_cached, published_at
from ._common import UsageError, console
from ._models import find_model

EXAMPLE = 'vssm download spatial_mamba_tiny'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', metavar='NAME', help='a model, as in `vssm info`')
    parser.add_argument(
        '--cache-dir',
        metavar='DIR',
        type=Path,
        help="folder of the weights, timm.create_model's cache_dir (default: torch.hub's)",
    )


def run(args: argparse.Namespace) -> int:
    model = find_model(args.model)
    try:
        cfg = resolve_pretrained_cfg(model, args.model.partition('.')[2] or None)
    except RuntimeError as error:  # for an unknown tag
        raise UsageError(str(error)) from error
    if not published_at(cfg):
        raise UsageError(f'NAME must be a model with published weights, got {args.model}, of which there are none.')
    path = cached_path(cfg, args.cache_dir)
    said = 'already there'
    if not is_cached(path):
        said = 'downloaded and converted'
        try:
            path = download_pretrained(cfg, args.cache_dir, fetch_url if cfg.url else fetch_drive)
        except (OSError, RuntimeError) as error:
            raise UsageError(str(error)) from error
    console.print(f'{path}: {said}', highlight=False, markup=False, soft_wrap=True)
    return 0


def fetch_url(url: str, path: str) -> None:
    torch.hub.download_url_to_file(url, path, progress=True)


def fetch_drive(url: str, path: str) -> None:
    """Save a file of Google Drive, which asks for confirmations that gdown gives."""
    import gdown

    try:
        saved = gdown.download(url, path, quiet=not console.is_terminal)
    except Exception as error:  # gdown's own kinds, which differ between its releases, and those of requests
        raise OSError(str(error)) from error
    if saved is None:  # as older releases say it
        raise OSError('Google Drive did not give the file.')


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['download', *sys.argv[1:]]))
