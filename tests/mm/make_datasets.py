# SPDX-License-Identifier: Apache-2.0
"""Make miniature data sets in the layout of the real ones, from the two photographs that scikit-learn carries.

    python tests/mm/make_datasets.py FOLDER

writes FOLDER/imagenet, FOLDER/ADEChallengeData2016 and FOLDER/coco, which take the places of data/imagenet,
data/ade/ADEChallengeData2016 and data/coco in the configs. The labels say which photograph an image is cut from, or
which patch of it is bright, or blue; they mean nothing more.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SIZES = ((96, 72), (72, 96), (96, 64), (80, 80))  # width and height of each image, both orientations
SPLITS = dict(training='train', validation='val')  # in folders of ADE20K, and in names of both


def photographs(first):
    """Crops of the two photographs in turn, each a PIL image."""
    sources = [Image.fromarray(array) for array in load_sample_images().images]  # each 427 x 640
    for i, (width, height) in enumerate(SIZES):
        left, top = 40 * (first + i), 30 * (first + i)
        yield sources[i % 2].crop((left, top, left + 2 * width, top + 2 * height)).resize((width, height))


def make_imagenet(root):
    """SPLIT/CLASS/NAME.JPEG, a class for each of the two photographs, named as ImageNet's are."""
    for first, split in enumerate(('train', 'val')):
        for i, image in enumerate(photographs(first)):
            path = Path(root, split, f'n{i % 2 + 1:08d}', f'{split}_{i + 1:08d}.JPEG')
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def make_ade20k(root, classes=150):
    """images/SPLIT/NAME.jpg and annotations/SPLIT/NAME.png, in which 0 is no class and the others are the classes."""
    for first, (folder, split) in enumerate(SPLITS.items()):
        for i, image in enumerate(photographs(first)):
            name = f'ADE_{split}_{i + 1:08d}'
            red, green, blue = np.moveaxis(np.asarray(image).astype(int), 2, 0)
            labels = 1 + ((red + green + blue) // 255 * 10 + 100 * (blue > red)) // (150 // classes)
            labels[:4] = 0
            labels = labels.astype(np.uint8)
            for kind, suffix, picture in (('images', 'jpg', image), ('annotations', 'png', Image.fromarray(labels))):
                path = Path(root, kind, folder, f'{name}.{suffix}')
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)


def make_coco(root, classes):
    """SPLIT/ID.jpg and annotations/instances_SPLIT.json: polygons, and one crowd, as run lengths down the columns."""
    annotations = Path(root, 'annotations')
    annotations.mkdir(parents=True, exist_ok=True)
    for first, split in enumerate(f'{split}2017' for split in SPLITS.values()):
        Path(root, split).mkdir(exist_ok=True)
        images, objects = [], []
        for i, image in enumerate(photographs(first)):
            width, height = image.size
            images.append(dict(id=i + 1, file_name=f'{i + 1:012d}.jpg', width=width, height=height))
            image.save(Path(root, split, images[-1]['file_name']))
            for k, (x, y, w, h) in enumerate([(8, 8, 40, 30), (30, 24, 34, 40)]):
                diamond = [x, y + h / 2, x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h]
                shape = dict(segmentation=[diamond], area=w * h / 2, iscrowd=0)
                if i == k == 1:
                    w, h = width - x, height  # to the end of every column from x on
                    counts = [height * x, height * w]
                    shape = dict(segmentation=dict(size=[height, width], counts=counts), area=w * h, iscrowd=1)
                    y = 0
                category = 1 + (7 * i + k) % len(classes)
                objects.append(
                    dict(id=len(objects) + 1, image_id=i + 1, category_id=category, bbox=[x, y, w, h], **shape)
                )
        categories = [dict(id=i + 1, name=name, supercategory='thing') for i, name in enumerate(classes)]
        content = dict(info={}, licenses=[], images=images, annotations=objects, categories=categories)
        (annotations / f'instances_{split}.json').write_text(json.dumps(content))


def main(folder):
    from vssm.models.mm import mmcv_ext

    mmcv_ext.install()
    from mmdet.datasets import CocoDataset

    make_imagenet(Path(folder, 'imagenet'))
    make_ade20k(Path(folder, 'ADEChallengeData2016'))
    make_coco(Path(folder, 'coco'), CocoDataset.METAINFO['classes'])


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
