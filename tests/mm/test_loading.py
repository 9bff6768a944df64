# SPDX-License-Identifier: Apache-2.0
"""Checkpoints into models by every path there is: no code runs, what does not fit is named, and any source will do."""

import contextlib
import functools
import http.server
import io
import logging
import pickle
import threading
import zipfile

import numpy as np
import pytest
import timm
import torch
from mmengine import fileio
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import BaseModel, BaseModule, PretrainedInit
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint
from mmengine.runner import checkpoint as loaders
from safetensors.torch import save_file
from torch import nn

from vssm.models import mm
from vssm.models.mm.content import read_content
from vssm.models.mm.loading import install, load_whole, without_pretrained
from vssm.models.mm.sources import has_folder, local_file, read_weights
from vssm.models.vmamba import checkpoint_filter_fn
from vssm.models.weights import convert

pytestmark = pytest.mark.usefixtures('one_thread')


class Head(BaseModule):
    """A head that takes weights by mmengine's initialiser."""

    def __init__(self, classes=3, init_cfg=None):
        super().__init__(init_cfg)
        self.conv = nn.Conv2d(4, 4, 3)
        self.fc = nn.Linear(4, classes)


class Detector(BaseModel):
    """The parts of a detector, small."""

    def __init__(self, classes=3, backbone=None, head=None, init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        self.backbone = mm.TimmFeatures('test_vmamba', **(backbone or {}))
        self.neck = nn.Conv2d(96, 4, 1)
        self.bbox_head = Head(classes, head)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.bbox_head.fc(self.neck(self.backbone(inputs)[-1]).mean((2, 3)))


def randomised(model):
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5)
    return model


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.fixture
def log(monkeypatch):
    """What is logged in the meantime."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


# ---- code in files ---------------------------------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return exec, ('import builtins; builtins._code_of_a_file_ran = True',)


def pretrained(path, **kwargs):
    return dict(type='Pretrained', checkpoint=str(path), **kwargs)


def runner_of(kind, path, folder):
    model = Detector()
    return kind(model, str(folder), load_from=str(path), default_scope='mmengine', experiment_name=path.stem)


PATHS = {
    'load_weights': lambda path, folder: mm.load_weights(mm.ImageClassifier('test_vmamba'), path),
    'a classifier': lambda path, folder: mm.ImageClassifier('test_vmamba', init_cfg=pretrained(path)).init_weights(),
    'a backbone': lambda path, folder: mm.TimmFeatures('test_vmamba', init_cfg=pretrained(path)).init_weights(),
    'a whole model': lambda path, folder: Detector(init_cfg=pretrained(path)).init_weights(),
    'a head': lambda path, folder: Detector(head=pretrained(path)).init_weights(),
    'a part of a file': lambda path, folder: Detector(head=pretrained(path, prefix='bbox_head.')).init_weights(),
    'the initialiser': lambda path, folder: PretrainedInit(str(path))(nn.Linear(1, 1)),
    'load_checkpoint': lambda path, folder: load_checkpoint(nn.Linear(1, 1), str(path)),
    'the loader': lambda path, folder: CheckpointLoader.load_checkpoint(str(path)),
    'every scheme': lambda path, folder: [f(str(path), 'cpu') for f in CheckpointLoader._schemes.values()],
    "load_from of mmengine's Runner": lambda path, folder: runner_of(Runner, path, folder).load_or_resume(),
    'load_from of TimmRunner': lambda path, folder: runner_of(mm.TimmRunner, path, folder).load_or_resume(),
    'read_run': lambda path, folder: mm.read_run(path),
    'convert': lambda path, folder: convert(path, folder / 'out.safetensors'),
}


SLOW = ("load_from of mmengine's Runner", 'load_from of TimmRunner', 'convert')


@pytest.mark.parametrize('legacy', [False, pytest.param(True, marks=pytest.mark.slow)], ids=['zip', 'legacy'])
@pytest.mark.parametrize('name', [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PATHS])
def test_no_path_runs_code(name, legacy, tmp_path, monkeypatch):
    """Not even where PyTorch's reader would run it, as releases of mmengine let it, or a setting of the process."""
    path = tmp_path / 'file.pth'
    content = dict(state_dict=Detector().state_dict(), meta=dict(code=Code()))
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    unsafe = functools.partial(torch.load, weights_only=False)
    monkeypatch.setattr(torch, 'load', lambda *args, **kwargs: unsafe(*args, **{**kwargs, 'weights_only': False}))
    import builtins

    torch.load(path)
    assert builtins._code_of_a_file_ran  # the control
    del builtins._code_of_a_file_ran
    with pytest.raises((ValueError, mm.RunError), match='asks for builtins.exec') as error:
        PATHS[name](path, tmp_path)
    assert not hasattr(builtins, '_code_of_a_file_ran')
    assert 'weights_only' not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize('package', ['mmdet', 'mmseg'])
