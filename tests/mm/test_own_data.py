# SPDX-License-Identifier: Apache-2.0
"""Data of one's own: the README's commands, the configs of docs/own-data.md as they stand there, and open classes."""

import json
import re
import shlex
import shutil
from pathlib import Path

import make_datasets
import pytest
import torch
from PIL import Image
from processes import finish, start

from vssm.models.mm import RunError
from vssm.models.mm.own_classes import fill_classes
from vssm.tools._common import config_dir, load_config
from vssm.tools.main import main

pytest.importorskip('mmdet', reason="mmdet is not installed: pip install '.[mmlab]'")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / 'docs' / 'own-data.md').read_text()


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


# ---- classes that a config leaves open -------------------------------------------------------------------------------

CELLS, FIELDS = ('cell', 'nucleus', 'debris'), ('soil', 'wheat', 'maize', 'road', 'water')
OPEN = {
    'finetune/faster-rcnn_vmamba_tiny_fpn_1xb2-12e_folder': ('cells', CELLS),
    'finetune/mask-rcnn_vmamba_tiny_fpn_1xb2-12e_folder': ('cells', CELLS),
    'finetune/upernet_vmamba_tiny_1xb4-20k_folder-512x512': ('fields', FIELDS),
}


def parts(node):
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
        yield from parts(child)


def open_config(name, folder):
    cfg = load_config(name)
    for loader in ('train', 'val', 'test'):
        cfg[f'{loader}_dataloader'].dataset.data_root = str(folder / 'data' / OPEN[name][0])
    (folder / 'data' / 'fields' / 'classes.txt').write_text('\n'.join(FIELDS) + '\n\n')
    return cfg


@pytest.mark.parametrize('name', OPEN)
def test_open_classes_come_from_the_data(name, folder):
    cfg, classes = open_config(name, folder), OPEN[name][1]
    fill_classes(cfg)
    numbers = [part['num_classes'] for part in parts(cfg.model.to_dict()) if 'num_classes' in part]
    assert numbers and set(numbers) == {len(classes)}
    for loader in ('train', 'val', 'test'):
        assert tuple(cfg[f'{loader}_dataloader'].dataset.metainfo.classes) == classes


@pytest.mark.parametrize('name', [name for name in OPEN if 'mask' not in name])
def test_data_of_open_classes_are_checked_by_their_names(name, folder, capsys):
    open_config(name, folder)
    assert main(['data-check', name, '--data-root', str(folder / 'data' / OPEN[name][0])]) == 0
    out = capsys.readouterr().out
    assert all(f'\n{label} ' in out for label in OPEN[name][1]) and 'problem' not in out


def test_classes_that_are_given_stay(folder):
    cfg = open_config('finetune/mask-rcnn_vmamba_tiny_fpn_1xb2-12e_folder', folder)
    cfg.model.roi_head.bbox_head.num_classes = 7
    fill_classes(cfg)
    assert (cfg.model.roi_head.bbox_head.num_classes, cfg.model.roi_head.mask_head.num_classes) == (7, 3)
    whole = load_config('coco/mask-rcnn_vmamba_tiny_fpn_8xb2-1x_coco')  # whose data are not here
    fill_classes(whole)
    assert whole.model.roi_head.bbox_head.num_classes == 80


@pytest.mark.parametrize(
    ('kind', 'content', 'said'),
    [
        ('cells', None, 'train.json must be there, for the names of the classes'),
        ('cells', '{"images": [], "categories": []}', 'train.json must have categories, each with an id and a name'),
        ('fields', None, 'classes.txt must be there, for the names of the classes'),
        ('fields', ' \n', 'classes.txt must name a class in each line'),
    ],
)
def test_open_classes_without_names_end_in_a_sentence(kind, content, said, folder):
    cfg = open_config(next(name for name in OPEN if OPEN[name][0] == kind), folder)
    file = folder / 'data' / kind / dict(cells='train.json', fields='classes.txt')[kind]
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(RunError, match=said):
        fill_classes(cfg)


def test_other_data_need_their_classes(folder):
    cfg = open_config('finetune/mask-rcnn_vmamba_tiny_fpn_1xb2-12e_folder', folder)
    cfg.train_dataloader.dataset.type = 'LVISV1Dataset'
    with pytest.raises(RunError, match='must be given for data of type LVISV1Dataset, got None'):
        fill_classes(cfg)


@pytest.mark.slow
def test_the_readmes_commands_train_a_detector_on_three_classes(folder):
    """With a small network and small images, for one epoch, and without a download."""
    commands = re.findall(r'^vssm (.*/faster-rcnn.*)', (ROOT / 'README.md').read_text(), flags=re.MULTILINE)
    assert [command.split()[0] for command in commands] == ['train', 'test', 'predict']
    options = ['model.backbone.model_name=test_vmamba', 'model.backbone.pretrained=False', 'train_cfg.max_epochs=1']
    options += ['model.neck.in_channels=32,48,64,96']
    for loader in ('train', 'val', 'test'):
        options += [f'{loader}_dataloader.num_workers=0', f'{loader}_dataloader.persistent_workers=False']
        resize = 2 if loader == 'train' else 1
        options += [f'{loader}_dataloader.dataset.pipeline.{resize}.scale=(128,64)']
    for command in commands[:2]:
        tool, *arguments = shlex.split(command.replace('epoch_12', 'epoch_1'))
        said = finish(start(f'vssm.tools.{tool}', *arguments, '--cfg-options', *options, cwd=folder / 'data'))
    assert 'bbox_mAP_50' in said
    checkpoint = torch.load(folder / 'data' / 'runs' / 'cells' / 'epoch_1.pth', weights_only=True)
    assert checkpoint['meta']['dataset_meta']['classes'] == CELLS
    assert len(checkpoint['state_dict']['roi_head.bbox_head.fc_cls.bias']) == 3 + 1

    _, config, *arguments = shlex.split(commands[2].replace('epoch_12', 'epoch_1'))
    own = folder / 'small.py'  # with the network that was trained here
    own.write_text(
        f"_base_ = '{config_dir() / config}.py'\nmodel = dict(\n    backbone=dict(model_name='test_vmamba',\n"
        '    pretrained=False), neck=dict(in_channels=[32, 48, 64, 96]))\n'
    )
    said = finish(start('vssm.tools.predict', own, *arguments, '--threshold', 0.0, cwd=folder / 'data'))
    answers = [json.loads(line) for line in said.splitlines() if line.startswith('{')]
    assert len(answers) == 4 and {found['class'] for answer in answers for found in answer['objects']} <= {*CELLS}
    assert len(list((folder / 'data' / 'predictions').iterdir())) == 4
