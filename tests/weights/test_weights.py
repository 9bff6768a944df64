# SPDX-License-Identifier: Apache-2.0
"""Files of weights: read without running them, told, converted, downloaded; and the Hugging Face hub's calls."""

import argparse
import builtins
import copyreg
import datetime
import functools
import hashlib
import http.server
import importlib
import io
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import threading
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from golden_files import KEY_FILES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import get_arch_pretrained_cfgs

from vssm.models.weights import (
    cached_path,
    convert,
    identify,
    is_cached,
    list_models,
    read_checkpoint,
    strip_prefixes,
    translate,
)
from vssm.models.weights.archive import _STORAGES
from vssm.models.weights.convert import _fit
from vssm.models.weights.identify import registered
from vssm.models.weights.pretrained import published_at
from vssm.models.weights.read import pass_cfg_nodes
from vssm.models.weights.rename import rename_fn
from vssm.tools.main import main

TEST_MODELS = [name for name in list_models() if name.startswith('test_')]
PYRAMIDS = [name for name in TEST_MODELS if name != 'test_vim']
LIKE = {  # key file of the same names as a test model's
    'test_vmamba': 'vmamba_tiny_s1l8',
    'test_vmamba2d': '2dvmamba_tiny',
    'test_vanilla_vmamba': 'vanilla_vmamba_tiny',
    'test_spatial_mamba': 'spatialmamba_tiny',
    'test_vim': 'vim_tiny',
    'test_groupmamba': 'groupmamba_tiny',
    'test_mambavision': 'mambavision_B',
}
WITH_BACKBONE = [name for name in KEY_FILES if re.match('2dvmamba|spatialmamba|vmamba.*(s1l8|s2l15)', name)]


def random_state(name, seed=0, **kwargs):
    """A state dict with a random number in every place, whole ones in integer tensors."""
    g = torch.Generator().manual_seed(seed)
    state = registered(name).state_dict()
    if kwargs:
        state = timm.create_model(name, device='meta', **kwargs).state_dict()
    return {
        key: torch.randn(t.shape, generator=g) if t.is_floating_point() else torch.tensor(7) for key, t in state.items()
    }