def test_no_code_runs_by_the_packages_own_functions(package, tmp_path, small_config, monkeypatch):
    pytest.importorskip(package, reason="not installed: pip install '.[mmlab]'")
    from vssm.tools._common import find_config

    task, name = dict(mmdet='coco', mmseg='ade20k')[package], dict(mmdet='init_detector', mmseg='init_model')[package]
    name_of_config, options = small_config(task, 'test_vmamba')
    cfg = Config.fromfile(find_config(name_of_config))
    cfg.merge_from_dict(options)
    torch.save(dict(state_dict={}, meta=dict(code=Code())), tmp_path / 'file.pth')
    unsafe = torch.load
    monkeypatch.setattr(torch, 'load', lambda *args, **kwargs: unsafe(*args, **{**kwargs, 'weights_only': False}))
    apis = __import__(f'{package}.apis', fromlist=[name])
    with pytest.raises(ValueError, match='asks for builtins.exec'):
        getattr(apis, name)(cfg, str(tmp_path / 'file.pth'), device='cpu')


def test_the_config_in_a_file_is_left_out(tmp_path, log):
    """mmengine's Runner and its inferencers would run it."""
    hub = dict(runtime_info=dict(cfg='raise SystemExit', iter=3), log_scalars={}, resumed_keys={})
    run = dict(meta=dict(cfg='raise SystemExit', config='raise SystemExit', epoch=1), message_hub=hub, state_dict={})
    torch.save(run, tmp_path / 'file.pth')
    content = CheckpointLoader.load_checkpoint(str(tmp_path / 'file.pth'))
    assert content['meta'] == dict(epoch=1) and content['message_hub']['runtime_info'] == dict(iter=3)
    assert any('its cfg' in line and 'left out' in line for line in log)


def test_a_refused_file_is_not_read_again_in_a_way_that_runs_code(tmp_path, monkeypatch):
    """As onedl-mmengine's loaders do, which can be called by their names."""
    unsafe = functools.partial(torch.load, weights_only=False)
    monkeypatch.setattr(loaders, '_safe_torch_load', lambda file, **kwargs: unsafe(file), raising=False)
    torch.save(dict(code=Code(), weight=torch.ones(1)), tmp_path / 'evil.pth')
    torch.save(dict(weight=torch.ones(1)), tmp_path / 'good.pth')
    install()
    with pytest.raises(pickle.UnpicklingError, match='exec'):
        loaders._safe_torch_load(tmp_path / 'evil.pth', map_location='cpu')
    assert loaders._safe_torch_load(tmp_path / 'good.pth', map_location='cpu') == dict(weight=torch.ones(1))


def test_loaders_of_others_stay(monkeypatch):
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    CheckpointLoader.register_scheme('mine://', lambda filename, map_location=None: dict(mine=filename))
    install()
    CheckpointLoader._schemes['mine://'].__name__ = 'load_from_mine'
    assert CheckpointLoader.load_checkpoint('mine://x') == dict(mine='mine://x')


# ---- what a training checkpoint may hold -----------------------------------------------------------------------------


def run_of(**entries):
    hub = dict(runtime_info={}, log_scalars={}, resumed_keys={})
    weights = dict(x=torch.ones(3))
    return dict(meta=dict(epoch=1, iter=2, seed=0), state_dict=weights, message_hub=hub, optimizer={}, **entries)


