# SPDX-License-Identifier: Apache-2.0
"""Images by timm's readers, beside ImageFolder, which reads the same ones; and streams, which have no order."""

import shutil
import tarfile
import uuid
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip('mmengine', reason="mmengine is not installed: pip install '.[train]'")

from mmengine.config import Config  # noqa: E402
from mmengine.registry import RUNNERS  # noqa: E402
from timm.data import IterableImageDataset  # noqa: E402

from vssm.models import mm  # noqa: E402
from vssm.models.mm import readers  # noqa: E402
from vssm.tools._common import find_config  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread', 'quick_configs')

SMALL = dict(input_size=16)
TRAINING = dict(input_size=16, is_training=True)


@pytest.fixture
def folder(tmp_path):
    """Two classes of four images in train and two in val, one of each turned by its EXIF orientation."""
    for split, count in (('train', 4), ('val', 2)):
        for c, name in enumerate('ab'):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                picture = Image.new('RGB', (24, 20), (60 * i, 120 * c, 90))
                picture.paste((255, 255, 255), (0, 0, 8, 6))
                exif = Image.Exif()
                exif[0x0112] = 6 if i == 1 else 1
                picture.save(tmp_path / split / name / f'{i}.png', exif=exif)
    return tmp_path


def pack(folder, split):
    """Put a split into a tar file, in place of its folder."""
    with tarfile.open(folder / f'{split}.tar', 'w') as tar:
        tar.add(folder / split, arcname='.')
    shutil.rmtree(folder / split)


@pytest.mark.parametrize('kind', ('folder', 'tar', 'torchvision'))
@pytest.mark.parametrize('split', ('train', 'val'))
def test_a_reader_gives_what_an_image_folder_gives(kind, split, folder):
    upright = kind != 'torchvision'  # whose data sets decode by themselves
    expected = mm.ImageFolder(folder, split, SMALL, upright=upright)
    expected = [expected[i] for i in range(len(expected))]
    if kind == 'tar':
        pack(folder, 'train'), pack(folder, 'val')
    name = 'torch/image_folder' if kind == 'torchvision' else ''
    dataset = mm.TimmDataset(name, str(folder), split, SMALL)
    assert dataset.metainfo == dict(classes=('a', 'b')) and dataset.preprocessing == SMALL
    assert len(dataset) == len(expected)
    found = sorted((dataset[i] for i in range(len(dataset))), key=lambda sample: sample['data_samples'])
    for sample, other in zip(found, expected, strict=True):
        assert sample['data_samples'] == other['data_samples']
        assert torch.equal(sample['inputs'], other['inputs'])


@pytest.mark.parametrize('tar', (False, True), ids=('folder', 'tar'))
def test_classes_are_numbered_by_one_split(tar, folder):
    shutil.rmtree(folder / 'val' / 'a')
    if tar:
        pack(folder, 'val')
    dataset = mm.TimmDataset('', str(folder), 'val', SMALL)
    assert dataset.metainfo == dict(classes=('a', 'b')) and [dataset[i]['data_samples'] for i in (0, 1)] == [1, 1]
    (folder / 'train' / 'b').rename(folder / 'train' / 'c')
    with pytest.raises(mm.RunError, match=r"val in .* must hold classes of the 2 in train, got \['b'\]"):
        mm.TimmDataset('', str(folder), 'val', SMALL)


@pytest.mark.parametrize('tar', (False, True), ids=('folder', 'tar'))
def test_an_unreadable_image_of_a_reader_is_named(tar, folder):
    path = folder / 'train' / 'a' / '2.png'
    path.write_bytes(path.read_bytes()[:-30])
    if tar:
        pack(folder, 'train')
    dataset = mm.TimmDataset('', str(folder), 'train', SMALL)
    (index,) = (i for i in range(len(dataset)) if dataset.name_of(i).endswith('a/2.png'))
    with pytest.raises(mm.RunError, match=r'^the image .*a/2\.png cannot be read \(.*\)\.$'):
        mm.GuardedDataset(dataset)[index]
    skipping = mm.GuardedDataset(dataset, skip=True)
    assert skipping[index]['inputs'].shape == (3, 16, 16) and skipping.unreadable.nonzero().tolist() == [[index]]


def test_an_error_of_the_transform_is_none_of_the_image(folder):
    dataset = mm.TimmDataset('', str(folder), 'train', SMALL)
    dataset.transform = lambda picture: 1 / 0
    with pytest.raises(ZeroDivisionError):
        mm.GuardedDataset(dataset, skip=True)[0]


