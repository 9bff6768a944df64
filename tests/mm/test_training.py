# SPDX-License-Identifier: Apache-2.0
"""Training on mmengine's Runner: data, metric, optimizer, checkpoints, and the digits from config to picture."""

import json
import math
import pickle
import time
import uuid

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import METRICS, OPTIM_WRAPPER_CONSTRUCTORS, RUNNERS
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vssm.models import mm
from vssm.tools._common import find_config
from vssm.tools.main import main

CONFIGS = ('digits/vmamba2d_test', 'digits/vmamba_test')
AFFINE = dict(degrees=10, translate=(0.1, 0.1), scale=(0.9, 1.1))

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def build(tmp_path):
    """Runner of a config cut down to 2 training and 1 evaluation batches."""

    def build(name=CONFIGS[0], **options):
        cfg = Config.fromfile(find_config(name))
        cfg.merge_from_dict(
            {
                'train_cfg.max_epochs': 1,
                'train_dataloader.batch_size': 8,
                'train_dataloader.num_batch_per_epoch': 2,
                'val_dataloader.batch_size': 8,
                'val_dataloader.num_batch_per_epoch': 1,
                'test_dataloader.batch_size': 8,
                'test_dataloader.num_batch_per_epoch': 1,
                **options,
            }
        )
        cfg.work_dir = str(tmp_path)
        cfg.experiment_name = uuid.uuid4().hex  # mmengine hands out loggers and histories by it
        return RUNNERS.build(cfg)

    return build


def classifier(name='test_vmamba2d'):
    return mm.ImageClassifier(name, num_classes=10, in_chans=1)


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', CONFIGS)
def test_a_run_changes_every_weight_and_its_checkpoint_gives_the_same_outputs(name, build, tmp_path, capsys):
    torch.set_num_threads(2)
    runner = build(name)
    assert torch.get_num_threads() == 1
    before = {key: value.clone() for key, value in runner.model.named_parameters()}
    runner.train()
    for key, value in runner.model.named_parameters():
        assert value.isfinite().all()
        if not key.endswith('stages.3.blocks.0.mixer.A_log'):  # where the map is one position, nothing decays
            assert not torch.equal(value, before[key]), key
    assert math.isfinite(runner.message_hub.get_scalar('train/loss').current())
    assert 'iteration 2/2' in capsys.readouterr().out

    path = tmp_path / 'checkpoint.safetensors'
    assert not list(tmp_path.glob('*.tmp'))
    with safe_open(path, framework='pt') as file:
        metadata = file.metadata()
    assert metadata['epoch'] == '1'
    model = timm.create_model(metadata['model'], checkpoint_path=path, **json.loads(metadata['model_args'])).eval()
    assert {block.mixer.scan_ndim for stage in model.stages for block in stage.blocks} == {2 if '2d' in name else 1}
    reloaded = mm.ImageClassifier(metadata['model'], num_classes=10, in_chans=1).eval()
    mm.load_weights(reloaded, path)
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        expected = runner.model.eval()(images)
        assert torch.equal(model(images), expected)
        assert torch.equal(reloaded(images), expected)

    metrics = build(name, load_from=str(path)).test()
    assert metrics == {'accuracy/top1': runner.message_hub.get_scalar('val/accuracy/top1').current()}


def test_the_second_config_differs_in_the_model_alone():
    first, second = (Config.fromfile(find_config(name)).to_dict() for name in CONFIGS)
    assert first.pop('model') == {**second.pop('model'), 'model_name': 'test_vmamba2d'}
    assert first == second


def test_a_seed_decides_a_run(build, tmp_path):
    weights = []
    for seed in (0, 0, 1):
        build(**{'randomness.seed': seed}).train()
        weights.append(load_file(tmp_path / 'checkpoint.safetensors'))
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert any(not torch.equal(value, weights[2][key]) for key, value in weights[0].items())


# ---- model and metric ------------------------------------------------------------------------------------------------


def test_the_modes_of_the_classifier():
    model = classifier().eval()
    images, labels = torch.randn(3, 1, 32, 32), torch.tensor([4, 0, 9])
    logits = model(images)
    assert logits.shape == (3, 10)
    log_probabilities = logits - logits.logsumexp(1, keepdim=True)
    expected = -(log_probabilities[0, 4] + log_probabilities[1, 0] + log_probabilities[2, 9]) / 3
    torch.testing.assert_close(model(images, labels, mode='loss')['loss_cls'], expected)
    predictions = model(images, labels, mode='predict')
    assert [p['gt_label'].item() for p in predictions] == [4, 0, 9]
    torch.testing.assert_close(torch.stack([p['pred_score'] for p in predictions]), log_probabilities.exp())
    with pytest.raises(ValueError, match="mode must be 'tensor', 'loss' or 'predict', got 'train'"):
        model(images, labels, mode='train')