def test_every_value_of_a_run_comes_back(tmp_path):
    shared = torch.arange(4.0)
    history = HistoryBuffer([1.5, 2.5], [1, 2], max_length=9)
    entries = dict(
        plain=[1, 2.5, True, None, 'text', b'bytes', (1, 'a'), {1, 2}, frozenset('ab'), complex(1, 2), {3: 'three'}],
        arrays=[np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.empty((0, 2))],
        texts=np.array(['a', 'long']),
        numbers=[np.float64(1.5), np.float32(0.25), np.int64(3), np.bool_(True)],
        tensors=dict(a=shared, b=shared, half=torch.ones(2).bfloat16(), step=torch.tensor(3), bits=torch.ones(2) > 0),
        history=history,
        size=torch.Size([1, 2]),
    )
    torch.save(run_of(**entries), tmp_path / 'run.pth')
    run = mm.read_run(tmp_path / 'run.pth')
    assert run['plain'] == entries['plain'] and list(map(type, run['plain'])) == list(map(type, entries['plain']))
    for actual, expected in zip([*run['arrays'], run['texts']], [*entries['arrays'], entries['texts']], strict=True):
        assert actual.dtype == expected.dtype and np.array_equal(actual, expected)
    assert run['numbers'] == entries['numbers']
    assert list(map(type, run['numbers'])) == list(map(type, entries['numbers']))
    assert_same(run['tensors'], entries['tensors'])
    assert run['tensors']['a'].data_ptr() == run['tensors']['b'].data_ptr()
    assert run['size'] == entries['size'] and isinstance(run['size'], torch.Size)
    run['history'].update(4.0)
    assert (
        isinstance(run['history'], HistoryBuffer) and run['history'].mean() == 8 / 4
    )  # a sum by the number of what is in it
    assert run['history'].max_length == 9 and [array.tolist() for array in history.data] == [[1.5, 2.5], [1, 2]]


def rewritten(path, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))


class Bytes:
    def __reduce__(self):
        return bytearray, (1 << 50,)


class Array:
    def __reduce__(self):
        return np.ndarray, ((1 << 50,),)


def loop():
    entries = []
    entries.append(entries)
    return entries


def pickled(program):
    return lambda path: rewritten(path, lambda name, data: program if name.endswith('data.pkl') else data)


GUARDS = {  # what makes the file, and what is said of it
    'nothing': (lambda path: path.write_bytes(b''), 'an empty file'),
    'deflated': (lambda path: rewritten(path, compression=zipfile.ZIP_DEFLATED), 'one that is compressed'),
    'petabytes': (lambda path: torch.save(run_of(x=Bytes()), path), 'one that holds builtins.bytearray as x'),
    'an array of petabytes': (lambda path: torch.save(run_of(x=Array()), path), r'\(TypeError\)'),
    'a memo': (pickled(b'\x80\x02}r\xff\xff\xff\x7f.'), 'numbers more objects than it holds'),
    'expanded': (lambda path: torch.save(run_of(x=torch.ones(1).expand(1 << 50)), path), 'more numbers than there are'),
    'a class': (lambda path: torch.save(run_of(x=[Head()]), path), r'one that holds .*Head as x'),
    'itself': (lambda path: torch.save(run_of(x=loop()), path), 'x holds itself'),
    'old': (
        lambda path: torch.save(run_of(), path, _use_new_zipfile_serialization=False),
        'one without checksums, as PyTorch before 1.6 wrote it',
    ),
    'no history': (lambda path: torch.save(run_of(x=HistoryBuffer(['a'], [1])), path), 'x is no history of numbers'),
    'a list': (lambda path: torch.save([1], path), 'got one without entries'),
    'no weights': (lambda path: torch.save({**run_of(), 'state_dict': [1]}, path), 'whose state_dict are no tensors'),
    'averages': (
        lambda path: torch.save(run_of(ema_state_dict={'module.x': torch.full((3,), torch.nan)}), path),
        r'as ema_state_dict, got 1 that are not finite \(module.x\)',
    ),
}


