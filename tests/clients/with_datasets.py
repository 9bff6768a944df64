# SPDX-License-Identifier: Apache-2.0
"""Trainings on data sets of Hugging Face, made on this machine, by index and as a stream."""

import re
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from vssm.models import mm
from vssm.tools._common import config_dir

PAGE = (Path(__file__).parents[2] / 'docs' / 'own-data.md').read_text()


@pytest.fixture
def folder(tmp_path):
    """Twelve images of two classes in files of Parquet, as the Hub has them."""
    pictures = [Image.new('RGB', (24, 20), (20 * i, 90, 200 * (i % 2))) for i in range(12)]
    features = datasets.Features(image=datasets.Image(), labels=datasets.ClassLabel(names=['dark', 'bright']))
    columns = dict(image=pictures, labels=[i % 2 for i in range(12)])
    whole = datasets.Dataset.from_dict(columns, features=features)
    (tmp_path / 'shapes' / 'data').mkdir(parents=True)
    for split, count in (('train', 12), ('validation', 6)):
        whole.select(range(count)).to_parquet(tmp_path / 'shapes' / 'data' / f'{split}-00000-of-00001.parquet')
    return tmp_path


@pytest.fixture
def common(folder):
    return dict(
        name=f'hfds/{folder / "shapes"}', data_root=str(folder), target_key='labels', transform=dict(input_size=16)
    )


def test_images_by_index(common):
    dataset = mm.TimmDataset(split='validation', **common)
    assert dataset.metainfo == dict(classes=('dark', 'bright')) and len(dataset) == 6
    for i in range(6):
        sample = dataset[i]
        assert sample['data_samples'] == i % 2 == (sample['inputs'][2].float().mean() > 100)


def test_the_config_of_the_page_resumes_to_the_same_weights(train, folder):
    """With a data set of this machine in the place of that of the Hub."""
    code = re.search(r'`beans\.py`.*?```python\n(.*?)```', PAGE, re.DOTALL)[1]
    code = code.replace('/path/to/vssm/configs', str(config_dir()))
    (folder / 'beans.py').write_text(code.replace('AI-Lab-Makerere/beans', str(folder / 'shapes')))
    small = {f'{loader}_dataloader.dataset.transform.input_size': 16 for loader in ('train', 'val')}
    options = {'model.num_classes': 2, **small}
    whole = train(2, options, config=folder / 'beans.py')
    again = train(2, options, config=folder / 'beans.py', resume=True)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_stream_resumes_after_an_epoch_to_the_same_weights_too(train, common, folder):
    stream = dict(common, type='TimmStream', name=f'hfids/{folder / "shapes"}', num_samples=12, classes=2)
    evaluation = dict(common, type='TimmDataset', split='validation')
    options = {'train_dataloader.dataset': stream, 'val_dataloader.dataset': evaluation}
    whole = train(2, options)
    again = train(2, options, resume=True)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