def meta_tensors(shapes):
    return {name: torch.empty(shape, device='meta') for name, shape in shapes.items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


def metadata_of(path):
    with safe_open(path, framework='pt') as file:
        return file.metadata()


@pytest.fixture
def publish(golden):
    """publish(model, state): a state dict of a test model under published names and in published shapes."""

    def publish(name, state):
        published = {}
        shapes = golden(f'keys_{LIKE[name]}.json')['state_dict']
        for ours, (theirs, shape) in zip(
            rename_fn(name)(meta_tensors(shapes), torch.nn.Module()), shapes.items(), strict=True
        ):
            if 'blocks.' in ours:  # whose number goes from one name to the other
                theirs = re.sub(r'(.*\b(?:blocks|block\d|layers)\.)\d+', r'\1{}', theirs)
            published[re.sub(r'blocks\.\d+', 'blocks', ours)] = theirs, shape
        out = {}
        for ours, value in state.items():
            theirs, shape = published[re.sub(r'blocks\.\d+', 'blocks', ours)]
            if value.dim() < len(shape):
                value = value.unflatten(0, (shape[0], -1))
            elif value.dim() > len(shape):
                value = value.flatten(0, 1)
            if 'scan_back.conv.weight' in ours:  # Vim's taps in the direction's own order
                value = value.flip(-1)
            out[theirs.format(*re.findall(r'blocks\.(\d+)', ours))] = value
        return out

    return publish


class CfgNode(dict):
    """As yacs has it: a dictionary with attributes."""


@pytest.fixture
def foreign(monkeypatch):
    """foreign(write): call it while a yacs exists, which is gone when the file is read."""

    def with_yacs(write):
        with monkeypatch.context() as patch:
            module = types.ModuleType('yacs.config')
            module.CfgNode = CfgNode
            patch.setattr(CfgNode, '__module__', 'yacs.config')
            patch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
            patch.setitem(sys.modules, 'yacs.config', module)
            node = CfgNode(MODEL=CfgNode(NAME='vssm1_tiny', DEPTHS=[2, 2, 8, 2]), LR=1e-3)
            node.__dict__['__immutable__'] = True
            write(node)

    yield with_yacs
    assert 'yacs' not in sys.modules


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_every_dtype_and_layout_is_read_as_saved(tmp_path):
    base = torch.randn(6, 8)
    tensors = {str(dtype): torch.arange(5).to(dtype) for dtype in _STORAGES.values()}
    newer = {str(dtype): torch.arange(5).to(dtype) for dtype in (torch.float8_e4m3fn, torch.uint16)}
    tensors |= {
        'view': base[1:4, ::2],
        'transposed': base.t(),
        'shared': base,
        'scalar': torch.tensor(3.0),
        'parameter': torch.nn.Parameter(base.clone()),
        'attribute': base.clone(),
        'both': torch.nn.Parameter(base.clone()),
    }
    tensors['attribute'].kind = tensors['both'].kind = 'noted'
    torch.save(tensors, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    torch.save(tensors | newer, tmp_path / 'new.pth')
    for name, expected in (('old.pth', tensors), ('new.pth', tensors | newer)):
        actual, metadata = read_checkpoint(tmp_path / name)
        assert metadata == {'weights': 'model'}
        assert_same(actual, expected)


def test_classes_that_are_unknown_are_left_alone(tmp_path, foreign):
    """The kinds of things that trainers save beside weights; of what is not installed none is imported."""
    history = pytest.importorskip('mmengine.logging').HistoryBuffer([1.0, 2.0], [1, 1])
    weights = OrderedDict(random_state('test_vmamba'))
    weights._metadata = OrderedDict({'': dict(version=1)})
    rng = np.random.default_rng(0).normal(size=3)
    beside = dict(
        args=argparse.Namespace(lr=1e-3, out=pathlib.PurePosixPath('/data')),
        history={'train/loss': history},
        arrays=[rng, rng[0], rng.dtype, np.int64(3)],
        time=datetime.datetime(2024, 2, 29),
        sets=({1, 2}, frozenset('ab'), slice(1, 2), range(3), complex(1, 2), b'bytes', bytearray(b'more')),
        maps=[defaultdict(list, a=[1]), Counter('aab'), types.SimpleNamespace(x=1)],
        partial=functools.partial(int, base=2),
        optimizer=torch.optim.AdamW([torch.zeros(3)]).state_dict(),
        device=torch.device('cpu'),
        size=torch.Size([1, 2]),
        epoch=3,
    )
    foreign(lambda node: torch.save({'model': weights, 'config': node, **beside}, tmp_path / 'training.pth'))
    assert_same(read_checkpoint(tmp_path / 'training.pth')[0], weights)


def test_the_choice_of_weights(tmp_path):
    plain, averaged = {'x': torch.zeros(2)}, {'x': torch.ones(2)}
    path = tmp_path / 'both.pth'
    layouts = [
        ({'model': plain, 'model_ema': averaged, 'optimizer': {}}, 'model_ema', 'model'),
        ({'state_dict': plain, 'state_dict_ema': averaged}, 'model_ema', 'model'),
        ({'state_dict': plain, 'state_dict_ema': None}, 'model'),
        ({'model': plain, 'epoch': 3}, 'model'),
        (plain, 'model'),
        ({'model_ema': averaged}, 'model_ema'),
    ]
    hooks = pytest.importorskip('mmengine.hooks')
    checkpoint = {'state_dict': dict(plain), 'ema_state_dict': {'module.x': averaged['x'], 'steps': torch.tensor(9)}}
    hooks.EMAHook._swap_ema_state_dict(None, checkpoint)  # as it saves them
    layouts.append((checkpoint, 'model_ema', 'model'))
    for layout, *held in layouts:
        torch.save(layout, path)
        for which in ('auto', 'model', 'model_ema'):
            kind = held[0] if which == 'auto' else which
            if kind in held:
                tensors, metadata = read_checkpoint(path, which)
                tensors, _ = strip_prefixes(tensors)
                assert metadata == {'weights': kind}
                assert_same(tensors, averaged if kind == 'model_ema' else plain)
            else:
                with pytest.raises(ValueError, match=f'must hold {which}, got {held[0]} alone'):
                    read_checkpoint(path, which)
    with pytest.raises(ValueError, match="which must be one of auto, model, model_ema, got 'ema'"):
        read_checkpoint(path, 'ema')


def test_the_choice_of_weights_is_noted(tmp_path):
    source, target = tmp_path / 'in.pth', tmp_path / 'out.safetensors'
    plain, averaged = random_state('test_vmamba', 1), random_state('test_vmamba', 2)
    torch.save({'model': plain, 'model_ema': averaged}, source)
    for options, kind, state in (([], 'model_ema', averaged), (['--weights', 'model'], 'model', plain)):
        assert main(['convert', str(source), str(target), '--model', 'test_vmamba', '--force', *options]) == 0
        assert_same(load_file(target), state)
        assert read_checkpoint(target)[1]['weights'] == metadata_of(target)['weights'] == kind
    with pytest.raises(ValueError, match='must hold model_ema, got model'):
        read_checkpoint(target, 'model_ema')


def rewrite(path, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """Replace a checkpoint's records."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))


def flip(path):
    data = bytearray(path.read_bytes())
    data[data.find(torch.arange(500.0).numpy().tobytes()) + 99] ^= 1
    path.write_bytes(data)


DAMAGE = {
    'empty': (lambda path: path.write_bytes(b''), 'got an empty file'),
    'web page': (lambda path: path.write_text('\n<!DOCTYPE html><html>404</html>'), 'got a web page'),
    'text': (lambda path: path.write_text('version https://git-lfs'), 'cannot be read as such'),
    'no file': (lambda path: path.unlink(), 'does not exist'),
    'folder': (lambda path: (path.unlink(), path.mkdir()), 'is a folder'),
    'truncated': (lambda path: path.write_bytes(path.read_bytes()[:-99]), r'\(BadZipFile\)'),
    'half': (lambda path: path.write_bytes(path.read_bytes()[:1500]), r'\(BadZipFile\)'),
    'one bit': (flip, r'\(BadZipFile\)'),
    'old truncated': (
        lambda path: (
            torch.save({'x': torch.arange(500.0)}, path, _use_new_zipfile_serialization=False),
            path.write_bytes(path.read_bytes()[:-99]),
        ),
        'got one that lacks its end',
    ),
    'short record': (
        lambda path: rewrite(path, lambda name, data: data[:100] if '/data/' in name else data),
        r'\(RuntimeError\)',
    ),
    'no record': (
        lambda path: rewrite(path, lambda name, data: data.replace(b'X\x01\x00\x00\x000', b'X\x01\x00\x00\x005')),
        r'\(KeyError\)',
    ),
    'compressed': (lambda path: rewrite(path, compression=zipfile.ZIP_DEFLATED), 'got one that is compressed'),
    'big-endian': (
        lambda path: rewrite(path, lambda name, data: b'big' if 'byteorder' in name else data),
        'byte order of another machine',
    ),
    'expanded': (
        lambda path: torch.save({'x': torch.zeros(1).expand(10**13)}, path),
        'a tensor claims more numbers than there are',
    ),
    'list': (lambda path: torch.save([1, 2], path), 'must map names to tensors, got list'),
    'no tensors': (lambda path: torch.save({}, path), 'must map names to tensors, got an empty dict'),
    'number': (lambda path: torch.save({'step': 3}, path), 'must map names to tensors, got step: int'),
    'array': (lambda path: torch.save({'x': np.zeros(3)}, path), r'got x: \w*\.?numpy\.\w+\.multiarray\._reconstruct'),
    'a module': (
        lambda path: torch.save(torch.nn.Linear(1, 1), path),
        r'must map names to tensors, got torch\.nn\.modules\.linear\.Linear',
    ),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_file_is_refused(damage, tmp_path):
    change, said = DAMAGE[damage]
    path = tmp_path / 'file.pth'
    torch.save({'x': torch.arange(500.0)}, path)
    change(path)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value) and str(error.value).count('\n') == 0


@pytest.mark.parametrize('damage', ['truncated', 'nonsense', 'empty'])
def test_a_damaged_safetensors_file_is_refused(damage, tmp_path):
    path = tmp_path / 'file.safetensors'
    save_file({'x': torch.zeros(9)}, path)
    path.write_bytes({'truncated': path.read_bytes()[:-1], 'nonsense': b'nonsense', 'empty': b''}[damage])
    with pytest.raises(ValueError, match=r'must be a \.safetensors file'):
        read_checkpoint(path)


def test_our_safetensors_files_have_a_checksum(tmp_path):
    """Of the tensors, their names, and the metadata; what reads the file with our code compares it."""
    source, path = tmp_path / 'in.pth', tmp_path / 'file.safetensors'
    state = {**random_state('test_vmamba'), 'head.fc.bias': torch.arange(1000.0)}
    torch.save(state, source)
    convert(source, path)
    whole = path.read_bytes()
    tensors, metadata = read_checkpoint(path)
    assert_same(tensors, state)
    assert 'checksum' not in metadata and metadata_of(path)['checksum'].startswith('sha256:')
    found = whole.find(torch.arange(1000.0).numpy().tobytes())
    for at, new in [(found + 99, b'\1'), (whole.find(b'in.pth'), b'I'), (whole.find(b'head.fc.bias'), b'H')]:
        path.write_bytes(whole[:at] + new + whole[at + 1 :])
        assert path.read_bytes() != whole and load_file(path)  # safetensors sees nothing
        with pytest.raises(ValueError, match='was damaged after it was written: its checksum differs'):
            read_checkpoint(path)
        assert not is_cached(path)  # so that pretrained=True fetches it again
    save_file(state, path, dict(model='test_vmamba'))  # as others write it
    assert_same(read_checkpoint(path)[0], state)


def test_tensors_that_share_most_of_their_numbers_are_refused(tmp_path):
    """They would be twenty times as large once they are written apart."""
    base = torch.ones(10_000)
    torch.save({f'x{i}': base[i:] for i in range(20)}, tmp_path / 'file.pth')
    with pytest.raises(ValueError, match='claim more than four times the numbers'):
        read_checkpoint(tmp_path / 'file.pth')


# ---- code in files ---------------------------------------------------------------------------------------------------


class Payload:
    """Unpickled, it calls a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


class StatePayload:
    """Unpickled, it is built by one function and then given a state by another."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return OrderedDict, (), {'x': Payload(*self.call)}


ATTACKS = {
    'os.system': lambda marker: (os.system, f'touch {marker}'),
    'builtins.eval': lambda marker: (eval, f'open({marker!r}, "w")'),
    'builtins.exec': lambda marker: (exec, f'open({marker!r}, "w")'),
    'io.open': lambda marker: (open, marker, 'w'),
    'builtins.__import__': lambda marker: (builtins.__import__, 'stranger'),
    'subprocess.Popen': lambda marker: (subprocess.Popen, ['touch', marker]),
    'importlib.import_module': lambda marker: (importlib.import_module, 'stranger'),
    'shutil.copy': lambda marker: (shutil.copy, __file__, marker),
    'stranger.run': lambda marker: (importlib.import_module('stranger').run, marker),
}
ACCEPTED = ('stranger.run',)  # a third party's name is inert, whatever it is


@pytest.fixture(params=[(attack, Payload) for attack in ATTACKS] + [('os.system', StatePayload)], ids=str)
def attacked(request, tmp_path, monkeypatch):
    """(attack, file, assertion that nothing ran)"""
    attack, wrap = request.param
    marker = tmp_path / 'marker'
    (tmp_path / 'stranger.py').write_text(
        f'def run(path):\n    open(path, "w").close()\n\nrun({str(marker)!r})  # importing it is enough\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    payload = wrap(*ATTACKS[attack](str(marker)))
    checkpoint = {'model': random_state('test_vmamba2d'), 'config': payload}
    torch.save(checkpoint, tmp_path / 'file.pth')
    program = pickle.dumps(payload)
    sys.modules.pop('stranger', None)
    marker.unlink(missing_ok=True)

    result = pickle.loads(program)  # the control: elsewhere it runs
    for value in (result, *getattr(result, '__dict__', {}).values()):
        if isinstance(value, subprocess.Popen):
            value.wait()
        elif isinstance(value, io.IOBase):
            value.close()
    assert marker.exists()
    sys.modules.pop('stranger', None)
    marker.unlink()

    def check():
        assert not marker.exists() and 'stranger' not in sys.modules

    yield attack, tmp_path / 'file.pth', check
    check()


@pytest.fixture(scope='module')
def classifier():
    return pytest.importorskip('vssm.models.mm').ImageClassifier('test_vmamba2d')


def test_no_code_in_a_file_runs(attacked, classifier, tmp_path, capsys):
    attack, path, check = attacked
    load_weights = sys.modules['vssm.models.mm'].load_weights
    out = tmp_path / 'out.safetensors'
    if attack in ACCEPTED:
        tensors, _ = read_checkpoint(path)
        assert tensors.keys() == classifier.model.state_dict().keys()
        assert main(['convert', str(path), str(out), '--model', 'test_vmamba2d']) == 0
        load_weights(classifier, path)
    else:
        said = f'got one that asks for {"posix.system" if attack == "os.system" else attack}, which no weights need'
        with pytest.raises(ValueError, match=re.escape(said)):
            read_checkpoint(path)
        check()
        assert main(['convert', str(path), str(out)]) == 2
        assert said in capsys.readouterr().err and not out.exists()
        with pytest.raises(ValueError, match=re.escape(said)):
            load_weights(classifier, path)
    check()
    with pytest.raises(RuntimeError, match='weights_only'):
        timm.create_model('test_vmamba2d', checkpoint_path=str(path))


def test_the_test_command_runs_no_code(tmp_path, capsys):
    pytest.importorskip('mmengine')
    torch.save({'model': {'x': torch.zeros(1)}, 'args': Payload(os.system, f'touch {tmp_path}/marker')}, tmp_path / 'f')
    assert main(['test', 'digits/vmamba2d_test', str(tmp_path / 'f'), '--work-dir', str(tmp_path)]) == 2
    assert 'asks for posix.system' in capsys.readouterr().err and not (tmp_path / 'marker').exists()


def pickled(*opcodes):
    return b'\x80\x02' + b''.join(opcodes) + b'.'


TENSOR = b'ctorch._utils\n_rebuild_tensor_v2\n'
HOSTILE = {  # programs that pickle would not write
    'a state for a function': pickled(TENSOR, b'}X\x08\x00\x00\x00__code__K\x01sb'),
    'attributes for a function': pickled(TENSOR, b'N}X\x0c\x00\x00\x00__defaults__)s\x86b'),
    'attributes for a class': pickled(b'cthird.party\nClass\n', b'N}X\x0c\x00\x00\x00__setstate__)s\x86b'),
    'a state for a type': pickled(b'ctorch\nFloatStorage\n', b'}X\x01\x00\x00\x00aK\x01sb'),
    'attributes for OrderedDict': pickled(b'ccollections\nOrderedDict\n', b'N}X\x01\x00\x00\x00aK\x01s\x86b'),
    'a memo of gigabytes': pickled(b'}r\xff\xff\xff\x03'),
    'a text of terabytes': b'\x80\x04\x8d\x00\x00\x00\x00\x00\x01\x00\x00.',
    'a tensor of nothing': pickled(TENSOR, b')R'),
    'no such storage': pickled(b'}X\x01\x00\x00\x00x', TENSOR, b'(K\x01K\x00K\x02K\x03tRs'),
    'another reference': pickled(b'X\x01\x00\x00\x00aQ'),
    'a name that is none': b'\x80\x04\x8c\x02a\x00\x8c\x01b\x93.',
    'a path of names': b'\x80\x04\x8c\x05torch\x8c\x0ehub.get_dir\x93.',
    'a key of endless text': pickled(
        b'}(X\x01\x00\x00\x00x)\x85q\x00', *(b'0h\x00h\x00\x86q\x00' for _ in range(60)), b'K\x01u'
    ),
    'a method of a dictionary': pickled(
        b'}X\x05\x00\x00\x00modelccollections\nOrderedDict\n)R}X\x01\x00\x00\x00aK\x01s',
        b'N}X\x05\x00\x00\x00itemscthird.party\nClass\n)Rs\x86bs',
    ),
    'nothing': b'',
    'no end': b'\x80\x02}',
}


@pytest.mark.parametrize('program', HOSTILE)
def test_a_hostile_program_does_nothing(program, tmp_path):
    good, bad = tmp_path / 'good.pth', tmp_path / 'bad.pth'
    expected = {'x': torch.arange(5.0)}
    torch.save(expected, good)
    torch.save(expected, bad)
    rewrite(bad, lambda name, data: HOSTILE[program] if name.endswith('data.pkl') else data)
    with pytest.raises(ValueError, match='must be a .safetensors file|must map names to tensors'):
        read_checkpoint(bad)
    assert_same(read_checkpoint(good)[0], expected)


@pytest.mark.parametrize('dtype', ['quint8', 'qint32', 'quint4x2', 'bits8', 'int4', 'complex64', 'float4_e2m1fn_x2'])
def test_numbers_of_no_plain_type_are_refused(dtype, tmp_path):
    path = tmp_path / 'file.pth'
    torch.save({'x': torch.zeros(4, dtype=torch.uint16)}, path)
    rewrite(path, lambda name, data: data.replace(b'ctorch\nuint16\n', f'ctorch\n{dtype}\n'.encode()))
    with pytest.raises(ValueError, match='must be a .safetensors file|must map names to tensors'):
        read_checkpoint(path)


def test_integers_are_no_weights(tmp_path):
    source = tmp_path / 'integers.pth'
    torch.save({name: t.int() for name, t in random_state('test_vmamba').items()}, source)
    with pytest.raises(ValueError, match='of other numbers .* must hold real numbers and holds torch.int32'):
        convert(source, tmp_path / 'out.safetensors')


def test_an_empty_average_is_none(tmp_path):
    weights = {'x': torch.zeros(2)}
    torch.save({'model': weights, 'model_ema': {}}, tmp_path / 'file.pth')
    tensors, metadata = read_checkpoint(tmp_path / 'file.pth')
    assert_same(tensors, weights)
    assert metadata['weights'] == 'model'


@pytest.mark.parametrize('args', ['{', '[]', 'null', '[' * 100_000])
def test_notes_that_are_no_arguments(args, tmp_path):
    source = tmp_path / 'in.safetensors'
    save_file(random_state('test_vmamba'), source, dict(model='test_vmamba', model_args=args))
    with pytest.raises(ValueError, match=f'{source} must note its model_args as a JSON object'):
        convert(source, tmp_path / 'out.safetensors')


def test_a_network_of_endless_depth_is_not_built(tmp_path):
    state = random_state('test_vmamba')
    block = {n: t for n, t in state.items() if n.startswith('stages.0.blocks.0.')}
    state |= {n.replace('blocks.0', f'blocks.{j}'): t for n, t in block.items() for j in range(1, 1000)}
    with pytest.raises(ValueError, match='must hold one of our networks, got .* tensors'):
        identify(state)


@pytest.mark.parametrize(
    'call',
    [(copyreg._reconstructor, object, object, None), (getattr, 'text', 'upper')],
    ids=['reconstructor', 'getattr'],
)
def test_harmless_names_of_the_standard_library_stay_inert(call, tmp_path):
    weights = {'x': torch.zeros(2)}
    torch.save({'model': weights, 'config': Payload(*call)}, tmp_path / 'file.pth')
    assert_same(read_checkpoint(tmp_path / 'file.pth')[0], weights)


# ---- which network ---------------------------------------------------------------------------------------------------


def without_twin(model):
    """1-D and 2-D scans have the same names and shapes; a file alone is taken for the 1-D one."""
    return model.replace('vmamba2d', 'vmamba')


def twins_of(model):
    """Our other models of the same names and shapes: with a 2-D scan, or for larger images."""
    return sorted({model.replace('vmamba', 'vmamba2d', 1), f'{model}_512'} & {*list_models()} - {model})


@pytest.mark.parametrize(
    'variant, kind',
    [
        *[(variant, 'classifier') for variant in KEY_FILES],
        *[
            pytest.param(variant, kind, marks=() if 'tiny' in variant else pytest.mark.slow)
            for variant in WITH_BACKBONE
            for kind in ('backbone', 'newer names')
            if kind == 'backbone' or variant.startswith('vmamba')  # the others have one kind of names
        ],
    ],
)
def test_published_names_tell_the_model(variant, kind, golden):
    keys, model = golden(f'keys_{variant}.json'), KEY_FILES[variant]
    shapes, expected = dict(keys['state_dict']), {}
    if kind == 'newer names':
        shapes |= keys['alternative_naming']
        for name in keys['alternative_naming']:
            stem, _, last = name.rpartition('.')
            del shapes[f'{stem}_{last}']
    elif kind == 'backbone':
        shapes = {k: v for k, v in shapes.items() if k not in keys['backbone_state_dict_missing']}
        shapes |= keys['backbone_state_dict_extra']
        expected = {'features_only': True}
    state = meta_tensors(shapes)
    assert identify(state) == (without_twin(model), expected, twins_of(without_twin(model)))
    assert identify(state, model) == (model, expected, [])
    assert len(_fit(state, model, expected)) == len(shapes)


@pytest.mark.parametrize(
    'like, args',
    [
        ('vmamba_small', dict(depths=[2, 2, 14, 2])),
        ('vanilla_vmamba_tiny', dict(depths=[2, 2, 10, 2], num_classes=7)),
        ('vmamba_tiny', dict(num_classes=7, in_chans=1)),
        ('vmamba_tiny', dict(num_classes=0)),
        ('test_vmamba', dict(d_state=2, mlp_ratio=1.3)),
        ('test_vmamba', dict(dims=[40, 48, 64, 96], ssm_ratio=1.5)),
        ('test_spatial_mamba', dict(depths=[1, 2, 2, 1], mlp_ratio=3.0)),
    ],
    ids=str,
)
def test_other_shapes_are_told_by_their_arguments(like, args):
    state = timm.create_model(like, device='meta', **args).state_dict()
    name, told, _ = identify(state)
    rebuilt = timm.create_model(name, device='meta', **told).state_dict()
    assert {k: v.shape for k, v in rebuilt.items()} == {k: v.shape for k, v in state.items()}
    assert name == like and told.keys() == args.keys()
    assert told == args | ({'mlp_ratio': 83 / 64} if args.get('mlp_ratio') == 1.3 else {})  # widths are whole numbers


def test_a_file_of_another_size_is_refused():
    """A network of sizes of its own may be called by any name of its family, but not one whose sizes have a name."""
    tensors = registered('vmamba_tiny').state_dict()
    with pytest.raises(ValueError, match='checkpoint FILE must hold vmamba_small, got the tensors of vmamba_tiny.'):
        translate(tensors, {}, 'FILE', 'vmamba_small')
    noted = dict(model='vmamba_small', model_args='{}')  # a training of that name, with the depths of the other
    fewer = {name: value for name, value in tensors.items() if not name.startswith('stages.2.blocks.7.')}
    for args in ((tensors, noted), (fewer, {})):
        assert translate(*args, 'FILE', 'vmamba_small')[1].metadata['model'] == 'vmamba_small'


def test_a_family_is_told_before_its_networks_are_built(monkeypatch):
    """Of the other families the small networks for tests alone are, as all would take many times as long."""
    built = set()
    monkeypatch.setitem(identify.__globals__, 'registered', lambda name: built.add(name) or registered(name))
    assert identify(registered('test_vim').state_dict()) == ('test_vim', {}, [])
    assert built == {*TEST_MODELS, *(name for name in list_models() if name.startswith('vim_'))}


# ---- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('variant', ['2dvmamba_tiny', 'spatialmamba_tiny'])
def test_a_published_file_becomes_safetensors(variant, golden, tmp_path, foreign, capsys):
    """Of the full size, in numbers of one byte."""
    keys, model = golden(f'keys_{variant}.json'), KEY_FILES[variant]
    state = {name: torch.ones(shape, dtype=torch.float8_e4m3fn) for name, shape in keys['state_dict'].items()}
    source, target = tmp_path / 'published.pth', tmp_path / 'out.safetensors'
    foreign(lambda node: torch.save({'model': state, 'optimizer': {}, 'epoch': 3, 'config': node}, source))
    source.chmod(0o640)
    assert main(['convert', str(source), str(target)]) == 0
    out = capsys.readouterr().out
    assert f'Wrote {target}: {without_twin(model)}, weights: model\n' in out
    assert (f'Taken for {without_twin(model)}; ' in out) == bool(twins_of(without_twin(model)))
    assert main(['convert', str(source), str(target), '--model', model, '--force']) == 0
    assert 'Taken' not in capsys.readouterr().out
    metadata = metadata_of(target)
    assert metadata.pop('vssm') and metadata.pop('checksum')
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    assert metadata == dict(model=model, model_args='{}', source='published.pth', sha256=sha256, weights='model')
    own = timm.create_model(model, device='meta').state_dict()
    assert target.stat().st_mode == source.stat().st_mode
    assert {k: v.shape for k, v in load_file(target).items()} == {k: v.shape for k, v in own.items()}
    assert set(tmp_path.iterdir()) == {source, target}


PREFIXES = ('', 'module.', '_orig_mod.', 'module._orig_mod.', 'model.')


@pytest.mark.parametrize(
    'name, prefix',
    [*[('test_vmamba', prefix) for prefix in PREFIXES], *[(name, 'module.') for name in TEST_MODELS[1:]]],
)
def test_convert_puts_every_value_in_its_place(name, prefix, publish, tmp_path):
    expected = random_state(name)
    state = {f'{prefix}{key}': value for key, value in publish(name, expected).items()}
    assert not state.keys() & expected.keys()
    torch.save({'model': state}, tmp_path / 'in.pth')
    convert(tmp_path / 'in.pth', tmp_path / 'out.safetensors', name)
    assert_same(load_file(tmp_path / 'out.safetensors'), expected)
    model = timm.create_model(name, checkpoint_path=str(tmp_path / 'out.safetensors'))
    assert_same(model.state_dict(), expected)


@pytest.mark.parametrize('name', PYRAMIDS)
def test_the_backbone_of_a_detector(name, publish, tmp_path, capsys):
    full = random_state(name)
    body = {key: value for key, value in full.items() if not key.startswith('head.')}
    norms = {f'outnorm{i}.{k}': torch.randn(dim) for i, dim in enumerate((32, 48, 64, 96)) for k in ('weight', 'bias')}
    detector = {f'backbone.{key}': value for key, value in (publish(name, body) | norms).items()}
    detector |= {'neck.conv.weight': torch.zeros(3), 'roi_head.fc.bias': torch.zeros(3)}
    source, target = tmp_path / 'in.pth', tmp_path / 'out.safetensors'
    torch.save({'meta': {}, 'state_dict': detector}, source)
    assert main(['convert', str(source), str(target), '--model', name]) == 0
    assert 'Left out what is not the network: neck.conv.weight, ...' in capsys.readouterr().out
    assert_same(load_file(target), body | norms)
    assert json.loads(metadata_of(target)['model_args']) == {'features_only': True}
    overlay = dict(file=str(target))
    backbone = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    assert_same(backbone.model.state_dict(), body)

    detector['backbone.outnorm1.weight'] = torch.zeros(7)
    torch.save({'state_dict': detector}, source)
    with pytest.raises(ValueError, match=r'1 misshapen \(outnorm1.weight\), outnorm1.weight must be \(48,\)'):
        convert(source, tmp_path / 'other.safetensors', name)


def test_a_checkpoint_of_our_own_training(tmp_path):
    """Its metadata say what shapes do not: the scan, and how it was trained."""
    args = dict(num_classes=10, in_chans=1, drop_path_rate=0.1, scan_ndim=2, pretrained=True, depths=[99999999] * 4)
    state = random_state('test_vmamba', num_classes=10, in_chans=1)
    noted = dict(model='test_vmamba', model_args=json.dumps(args), epoch='3', vssm='0')
    save_file(state, tmp_path / 'checkpoint.safetensors', noted)
    metadata = convert(tmp_path / 'checkpoint.safetensors', tmp_path / 'out.safetensors').metadata
    assert metadata['model'] == 'test_vmamba' and metadata['epoch'] == '3'
    told = json.loads(metadata['model_args'])
    assert told == dict(num_classes=10, in_chans=1, drop_path_rate=0.1, scan_ndim=2)
    model = timm.create_model('test_vmamba', checkpoint_path=str(tmp_path / 'out.safetensors'), **told)
    assert_same(model.state_dict(), state)
    told = json.loads(
        convert(tmp_path / 'out.safetensors', tmp_path / 'o.safetensors', 'test_vmamba2d').metadata['model_args']
    )
    assert told == dict(num_classes=10, in_chans=1)  # another model has other arguments

    noted['model_args'] = '[1]'
    save_file(state, tmp_path / 'checkpoint.safetensors', noted)
    with pytest.raises(ValueError, match='model_args'):
        convert(tmp_path / 'checkpoint.safetensors', tmp_path / 'out.safetensors')


def test_tensors_that_share_numbers_are_written_apart(tmp_path):
    state = random_state('test_vmamba')
    base = torch.randn(64)
    state['stages.0.blocks.0.norm1.weight'], state['stages.0.blocks.0.norm2.weight'] = base[:32], base[::2]
    torch.save(state, tmp_path / 'in.pth')
    convert(tmp_path / 'in.pth', tmp_path / 'out.safetensors')
    assert_same(load_file(tmp_path / 'out.safetensors'), state)


def change(state, **changes):
    return {k: v for k, v in {**state, **changes}.items() if v is not None}


MISFITS = {
    'another network': (
        lambda state: timm.create_model('resnet10t').state_dict(),
        (r'got \d+ tensors of which no name is known: conv1\.0\.weight, ', r', \.\.\.\.$'),
    ),
    'missing': (
        lambda state: change(state, **{'head.fc.bias': None, 'head.norm.bias': None}),
        (r'got 112: 2 missing \(head\.norm\.bias, head\.fc\.bias\)\.',),
    ),
    'unexpected': (
        lambda state: change(state, pos_embed=torch.zeros(3), **{f'x{i}': torch.zeros(1) for i in range(30)}),
        (r'31 unexpected \(pos_embed, x0, .*x18, \.\.\.\)',),
    ),
    'misshapen': (
        lambda state: change(state, **{'stages.3.blocks.0.norm2.bias': torch.zeros(7)}),
        (r'1 misshapen \(stages\.3\.blocks\.0\.norm2\.bias\), .* must be \(96,\) and is \(7,\)',),
    ),
    'scan of another size': (
        lambda state: change(state, **{'stages.1.blocks.0.mixer.dt_bias': torch.zeros(7)}),
        (r'1 misshapen \(stages\.1\.blocks\.0\.mixer\.dt_bias\)',),
    ),
    'half': (
        lambda state: dict(list(state.items())[:10]),
        (r'the nearest, \d+ missing', r'\.\.\.'),
    ),
    'two networks': (
        lambda state: state | {f'module.{name}': value for name, value in state.items()},
        (r'two tensors that both are stem\.conv1\.weight',),
    ),
    'strange sizes': (
        lambda state: change(state, **{'stages.0.blocks.0.norm1.weight': torch.zeros(0)}),
        (r'of test_vmamba, the nearest, 1 misshapen', r'must be \(32,\) and is \(0,\)'),
    ),
    'scalars': (
        lambda state: {name: torch.tensor(0.0) for name in state},
        (r'misshapen',),
    ),
}


@pytest.mark.parametrize('case', MISFITS)
def test_what_does_not_fit_is_listed_and_nothing_is_left(case, tmp_path, capsys):
    make, said = MISFITS[case]
    source, target = tmp_path / 'in.pth', tmp_path / 'out.safetensors'
    torch.save(make(random_state('test_vmamba')), source)
    assert main(['convert', str(source), str(target)]) == 2
    error = capsys.readouterr().err
    assert error.startswith('vssm convert: checkpoint must hold ') and error.count('\n') == 1
    for part in said:
        assert re.search(part, error), error
    assert list(tmp_path.iterdir()) == [source]


def test_convert_refuses_bad_arguments(tmp_path, capsys, monkeypatch):
    source, target = tmp_path / 'in.pth', tmp_path / 'out.safetensors'
    torch.save(random_state('test_vmamba'), source)
    target.write_text('mine')
    cases = [
        ([source, target], 'OUT must not exist'),
        ([source, tmp_path / 'out.pth'], 'target must end in .safetensors'),
        ([source, tmp_path / 'no' / 'out.safetensors'], 'folder of target'),
        ([tmp_path / 'no.pth', tmp_path / 'o.safetensors'], 'no.pth does not exist'),
        ([source, tmp_path / 'o.safetensors', '--model', 'test_vmanba'], "Did you mean 'test_vmamba'?"),
        ([source, tmp_path / 'o.safetensors', '--model', 'resnet50'], "got 'resnet50'"),
        ([source, tmp_path / 'o.safetensors', '--model', 'vmamba_tiny'], 'vmamba_tiny, got the tensors of test_vmamba'),
        ([source, tmp_path / 'o.safetensors', '--weights', 'model_ema'], 'must hold model_ema, got model alone'),
    ]
    for argv, said in cases:
        assert main(['convert', *map(str, argv)]) == 2
        assert said in capsys.readouterr().err
    assert target.read_text() == 'mine'

    def interrupted(path, tensors, metadata):
        path.write_bytes(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(sys.modules['vssm.models.weights.convert'], 'write_safetensors', interrupted)
    assert main(['convert', str(source), str(target), '--force']) == 2
    assert 'disk full' in capsys.readouterr().err
    assert target.read_text() == 'mine' and set(tmp_path.iterdir()) == {source, target}


# ---- through timm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', TEST_MODELS)
def test_checkpoint_path_takes_a_file_of_foreign_classes(name, publish, tmp_path, foreign):
    expected = random_state(name)
    path = tmp_path / 'published.pth'
    foreign(lambda node: torch.save({'model': publish(name, expected), 'optimizer': {}, 'config': node}, path))
    assert_same(timm.create_model(name, checkpoint_path=str(path)).state_dict(), expected)


def test_checkpoint_path_with_other_classes_goes_through_convert(publish, tmp_path):
    expected = random_state('test_vmamba')
    source, target = tmp_path / 'in.pth', tmp_path / 'out.safetensors'
    torch.save({'model': publish('test_vmamba', expected), 'args': pathlib.PurePosixPath('/x')}, source)
    with pytest.raises(RuntimeError, match='weights_only'):
        timm.create_model('test_vmamba', checkpoint_path=str(source))
    assert main(['convert', str(source), str(target)]) == 0
    assert_same(timm.create_model('test_vmamba', checkpoint_path=str(target)).state_dict(), expected)


def test_a_safe_global_of_the_user_is_left_alone():
    before = torch.serialization.get_safe_globals()
    assert (OrderedDict, 'yacs.config.CfgNode') in before
    try:
        for mine in ((Counter, 'yacs.config.CfgNode'), type('CfgNode', (), {'__module__': 'yacs.config'})):
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals([mine])
            pass_cfg_nodes()
            assert torch.serialization.get_safe_globals() == [mine]
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


@pytest.mark.parametrize(
    'name, serialization',
    [('test_vmamba', False), *[(name, True) for name in TEST_MODELS if name != 'test_vmamba2d']],  # told alike
)
def test_hugging_face_round_trip(name, serialization, tmp_path, monkeypatch):
    """local-dir: as it is, hf-hub: with the hub's calls sent to a folder."""
    hub = timm.models._hub
    model = timm.create_model(name, num_classes=5).eval()
    repository = tmp_path / 'repository'

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return types.SimpleNamespace(repo_id=repo_id)

        def file_exists(self, **kwargs):
            return False

        def upload_folder(self, folder_path, **kwargs):
            shutil.copytree(folder_path, repository)

    def download(repo_id, filename, **kwargs):
        assert repo_id == 'someone/model'
        if not (repository / filename).is_file():
            raise hub.EntryNotFoundError('no such file')
        return str(repository / filename)

    monkeypatch.setattr(hub, 'HfApi', Api)
    monkeypatch.setattr(hub, 'hf_hub_download', download)
    timm.models.push_to_hf_hub(model, 'someone/model', safe_serialization=serialization)
    assert (repository / 'model.safetensors').exists() == serialization
    images = torch.randn(2, 3, 32, 32)
    for source in (f'local-dir:{repository}', 'hf-hub:someone/model'):
        again = timm.create_model(source, pretrained=True).eval()
        assert_same(again.state_dict(), model.state_dict())
        assert torch.equal(again(images), model(images))
        assert timm.create_model(source, pretrained=True, num_classes=3, in_chans=1).num_classes == 3


# ---- pretrained ------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    """(address, files, requests): a web server of files {name: (status, body, claimed length)}."""
    files, requests = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            status, body, length = files.get(self.path.lstrip('/'), (404, b'', 0))
            self.send_response(status)
            self.send_header('Content-Length', str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    monkeypatch.setenv('no_proxy', '127.0.0.1')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield f'http://127.0.0.1:{httpd.server_port}', files, requests
        httpd.shutdown()
        thread.join()


def saved(checkpoint):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def serve(body, status=200, cut=0):
    return status, body[: len(body) - cut], len(body)


@pytest.fixture
def published(monkeypatch):
    """published(model, url=..., origin_url=...): say so in the registry."""

    def publish(name, **kwargs):
        cfg = replace(timm.get_pretrained_cfg(name), **kwargs)
        monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, name, cfg)
        return cfg

    return publish


def test_a_url_is_downloaded_converted_and_kept(server, publish, published, tmp_path, foreign):
    address, files, requests = server
    expected = random_state('test_vmamba')
    body = io.BytesIO()
    foreign(lambda node: torch.save({'model': publish('test_vmamba', expected), 'config': node}, body))
    body = body.getvalue()
    files['weights.pth'] = serve(body)
    published('test_vmamba', url=f'{address}/weights.pth')
    cache = tmp_path / 'new' / 'cache'
    assert_same(timm.create_model('test_vmamba', pretrained=True, cache_dir=cache).state_dict(), expected)
    (file,) = cache.iterdir()
    assert re.fullmatch(r'test_vmamba-[0-9a-f]{8}\.safetensors', file.name)
    metadata = metadata_of(file)
    assert metadata['source'] == f'{address}/weights.pth' and metadata['sha256'] == hashlib.sha256(body).hexdigest()

    files.clear()
    model = timm.create_model('test_vmamba', pretrained=True, cache_dir=cache, in_chans=1, num_classes=5)
    state = model.state_dict()
    assert state['head.fc.weight'].shape == (5, 96)
    torch.testing.assert_close(state['stem.conv1.weight'], expected['stem.conv1.weight'].sum(1, keepdim=True))
    backbone = timm.create_model('test_vmamba', pretrained=True, cache_dir=str(cache), features_only=True)
    assert_same(backbone.model.state_dict(), {k: v for k, v in expected.items() if not k.startswith('head.')})
    embedder = timm.create_model('test_vmamba', pretrained=True, cache_dir=cache, num_classes=0)
    assert torch.equal(embedder.state_dict()['head.norm.weight'], expected['head.norm.weight'])
    assert requests == ['/weights.pth']


def test_a_damaged_cache_is_replaced(server, publish, published, tmp_path, capsys):
    address, files, requests = server
    expected = random_state('test_vmamba')
    files['weights.pth'] = serve(saved({'model': publish('test_vmamba', expected)}))
    published('test_vmamba', url=f'{address}/weights.pth')
    stale = tmp_path / '.vssm-killed'
    stale.mkdir()
    os.utime(stale, (0, 0))
    for command in (None, ['download', 'test_vmamba', '--cache-dir', str(tmp_path)]):
        if command:
            assert main(command) == 0 and 'downloaded' in capsys.readouterr().out
        model = timm.create_model('test_vmamba', pretrained=True, cache_dir=tmp_path)
        assert_same(model.state_dict(), expected)
        (file,) = tmp_path.iterdir()  # what a killed process left is gone, too
        file.write_bytes(file.read_bytes()[:7])
    assert requests == ['/weights.pth'] * 2


def test_a_checkpoint_of_our_own_training_at_a_url(server, tmp_path):
    address, files, _ = server
    expected = random_state('test_vmamba')
    save_file(expected, tmp_path / 'run', dict(model='test_vmamba', model_args='{"drop_path_rate": 0.1}'))
    files['run.safetensors'] = serve((tmp_path / 'run').read_bytes())
    overlay = dict(url=f'{address}/run.safetensors')
    model = timm.create_model('test_vmamba', pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
    assert_same(model.state_dict(), expected)


@pytest.mark.parametrize(
    'name, said', [('vmamba_tiny.nope', 'Invalid pretrained tag'), ('vmamba2d_tiny', 'there are none')]
)
def test_download_of_what_there_is_not(name, said, tmp_path, capsys):
    assert main(['download', name, '--cache-dir', str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_download_into_a_file(tmp_path, capsys):
    (tmp_path / 'file').touch()
    assert main(['download', 'vmamba_tiny_s1l8', '--cache-dir', str(tmp_path / 'file')]) == 2
    assert str(tmp_path / 'file') in capsys.readouterr().err


def test_another_url_is_another_file(server, tmp_path):
    address, files, _ = server
    states = {f'{seed}.pth': random_state('test_vmamba', seed, num_classes=seed) for seed in (3, 4)}
    files |= {name: serve(saved(state)) for name, state in states.items()}
    for seed in (3, 4, 3):
        overlay = dict(url=f'{address}/{seed}.pth', num_classes=seed)
        model = timm.create_model('test_vmamba', pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
        assert_same(model.state_dict(), states[f'{seed}.pth'])
    assert len(list(tmp_path.iterdir())) == 2


FAILURES = {
    'breaks off': (lambda: serve(saved(random_state('test_vmamba')), cut=1000), 'cannot be read as such'),
    'half': (lambda: serve(saved(random_state('test_vmamba')), cut=100000), 'cannot be read as such'),
    'web page': (lambda: serve(b'<!DOCTYPE html><html>Sign in</html>'), 'got a web page'),
    'not found': (lambda: serve(b'none', status=404), 'HTTP Error 404'),
    'broken server': (lambda: serve(b'', status=503), 'HTTP Error 503'),
    'nothing': (lambda: serve(b''), 'got an empty file'),
    'another model': (lambda: serve(saved(random_state('test_spatial_mamba'))), 'must hold'),
    'another size': (
        lambda: serve(saved(random_state('test_vmamba', depths=(1, 1, 3, 1)))),
        r"must hold test_vmamba with .* got one with .*'depths': \[1, 1, 3, 1\]",
    ),
    'other classes': (lambda: serve(saved(random_state('test_vmamba', num_classes=7))), "'num_classes': 7"),
    'an attack': (lambda: serve(saved({'model': Payload(os.system, 'true')})), 'asks for posix.system'),
}


@pytest.mark.parametrize('failure', FAILURES)
def test_a_bad_download_leaves_nothing(failure, server, published, tmp_path, capsys):
    make, said = FAILURES[failure]
    address, files, _ = server
    files['weights.pth'] = make()
    published('test_vmamba', url=f'{address}/weights.pth')
    with pytest.raises(RuntimeError, match=said) as error:
        timm.create_model('test_vmamba', pretrained=True, cache_dir=tmp_path)
    assert f'test_vmamba: no weights from {address}/weights.pth: ' in str(error.value)
    assert not list(tmp_path.iterdir())
    assert main(['download', 'test_vmamba', '--cache-dir', str(tmp_path)]) == 2
    assert re.search(said, capsys.readouterr().err) and not list(tmp_path.iterdir())

    files['weights.pth'] = serve(saved(random_state('test_vmamba')))  # and nothing stands in the way of the next one
    assert main(['download', 'test_vmamba', '--cache-dir', str(tmp_path)]) == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_no_server(published, tmp_path):
    published('test_vmamba', url='http://127.0.0.1:9/weights.pth')
    with pytest.raises(RuntimeError, match='test_vmamba: no weights from http://127.0.0.1:9/weights.pth: '):
        timm.create_model('test_vmamba', pretrained=True, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['test_vmamba2d', 'vmamba2d_tiny.in1k'])
def test_where_nothing_is_published_pretrained_says_so(name, capsys):
    with pytest.raises(RuntimeError, match='no weights are published, so that pretrained must be False; checkpoint_pa'):
        timm.create_model(name, pretrained=True)
    assert main(['download', name]) == 2
    assert 'NAME must be a model with published weights' in capsys.readouterr().err


SOURCES = {  # of the weights of each family, and the licence under which they are published
    'vmamba_': (r'https://github\.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm.*\.pth', 'mit'),
    'vanilla_vmamba_': (r'https://github\.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssm.*\.pth', 'mit'),
    'spatial_mamba_': (r'https://drive\.google\.com/uc\?id=[\w-]{33}', 'apache-2.0'),
    'vim_': (r'https://huggingface\.co/hustvl/Vim-\w+-midclstok', 'apache-2.0'),
    'groupmamba_': (r'https://huggingface\.co/Abdelrahman-shaker/GroupMamba-\w+', 'mit'),
    'mambavision_': (r'https://huggingface\.co/nvidia/MambaVision-[\w-]+', 'cc-by-nc-sa-4.0'),
}


def test_every_model_says_where_its_weights_are():
    for name in list_models():
        source, license = next(
            (found for family, found in SOURCES.items() if name.startswith(family)), ('', 'apache-2.0')
        )
        for cfg in get_arch_pretrained_cfgs(name).values():  # of each of its tags
            assert re.fullmatch(source, published_at(cfg)) and cfg.license == license, name
    groups = [timm.get_pretrained_cfg(f'groupmamba_{size}').origin_url for size in ('tiny', 'small', 'base')]
    assert len(set(groups)) == 3 and all(re.fullmatch(SOURCES['spatial_mamba_'][0], url) for url in groups)


def test_a_file_on_google_drive_is_downloaded_once(server, publish, published, tmp_path, capsys, monkeypatch):
    """gdown's own way to the drive was not tried; here it fetches from the test's server."""
    address, files, requests = server
    name, drive, cache = 'test_spatial_mamba', 'https://drive.google.com/uc?id=abc', ['--cache-dir', str(tmp_path)]
    expected = random_state(name)
    files['uc'] = serve(saved({'model': publish(name, expected)}))
    published(name, origin_url=drive)
    with pytest.raises(RuntimeError, match=re.escape(f'run `vssm download {name} --cache-dir {tmp_path}` once')):
        timm.create_model(name, pretrained=True, cache_dir=tmp_path)
    monkeypatch.setitem(sys.modules, 'gdown', None)
    assert main(['download', name, *cache]) == 2
    assert 'needs the package gdown' in capsys.readouterr().err and not list(tmp_path.iterdir())

    def fetch(url, output, quiet):
        assert url == drive
        torch.hub.download_url_to_file(f'{address}/uc', output, progress=False)
        return output

    def refuse(url, output, quiet):
        raise KeyError('too many accesses')

    for download, said in ((refuse, 'too many accesses'), (lambda *args, **kwargs: None, 'did not give the file')):
        monkeypatch.setitem(sys.modules, 'gdown', types.SimpleNamespace(download=download))
        assert main(['download', name, *cache]) == 2
        assert said in capsys.readouterr().err and not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, 'gdown', types.SimpleNamespace(download=fetch))
    for said in ('downloaded and converted', 'already there'):
        assert main(['download', name, *cache]) == 0
        assert said in capsys.readouterr().out
    assert requests == ['/uc']
    assert_same(timm.create_model(name, pretrained=True, cache_dir=tmp_path).state_dict(), expected)
    (file,) = tmp_path.iterdir()
    assert metadata_of(file)['source'] == drive


def test_the_cache_is_that_of_torch_hub(published, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    cfg = published('test_vmamba', url='http://127.0.0.1:9/weights.pth')
    path = cached_path(cfg)
    assert path.parent == tmp_path / 'hub' / 'checkpoints'
    path.parent.mkdir(parents=True)
    save_file(random_state('test_vmamba'), path)
    assert_same(timm.create_model('test_vmamba', pretrained=True).state_dict(), random_state('test_vmamba'))


def test_download_needs_a_model_of_ours(capsys):
    assert main(['download', 'spatial_mamba_tniy']) == 2
    assert "Did you mean 'spatial_mamba_tiny'?" in capsys.readouterr().err