def test_weights_are_not_initialised_anew():
    model = classifier()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.init_weights()  # which the runner calls
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    'topk, expected',
    [
        ((1,), {'accuracy/top1': 50.0}),
        ((2,), {'accuracy/top2': 75.0}),
        ((1, 3), {'accuracy/top1': 50.0, 'accuracy/top3': 100.0}),
    ],
    ids=str,
)
def test_accuracy(topk, expected):
    metric = METRICS.build(dict(type='Accuracy', topk=topk))
    samples = [  # the label's score comes first, first, second, third
        ([0.5, 0.3, 0.2], 0),
        ([0.1, 0.2, 0.7], 2),
        ([0.3, 0.1, 0.6], 0),
        ([0.5, 0.3, 0.2], 2),
    ]
    for batch in (samples[:3], samples[3:]):
        metric.process(None, [dict(pred_score=torch.tensor(s), gt_label=torch.tensor(label)) for s, label in batch])
    assert metric.evaluate(size=4) == expected


# ---- data ------------------------------------------------------------------------------------------------------------


def test_the_split_is_fixed_disjoint_and_stratified():
    train, heldout = mm.Digits('train'), mm.Digits('heldout')
    assert (len(train), len(heldout)) == (1198, 599)
    assert sorted(train.indices + heldout.indices) == list(range(1797))
    assert heldout.indices[:8] == [1, 4, 10, 21, 24, 25, 28, 32]
    for digit in range(10):
        count = heldout.labels.count(digit)
        assert abs(count - (count + train.labels.count(digit)) / 3) < 1


