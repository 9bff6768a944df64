# SPDX-License-Identifier: Apache-2.0
"""`vssm predict` with the config of a detector or segmentor: objects, areas and pictures."""

import csv
import importlib
import io
import json

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from vssm.models.weights import write_safetensors
from vssm.tools._common import config_dir, load_config
from vssm.tools.main import main

for package in ('mmdet', 'mmseg'):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[mmlab]'")
inference = importlib.import_module('vssm.models.mm.inference')

pytestmark = pytest.mark.usefixtures('one_thread', 'quick_configs')

CLASSES = dict(coco=('cell', 'nucleus', 'debris'), ade20k=('soil', 'wheat', 'maize', 'road', 'water'))
HEADS = dict(
    coco='roi_head=dict(bbox_head=dict(num_classes=3), mask_head=dict(num_classes=3))',
    ade20k='decode_head=dict(num_classes=5), auxiliary_head=dict(num_classes=5)',
)


@pytest.fixture(scope='module', params=CLASSES)
def task(request):
    return request.param


@pytest.fixture(scope='module')
def work(task, small_config, tmp_path_factory, quick_configs):
    """A folder with own.py, of a small model for one's own classes, and its random weights as a training notes them."""
    folder = tmp_path_factory.mktemp(task)
    name, options = small_config(task, 'test_vmamba')
    (folder / 'own.py').write_text(
        f'_base_ = {str(config_dir() / f"{name}.py")!r}\nmodel = dict({HEADS[task]})\n'
        f'test_dataloader = dict(dataset=dict(metainfo=dict(classes={CLASSES[task]})))\n'
    )
    cfg = load_config(str(folder / 'own.py'))
    cfg.merge_from_dict({key: value for key, value in options.items() if key.startswith(('model', 'test_d'))})
    if task == 'coco':
        cfg.model.test_cfg.rcnn.max_per_img = 2  # to be drawn
    cfg.dump(folder / 'own.py')
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    meta = dict(dataset_meta=dict(classes=tuple(name.upper() for name in CLASSES[task])))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / 'epoch_1.pth')
    write_safetensors(folder / 'weights.safetensors', model.state_dict(), {})
    noise = np.random.default_rng(0).integers(256, size=(60, 90, 3), dtype=np.uint8)
    (folder / 'photographs' / 'more').mkdir(parents=True)
    for path in ('a.jpg', 'b.png', 'more/a.png'):
        Image.fromarray(noise).save(folder / 'photographs' / path)
    return folder


def predict(work, capsys, *options, checkpoint='epoch_1.pth', images='photographs', threshold=0):
    argv = ['predict', work / 'own.py', work / images, '--checkpoint', work / checkpoint, '--threshold', threshold]
    status = main([*map(str, argv), *map(str, options)])
    return status, *capsys.readouterr()


def test_what_is_found_is_told_and_drawn(task, work, tmp_path, capsys, monkeypatch):
    load = inference.load_predictor
    monkeypatch.setattr(inference, 'load_predictor', lambda *args: print('a line of a log') or load(*args))
    status, out, err = predict(work, capsys, '--out-dir', tmp_path)
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0, err
    assert {path.name for path in tmp_path.iterdir()} == {'a.png', 'b.png', 'a-1.png'}
    names = [name.upper() for name in CLASSES[task]]  # the checkpoint's
    for line, name in zip(lines, ('a.jpg', 'b.png', 'more/a.png'), strict=True):
        assert line['image'] == str(work / 'photographs' / name)
        drawn, photograph = (np.asarray(Image.open(line[key]).convert('RGB')) for key in ('picture', 'image'))
        assert drawn.shape == photograph.shape and (drawn != photograph).any()
        found = line['objects' if task == 'coco' else 'classes']
        assert found and all(names[entry['index']] == entry['class'] for entry in found)
        values = [entry['score' if task == 'coco' else 'share'] for entry in found]
        assert values == sorted(values, reverse=True)
        if task == 'coco':
            assert all(0 <= x0 <= x1 <= 90 and 0 <= y0 <= y1 <= 60 for x0, y0, x1, y1 in (e['box'] for e in found))
        else:
            assert sum(values) == pytest.approx(1)
    if task == 'coco':  # whose unsure objects are left out
        out = predict(work, capsys, '--out-dir', tmp_path, images='photographs/b.png', threshold=0.99)[1]
        assert json.loads(out)['objects'] == []


def test_the_config_names_the_classes_of_bare_weights(task, work, tmp_path, capsys):
    out = predict(work, capsys, '--csv', '--out-dir', tmp_path, checkpoint='weights.safetensors')[1]
    rows = list(csv.DictReader(io.StringIO(out)))
    assert rows[0].keys() == {'image', 'rank', *inference_fields(task)}
    assert rows and {row['class'] for row in rows} <= {*CLASSES[task]}


def inference_fields(task):
    return ('index', 'class', 'score', 'box') if task == 'coco' else ('index', 'class', 'share')


def test_objects_and_areas_on_a_terminal(task, work, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('vssm.tools._common.console._force_terminal', True)
    out = predict(work, capsys, '--out-dir', tmp_path, images='photographs/b.png')[1]
    assert f'b.png, drawn in {tmp_path}/b.png\n' in out and ' %' in out and '{' not in out
    assert any(name.upper() in out for name in CLASSES[task])


@pytest.mark.parametrize(
    'change, said',
    [
        (dict(checkpoint='none.pth'), 'none.pth does not exist'),
        (dict(checkpoint='classifier.pth'), 'classifier.pth must hold the weights of this model'),
        (dict(checkpoint='names.pth'), 'names.pth must name the'),
        (dict(out_dir='photographs'), '--out-dir must be another folder than that of the images'),
    ],
    ids=str,
)
@pytest.mark.parametrize('task', ['ade20k'], indirect=True)  # on which what is refused does not depend
def test_what_a_detector_or_segmentor_refuses(change, said, work, tmp_path, capsys):
    torch.save({'model': {'stem.weight': torch.zeros(1)}}, work / 'classifier.pth')
    content = torch.load(work / 'epoch_1.pth')
    content['meta']['dataset_meta'] = dict(classes=('one',))
    torch.save(content, work / 'names.pth')
    options = ['--out-dir', work / change['out_dir'] if 'out_dir' in change else tmp_path / 'new']
    status, _, err = predict(work, capsys, *options, checkpoint=change.get('checkpoint', 'epoch_1.pth'))
    assert status == 2 and said in err and err.count('\n') == 1, err
    assert not (tmp_path / 'new').exists() and len(list((work / 'photographs').iterdir())) == 3


def test_a_config_needs_a_checkpoint(task, work, capsys):
    assert main(['predict', str(work / 'own.py'), str(work / 'photographs')]) == 2
    assert '--checkpoint must name the weights of' in capsys.readouterr().err
    assert main(['predict', str(work / 'epoch_1.pth'), str(work / 'photographs')]) == 2
    assert 'vssm predict CONFIG IMAGE --checkpoint FILE' in capsys.readouterr().err