@pytest.mark.parametrize(
    'kind, options, said',
    [
        (mm.TimmDataset, dict(split='test'), 'test must be a folder, or test.tar beside it a file'),
        (mm.TimmDataset, dict(name='wds/x'), "data with an order, got 'wds/x', a stream: type='TimmStream'"),
        (mm.TimmDataset, dict(name='torch/nothing'), 'torch/nothing cannot be opened by timm: Unknown'),
        (mm.TimmDataset, dict(classes=3), 'classes must name or count the 2 classes'),
        (mm.TimmStream, dict(name='hfds/x'), "name must begin with hfids/, tfds/, wds/, got 'hfds/x'"),
    ],
)
def test_what_a_reader_cannot_read_is_refused(kind, options, said, folder):
    with pytest.raises(mm.RunError, match=said):
        kind(**dict(data_root=str(folder), **options))


def test_labels_that_are_no_classes(folder, monkeypatch):
    dataset = mm.TimmDataset('', str(folder), 'train', SMALL)
    for label in (2, -1, None, [0, 1]):
        monkeypatch.setattr(dataset, '_read', lambda index, label=label: (Image.new('RGB', (20, 20)), label))
        with pytest.raises(mm.RunError, match='must be a number from 0 to 1'):
            dataset._numbers = None
            dataset[0]


# ---- streams ---------------------------------------------------------------------------------------------------------


class Stream:
    """A reader as timm's of streams: its order follows from the seed, the epoch and the workers' seeds."""

    def __init__(self, count, seed, batch_size, is_training):
        self.count, self.seed, self.batch_size, self.is_training = count, seed, batch_size, is_training
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_loader_cfg(self, num_workers):
        self.num_workers = num_workers

    def set_epoch(self, epoch):
        self.epoch.fill_(epoch)

    def __len__(self):
        return self.count

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        seed = (0 if worker is None else worker.seed) + int(self.epoch)
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed)).tolist()
        for i in order if self.is_training else range(self.count):
            yield Image.linear_gradient('L').rotate(40 * i).convert('RGB'), i % 2


@pytest.fixture
def build(folder, monkeypatch, tmp_path):
    """build(epochs, **changes): a Runner of a training on a stream of eight images, tested on a folder."""
    images = {}

    def create(name, root, split, is_training=False, seed=0, batch_size=1, num_samples=None, **kwargs):
        assert name == 'wds/lines'
        reader = images.setdefault(is_training, Stream(8, seed, batch_size, is_training))
        return IterableImageDataset(root, reader=reader)

    create_dataset = readers.create_dataset
    monkeypatch.setattr(readers, 'create_dataset', lambda name, **kw: (create if name else create_dataset)(name, **kw))

    def build(epochs, **changes):
        cfg = Config.fromfile(find_config('finetune/vmamba_tiny_1xb64-50e_folder'))
        stream = dict(type='TimmStream', name='wds/lines', classes=2, _delete_=True, transform=TRAINING)
        cfg.merge_from_dict(
            {
                'model.model_name': 'test_vmamba',
                'model.pretrained': False,
                'train_dataloader.dataset': stream,
                'train_dataloader.batch_size': 4,
                'train_dataloader.num_workers': 1,
                'val_dataloader.dataset': dict(
                    type='TimmDataset', data_root=str(folder), transform=SMALL, _delete_=True
                ),
                'val_dataloader.num_workers': 0,
                'val_dataloader.persistent_workers': False,
                'train_cfg.max_epochs': epochs,
                'default_hooks.checkpoint.interval': 1,
                **changes,
            }
        )
        cfg.work_dir = changes.pop('work_dir', str(tmp_path / 'run'))
        cfg.experiment_name = uuid.uuid4().hex
        return RUNNERS.build(cfg)

    return build


def test_a_stream_resumes_after_an_epoch_to_the_same_weights(build, tmp_path):
    build(2).train()
    whole = torch.load(tmp_path / 'run' / 'epoch_2.pth', weights_only=True)['state_dict']
    (tmp_path / 'run' / 'epoch_2.pth').unlink()
    runner = build(2, resume=True)
    runner.train()
    again = torch.load(tmp_path / 'run' / 'epoch_2.pth', weights_only=True)['state_dict']
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    log = ''.join(path.read_text() for path in Path(runner.log_dir).glob('*.log'))
    assert 'is a stream: a run that is resumed within an epoch begins that epoch anew' in log


@pytest.mark.usefixtures('build')
def test_images_of_a_stream_depend_on_seed_and_epoch():
    dataset = mm.TimmStream('wds/lines', classes=2, transform=TRAINING, training=True)
    first = [sample['inputs'] for sample in dataset]
    again = [sample['inputs'] for sample in dataset]
    assert len(first) == len(dataset) == 8 and all(map(torch.equal, first, again))
    dataset.set_epoch(1)
    assert not all(map(torch.equal, first, (sample['inputs'] for sample in dataset)))


@pytest.mark.usefixtures('build')
def test_a_stream_of_unknown_length_or_classes_is_refused(monkeypatch):
    with pytest.raises(mm.RunError, match='classes, which its reader does not know'):
        mm.TimmStream('wds/lines')
    monkeypatch.setattr(Stream, '__len__', lambda self: 0)
    with pytest.raises(mm.RunError, match='num_samples must be the number of images'):
        mm.TimmStream('wds/lines', classes=2)
