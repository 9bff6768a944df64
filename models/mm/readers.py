# SPDX-License-Identifier: Apache-2.0
"""Images by any of timm's readers: folders, tar files, torchvision, Hugging Face, WebDataset and TensorFlow."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_dist_info
from mmengine.registry import DATASETS
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..images import eight_bits, turn_upright
from .data import ImageError, make_transform
from .utils import RunError, mix_seeds, seed_everything

__all__ = ['TimmDataset', 'TimmStream']

_STREAMS = ('hfids', 'tfds', 'wds')


class _Labelled:
    """What the data sets of this file share: names of classes, a transform, and samples as `ImageFolder` gives them."""

    def _prepare(
        self,
        name: str,
        transform: dict[str, Any] | None,
        known: Sequence[str] | None,
        classes: Sequence[str] | int | None,
    ) -> None:
        names = [str(number) for number in range(classes)] if isinstance(classes, int) else classes or known
        if not names or isinstance(names, str) or (known and len(names) != len(known)):
            many = f'{len(known)} classes' if known else 'classes, which its reader does not know'
            raise RunError(f'{type(self).__name__}: classes must name or count the {many}, got {classes!r}.')
        self.name = name
        self.metainfo = dict(classes=tuple(map(str, names)))
        self.preprocessing = None if (transform or {}).get('is_training') else dict(transform or {})
        self.transform = make_transform(transform or {})

    def _sample(self, picture: Image.Image, label: Any, where: str) -> dict[str, Any]:
        """dict(inputs, data_samples), (3, H, W), uint8, and the number of the class.

        Raises:
            RunError: The label is no number of a class.
        """
        count = len(self.metainfo['classes'])
        try:
            number = int(label)
        except (TypeError, ValueError):
            number = -1
        if not 0 <= number < count:
            raise RunError(
                f'{self.name!r}: the label of {where} must be a number from 0 to {count - 1}, got {label!r}.'
            )
        return dict(inputs=torch.as_tensor(self.transform(picture)), data_samples=number)


@DATASETS.register_module()
class TimmDataset(_Labelled, Dataset):
    """Images by one of timm's readers that knows their number and their order.

    Gives what `ImageFolder` gives. Without a name the data are DATA_ROOT/SPLIT, a folder with one folder of images per
    class, or DATA_ROOT/SPLIT.tar; their classes are numbered in the order of their names, in which 2 stands before 10.

    Args:
        name: Name of the data set as timm's `create_dataset` takes it: hfds/NAME, torch/NAME; empty for files.
        data_root: Folder of the data; of a Hugging Face data set its cache, the usual one unless given.
        split: Name of the split.
        transform: Keyword arguments of timm's `create_transform`.
        class_split: Name of the split of files whose folders number the classes, so that all splits agree.
        upright: Whether images are turned as their EXIF orientation says.
        classes: Names of the classes in the order of their numbers, or their number; unless given those that the reader
            knows.
        kwargs: Further keyword arguments of `create_dataset`.

    Raises:
        RunError: There are no such data, or nothing names the classes.
    """

    strict_decoder = True  # Pillow's refuses a file that lacks its end

    def __init__(
        self,
        name: str = '',
        data_root: str | None = None,
        split: str = 'train',
        transform: dict[str, Any] | None = None,
        class_split: str = 'train',
        upright: bool = True,
        classes: Sequence[str] | int | None = None,
        **kwargs: Any,
    ) -> None:
        if _prefix(name) in _STREAMS:
            raise RunError(
                f"TimmDataset: name must be of data with an order, got {name!r}, a stream: type='TimmStream'."
            )
        self.upright = upright
        self._numbers: list[int] | None = None  # of the classes, by those of the reader
        self._source: Any
        known: Sequence[str] | None
        if name:
            self._source = _create(name, root=data_root, split=split, **kwargs)
            known = _names(self._source)
        else:
            self._source, known = self._open_files(data_root or '.', split, class_split, kwargs)
        self._prepare(name, transform, known, classes)

    def _open_files(
        self, data_root: str, split: str, class_split: str, kwargs: dict[str, Any]
    ) -> tuple[Any, list[str] | None]:
        """The data of files, and the names of the classes, which another split may number."""
        source = _open_split(data_root, split, kwargs)
        own = _names(source)
        if split == class_split or kwargs.get('class_map') or own is None:
            return source, own
        known = _names(_open_split(data_root, class_split, kwargs)) or []
        if strangers := set(own) - set(known):
            raise RunError(
                f'TimmDataset: {split} in {data_root} must hold classes of the {len(known)} in {class_split}, got '
                f'{sorted(strangers)[:5]}.'
            )
        self._numbers = [known.index(name) for name in own]
        return source, known

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            picture, label = self._read(index)
        except Exception as error:  # of any kind, as the bytes may mean anything to a decoder
            raise ImageError(f'the image {self.name_of(index)} cannot be read ({error})') from error
        return self._sample(picture, label if self._numbers is None else self._numbers[label], self.name_of(index))

    def _read(self, index: int) -> tuple[Image.Image, Any]:
        """A picture and its label, past timm's data set, which takes another image where one cannot be read."""
        if not hasattr(self._source, 'reader'):  # one of torchvision's
            picture, label = self._source[index]
            return picture.convert('RGB'), label
        file, label, *_ = self._source.reader[index]
        with file, Image.open(file) as picture:
            if self.upright:
                turn_upright(picture)
            return eight_bits(picture).convert('RGB'), label

    def name_of(self, index: int) -> str:
        """What tells an image from the others: its file, where the reader has one, or its number."""
        if hasattr(self._source, 'filename'):
            try:
                return str(self._source.filename(index, absolute=True) or index)
            except Exception:  # of whatever library, whose own error is told already
                pass
        return f'number {index} of {self.name!r}'


