# SPDX-License-Identifier: Apache-2.0
"""Images in folders, handwritten digits, and the wrappers that make a data set safe to train on for days."""

import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmengine.logging import print_log
from mmengine.registry import DATA_SAMPLERS, DATASETS
from PIL import Image
from timm.data import auto_augment, create_transform
from torch.utils.data import Dataset, Sampler
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..images import eight_bits, misplaced, turn_upright
from .utils import RunError, mix_seeds, seed_everything

__all__ = ['Digits', 'GuardedDataset', 'ImageError', 'ImageFolder', 'SeededSampler', 'make_transform', 'unreadable']


class ImageError(RunError):
    """An image that cannot be used, in a sentence without its full stop."""


@DATASETS.register_module()
class ImageFolder(Dataset):
    """Images in one folder per class, DATA_ROOT/SPLIT/CLASS/..., as ImageNet-1K is unpacked.

    Gives dict(inputs, data_samples): an image, (3, H, W), uint8, and the number of its class. `preprocessing` is what a
    file of weights notes of the transform, None of one that augments. Classes are numbered in
    the order of their names, and a line in the log says so. Hidden files and folders, and those that macOS and file
    servers add, are no data; links that lead in a circle are not followed.

    Args:
        data_root: The folder with the splits.
        split: Name of the split, such as 'train' or 'val'.
        transform: Keyword arguments of timm's `create_transform`.
        class_split: Name of the split whose folders, sorted, number the classes, so that all splits agree.
        upright: Whether images are turned as their EXIF orientation says, as every viewer does. The published recipes
            of ImageNet-1K leave them as they are.

    Raises:
        RunError: A folder is missing or holds no image, or the split has a class that `class_split` lacks.
    """

    strict_decoder = True  # Pillow's refuses a file that lacks its end

    def __init__(
        self,
        data_root: str,
        split: str,
        transform: dict[str, Any] | None = None,
        class_split: str = 'train',
        upright: bool = True,
    ) -> None:
        root, class_root = Path(data_root, split), Path(data_root, class_split)
        self.upright = upright
        try:
            classes = class_folders(class_root)
            strangers = set(class_folders(root)) - set(classes)
            if not classes or strangers:
                raise RunError(
                    f'ImageFolder: {root} must hold classes of the {len(classes)} in {class_root}, got '
                    f'{sorted(strangers)[:5] or "no folder"}.'
                )
            ignored: Counter[str] = Counter()
            images = {name: list(_images(root / name, ignored)) for name in classes}
            if not any(images.values()):
                raise RunError(f'ImageFolder: {root} must hold images ({" ".join(IMG_EXTENSIONS)}), got none.')
            empty = [name for name in classes if not images[name]]
            if root != class_root:
                empty = [name for name in empty if not any(_images(class_root / name, Counter()))]
            loose = sum(path.suffix.lower() in IMG_EXTENSIONS for path in root.iterdir() if _is_data(path.name))
        except OSError as error:
            raise RunError(f'ImageFolder: the folders of {root} cannot be read: {error}.') from error
        if empty:
            raise RunError(
                f'ImageFolder: every folder in {class_root} is a class and must hold images '
                f'({" ".join(IMG_EXTENSIONS)}), got none in {", ".join(empty[:5])}{" ..." if len(empty) > 5 else ""}: '
                'remove such folders, which would change the numbers of the other classes, or convert their files.'
            )
        self._report(root, classes, ignored, loose)
        self.metainfo = dict(classes=tuple(classes))
        # Arrays, as counting the references of a list's objects would give each worker a copy of all of them.
        self.paths = np.array([os.fsencode(path) for name in classes for path in images[name]])
        self.labels = np.repeat(np.arange(len(classes)), [len(images[name]) for name in classes])
        self.preprocessing = None if (transform or {}).get('is_training') else dict(transform or {})
        self.transform = make_transform(transform or {})

    @staticmethod
    def _report(root: Path, classes: Sequence[str], ignored: Counter[str], loose: int) -> None:
        """Log the numbers of the classes, and warn of what lies among the images and is left out."""
        numbers = [f'{number} {name}' for number, name in enumerate(classes)]
        if len(numbers) > 100:
            numbers[50:-1] = ['...']
        print_log(f'The classes of {root} are numbered by name: {", ".join(numbers)}.', 'current')
        if loose:
            ignored['images beside the folders of the classes'] = loose
        if ignored:
            kinds = ', '.join(f'{count} {kind}' for kind, count in ignored.most_common())
            print_log(
                f'{root}: {ignored.total()} entries are left out: {kinds}. Images are files that end with '
                f'{" ".join(IMG_EXTENSIONS)}.',
                'current',
                logging.WARNING,
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = os.fsdecode(self.paths[index])
        with Image.open(path) as image:
            if self.upright:
                turn_upright(image)
            try:
                picture = eight_bits(image).convert('RGB')
            except ValueError as error:
                raise ImageError(f'the image {path} cannot be read ({error})') from error
            inputs = torch.as_tensor(self.transform(picture))
        return dict(inputs=inputs, data_samples=int(self.labels[index]))

    def get_data_info(self, index: int) -> dict[str, Any]:
        """dict(img_path), as mmengine's data sets have it."""
        return dict(img_path=os.fsdecode(self.paths[index]))


def make_transform(options: dict[str, Any]) -> Callable[[Image.Image], Any]:
    """timm's transform for its prefetcher, which ends in uint8, a quarter of the bytes to move to a GPU.

    Args:
        options: Keyword arguments of `create_transform`.
    """
    transform = create_transform(**{'use_prefetcher': True, **options})
    for step in transform.transforms:
        for operation in getattr(step, 'ops', ()):  # RandAugment and AugMix have them
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
    return transform


def _is_data(name: str) -> bool:
    """Whether a file or folder is one of the user's: not hidden, nor what macOS's archives and file servers add."""
    return not name.startswith('.') and name not in ('__MACOSX', '@eaDir')


def class_folders(root: str | Path) -> list[str]:
    """The names of the folders of classes in a folder, sorted.

    Raises:
        RunError: There is no such folder, or two of the names are one folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise RunError(f'ImageFolder: {root} must be a folder with one folder of images per class.')
    inside = root.resolve()
    found: dict[Path, str] = {}
    for path in sorted(root.iterdir()):
        folder = path.resolve()
        if not path.is_dir() or not _is_data(path.name) or inside.is_relative_to(folder):  # the last leads in a circle
            continue
        if folder in found:
            raise RunError(f'ImageFolder: {path} must be a class of its own, got a link to {found[folder]}.')
        found[folder] = path.name
    return list(found.values())


def _images(root: Path, ignored: Counter[str]) -> Iterator[str]:
    """The paths of all images of a class, sorted by their folders and names.

    Args:
        root: Folder of the class; nothing is found where there is none.
        ignored: Counter to which what is left out is added, by its kind.

    Raises:
        OSError: A folder cannot be listed.
    """
    if not root.is_dir():
        return
    seen = {_identity(path) for path in (root, *root.absolute().parents, *root.resolve().parents)}

    def is_new(path: str) -> bool:
        identity = _identity(path)
        if identity in seen:
            ignored['links to a folder that is there already'] += 1
            return False
        seen.add(identity)
        return True

    def fail(error: OSError) -> None:
        raise error  # `os.walk` would leave such a folder out

    folders = []
    for folder, below, names in os.walk(root, onerror=fail, followlinks=True):
        below[:] = [name for name in sorted(below) if _is_data(name) and is_new(os.path.join(folder, name))]
        folders.append((folder, names))
    for folder, names in sorted(folders):
        for name in sorted(filter(_is_data, names)):
            if name.lower().endswith(IMG_EXTENSIONS):
                yield os.path.join(folder, name)
            else:
                ignored[os.path.splitext(name)[1].lower() or 'without an extension'] += 1


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """timm's posterize, but for its full strength, which keeps no bit: Pillow refuses that from version 13 on."""
    return image.point(lambda value: 0) if bits < 1 else auto_augment.posterize(image, bits, **kwargs)


def _identity(path: str | Path) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


@DATASETS.register_module()
class Digits(Dataset):
    """scikit-learn's 1,797 scans of handwritten digits, 8x8 in 17 grey levels, a third of them held out.

    Gives dict(inputs, data_samples): an image, (1, img_size, img_size), in [-1, 1], and its label.

    Args:
        split: 'train' or 'heldout', a fixed division which keeps the share of every digit.
        img_size: Height and width to which the scans are enlarged.
        affine: Keyword arguments of torchvision's RandomAffine, None for no augmentation.
    """

    metainfo = dict(classes=tuple('0123456789'))
    preprocessing = None  # of training

    def __init__(self, split: str, img_size: int = 32, affine: dict[str, Any] | None = None) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        scans, labels = load_digits(return_X_y=True)
        indices = train_test_split(range(len(labels)), test_size=1 / 3, stratify=labels, random_state=0)
        if split not in ('train', 'heldout'):
            raise ValueError(f"Digits: split must be 'train' or 'heldout', got {split!r}.")
        self.indices = sorted(indices[split == 'heldout'])
        self.labels = [int(labels[i]) for i in self.indices]
        grey = (scans.reshape(-1, 8, 8) * (255 / 16)).round().astype('uint8')
        self.images = [
            Image.fromarray(grey[i]).resize((img_size, img_size), Image.Resampling.BICUBIC) for i in self.indices
        ]

        steps = [transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
        if affine is None:
            self.preprocessing = dict(input_size=img_size, crop_pct=1.0, interpolation='bicubic', mean=[0.5], std=[0.5])
        else:
            steps.insert(0, transforms.RandomAffine(interpolation=transforms.InterpolationMode.BILINEAR, **affine))
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(inputs=self.transform(self.images[index]), data_samples=self.labels[index])


class _Draw(int):
    """An index into a data set, with a seed for all that is random about the sample in this epoch."""

    seed: int


@DATA_SAMPLERS.register_module()
class SeededSampler(Sampler):
    """Gives every index that another sampler draws a seed of its own.

    The seed depends on the other sampler's seed, the epoch, the position in the sequence of all processes and the
    index, not on the worker that computes the sample, so that neither the number of workers nor a resumption changes
    it.

    Args:
        dataset: Data set to draw from.
        sampler: Config of the other sampler.
        seed: Seed of the other sampler.
        skip: Number of indices that this process used before the run was resumed.
    """

    def __init__(self, dataset: Dataset, sampler: dict[str, Any], seed: int | None = None, skip: int = 0) -> None:
        self.dataset = dataset
        self.sampler = DATA_SAMPLERS.build(sampler, default_args=dict(dataset=dataset, seed=seed))
        self.skip = skip

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[_Draw]:
        rank, world_size = get_dist_info()
        epoch = getattr(self.sampler, 'epoch', 0)
        for i, index in enumerate(islice(self.sampler, self.skip, None), self.skip):
            draw = _Draw(index)
            draw.seed = mix_seeds(self.sampler.seed, epoch, rank + i * world_size, index)
            yield draw

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


@DATASETS.register_module()
class GuardedDataset(Dataset):
    """Seeds every sample as its index says, and tells an image that cannot be read from an error of the pipeline.

    A JPEG or PNG file that lacks its end counts as unreadable, although some decoders would fill the rest with grey. Of
    a sample that is made of several images only the first is checked.

    Args:
        dataset: Data set that gives the samples, or its config. If it has a method `get_data_info`, this gives the
            paths of a sample by its index.
        skip: Whether an unreadable image is replaced by another one, which its seed decides, or stops the run.
    """

    def __init__(self, dataset: Dataset | dict[str, Any], skip: bool = False) -> None:
        if isinstance(dataset, dict):
            cfg = dataset
            try:
                dataset = DATASETS.build(cfg)
            except ValueError as error:
                if 'at least one array' not in str(error):  # with which mmengine fails to pack no samples
                    raise
                dataset = DATASETS.build({**cfg, 'serialize_data': False})
            if hasattr(dataset, 'full_init'):
                dataset.full_init()
        self.dataset: Any = dataset
        self.skip = skip
        # In shared memory, so that the main process sees what the workers find.
        self.unreadable = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset':  # it is missing while a worker unpickles
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> Any:
        drawn, index = index, int(index)
        if isinstance(drawn, _Draw):
            seed_everything(drawn.seed)
        for _ in range(10):
            paths = () if getattr(self.dataset, 'strict_decoder', False) else self.paths(index)
            problem = next(filter(None, map(_truncated, paths)), None)
            if problem is None:
                try:
                    sample = self.dataset[index]
                    self._check_mask(sample, paths)
                    return sample
                except ImageError as error:
                    problem = str(error)
                except RunError:
                    raise
                except Exception:
                    problem = next(filter(None, map(unreadable, self.paths(index))), None)
                    if problem is None:
                        raise
            if not self.skip:
                hint = '; unreadable=skip in the config replaces such images' if isinstance(drawn, _Draw) else ''
                raise RunError(f'{problem}{hint}.')
            self.unreadable[index] = True
            index = random.randrange(len(self))
        raise RunError(f'ten images in a row cannot be read, the last: {problem}.')

    def _check_mask(self, sample: Any, paths: Sequence[str]) -> None:
        """Refuse a mask of mmsegmentation that does not lie over its image, or has labels beyond the classes.

        A loss on a GPU would stop without a word, and the metrics would leave such labels out.
        """
        problem = misplaced(*paths) if len(paths) == 2 else None
        if problem is not None:
            raise RunError(f'{problem}.')
        mask = getattr(sample['data_samples'], 'gt_sem_seg', None) if 'data_samples' in sample else None
        if mask is None or not hasattr(self.dataset, 'reduce_zero_label'):
            return
        labels, classes = mask.data, len(self.dataset.metainfo['classes'])
        wrong = labels[(labels >= classes) & (labels != self.dataset.ignore_index)]
        if len(wrong):
            raise RunError(
                f'the mask {paths[-1]} must have labels below {classes}, the number of classes in metainfo.classes, '
                f'got {wrong.max()}.'
            )

    def paths(self, index: int) -> list[str]:
        """The files of a sample, if the data set names them."""
        if not hasattr(self.dataset, 'get_data_info'):
            return []
        info = self.dataset.get_data_info(index)
        return [info[key] for key in ('img_path', 'seg_map_path') if info.get(key)]


# How JPEG and PNG files begin and end.
_SIGNATURES: Sequence = ((b'\xff\xd8\xff', b'\xff\xd9'), (b'\x89PNG', b'IEND\xaeB`\x82'))


def _truncated(path: str) -> str | None:
    """Why a JPEG or PNG file that does not end as it should cannot be decoded; None if it can, or ends well."""
    try:
        with open(path, 'rb') as file:
            start = file.read(4)
            file.seek(-min(8, file.seek(0, 2)), 2)
            end = file.read()
    except OSError:
        return None  # this is no local file, or reading it will raise the error
    if any(start.startswith(first) and not end.endswith(last) for first, last in _SIGNATURES):
        return unreadable(path)  # it can be whole, with other bytes appended
    return None


def unreadable(path: str) -> str | None:
    """Why an image cannot be decoded; None if it can."""
    try:
        with Image.open(path) as image:
            image.load()
            eight_bits(image)
    except Exception as error:  # of any kind, as the bytes may mean anything to a decoder
        return f'the image {path} cannot be read ({error})'
    return None