def test_the_scans_keep_their_labels():
    """Reduced to 8x8 again, an image is the scan of its index, whose label it has."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    heldout = mm.Digits('heldout')
    for i in (0, 100, 598):
        index = heldout.indices[i]
        assert heldout.labels[i] == labels[index]
        reduced = torch.tensor(list(heldout.images[i].resize((8, 8), Image.BOX).tobytes())).float()
        assert torch.corrcoef(torch.stack([reduced, torch.tensor(scans[index]).float()]))[0, 1] > 0.95


def test_only_the_training_images_vary():
    for affine, same in ((None, True), (AFFINE, False)):
        digits = mm.Digits('train', affine=affine)
        first, second = digits[0], digits[0]
        assert first['inputs'].shape == (1, 32, 32)
        assert first['inputs'].min() >= -1 and first['inputs'].max() <= 1
        assert torch.equal(first['inputs'], second['inputs']) == same
        assert first['data_samples'] == second['data_samples']
    cfg = Config.fromfile(find_config(CONFIGS[0]))
    assert (cfg.train_dataloader.dataset.split, cfg.train_dataloader.dataset.affine) == ('train', AFFINE)
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset == dict(type='Digits', split='heldout')


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be 'train' or 'heldout', got 'test'"):
        mm.Digits('test')


# ---- optimizer -------------------------------------------------------------------------------------------------------


class Detector(torch.nn.Module):
    """A timm model further down, as the backbone of something else."""

    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model('test_vmamba', num_classes=0)
        self.head = torch.nn.Linear(96, 4)


@pytest.mark.parametrize('make', [classifier, Detector], ids=['classifier', 'backbone'])
def test_what_decays(make):
    model = make()
    optimizer = dict(type='adamw', lr=0.01, weight_decay=0.05, betas=(0.8, 0.9))
    cfg = dict(optimizer=optimizer, clip_grad=dict(max_norm=2.0))
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(dict(type='TimmOptimWrapperConstructor', optim_wrapper_cfg=cfg))
    wrapper = constructor(model)
    assert type(wrapper.optimizer) is torch.optim.AdamW
    assert wrapper.clip_grad_kwargs == dict(max_norm=2.0)
    assert all(group['lr'] == 0.01 and group['betas'] == (0.8, 0.9) for group in wrapper.optimizer.param_groups)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays = {names[p]: group['weight_decay'] for group in wrapper.optimizer.param_groups for p in group['params']}
    assert set(decays) == set(names.values())
    for name, weight_decay in decays.items():
        kind = name.rsplit('.', 1)[1]
        norm = any(part.startswith('norm') for part in name.split('.'))
        exempt = kind in ('A_log', 'D', 'dt_bias', 'bias') or norm
        assert weight_decay == (0.0 if exempt else 0.05), name
    assert {'A_log', 'D', 'dt_bias', 'dt_weight', 'bias', 'weight'} == {name.rsplit('.', 1)[1] for name in decays}


def test_paramwise_cfg_is_refused():
    with pytest.raises(ValueError, match='paramwise_cfg must be None'):
        mm.TimmOptimWrapperConstructor(dict(optimizer=dict(type='sgd')), paramwise_cfg=dict(norm_decay_mult=0.0))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return print, ('this code must not run',)


def _without(state_dict, name):
    return {key: value for key, value in state_dict.items() if key != name}


@pytest.mark.parametrize(
    'write, said',
    [
        (lambda path, weights: None, r'does not exist'),
        (lambda path, weights: path.with_suffix('.safetensors').write_bytes(b'nonsense'), r'must be a \.safetensors'),
        (
            lambda path, weights: path.write_bytes(b'nonsense'),
            r'must be a \.safetensors file, or',
        ),
        (lambda path, weights: path.write_bytes(pickle.dumps(Evil(), protocol=2)), r'must be a \.safetensors'),
        (lambda path, weights: torch.save({'state_dict': weights, 'evil': Evil()}, path), r'must be a \.safetensors'),
        (lambda path, weights: torch.save([1, 2], path), 'must map names to tensors, got list'),
        (lambda path, weights: torch.save({'step': 3}, path), 'must map names to tensors, got step: int'),
        (lambda path, weights: torch.save({3: torch.zeros(1)}, path), 'must map names to tensors, got a key of int'),
        (lambda path, weights: torch.save(_without(weights, 'head.fc.bias'), path), r'1 missing \(head\.fc\.bias\)'),
        (lambda path, weights: torch.save({**weights, 'x': weights['head.fc.bias']}, path), r'1 unexpected \(x\)'),
        (
            lambda path, weights: torch.save({**weights, 'head.fc.bias': torch.zeros(11)}, path),
            r'1 misshapen \(head\.fc\.bias\)',
        ),
        (
            lambda path, weights: save_file(weights, path.with_suffix('.safetensors'), dict(model='test_vmamba')),
            'must hold test_vmamba2d, got test_vmamba',
        ),
    ],
    ids='absent,safetensors,pth,pickle,code,list,numbers,unnamed,missing,unexpected,misshapen,other model'.split(','),
)
def test_a_bad_checkpoint_is_refused(write, said, tmp_path, capsys):
    model = classifier()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / 'checkpoint.pth'
    write(path, model.model.state_dict())
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        mm.load_weights(model, next(tmp_path.iterdir(), path))
    assert not capsys.readouterr().out
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    'wrap',
    [
        lambda weights: weights,
        lambda weights: {'state_dict': weights, 'epoch': 3},
        lambda weights: {'state_dict': {f'model.{name}': value for name, value in weights.items()}},
        lambda weights: {'model': weights},
    ],
    ids=['bare', 'timm', 'mmengine', 'wrapped'],
)
def test_pth_checkpoints_load(wrap, tmp_path):
    source, target = classifier(), classifier()
    torch.save(wrap(source.model.state_dict()), tmp_path / 'checkpoint.pth')
    mm.load_weights(target, tmp_path / 'checkpoint.pth')
    weights = target.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in source.state_dict().items())


def test_a_checkpoint_is_replaced_as_a_whole(build, tmp_path, monkeypatch):
    build().train()
    path = tmp_path / 'checkpoint.safetensors'
    before = path.read_bytes()

    def interrupted(filename, tensors, metadata):
        filename.write_bytes(b'half')
        raise OSError('disk full')

    monkeypatch.setattr('vssm.models.mm.hooks.write_safetensors', interrupted)
    with pytest.raises(mm.RunError, match='checkpoint.safetensors cannot be written: disk full'):
        build().train()
    assert path.read_bytes() == before and not list(tmp_path.glob('*.tmp'))


def test_the_test_command_refuses_a_checkpoint_of_the_other_scan(tmp_path, capsys):
    path = tmp_path / 'checkpoint.safetensors'
    save_file(classifier().model.state_dict(), path, dict(model='test_vmamba2d'))
    assert main(['test', 'digits/vmamba_test', str(path), '--work-dir', str(tmp_path)]) == 2
    assert capsys.readouterr().err == (f'vssm test: checkpoint {path} must hold test_vmamba, got test_vmamba2d.\n')


# ---- the demo --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    work_dir = tmp_path / 'digits'
    assert main(['demo', '--work-dir', str(work_dir)]) == 0
    metrics = json.loads((work_dir / 'metrics.json').read_text())
    assert metrics['heldout_accuracy_2d'] >= 0.98
    assert metrics['heldout_accuracy_1d'] >= 0.97
    width, height = Image.open(work_dir / 'digits.png').size
    assert width > 1000 and height > 700
    for scan, name in zip(('2d', '1d'), CONFIGS, strict=True):
        checkpoint = work_dir / metrics['checkpoints'][scan]
        capsys.readouterr()
        assert main(['test', name, str(checkpoint), '--work-dir', str(tmp_path / 'test')]) == 0
        assert f'{100 * metrics[f"heldout_accuracy_{scan}"]:.2f}' in capsys.readouterr().out
        Image.new('RGB', (90, 60)).save(tmp_path / 'photograph.jpg')
        assert main(['predict', str(checkpoint), str(tmp_path / 'photograph.jpg')]) == 0
        assert json.loads(capsys.readouterr().out)['predictions'][0]['class'] in '0123456789'

    start = time.time()
    assert main(['demo', '--work-dir', str(work_dir)]) == 0
    assert '--force' in capsys.readouterr().out
    assert time.time() - start < 10
    assert json.loads((work_dir / 'metrics.json').read_text()) == metrics


@pytest.mark.slow
def test_demo_shows_why_a_training_failed(tmp_path, capsys):
    (tmp_path / 'vmamba_test').write_text('a file where a folder must be')
    assert main(['demo', '--work-dir', str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert 'Training the 1-D scan failed' in out and 'vmamba_test' in out
    assert not (tmp_path / 'metrics.json').exists()