@DATASETS.register_module()
class TimmStream(_Labelled, IterableDataset):
    """Images by one of timm's readers that has no order: WebDataset's shards, streams of Hugging Face and TensorFlow.

    The images of an epoch follow from the seed and the numbers of the epoch, the processes and their workers, so that a
    run that is resumed after an epoch goes on as an unbroken one. One that is resumed within an epoch begins the epoch
    anew. An image that cannot be decoded is left out by the reader.

    Args:
        name: Name of the data set as timm's `create_dataset` takes it: wds/NAME, hfids/NAME, tfds/NAME.
        data_root: Folder or URL of the shards, or folder of the library's cache, the usual one unless given.
        split: Split as the reader takes it, such as 'train', or 'SHARDS|IMAGES' of WebDataset.
        transform: Keyword arguments of timm's `create_transform`.
        classes: Names of the classes in the order of their numbers, or their number; unless given those that the reader
            knows.
        training: Whether images are drawn for batches in an order that changes with the epoch, or each comes once.
        batch_size: Number of images in a batch, of which a process in training gets whole ones.
        num_workers: Number of processes that load, of which each has shards of its own.
        seed: Seed of the order and of all that is random about an image.
        kwargs: Further keyword arguments of `create_dataset`, such as num_samples.

    Raises:
        RunError: There are no such data, their number is not known, or nothing names the classes.
    """

    def __init__(
        self,
        name: str,
        data_root: str | None = None,
        split: str = 'train',
        transform: dict[str, Any] | None = None,
        classes: Sequence[str] | int | None = None,
        training: bool = False,
        batch_size: int = 1,
        num_workers: int = 1,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if _prefix(name) not in _STREAMS:
            raise RunError(f'TimmStream: name must begin with {"/, ".join(_STREAMS)}/, got {name!r}.')
        if not training and get_dist_info()[1] > 1:
            raise RunError(
                f'TimmStream: name must be of data with an order in an evaluation by several processes, got {name!r}, '
                'which would be cut into unequal parts.'
            )
        options = dict(is_training=training, batch_size=batch_size, seed=seed)
        self._source: Any = _create(name, root=data_root, split=split, **options, **kwargs)
        self._source.set_loader_cfg(num_workers)
        self._seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # which workers read
        try:
            self._length = len(self._source)
        except TypeError:  # of arithmetic with None
            self._length = 0
        if not self._length:
            raise RunError(f'TimmStream: num_samples must be the number of images in {split!r} of {name!r}.')
        self._prepare(name, transform, _names(self._source), classes)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)
        self._source.set_epoch(epoch)

    def __len__(self) -> int:
        """The number of images that this process gets in an epoch."""
        return self._length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rank, _ = get_dist_info()
        worker = get_worker_info()
        position = (int(self._epoch), rank, 0 if worker is None else worker.id)
        for i, (picture, label) in enumerate(self._source):
            seed_everything(mix_seeds(self._seed, *position, i))
            yield self._sample(picture, label, f'image {i} of worker {position[2]}')


def _prefix(name: str) -> str:
    """What a name says of its reader, in lower case; nothing of files."""
    prefix, slash, _ = name.partition('/')
    return prefix.lower() if slash else ''


def _create(name: str, **kwargs: Any) -> Any:
    """A data set of timm's.

    Raises:
        RunError: Its library is missing, refuses the arguments, or finds no data.
    """
    try:
        return create_dataset(name, **kwargs)
    except ImportError as error:
        raise RunError(f'{name} needs a package that is not installed: {error}.') from error
    except Exception as error:  # of whatever library reads
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise RunError(f'{name or kwargs["root"]} cannot be opened by timm: {reason.rstrip(".")}.') from error


def _open_split(data_root: str, split: str, kwargs: dict[str, Any]) -> Any:
    """The data of DATA_ROOT/SPLIT or DATA_ROOT/SPLIT.tar.

    Raises:
        RunError: There is neither, or nothing is in it.
    """
    folder = Path(data_root, split)
    tar = folder.with_name(f'{folder.name}.tar')
    if folder.is_dir():
        return _create('', root=str(folder), search_split=False, **kwargs)
    if tar.is_file():
        # Opened for every image: a position in the file would be shared by all processes that load.
        return _create('', root=str(tar), **{'cache_tarfiles': False, **kwargs})
    raise RunError(f'TimmDataset: {folder} must be a folder, or {tar.name} beside it a file.')


def _names(source: Any) -> list[str] | None:
    """The classes of a data set by their numbers; None where it does not name each."""
    reader = getattr(source, 'reader', source)
    numbers: Mapping[str, int] = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', {})
    names = {number: name for name, number in numbers.items()}
    return [names[number] for number in range(len(names))] if names and set(names) == set(range(len(names))) else None