@pytest.mark.parametrize('guard', GUARDS)
def test_a_hostile_run_is_refused(guard, tmp_path):
    make, said = GUARDS[guard]
    torch.save(run_of(), tmp_path / 'run.pth')
    mm.read_run(tmp_path / 'run.pth')
    make(tmp_path / 'run.pth')
    with pytest.raises(ValueError, match=said) as error:
        mm.read_run(tmp_path / 'run.pth')
    assert '\n' not in str(error.value) and 'weights_only' not in str(error.value)


# ---- numbers that are no weights -------------------------------------------------------------------------------------

NUMBERS = {
    'nan': lambda value: value.fill_(torch.nan),
    'infinite': lambda value: value.fill_(torch.inf),
    'bool': lambda value: value > 0,
    'integer': lambda value: value.long(),
    'complex': lambda value: value.to(torch.complex64),
}


@pytest.mark.parametrize('numbers', NUMBERS)
def test_numbers_that_are_no_weights_are_refused(numbers, tmp_path):
    model = Detector()
    state, own = model.state_dict(), model.backbone.model.model.state_dict()
    for name, load in (
        ('bbox_head.fc.bias', lambda path: load_whole(model, path, start=True)),
        ('bbox_head.fc.bias', lambda path: load_checkpoint(model, str(path))),
        ('backbone.model.model.stem.conv1.bias', lambda path: model.backbone._load(path)),
    ):
        bad = NUMBERS[numbers](state[name].clone())
        torch.save({**state, name: bad}, tmp_path / 'file.pth')
        with pytest.raises(
            ValueError, match='must be a .safetensors file' if numbers == 'complex' else 'of other|finite'
        ):
            load(tmp_path / 'file.pth')
    bad = NUMBERS[numbers](own['stem.conv1.bias'].clone())
    with pytest.raises(ValueError, match='1 of other numbers|1 that are not finite'):
        checkpoint_filter_fn({**own, 'stem.conv1.bias': bad}, model.backbone.model.model)


@pytest.mark.slow
@pytest.mark.parametrize('numbers', NUMBERS)
def test_numbers_that_are_no_weights_are_refused_by_every_path(numbers, tmp_path):
    classifier, detector = timm.create_model('test_vmamba').state_dict(), Detector().state_dict()
    name = 'stages.0.blocks.0.norm1.bias'
    bad = NUMBERS[numbers](classifier[name].clone())
    torch.save({'state_dict': {**classifier, name: bad}}, tmp_path / 'classifier.pth')
    ours = f'backbone.model.model.{name}'
    torch.save({'state_dict': {**detector, ours: bad}}, tmp_path / 'detector.pth')
    head = NUMBERS[numbers](detector['bbox_head.fc.bias'].clone())
    torch.save({'state_dict': {**detector, 'bbox_head.fc.bias': head}}, tmp_path / 'head.pth')
    complex_ones = numbers == 'complex'  # which our reader refuses before it knows the network
    for file, names in (('classifier', name), ('detector', name), ('head', 'bbox_head.fc.bias')):
        path = tmp_path / f'{file}.pth'
        paths = dict(
            classifier=['load_weights', 'a classifier', 'a backbone', 'convert'],
            detector=['a backbone', 'a whole model', 'load_from of TimmRunner', 'convert'],
            head=['a whole model', 'a part of a file', 'load_from of TimmRunner', "load_from of mmengine's Runner"],
        )[file]
        said = 'must be a .safetensors file' if complex_ones else f'({names}|not finite|of other numbers)'
        for kind in paths:
            with pytest.raises((ValueError, mm.RunError), match=said):
                PATHS[kind](path, tmp_path)
    with pytest.raises(ValueError, match='of other numbers|not finite'):
        timm.create_model('test_vmamba', checkpoint_path=str(tmp_path / 'classifier.pth'))


