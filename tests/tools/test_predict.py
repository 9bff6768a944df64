# SPDX-License-Identifier: Apache-2.0
"""`vssm predict` and `vssm.predict`: what images show, by models and by files of weights."""

import csv
import functools
import http.server
import io
import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

import vssm
from vssm.models import predict as prediction
from vssm.models.weights import read as reading
from vssm.models.weights import read_checkpoint, write_safetensors
from vssm.tools.main import main

CLASSES = ('kākā', 'kea', 'kiwi')
TRANSFORM = dict(input_size=48, crop_pct=1.0, interpolation='bilinear', mean=[0.4, 0.5, 0.6], std=[0.2, 0.2, 0.3])


@pytest.fixture(scope='module')
def network():
    torch.manual_seed(0)
    model = timm.create_model('test_vmamba2d', num_classes=3).eval()
    torch.nn.init.normal_(model.head.fc.weight)
    return model


@pytest.fixture
def checkpoint(network, tmp_path):
    """A file as a training writes it."""
    path = tmp_path / 'checkpoint.safetensors'
    metadata = dict(model='test_vmamba2d', model_args='{"num_classes": 3}')
    metadata |= dict(classes=json.dumps(CLASSES), transform=json.dumps(TRANSFORM))
    write_safetensors(path, network.state_dict(), metadata)
    return path


@pytest.fixture(scope='module')
def classifier(network, tmp_path_factory):
    path = tmp_path_factory.mktemp('classifier') / 'weights.pth'
    torch.save(network.state_dict(), path)
    return prediction.load_classifier(path)


@pytest.fixture
def photographs(tmp_path):
    """A folder of three, one of them further down, beside what is no image."""
    folder = tmp_path / 'photographs'
    (folder / 'more').mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ('1.png', '2.JPG', 'more/3.png'):
        Image.fromarray(rng.integers(256, size=(60, 80, 3), dtype=np.uint8)).save(folder / name)
    (folder / 'notes.txt').touch()
    return folder


@pytest.fixture
def run(capsys):
    """Call the command, and return its status, its output and its errors."""

    def run(*args):
        status = main(['predict', *map(str, args)])
        return status, *capsys.readouterr()

    return run


def expected(network, path, **changes):
    picture = Image.open(path).convert('RGB')
    with torch.no_grad():
        return network(create_transform(**TRANSFORM | changes)(picture).unsqueeze(0)).softmax(-1)[0]


def shown(answer):
    """An answer up to the rounding of its probabilities, which the other images of a batch may change."""
    return [{**row, 'probability': pytest.approx(row['probability'], abs=1e-5)} for row in answer]


def test_a_file_brings_its_classes_and_its_transform(network, checkpoint, photographs):
    paths = [photographs / '1.png', Image.open(photographs / '2.JPG'), str(photographs / 'more/3.png')]
    answers = vssm.predict(checkpoint, paths, batch_size=2)
    for name, answer in zip(('1.png', '2.JPG', 'more/3.png'), answers, strict=True):
        probabilities = expected(network, photographs / name)
        assert [row['index'] for row in answer] == probabilities.argsort(descending=True).tolist()
        assert [row['class'] for row in answer] == [CLASSES[row['index']] for row in answer]
        for row in answer:
            assert row['probability'] == pytest.approx(probabilities[row['index']].item(), abs=1e-5)
    assert vssm.predict(checkpoint, paths[0], topk=1)[0] == shown(answers[0][:1])


@pytest.mark.parametrize('kind', ['.pth', '.safetensors'])
def test_a_file_is_read_once(kind, network, tmp_path, monkeypatch):
    path, opened = tmp_path / f'weights{kind}', []
    if kind == '.pth':
        torch.save(network.state_dict(), path)
    else:
        write_safetensors(path, network.state_dict(), dict(model='test_vmamba2d', model_args='{"num_classes": 3}'))
    name = dict([('.pth', 'open_archive'), ('.safetensors', 'read_safetensors')])[kind]
    before = getattr(reading, name)
    monkeypatch.setattr(reading, name, lambda *args: opened.append(args) or before(*args))
    weights = prediction.load_classifier(path).model.state_dict()
    assert len(opened) == 1 and all(torch.equal(weights[key], value) for key, value in network.state_dict().items())


def test_a_published_file_takes_the_transform_of_its_network(network, photographs, tmp_path):
    torch.save({'model': network.state_dict()}, tmp_path / 'published.pth')
    (answer,) = vssm.predict(tmp_path / 'published.pth', photographs / '1.png')
    cfg = network.pretrained_cfg
    own = {key: cfg[key] for key in ('input_size', 'crop_pct', 'interpolation', 'mean', 'std')}
    probabilities = expected(network, photographs / '1.png', **own)
    assert {row['class'] for row in answer} == {'class 0', 'class 1', 'class 2'}
    assert answer[0]['probability'] == pytest.approx(probabilities.max().item(), abs=1e-5)


