# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by whatever name a config gives them: a path, a URL, a name of a model zoo, or a file of a backend."""

import difflib
import fcntl
import hashlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from mmengine import fileio
from mmengine.logging import print_log
from mmengine.runner import checkpoint as zoos
from torch import Tensor
from torch.hub import HASH_REGEX, download_url_to_file

from ..files import replacing
from ..weights import read_checkpoint
from ..weights.archive import open_archive
from ..weights.checksum import read_safetensors
from ..weights.read import is_safetensors, refusing

__all__ = ['has_folder', 'local_file', 'log_changes', 'naming', 'read_weights']


def read_weights(source: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of a checkpoint, averaged ones where there are any, and its metadata, as of `read_checkpoint`.

    Args:
        source: What `local_file` takes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be fetched, cannot be read safely, or has no weights.
    """
    with local_file(source) as path:
        return read_checkpoint(path)


@contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """Let a ValueError begin with the name of a checkpoint."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f'{source}: {error}') from error


def log_changes(
    source: str | Path, fitted: str, left_out: Iterable[str], theirs: dict[str, Tensor], own: dict[str, Tensor]
) -> None:
    """Log in what a training does not start from a checkpoint as it is.

    Args:
        source: The checkpoint.
        fitted: What was fitted, in words.
        left_out: Names of tensors that have another shape in the model.
        theirs: Names and tensors of the checkpoint.
        own: Names and tensors of the model.
    """
    notes = [
        f'{name} is left out and begins anew: it is {tuple(theirs[name].shape)} there and {tuple(own[name].shape)} here'
        for name in left_out
    ]
    for note in filter(None, [fitted, *notes]):
        print_log(f'{source}: {note}.', logger='current', level=logging.WARNING)


@contextmanager
def local_file(source: str | Path) -> Iterator[Path]:
    """The path of a checkpoint, for as long as the context lasts; a URL's is kept in the cache of torch.hub.

    Args:
        source: A path; a URL, http:// or https://; torchvision://NAME, open-mmlab://NAME or mmcls://NAME of the lists
            that mmengine keeps; or a name with the prefix of a backend that is registered with mmengine.fileio.

    Raises:
        ValueError: The file cannot be fetched. What is raised within the context names the source, too.
    """
    if '://' not in str(source):
        yield Path(source).expanduser()
        return
    url = _look_up(str(source))
    with ExitStack() as stack:
        if url.startswith(('http://', 'https://')):
            path = _download(url)
        elif '://' not in url:
            path = Path(url)
        else:
            try:
                path = Path(stack.enter_context(fileio.get_local_path(url)))
            except Exception as error:  # of any kind, as a backend is anyone's
                known = ', '.join(sorted(f'{prefix}://' for prefix in fileio.backends.prefix_to_backends if prefix))
                raise ValueError(
                    f'checkpoint {source} cannot be fetched by a backend of mmengine.fileio, which knows {known} '
                    f'({type(error).__name__}: {error}).'
                ) from error
        with naming(source):
            yield path


def has_folder(path: str, backend_args: dict[str, Any] | None = None) -> bool:
    """Whether a folder of data is there, as its backend says; one that cannot say, as over HTTP, is believed.

    Args:
        path: A folder, perhaps with the prefix of a backend that is registered with mmengine.fileio.
        backend_args: The data set's keyword arguments of the backend.
    """
    try:
        return fileio.isdir(path, backend_args=backend_args)
    except (AttributeError, NotImplementedError):
        return True
    except KeyError:  # no backend has that prefix
        return False


def _look_up(source: str) -> str:
    """The URL, or the path, behind a name of a model zoo; any other source as it is."""
    prefix, _, name = source.partition('://')
    if prefix in ('torchvision', 'modelzoo'):
        models = zoos.get_torchvision_models()
    elif prefix in ('open-mmlab', 'openmmlab'):
        name = zoos.get_deprecated_model_names().get(name, name)
        models = zoos.get_external_models()
    elif prefix == 'mmcls':
        models = zoos.get_mmcls_models()
    else:
        return source
    if name not in models:
        close = difflib.get_close_matches(name, models)
        hint = f' Did you mean {" or ".join(close)}?' if close else ''
        raise ValueError(f'checkpoint {source} must be one of the {len(models)} names of {prefix}://.{hint}')
    found = models[name]
    return found if '://' in found else str(Path(zoos._get_mmengine_home(), found))


def _download(url: str) -> Path:
    """The file of a URL in the cache, downloaded by one process at a time unless it is there."""
    folder = Path(torch.hub.get_dir(), 'checkpoints')
    path = folder / Path(urlsplit(url).path).name
    if not HASH_REGEX.search(path.name):  # other URLs may end in the same name
        path = path.with_name(f'{path.stem}-{hashlib.sha256(url.encode()).hexdigest()[:8]}{path.suffix}')
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f'.{path.name}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        if path.is_file():
            return path
        try:
            with replacing(path) as temporary:
                download_url_to_file(url, str(temporary), progress=False)
                _check_whole(temporary)
        except (OSError, HTTPException, RuntimeError, ValueError) as error:
            raise ValueError(f'checkpoint {url} cannot be downloaded: {error}') from error
    return path


def _check_whole(path: Path) -> None:
    """Refuse a download that broke off, so that the next one begins anew."""
    with refusing(path):
        if is_safetensors(path):
            read_safetensors(path)
        else:
            with open(path, 'rb') as file:
                open_archive(file)