def test_counters_may_be_whole_numbers_alone(tmp_path):
    state = timm.create_model('test_spatial_mamba').state_dict()
    counter = next(name for name in state if name.endswith('num_batches_tracked'))
    for value, fits in ((torch.tensor(7), True), (torch.tensor(7.0), True), (torch.tensor(7.5), False)):
        torch.save({**state, counter: value}, tmp_path / 'file.pth')
        model = mm.ImageClassifier('test_spatial_mamba')
        if fits:
            mm.load_weights(model, tmp_path / 'file.pth')
            assert model.model.state_dict()[counter] == 7
        else:
            with pytest.raises(ValueError, match='must hold integers and holds torch.float32'):
                mm.load_weights(model, tmp_path / 'file.pth')


def test_a_mask_may_be_infinite(tmp_path):
    class Masked(Detector):
        def __init__(self):
            super().__init__()
            self.register_buffer('mask', torch.full((2,), -torch.inf))

    torch.save(Masked().state_dict(), tmp_path / 'file.pth')
    load_whole(Masked(), tmp_path / 'file.pth')


# ---- control characters ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_control_characters_reach_no_terminal(tmp_path, capsys):
    bell = '\x1b]0;owned\x07'
    state = timm.create_model('test_vmamba').state_dict()
    files = {
        'name.pth': lambda path: torch.save({**state, f'x{bell}': torch.ones(1)}, path),
        'name.safetensors': lambda path: save_file({**state, f'x{bell}': torch.ones(1)}, path),
        'model.safetensors': lambda path: save_file(state, path, dict(model=f'vmamba{bell}')),
        'weights.safetensors': lambda path: save_file(state, path, dict(weights=f'x{bell}', model='test_vmamba2d')),
        'class.pth': lambda path: (
            torch.save({'x': Code()}, path),
            rewritten(path, lambda name, data: data.replace(b'__builtin__\nexec', f'a{bell}\nexec'.encode())),
        ),
        'stdlib.pth': lambda path: (
            torch.save({'x': Code()}, path),
            rewritten(path, lambda name, data: data.replace(b'__builtin__\nexec', f'os\nx{bell}'.encode())),
        ),
        'args.safetensors': lambda path: save_file(
            state, path, dict(model='test_vmamba', model_args=f'{{"global_pool": "\\u001b{"x"}"}}')
        ),
    }
    mmengine_takes = ('model.safetensors', 'weights.safetensors', 'class.pth')  # of which it shows nothing
    for file, write in files.items():
        path = tmp_path / file
        write(path)
        for name in ('load_weights', 'a backbone', 'convert', 'load_checkpoint'):
            harmless = (
                file == 'args.safetensors' and name != 'convert' or name == 'load_checkpoint' and file in mmengine_takes
            )
            with contextlib.nullcontext() if harmless else pytest.raises(ValueError) as error:
                PATHS[name](path, tmp_path)
            said = capsys.readouterr().out + str(getattr(error, 'value', ''))
            assert said.replace('\n', '').replace('\t', '').isprintable(), (file, name)


# ---- other classes, other channels -----------------------------------------------------------------------------------


def test_a_training_starts_from_a_detector_for_other_classes(tmp_path, log):
    source, target = randomised(Detector(3)), Detector(2)
    path = tmp_path / 'detector.pth'
    torch.save(dict(state_dict=source.state_dict()), path)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    load_whole(target, path, start=True)
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name] if '.fc.' in name else source.state_dict()[name]), name
    notes = [line for line in log if 'begins anew' in line]
    assert len(notes) == 2
    assert f'{path}: bbox_head.fc.weight is left out and begins anew: it is (3, 4) there and (2, 4) here.' in notes
    with pytest.raises(ValueError, match='size mismatch for bbox_head.fc.weight'):
        load_whole(Detector(2), path)