def test_a_network_of_timms_by_name_knows_imagenet(monkeypatch, photographs):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet')
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained: pretrained and model)
    (answer,) = vssm.predict('test_resnet', photographs / '1.png')
    names = prediction.ImageNetInfo('imagenet-1k')
    assert len(answer) == 5 and all(row['class'] == names.index_to_description(row['index']) for row in answer)


def test_a_network_of_timms_that_was_trained_here(photographs, tmp_path):
    model = timm.create_model('test_resnet', num_classes=2)
    path = tmp_path / 'checkpoint.safetensors'
    write_safetensors(path, model.state_dict(), dict(model='test_resnet', model_args='{"num_classes": 2}'))
    assert len(vssm.predict(path, photographs / '1.png')[0]) == 2
    write_safetensors(path, model.state_dict(), dict(model='test_resnet', model_args='{"num_classes": 3}'))
    with pytest.raises(ValueError, match='must hold the tensors of test_resnet'):
        vssm.predict(path, photographs / '1.png')


@pytest.mark.parametrize('mode', ('RGBA', 'L', 'P', 'I;16'))
def test_images_of_every_kind(mode, classifier, tmp_path):
    """What is transparent is white."""
    if mode == 'I;16':
        Image.fromarray(np.full((50, 50), 200 << 8, np.uint16)).save(tmp_path / 'image.png')
    else:
        Image.new('RGBA', (50, 50), (200, 200, 200, 0 if mode == 'RGBA' else 255)).convert(mode).save(
            tmp_path / 'image.png'
        )
    grey = 255 if mode == 'RGBA' else 200
    Image.new('RGB', (50, 50), (grey, grey, grey)).save(tmp_path / 'plain.png')
    found, plain = classifier([tmp_path / 'image.png', tmp_path / 'plain.png'])
    assert found == shown(plain)


def test_an_upright_photograph(classifier, photographs):
    image = Image.open(photographs / '1.png')
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise
    image.save(photographs / 'lying.png', exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(photographs / 'standing.png')
    lying, standing = classifier([photographs / 'lying.png', photographs / 'standing.png'])
    assert lying == shown(standing)


def test_digits_are_grey(tmp_path):
    """A network for one channel takes photographs in grey, at its own mean where the file does not say."""
    model = timm.create_model('test_vmamba', in_chans=1, num_classes=2).eval()
    torch.save(model.state_dict(), tmp_path / 'grey.pth')
    Image.new('RGB', (40, 40), (200, 10, 60)).save(tmp_path / 'red.png')
    Image.open(tmp_path / 'red.png').convert('L').save(tmp_path / 'grey.png')
    red, grey = (vssm.predict(tmp_path / 'grey.pth', tmp_path / name)[0] for name in ('red.png', 'grey.png'))
    assert red == grey and len(red) == 2


# ---- the command -----------------------------------------------------------------------------------------------------


def test_lines_of_json_in_a_pipe(run, checkpoint, photographs):
    status, out, err = run(checkpoint, photographs, '--topk', 2, '--batch-size', 2)
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and err == ''
    assert [line['image'] for line in lines] == [str(photographs / n) for n in ('1.png', '2.JPG', 'more/3.png')]
    for line in lines:
        assert line['model'] == 'test_vmamba2d'
        assert line['predictions'] == shown(vssm.predict(checkpoint, line['image'], topk=2)[0])


def test_a_table_with_commas(run, checkpoint, photographs):
    status, out, _ = run(checkpoint, photographs / '1.png', '--csv')
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 0 and [row['rank'] for row in rows] == ['1', '2', '3']
    assert {row['class'] for row in rows} == set(CLASSES) and {row['image'] for row in rows} == {
        str(photographs / '1.png')
    }
    assert sum(float(row['probability']) for row in rows) == pytest.approx(1, abs=1e-5)


def test_a_table_on_a_terminal(run, checkpoint, photographs, monkeypatch):
    monkeypatch.setattr('vssm.tools._common.console._force_terminal', True)
    _, out, _ = run(checkpoint, photographs / '1.png')
    assert all(name in out for name in CLASSES) and ' %' in out and '1.png' in out and '{' not in out


def test_patterns(run, checkpoint, photographs):
    _, out, _ = run(checkpoint, f'{photographs}/**/*.png')
    assert [json.loads(line)['image'][-5:] for line in out.splitlines()] == ['1.png', '3.png']


def test_an_address(run, checkpoint, photographs):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=photographs))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f'http://127.0.0.1:{server.server_port}/1.png'
        status, out, _ = run(checkpoint, address)
        assert status == 0 and json.loads(out)['image'] == address
        status, _, err = run(checkpoint, address.replace('1.png', '9.png'))
        assert status == 2 and '9.png cannot be fetched: ' in err and '404' in err
    finally:
        server.shutdown()
        server.server_close()


