# SPDX-License-Identifier: Apache-2.0
"""Pretrained weights: downloaded, converted, and kept in a cache."""

import functools
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg, resolve_pretrained_cfg

from .convert import convert
from .identify import SHAPE_ARGS, args_fn, registered

__all__ = ['cached_path', 'download_pretrained', 'is_cached', 'pretrained_kwargs']

_UNFINISHED = '.vssm-'  # the beginning of the name of a folder in which a file is made before it is moved


def cached_path(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Path:
    """The file that is to hold the converted weights of a configuration, named by their URL, which tags may share.

    Args:
        cfg: Configuration with `architecture`, and with `url` or else `origin_url`.
        cache_dir: Folder of the cache, that of torch.hub's checkpoints unless given.
    """
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir(), 'checkpoints')
    digest = hashlib.sha256(_source(cfg).encode()).hexdigest()
    return folder / f'{cfg.architecture}-{digest[:8]}.safetensors'


def _source(cfg: PretrainedCfg) -> str:
    return cfg.url or cfg.origin_url  # type: ignore[return-value]  # ours are single URLs


def is_cached(path: Path) -> bool:
    """Whether a file of the cache is there and whole. A damaged one, which is to be replaced, counts as none."""
    try:
        with safe_open(path, framework='pt'):
            return True
    except (OSError, SafetensorError):
        return False


def download_pretrained(
    cfg: PretrainedCfg,
    cache_dir: str | Path | None = None,
    fetch: Callable[[str, str], None] = functools.partial(torch.hub.download_url_to_file, progress=False),
) -> Path:
    """The file with the converted weights of a configuration, which are downloaded if they are not cached.

    A failure leaves no file behind.

    Args:
        cfg: Configuration with `architecture`, and with `url` or else `origin_url`.
        cache_dir: Folder of the cache, that of torch.hub's checkpoints unless given.
        fetch: Function that takes a URL and the path to save its content at.

    Raises:
        RuntimeError: The weights cannot be downloaded, or are not what they should be.
    """
    path = cached_path(cfg, cache_dir)
    if is_cached(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f'{_UNFINISHED}*'):
        if time.time() - leftover.stat().st_mtime > 24 * 3600:  # a process was killed
            shutil.rmtree(leftover, ignore_errors=True)
    url = _source(cfg)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_UNFINISHED) as folder:
        suffix = '.safetensors' if urlsplit(url).path.endswith('.safetensors') else '.pth'
        downloaded, converted = Path(folder, f'download{suffix}'), Path(folder, path.name)
        try:
            fetch(url, str(downloaded))
            metadata = convert(downloaded, converted, cfg.architecture, origin=url).metadata
            _check_against_cfg(json.loads(metadata['model_args']), cfg)
        except (OSError, HTTPException, ValueError) as error:
            raise RuntimeError(f'{cfg.architecture}: no weights from {url}: {error}') from error
        converted.replace(path)  # both are whole, and in one file system
    return path


def _check_against_cfg(args: dict[str, Any], cfg: PretrainedCfg) -> None:
    """Refuse weights with other channels or classes than the configuration says, from which timm adapts them."""
    defaults = args_fn(cfg.architecture)(registered(cfg.architecture).state_dict())
    got = {key: defaults[key] for key in ('in_chans', 'num_classes')}
    got |= {key: value for key, value in args.items() if key in SHAPE_ARGS | {'features_only'}}
    needed = dict(in_chans=cfg.input_size[0], num_classes=cfg.num_classes)
    if got != needed:
        raise ValueError(f'checkpoint must hold {cfg.architecture} with {needed}, got one with {got}.')


def pretrained_kwargs(variant: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of an entrypoint for pretrained=True, with the cached file in place of a URL.

    timm's own download would keep a file that broke off, and could not read one with unknown classes. Sources other
    than a URL are left to timm.

    Args:
        variant: Name of the model, perhaps with a tag.
        kwargs: Keyword arguments of the entrypoint.

    Raises:
        RuntimeError: There are no weights, or they cannot be loaded from their source; the message says what to do.
    """
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    if cfg.state_dict or cfg.file or cfg.hf_hub_id:
        return kwargs
    cache_dir = kwargs.get('cache_dir')
    if cfg.url:
        path = download_pretrained(cfg, cache_dir)
    elif cfg.origin_url:
        path = cached_path(cfg, cache_dir)
        if not is_cached(path):
            option = f' --cache-dir {cache_dir}' if cache_dir else ''
            raise RuntimeError(
                f'{variant}: its weights are published where they cannot be loaded from, {cfg.origin_url}: run '
                f'`vssm download {variant}{option}` once, then pretrained=True finds them.'
            )
    else:
        raise RuntimeError(
            f'{variant}: no weights are published, so that pretrained must be False; checkpoint_path=FILE loads yours.'
        )
    return {**kwargs, 'pretrained_cfg_overlay': {**(kwargs.get('pretrained_cfg_overlay') or {}), 'file': str(path)}}