@pytest.mark.parametrize(
    'change, said',
    [
        (lambda s: s.pop('bbox_head.fc.bias'), 'Missing key.* "bbox_head.fc.bias"'),
        (lambda s: s.update({'neck.weight': torch.ones(5, 96, 1, 1)}), 'size mismatch for neck.weight'),
        (lambda s: s.update({'bbox_head.fc.weight': torch.ones(3, 5)}), 'size mismatch for bbox_head.fc.weight'),
        (
            lambda s: [s.pop(name) for name in list(s) if name.startswith('backbone.')],
            'Missing key',
        ),
        (lambda s: s.clear() or s.update(timm.create_model('resnet18').state_dict()), 'Missing key'),
        (
            lambda s: s.update({n: torch.ones(2) for n in s if n.startswith('backbone.')}),
            'size mismatch|must hold',
        ),
    ],
    ids=['missing', 'neck', 'two sizes', 'no backbone', 'another network', 'another backbone'],
)
def test_a_file_of_another_detector_is_refused(change, said, tmp_path):
    state = Detector(3).state_dict()
    change(state)
    torch.save(dict(state_dict=state), tmp_path / 'file.pth')
    with pytest.raises(ValueError, match=said):
        load_whole(Detector(2), tmp_path / 'file.pth', start=True)


@pytest.mark.slow
def test_weights_for_three_channels_fit_four(tmp_path, log):
    """As timm fits pretrained ones."""
    classifier, detector = (randomised(model) for model in (timm.create_model('test_vmamba'), Detector()))
    torch.save(classifier.state_dict(), tmp_path / 'classifier.pth')
    torch.save(dict(state_dict=detector.state_dict()), tmp_path / 'detector.pth')
    overlay = dict(file=str(tmp_path / 'classifier.pth'))
    timms = timm.create_model('test_vmamba', pretrained=True, in_chans=4, pretrained_cfg_overlay=overlay)
    starts = pretrained(tmp_path / 'classifier.pth')
    ours = mm.ImageClassifier('test_vmamba', in_chans=4, init_cfg=[starts])
    ours.init_weights()
    assert_same(ours.model.state_dict(), timms.state_dict())
    backbone = mm.TimmFeatures('test_vmamba', in_chans=4, init_cfg=[starts])
    backbone.init_weights()
    assert torch.equal(backbone.model.model.stem.conv1.weight, timms.stem.conv1.weight)
    whole = Detector(backbone=dict(in_chans=4))
    load_whole(whole, tmp_path / 'detector.pth', start=True)
    three = detector.backbone.model.model.stem.conv1.weight
    expected = 0.75 * torch.cat([three, three[:, :1]], 1)
    torch.testing.assert_close(whole.backbone.model.model.stem.conv1.weight, expected)
    assert sum('stem.conv1.weight was fitted from 3 channels to 4' in line for line in log) == 3
    for load in (
        lambda: mm.load_weights(mm.ImageClassifier('test_vmamba', in_chans=4), tmp_path / 'classifier.pth'),
        lambda: load_whole(Detector(backbone=dict(in_chans=4)), tmp_path / 'detector.pth'),
    ):
        with pytest.raises(ValueError, match='stem.conv1.weight'):  # a test is strict
            load()


@pytest.mark.parametrize(
    'init_cfg', [[], [dict(type='Normal')], [pretrained('a'), pretrained('b')], 'a.pth', [dict(type='Pretrained')]]
)
@pytest.mark.parametrize('kind', ['TimmFeatures', 'ImageClassifier'])
def test_other_lists_are_refused(kind, init_cfg):
    with pytest.raises(ValueError, match=f'{kind}: init_cfg must be dict.* or a list of one, got'):
        getattr(mm, kind)('test_vmamba', init_cfg=init_cfg)


@pytest.mark.slow
def test_a_file_for_the_whole_model_spares_the_files_of_its_parts(tmp_path):
    """As they might be downloads."""
    source = randomised(Detector())
    torch.save(dict(state_dict=source.state_dict()), tmp_path / 'detector.pth')
    parts = dict(
        backbone=dict(pretrained=True), head=[pretrained('absent.pth'), dict(type='Constant', layer='Conv2d', val=0)]
    )
    runner = mm.TimmRunner(Detector(**parts), str(tmp_path), load_from=str(tmp_path / 'detector.pth'))
    runner._init_model_weights()
    assert runner.model.backbone.pretrained and len(runner.model.bbox_head.init_cfg) == 2
    assert (runner.model.bbox_head.conv.weight == 0).all()  # what needs no file is done
    runner.load_or_resume()
    assert_same(runner.model.state_dict(), source.state_dict())
    with without_pretrained(runner.model, False):
        assert runner.model.backbone.pretrained
    with pytest.raises(mm.RunError, match='no weights are published'):
        mm.TimmRunner(Detector(**parts), str(tmp_path), experiment_name='without')._init_model_weights()