def test_an_unreadable_image_of_a_folder_is_told_and_left_out(run, checkpoint, photographs):
    (photographs / '0.png').write_bytes(b'no image')
    status, out, err = run(checkpoint, photographs)
    assert status == 1 and len(out.splitlines()) == 3
    assert f'{photographs / "0.png"} must be an image that Pillow reads' in err


@pytest.mark.parametrize(
    'args, message',
    [
        (('{checkpoint}', 'no.png'), 'IMAGE must be a file, a folder, a pattern or a URL, got no.png'),
        (('{checkpoint}', '{photographs}/notes.txt'), 'no image could be read'),
        (('{checkpoint}', '{photographs}/1.png', '--topk', '0'), '--topk must be at least 1, got 0'),
        (('{checkpoint}', '{photographs}/1.png', '--batch-size', '-1'), '--batch-size must be at least 1, got -1'),
        (('{checkpoint}', '{photographs}/1.png', '--device', 'abacus'), 'must be a device of this machine, got abacus'),
        (('vmamba2d_tiny', '{photographs}/1.png'), 'no weights are published.*vssm predict FILE IMAGE'),
        (('vmanba_tiny', '{photographs}/1.png'), "got 'vmanba_tiny'. Did you mean"),
        (('no.pth', '{photographs}/1.png'), 'no.pth does not exist'),
        (('{photographs}/1.png', '{photographs}/1.png'), 'must be a .safetensors file, or a .pth file'),
    ],
)  # fmt: skip
def test_bad_input(args, message, run, checkpoint, photographs):
    status, out, err = run(*(arg.format(checkpoint=checkpoint, photographs=photographs) for arg in args))
    assert status == 2 and out == '' and re.search(message, err.replace('\n', ' ')), err


@pytest.mark.parametrize(
    'metadata, message',
    [
        (dict(classes='["kea"]'), 'must name its 3 classes, got 1 names'),
        (dict(classes='{}'), 'must note classes and a transform: classes must be a list, got dict'),
        (dict(transform='[]'), 'must note classes and a transform: transform must be a dict, got list'),
        (dict(transform='{"interpolation": 3'), 'must note classes and a transform'),
    ],
)
def test_files_that_note_nonsense(metadata, message, network, photographs, tmp_path):
    path = tmp_path / 'weights.safetensors'
    metadata = dict(model='test_vmamba2d', model_args='{"num_classes": 3}', **metadata)
    write_safetensors(path, network.state_dict(), metadata)
    with pytest.raises(ValueError, match=message):
        vssm.predict(path, photographs / '1.png')


def test_a_training_notes_what_a_prediction_needs(tmp_path, monkeypatch, capsys):
    """From folders of images to their labels, by the commands of the README."""
    pytest.importorskip('mmengine')
    monkeypatch.chdir(tmp_path)
    for split in ('train', 'val'):
        for grey, name in ((40, 'dark'), (200, 'light')):
            for i in range(2):
                path = tmp_path / 'leaves' / split / name / f'{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new('RGB', (40, 40), (grey, grey, grey + i)).save(path)
    options = ['model.model_name=test_vmamba2d', 'model.pretrained=False', 'train_cfg.max_epochs=1']
    options += [f'{part}_dataloader.num_workers=0' for part in ('train', 'val', 'test')]
    options += [f'{part}_dataloader.persistent_workers=False' for part in ('train', 'val', 'test')]
    readme = (Path(__file__).parents[2] / 'README.md').read_text()
    train, predict = re.findall(r'^vssm (train finetune/vmamba.*|predict runs/leaves.*)', readme, flags=re.MULTILINE)
    assert main([*train.split(), '--cfg-options', *options]) == 0
    metadata = read_checkpoint('runs/leaves/checkpoint.safetensors')[1]
    assert json.loads(metadata['classes']) == ['dark', 'light']
    assert json.loads(metadata['transform']) == dict(
        input_size=224,
        crop_pct=0.875,
        interpolation='bicubic',
        mean=pytest.approx([0.485, 0.456, 0.406]),
        std=pytest.approx([0.229, 0.224, 0.225]),
    )
    Image.new('RGB', (90, 60)).save('photograph.jpg')
    capsys.readouterr()
    assert main(predict.split()) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {row['class'] for row in answer['predictions']} == {'dark', 'light'}
