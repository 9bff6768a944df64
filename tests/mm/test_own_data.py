# SPDX-License-Identifier: Apache-2.0
"""The configs of docs/own-data.md, as they stand there: they train, resume, test and draw on data in that layout."""

import json
import re
import shutil
from pathlib import Path

import make_datasets
import pytest
from PIL import Image
from processes import finish, start

from vssm.tools._common import config_dir

pytest.importorskip('mmdet', reason="mmdet is not installed: pip install '.[mmlab]'")

PAGE = (Path(__file__).parents[2] / 'docs' / 'own-data.md').read_text()


@pytest.fixture
def folder(tmp_path):
    """A folder with data/cells, data/fields, cells.py and fields.py, as the page has them."""
    data = tmp_path / 'data'
    make_datasets.make_coco(data / 'cells', ('cell', 'nucleus', 'debris'))
    for split in ('train', 'val'):
        (data / 'cells' / f'{split}2017').rename(data / 'cells' / split)
        (data / 'cells' / 'annotations' / f'instances_{split}2017.json').rename(data / 'cells' / f'{split}.json')
    make_datasets.make_ade20k(data / 'fields', 5)
    for name in ('cells', 'fields'):
        code = re.search(rf'`{name}\.py`:\n\n```python\n(.*?)```', PAGE, re.DOTALL)[1]
        assert '/path/to/vssm/configs' in code
        (tmp_path / f'{name}.py').write_text(code.replace('/path/to/vssm/configs', str(config_dir())))
    return tmp_path


METRIC = dict(cells='coco/segm_mAP', fields='mIoU')


@pytest.mark.slow
@pytest.mark.parametrize('name', METRIC)
def test_a_config_of_ones_own_trains_resumes_tests_and_draws(name, small_config, folder):
    options = dict(small_config(dict(cells='coco', fields='ade20k')[name], 'test_vmamba')[1])
    options |= {'default_hooks.visualization.score_thr': 0.0} if name == 'cells' else {}
    for loader in ('train', 'val', 'test'):
        options |= {f'{loader}_dataloader.num_workers': 0, f'{loader}_dataloader.persistent_workers': False}

    def run(tool, *arguments, **more):
        changes = [f'{key}={value!r}' for key, value in {**options, **more}.items()]
        command = [f'vssm.tools.{tool}', f'{name}.py', *arguments, '--cfg-options', *changes]
        return finish(start(*command, cwd=folder))

    length, last = ('max_epochs', 'epoch_{}.pth') if name == 'cells' else ('max_iters', 'iter_{}.pth')
    work_dir = folder / 'work_dirs' / name
    run('train', **{f'train_cfg.{length}': 2 if name == 'fields' else 1})
    run('train', '--resume', **{f'train_cfg.{length}': 4 if name == 'fields' else 2})
    checkpoint = work_dir / last.format(4 if name == 'fields' else 2)
    assert checkpoint.exists()
    shown = {'default_hooks.visualization.draw': True, 'default_hooks.visualization.interval': 1}
    said = run('test', checkpoint, **shown)
    assert METRIC[name].rpartition('/')[2] in said
    pictures = list(work_dir.glob('*/vis_data/vis_image/*.png'))
    assert len(pictures) == 4
    sizes = {Image.open(path).size for path in pictures}
    assert {(192, 72), (160, 80)} <= sizes  # the truth beside what was found


@pytest.mark.slow
def test_a_wrong_category_is_named_in_the_words_of_the_page(folder):
    """As a user meets it: the exit status, one sentence, and the keys."""
    content = json.loads((folder / 'data' / 'cells' / 'train.json').read_text())
    content['categories'][0]['name'] = 'Cell'
    (folder / 'data' / 'cells' / 'train.json').write_text(json.dumps(content))
    options = ['model.backbone.model_name=test_vmamba', 'model.neck.in_channels=32,48,64,96']
    process = start('vssm.tools.train', 'cells.py', '--cfg-options', *options, cwd=folder)
    said = finish(process, status=2)
    assert 'in their order there (Cell, nucleus, debris), got cell, nucleus, debris' in said
    shutil.rmtree(folder / 'data')