# ---- sources ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder whose files have URLs, and what was asked for: dict(path, url, asked, cut)."""
    folder, asked, cut = tmp_path / 'served', [], set()
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            path = folder / self.path.lstrip('/')
            data = path.read_bytes() if path.is_file() else None
            self.send_response(200 if data is not None else 404)
            self.send_header('Content-Length', len(data or b''))
            self.end_headers()
            self.wfile.write((data or b'')[: -100 if self.path in cut else None])

        def log_message(self, *args):
            pass

    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield dict(path=folder, url=f'http://127.0.0.1:{server.server_port}', asked=asked, cut=cut)
    server.shutdown()
    server.server_close()


def test_a_url_is_downloaded_once(served):
    source = randomised(Detector())
    torch.save(dict(state_dict=source.state_dict()), served['path'] / 'epoch_1.pth')
    url = f'{served["url"]}/epoch_1.pth'
    for _ in range(2):
        target = Detector()
        load_whole(target, url)
        assert_same(target.state_dict(), source.state_dict())
    assert served['asked'] == ['/epoch_1.pth']
    assert_same(load_checkpoint(Detector(), url)['state_dict'], source.state_dict())
    (served['path'] / 'b').mkdir()  # another file of the same name
    torch.save(dict(state_dict=dict(other=torch.ones(1))), served['path'] / 'b/epoch_1.pth')
    assert list(read_weights(f'{served["url"]}/b/epoch_1.pth')[0]) == ['other']


def test_a_download_that_breaks_off_is_not_kept(served):
    torch.save(dict(x=torch.ones(1000)), served['path'] / 'file-0123abcd.pth')
    served['cut'].add('/file-0123abcd.pth')
    url = f'{served["url"]}/file-0123abcd.pth'
    with pytest.raises(ValueError, match=f'checkpoint {url} cannot be downloaded'):
        read_weights(url)
    served['cut'].clear()
    assert torch.equal(read_weights(url)[0]['x'], torch.ones(1000))
    with pytest.raises(ValueError, match='absent.pth cannot be downloaded: HTTP Error 404'):
        read_weights(f'{served["url"]}/absent.pth')
    with pytest.raises(ValueError, match=r'of\.pth.*: checkpoint .* must hold|must map names'):
        torch.save([1], served['path'] / 'of.pth')
        read_weights(f'{served["url"]}/of.pth')


def test_names_of_the_model_zoos(served, monkeypatch, tmp_path):
    torch.save(dict(state_dict={'backbone.x': torch.ones(1), 'head.x': torch.ones(1)}), served['path'] / 'net.pth')
    url = f'{served["url"]}/net.pth'
    for function in ('get_torchvision_models', 'get_external_models', 'get_mmcls_models'):
        monkeypatch.setattr(loaders, function, lambda: dict(net=url, local='net.pth'))
    monkeypatch.setattr(loaders, 'get_deprecated_model_names', lambda: dict(old='net'))
    monkeypatch.setenv('MMENGINE_HOME', str(served['path']))
    sources = ('torchvision://net', 'modelzoo://net', 'open-mmlab://net', 'openmmlab://old', 'open-mmlab://local')
    for source in (*sources, 'mmcls://net'):
        assert set(read_weights(source)[0]) == {'backbone.x', 'head.x'}, source
        content = CheckpointLoader.load_checkpoint(source)['state_dict']
        assert set(content) == ({'x'} if 'mmcls' in source else {'backbone.x', 'head.x'}), source
    with pytest.raises(
        ValueError, match='torchvision://nett must be one of the 2 names of torchvision://. Did you mean'
    ):
        read_weights('torchvision://nett')


