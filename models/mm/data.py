# SPDX-License-Identifier: Apache-2.0
"""Images in folders, handwritten digits, and the wrappers that make a data set safe to train on for days."""

import os
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmengine.registry import DATA_SAMPLERS, DATASETS
from PIL import Image
from timm.data import auto_augment, create_transform
from torch.utils.data import Dataset, Sampler
from torchvision import transforms
from torchvision.datasets import folder

from .utils import RunError, mix_seeds, seed_everything

__all__ = ['Digits', 'GuardedDataset', 'ImageFolder', 'SeededSampler']


@DATASETS.register_module()
class ImageFolder(Dataset):
    """Images in one folder per class, DATA_ROOT/SPLIT/CLASS/..., as ImageNet-1K is unpacked.

    Gives dict(inputs, data_samples): an image, (3, H, W), uint8, and the number of its class.

    Args:
        data_root: The folder with the splits.
        split: Name of the split, such as 'train' or 'val'.
        transform: Keyword arguments of timm's `create_transform`.
        class_split: Name of the split whose folders, sorted, number the classes, so that all splits agree.

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
    ) -> None:
        root, class_root = Path(data_root, split), Path(data_root, class_split)
        for path in (class_root, root):
            if not path.is_dir():
                raise RunError(f'ImageFolder: {path} must be a folder with one folder of images per class.')
        classes = _subfolders(class_root)
        strangers = set(_subfolders(root)) - set(classes)
        if not classes or strangers:
            raise RunError(
                f'ImageFolder: {root} must hold classes of the {len(classes)} in {class_root}, got '
                f'{sorted(strangers)[:5] or "no folder"}.'
            )
        numbers = {name: number for number, name in enumerate(classes)}
        self.metainfo = dict(classes=tuple(classes))
        images = folder.make_dataset(str(root), numbers, folder.IMG_EXTENSIONS, allow_empty=True)
        if not images:
            raise RunError(f'ImageFolder: {root} must hold images ({" ".join(folder.IMG_EXTENSIONS)}), got none.')
        # Arrays, as counting the references of a list's objects would give each worker a copy of all of them.
        self.paths = np.array([os.fsencode(path) for path, _ in images])
        self.labels = np.array([label for _, label in images])
        # The transform for timm's prefetcher ends in uint8, a quarter of the bytes to move to a GPU.
        self.transform = create_transform(**{'use_prefetcher': True, **(transform or {})})
        for step in self.transform.transforms:
            for operation in getattr(step, 'ops', ()):  # RandAugment and AugMix have them
                if operation.aug_fn is auto_augment.posterize:
                    operation.aug_fn = _posterize

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with Image.open(os.fsdecode(self.paths[index])) as image:
            inputs = torch.as_tensor(self.transform(image.convert('RGB')))
        return dict(inputs=inputs, data_samples=int(self.labels[index]))

    def get_data_info(self, index: int) -> dict[str, Any]:
        """dict(img_path), as mmengine's data sets have it."""
        return dict(img_path=os.fsdecode(self.paths[index]))


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """timm's posterize, but for its full strength, which keeps no bit: Pillow refuses that from version 13 on."""
    return image.point(lambda value: 0) if bits < 1 else auto_augment.posterize(image, bits, **kwargs)


def _subfolders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


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
        if affine is not None:
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
            dataset = DATASETS.build(dataset)
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
                    return self.dataset[index]
                except Exception:
                    problem = next(filter(None, map(_unreadable, self.paths(index))), None)
                    if problem is None:
                        raise
            if not self.skip:
                hint = '; unreadable=skip in the config replaces such images' if isinstance(drawn, _Draw) else ''
                raise RunError(f'{problem}{hint}.')
            self.unreadable[index] = True
            index = random.randrange(len(self))
        raise RunError(f'ten images in a row cannot be read, the last: {problem}.')

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
        return _unreadable(path)  # it can be whole, with other bytes appended
    return None


def _unreadable(path: str) -> str | None:
    """Why an image cannot be decoded; None if it can."""
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # of any kind, as the bytes may mean anything to a decoder
        return f'the image {path} cannot be read ({error})'
    return None
