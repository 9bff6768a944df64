# SPDX-License-Identifier: Apache-2.0
"""Pretrained weights: downloaded, converted, and kept in a cache."""

import fnmatch
import functools
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, resolve_pretrained_cfg

from .archive import Refused
from .checksum import read_safetensors
from .convert import convert
from .identify import GRID_ARGS, SHAPE_ARGS, args_fn, registered

__all__ = ['cached_path', 'download_pretrained', 'is_cached', 'pretrained_kwargs', 'published_at']

_UNFINISHED = '.vssm-'  # the beginning of the name of a folder in which a file is made before it is moved


def published_at(cfg: PretrainedCfg) -> str:
    """The address of the weights of a configuration: of the file or, on the Hugging Face Hub, of the repository; '' if
    none are published."""
    if cfg.url:
        return str(cfg.url)  # ours are single URLs
    if cfg.hf_hub_id:
        return f'https://huggingface.co/{cfg.hf_hub_id.partition("@")[0]}'
    return cfg.origin_url or ''


def cached_path(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Path:
    """The file that is to hold the converted weights of a configuration, named by their source, which tags may share.

    Args:
        cfg: Configuration with `architecture`, and with `url`, `hf_hub_id` or `origin_url`.
        cache_dir: Folder of the cache, that of torch.hub's checkpoints unless given.
    """
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir(), 'checkpoints')
    source = published_at(cfg) if not _is_on_hub(cfg) else f'{cfg.hf_hub_id}/{cfg.hf_hub_filename or ""}'
    digest = hashlib.sha256(source.encode()).hexdigest()
    return folder / f'{cfg.architecture}-{digest[:8]}.safetensors'


def _is_on_hub(cfg: PretrainedCfg) -> bool:
    return bool(cfg.hf_hub_id and not cfg.url)


def is_cached(path: Path) -> bool:
    """Whether a file of the cache is there and whole. A damaged one, which is to be replaced, counts as none."""
    try:
        read_safetensors(path)  # as timm, which reads it after us, checks nothing
    except (OSError, Refused, SafetensorError):
        return False
    return True


def download_pretrained(
    cfg: PretrainedCfg,
    cache_dir: str | Path | None = None,
    fetch: Callable[[str, str], None] = functools.partial(torch.hub.download_url_to_file, progress=False),
) -> Path:
    """The file with the converted weights of a configuration, which are downloaded if they are not cached.

    A failure leaves no file behind. On the Hugging Face Hub a file's name is a pattern, `hf_hub_filename`, that one
    file of the repository matches; without it the repository must hold one file of weights.

    Args:
        cfg: Configuration with `architecture`, and with `url`, `hf_hub_id` or `origin_url`.
        cache_dir: Folder of the cache, that of torch.hub's checkpoints unless given.
        fetch: Function that takes a URL and the path to save its content at; the Hub has its own.

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
    url = published_at(cfg)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_UNFINISHED) as folder:
        suffix = '.safetensors' if urlsplit(url).path.endswith('.safetensors') else '.pth'
        downloaded, converted = Path(folder, f'download{suffix}'), Path(folder, path.name)
        try:
            if _is_on_hub(cfg):
                downloaded, url = _fetch_from_hub(cfg, folder)
            else:
                fetch(url, str(downloaded))
            metadata = convert(downloaded, converted, cfg.architecture, origin=url).metadata
            _check_against_cfg(json.loads(metadata['model_args']), cfg)
        except (OSError, HTTPException, ValueError) as error:
            raise RuntimeError(f'{cfg.architecture}: no weights from {url}: {error}') from error
        converted.replace(path)  # both are whole, and in one file system
    return path


def _fetch_from_hub(cfg: PretrainedCfg, folder: str) -> tuple[Path, str]:
    """The file that was saved, and its address.

    Raises:
        OSError: The Hub does not give it.
        ValueError: The repository does not hold one such file.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise OSError(
            'this needs the package huggingface_hub: run `pip install ".[hub]"` in a clone of vssm.'
        ) from error
    repository, _, revision = str(cfg.hf_hub_id).partition('@')
    try:
        names = huggingface_hub.list_repo_files(repository, revision=revision or None)
    except Exception as error:  # its own kinds, which differ between its releases, and those of its transport
        raise OSError(str(error)) from error
    name = _one_file(names, cfg.hf_hub_filename)
    try:
        saved = huggingface_hub.hf_hub_download(repository, name, revision=revision or None, local_dir=folder)
    except Exception as error:
        raise OSError(str(error)) from error
    return Path(saved), f'{published_at(cfg)}/resolve/{revision or "main"}/{name}'


def _one_file(names: Sequence[str], pattern: str | None) -> str:
    """The name that matches the pattern, or without one is that of a file of weights."""
    patterns = [pattern] if pattern else ['*.safetensors', '*.pth', '*.pth.tar', '*.pt', '*.bin', '*.ckpt']
    found = [name for name in names if any(fnmatch.fnmatchcase(name, each) for each in patterns)]
    if len(found) != 1:
        raise ValueError(
            f'the repository must hold one file {" or ".join(patterns)}, got {", ".join(found or names) or "none"}.'
        )
    return found[0]


def _check_against_cfg(args: dict[str, Any], cfg: PretrainedCfg) -> None:
    """Refuse weights with other channels or classes than the configuration says, from which timm adapts them."""
    architecture = str(cfg.architecture)
    defaults = args_fn(architecture)(registered(architecture).state_dict())
    got = {key: defaults[key] for key in ('in_chans', 'num_classes')}
    got |= {key: value for key, value in args.items() if key in SHAPE_ARGS | GRID_ARGS | {'features_only'}}
    needed = dict(in_chans=cfg.input_size[0], num_classes=cfg.num_classes)
    if got != needed:
        raise ValueError(f'checkpoint must hold {cfg.architecture} with {needed}, got one with {got}.')


def pretrained_kwargs(variant: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of an entrypoint for pretrained=True, with the cached file in place of a URL.

    timm's own download would keep a file that broke off, and could not read one with unknown classes. Files, and
    repositories of the Hub that are none of the model's published ones, are left to timm.

    Args:
        variant: Name of the model, perhaps with a tag.
        kwargs: Keyword arguments of the entrypoint.

    Raises:
        RuntimeError: There are no weights, or they cannot be loaded from their source; the message says what to do.
    """
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    repositories = {published.hf_hub_id for published in get_arch_pretrained_cfgs(variant).values()}
    if cfg.state_dict or cfg.file or cfg.hf_hub_id and cfg.hf_hub_id not in repositories:
        return kwargs
    cache_dir = kwargs.get('cache_dir')
    if cfg.url or cfg.hf_hub_id:
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