@pytest.fixture
def fake(monkeypatch):
    """Files of a backend that is registered with mmengine: names and bytes."""
    files = {}

    class Fake(fileio.LocalBackend):
        def get(self, path):
            return files[str(path)]

        def get_local_path(self, path):
            from contextlib import contextmanager
            from tempfile import NamedTemporaryFile

            @contextmanager
            def local():
                with NamedTemporaryFile() as file:
                    file.write(files[str(path)])
                    file.flush()
                    yield file.name

            return local()

        def exists(self, path):
            return str(path) in files or self.isdir(path)

        isfile = exists

        def isdir(self, path):
            return any(name.startswith(f'{str(path).rstrip("/")}/') for name in files)

    monkeypatch.setattr('mmengine.fileio.io.backend_instances', {})  # which keeps those of other tests
    fileio.register_backend('fake', Fake, prefixes='fake', force=True)
    yield files
    fileio.backends.backends.pop('fake')
    fileio.backends.prefix_to_backends.pop('fake')


def test_files_of_a_backend(fake, tmp_path):
    state = randomised(timm.create_model('test_vmamba')).state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    fake['fake://weights/file.pth'] = buffer.getvalue()
    save_file(state, tmp_path / 'file.safetensors')
    fake['fake://weights/file.safetensors'] = (tmp_path / 'file.safetensors').read_bytes()
    for source in fake:
        model = mm.ImageClassifier('test_vmamba', init_cfg=pretrained(source))
        model.init_weights()
        assert_same(model.model.state_dict(), state)
        content = load_checkpoint(timm.create_model('test_vmamba'), source)
        assert_same(content.get('state_dict', content), state)
    with pytest.raises(ValueError, match=r'fake://absent.pth cannot be fetched by a backend .* fake://'):
        read_weights('fake://absent.pth')
    with pytest.raises(ValueError, match=r'strange://file.pth cannot be fetched by a backend of mmengine.fileio'):
        read_weights('strange://file.pth')


SCHEDULERS = {
    'ConstantLR': dict(factor=0.5),
    'CosineAnnealingLR': dict(T_max=4),
    'CosineRestartLR': dict(periods=[2, 2], restart_weights=[1, 0.5], eta_min=0.0),
    'ExponentialLR': dict(gamma=0.9),
    'LinearLR': dict(start_factor=0.1, end=3),
    'MultiStepLR': dict(milestones=[2, 3]),
    'PolyLR': dict(end=6),
    'ReduceOnPlateauLR': dict(monitor='loss'),
    'StepLR': dict(step_size=2),
}


@pytest.mark.parametrize('name', SCHEDULERS)
def test_the_state_of_a_schedule_is_read_as_it_was(name, tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0, momentum=0.9)
    scheduler = PARAM_SCHEDULERS.build(dict(SCHEDULERS[name], type=name, optimizer=optimizer))
    torch.save(dict(state=scheduler.state_dict()), tmp_path / 'state.pth')
    state = read_content(tmp_path / 'state.pth')['state']
    assert state == scheduler.state_dict()
    assert {key: type(value) for key, value in state.items()} == {
        key: type(value) for key, value in scheduler.state_dict().items()
    }


def test_a_folder_of_data_is_asked_of_its_backend(fake, tmp_path):
    fake['fake://data/train/a/1.png'] = b''
    args = dict(backend='fake')
    assert has_folder('fake://data') and has_folder('fake://data/train') and has_folder('data', args) is False
    assert not has_folder('fake://absent') and not has_folder('strange://data')
    assert has_folder(str(tmp_path)) and not has_folder(str(tmp_path / 'absent'))
    assert has_folder('https://host/data')  # over HTTP nothing can be listed
    runner = mm.TimmRunner(Detector(), str(tmp_path), experiment_name='data')
    loader = dict(dataset=dict(type='Digits', data_root='fake://absent'), batch_size=1, num_workers=0, sampler=None)
    with pytest.raises(mm.RunError, match='data_root must be a folder, got fake://absent, which does not exist'):
        runner.build_dataloader(loader)
    loader['dataset']['data_root'] = 'fake://data'
    with pytest.raises(mm.RunError, match="unexpected keyword argument 'data_root'"):  # so the folder was found
        runner.build_dataloader(loader)


def test_a_path_with_a_tilde_is_that_of_home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    with local_file('~/file.pth') as path:
        assert path == tmp_path / 'file.pth'
