# SPDX-License-Identifier: Apache-2.0
"""Trainings on WebDataset's shards."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from vssm.models import mm


@pytest.fixture
def shards(tmp_path):
    """train-0.tar to train-3.tar of four images each, the classes dark and bright, and val-0.tar of six."""
    for split, files, count in (('train', 4, 4), ('val', 1, 6)):
        for n in range(files):
            with tarfile.open(tmp_path / f'{split}-{n}.tar', 'w') as tar:
                for i in range(count):
                    picture, buffer = Image.new('RGB', (24, 20), (20 * i, 60 * n, 200 * (i % 2))), io.BytesIO()
                    picture.save(buffer, 'PNG')
                    for ending, content in (('png', buffer.getvalue()), ('cls', str(i % 2).encode())):
                        info = tarfile.TarInfo(f'{n}{i}.{ending}')
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    lengths = {f'train-{n}.tar': 4 for n in range(4)}
    info = dict(
        splits=dict(
            train=dict(name='train', filenames=[*lengths], shard_lengths=[*lengths.values()], num_samples=16),
            validation=dict(name='validation', filenames=['val-0.tar'], shard_lengths=[6], num_samples=6),
        )
    )
    (tmp_path / '_info.json').write_text(json.dumps(info))
    return tmp_path


@pytest.fixture
def options(shards):
    transform = dict(input_size=16)
    common = dict(type='TimmStream', name='wds/shapes', data_root=str(shards), classes=('dark', 'bright'))
    return {
        'train_dataloader.num_workers': 2,
        'train_dataloader.dataset': dict(**common, split='train', transform=dict(**transform, is_training=True)),
        'val_dataloader.dataset': dict(**common, split='validation', transform=transform),
    }


def test_every_image_of_an_evaluation_comes_once(options):
    dataset = mm.TimmStream(**{k: v for k, v in options['val_dataloader.dataset'].items() if k != 'type'})
    samples = list(dataset)
    assert len(samples) == len(dataset) == 6
    assert [sample['data_samples'] for sample in samples] == [0, 1, 0, 1, 0, 1]
    assert [int(sample['inputs'][2].float().mean() > 100) for sample in samples] == [0, 1, 0, 1, 0, 1]


def test_a_training_resumes_after_an_epoch_to_the_same_weights(train, options):
    whole = train(2, options)
    again = train(2, options, resume=True)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
