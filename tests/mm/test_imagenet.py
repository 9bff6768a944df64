# SPDX-License-Identifier: Apache-2.0
"""ImageNet-1K and folders of images: configs, data, preprocessing, losses, averages, rates; and what guards a run."""

import itertools
import math
import os
import random
import re
import resource
import shutil
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, PARAM_SCHEDULERS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from PIL import Image
from safetensors.torch import load_file
from timm.optim import Lamb
from torch import nn

from vssm.models import mm
from vssm.models.weights import list_models
from vssm.tools._common import find_config, list_configs

IMAGENET = [name for name in list_configs() if name.startswith('imagenet/')]
FINETUNE = [name for name in list_configs() if name.startswith('finetune/v')]  # the others are dense
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def build(small_config, data, tmp_path):
    """Runner of a small ImageNet run, one epoch of two iterations of two images."""

    def build(model_name='test_vmamba', work_dir=tmp_path, **options):
        name, changes = small_config('imagenet', model_name)
        cfg = Config.fromfile(find_config(name))
        cfg.merge_from_dict({**changes, **options})
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            loader.dataset.setdefault('data_root', None)
            if loader.dataset.data_root == 'data/imagenet':
                loader.dataset.data_root = str(data / 'imagenet')
        cfg.work_dir = str(work_dir)
        cfg.experiment_name = uuid.uuid4().hex  # mmengine hands out loggers and histories by it
        return RUNNERS.build(cfg)

    return build


# ---- configs ---------------------------------------------------------------------------------------------------------


def test_every_model_has_its_config():
    """But those whose weights come from ImageNet-21K or from other patches."""
    trained = [name for name in list_models() if not re.search('^test_|_512$|large3|stride8', name)]
    assert sorted(re.fullmatch(r'imagenet/(.*)_\d+xb.*', name)[1] for name in IMAGENET) == sorted(trained)
    assert len(FINETUNE) == 3


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=[] if 'tiny' in name else pytest.mark.slow) for name in IMAGENET + FINETUNE]
)
def test_an_imagenet_config_builds_its_whole_run(name, data, tmp_path, monkeypatch):
    cfg = Config.fromfile(find_config(name))
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(data / 'imagenet')
    wanted, size = cfg.model.model_name, 384 if '384' in name else 224
    assert f'/{wanted}_' in name
    cfg.model.num_classes = 2  # as many as the miniature has
    cfg.train_dataloader.drop_last = False  # which holds no whole batch
    cfg.auto_scale_lr.enable = True
    cfg.work_dir, cfg.experiment_name = str(tmp_path), uuid.uuid4().hex
    monkeypatch.setattr('vssm.models.backbone.trunc_normal_', lambda *args, **kwargs: None)  # slow, of no effect here
    runner = RUNNERS.build(cfg)
    assert type(runner) is mm.TimmRunner
    model = runner.model
    assert model.model.pretrained_cfg['architecture'] == wanted and model.pretrained == (name in FINETUNE)

    loop = runner.build_train_loop(runner._train_loop)
    assert f'-{loop.max_epochs}e_' in name
    sample = loop.dataloader.dataset[1]
    assert sample['inputs'].shape == (3, size, size) and sample['inputs'].dtype == torch.uint8
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    assert type(wrapper) is (OptimWrapper if 'vim_' in name else mm.BFloat16OptimWrapper)
    assert type(wrapper.optimizer) is (Lamb if 'mambavision_' in name else torch.optim.AdamW)
    rate = cfg.optim_wrapper.optimizer.lr
    processes = int(re.search(r'_(\d+)xb', name)[1])
    runner.scale_lr(wrapper, runner.auto_scale_lr)  # one process here
    assert max(group['lr'] for group in wrapper.optimizer.param_groups) == pytest.approx(rate / processes)
    runner.optim_wrapper, runner._train_loop = wrapper, loop
    assert runner.build_param_scheduler(runner.param_schedulers)
    for loop in (runner.build_val_loop(runner._val_loop), runner.build_test_loop(runner._test_loop)):
        assert len(loop.dataloader.dataset) == 4 and loop.evaluator.metrics
        assert loop.dataloader.dataset[0]['inputs'].shape == (3, size, size)
    hooks = {type(hook) for hook in runner.hooks}
    assert {mm.SafetensorsHook, mm.SeedHook, mm.FiniteLossHook, mm.ProgressHook} <= hooks
    assert (EMAHook in hooks) == ('_1xb' not in name)
    assert (mm.MESAHook in hooks) == (wanted.startswith(('spatial', 'mambavision')) and name in IMAGENET)


def test_finer_patches_start_from_coarse_ones():
    cfg = Config.fromfile(find_config('finetune/vim_tiny_patch16_224_8xb128-30e_in1k-stride8'))
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.weight_decay, cfg.train_cfg.max_epochs) == (5e-6, 1e-8, 30)
    assert MODELS.build({**cfg.model, 'pretrained': False}).model.patch_embed.grid_size == (27, 27)


def test_the_recipe():
    """VMamba's, which is Swin's; the others use it too."""
    cfg = Config.fromfile(find_config('imagenet/vmamba_tiny_8xb128-300e_in1k'))
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay, optimizer.eps) == ('adamw', 1e-3, 0.05, 1e-8)
    assert optimizer.betas == (0.9, 0.999) and cfg.optim_wrapper.clip_grad == dict(max_norm=5.0)
    assert (cfg.train_dataloader.batch_size, cfg.auto_scale_lr.base_batch_size) == (128, 1024)
    assert cfg.train_dataloader.dataset.transform.auto_augment == 'rand-m9-mstd0.5-inc1'
    assert cfg.val_dataloader.dataset.transform.crop_pct == 0.875
    assert {loader.dataset.transform.interpolation for loader in (cfg.train_dataloader, cfg.val_dataloader)} == {
        'bicubic'
    }
    erasing = MODELS.build(cfg.model.data_preprocessor).random_erasing
    assert (erasing.probability, erasing.rand_color, erasing.per_pixel) == (0.25, False, True)
    assert [hook.momentum for hook in cfg.custom_hooks if hook.type == 'EMAHook'] == [1e-4]
    assert mm.MESAHook(1.0).begin == 0.25
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = [
        PARAM_SCHEDULERS.build(dict(s, optimizer=optimizer, convert_to_iter_based=False)) for s in cfg.param_scheduler
    ]
    rates = []
    for _ in range(300):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert rates[0] == pytest.approx(1e-6) and rates[20] == pytest.approx(1e-3) and rates[160] == pytest.approx(5.05e-4)
    assert rates[299] == pytest.approx(1e-5, rel=0.02) and max(rates) == pytest.approx(1e-3)
    mixup = MODELS.build(cfg.model.data_preprocessor).mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert mixup.label_smoothing == 0.1 and mixup.num_classes == 1000


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ with classes a and b; the images of a are dark, those of b bright."""
    for split, count in (('train', 4), ('val', 2)):
        for name, grey in (('a', 40), ('b', 200)):
            for i in range(count):
                path = tmp_path / 'folder' / split / name / f'{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new('RGB', (40, 30), (grey, grey, grey)).save(path)
    return tmp_path / 'folder'


def test_images_of_folders(folder):
    train, val = (mm.ImageFolder(folder, split, dict(input_size=16)) for split in ('train', 'val'))
    assert (len(train), len(val)) == (8, 4) and train.metainfo == dict(classes=('a', 'b'))
    for dataset in (train, val):
        for i in range(len(dataset)):
            sample = dataset[i]
            assert sample['inputs'].shape == (3, 16, 16) and sample['inputs'].dtype == torch.uint8
            assert sample['data_samples'] == (sample['inputs'].float().mean() > 100)
            assert dataset.get_data_info(i)['img_path'].endswith('.png')


RAMP = (np.arange(400, dtype=np.uint16) * 164).reshape(20, 20)  # 0 to 65436


def portable_greymap(path):
    path.write_bytes(b'P5 20 20 65535\n' + RAMP.astype('>u2').tobytes())


@pytest.mark.parametrize(
    'name, write, expected',
    [
        ('grey.png', lambda path: Image.new('L', (20, 20), 90).save(path), 90),
        ('one-bit.png', lambda path: Image.new('1', (20, 20), 1).save(path), 255),
        ('grey-alpha.png', lambda path: Image.new('LA', (20, 20), (90, 7)).save(path), 90),
        ('alpha.png', lambda path: Image.new('RGBA', (20, 20), (10, 20, 30, 128)).save(path), (10, 20, 30)),
        ('palette.png', lambda path: Image.new('RGB', (20, 20), (10, 20, 30)).quantize().save(path), (10, 20, 30)),
        ('clear.png', lambda path: Image.new('P', (20, 20)).save(path, transparency=0), 0),
        ('ink.tif', lambda path: Image.new('CMYK', (20, 20), (0, 255, 255, 0)).save(path), (255, 0, 0)),
        ('16.png', lambda path: Image.fromarray(RAMP).save(path), RAMP // 256),
        ('16.tif', lambda path: Image.fromarray(RAMP).save(path), RAMP // 256),
        ('16-big-endian.tif', lambda path: Image.fromarray(RAMP.astype('>u2')).save(path), RAMP // 256),
        ('16.pgm', portable_greymap, RAMP // 256),
    ],
)
def test_images_of_every_kind_become_rgb(name, write, expected, folder):
    """As timm takes them; of 16 bits the upper eight, where Pillow would clip all but the darkest to white."""
    (folder / 'train' / 'a' / '0.png').unlink()
    write(folder / 'train' / 'a' / f'0-{name}')
    dataset = mm.ImageFolder(folder, 'train', dict(input_size=20, crop_pct=1.0))
    image = torch.as_tensor(dataset[0]['inputs'])
    if isinstance(expected, tuple):
        expected = np.reshape(expected, (3, 1, 1))
    assert image.shape == (3, 20, 20) and (image.numpy() == expected).all()


@pytest.mark.parametrize('mode', ['F', 'I'])
def test_images_without_a_range_are_refused_by_name(mode, folder):
    """Of floating-point numbers, or of 32 bits, nothing says what is white; nearly all became black or white."""
    Image.new(mode, (20, 20), 1).save(folder / 'train' / 'a' / '0.tif')
    dataset = mm.ImageFolder(folder, 'train', dict(input_size=8))
    index = dataset.paths.tolist().index(os.fsencode(folder / 'train' / 'a' / '0.tif'))
    with pytest.raises(mm.RunError, match=r'0\.tif cannot be read \(an image must have 8 bits a channel, or 16'):
        mm.GuardedDataset(dataset)[index]
    skipping = mm.GuardedDataset(dataset, skip=True)
    assert skipping[index]['inputs'].shape == (3, 8, 8) and skipping.unreadable.sum() == 1

    class Detection(Lenient):
        def __getitem__(self, index):
            raise AssertionError('failed to load image')  # as mmcv does, since OpenCV reads none of these

    with pytest.raises(mm.RunError, match=r'0\.tif cannot be read \(an image must have 8 bits'):
        mm.GuardedDataset(Detection(folder / 'train' / 'a' / '0.tif'))[0]


def test_orientation_is_honoured_but_for_the_published_recipes(folder):
    """A camera that is turned writes the pixels as they came, and says in the EXIF data how they are to be turned."""
    picture = np.zeros((20, 20, 3), np.uint8)
    picture[:10] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(picture).save(folder / 'train' / 'a' / '0.png', exif=exif)
    transform = dict(input_size=20, crop_pct=1.0)
    turned, as_stored = (mm.ImageFolder(folder, 'train', transform, upright=upright)[0] for upright in (True, False))
    assert torch.equal(turned['inputs'], as_stored['inputs'].rot90(-1, (1, 2)))
    assert turned['inputs'][:, 5, 15].min() == 255 and as_stored['inputs'][:, 5, 5].min() == 255
    assert not torch.equal(turned['inputs'], as_stored['inputs'])
    for name in IMAGENET + FINETUNE:
        cfg = Config.fromfile(find_config(name))
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            assert loader.dataset.upright == ('folder' in name)


def test_a_split_without_a_class_keeps_the_numbers(folder):
    for path in (folder / 'val' / 'a').iterdir():
        path.unlink()
    (folder / 'val' / 'a').rmdir()
    assert mm.ImageFolder(folder, 'val').labels.tolist() == [1, 1]


def test_augmentations_at_full_strength(folder):
    """timm's posterize then keeps no bit of the image, which some versions of Pillow refuse."""
    dataset = mm.ImageFolder(folder, 'train', dict(input_size=8, is_training=True, auto_augment='rand-m10-n6-inc1'))
    dark = 0
    for i in range(200):
        random.seed(i)
        np.random.seed(i)
        dark += not dataset[4]['inputs'].any()
    assert 0 < dark < 150


@pytest.fixture
def said(monkeypatch):
    """What a data set logs."""
    lines = []
    monkeypatch.setattr('vssm.models.mm.data.print_log', lambda text, *args: lines.append(text))
    return lines


def test_the_numbers_of_the_classes_are_said(folder, said):
    mm.ImageFolder(folder, 'train')
    assert said == [f'The classes of {folder / "train"} are numbered by name: 0 a, 1 b.']


@pytest.mark.parametrize('name', ['.ipynb_checkpoints', '__MACOSX', '@eaDir', '.hidden'])
def test_what_systems_add_is_no_class_and_no_image(name, folder, said):
    for place in (folder / 'train', folder / 'train' / 'a', folder / 'val'):
        (place / name).mkdir()
        Image.new('RGB', (8, 8)).save(place / name / '0-checkpoint.png')
    (folder / 'train' / 'a' / '._0.png').write_bytes(b'AppleDouble')
    for split, count in (('train', 8), ('val', 4)):
        dataset = mm.ImageFolder(folder, split)
        assert dataset.metainfo['classes'] == ('a', 'b') and len(dataset) == count
    assert not [line for line in said if 'left out' in line]


def test_other_files_are_counted_and_named(folder, said):
    for name in ('0.gif', '1.GIF', 'photo.heic', 'notes'):
        (folder / 'train' / 'a' / name).touch()
    Image.new('RGB', (8, 8)).save(folder / 'train' / 'loose.png')
    assert len(mm.ImageFolder(folder, 'train')) == 8
    (line,) = (line for line in said if 'left out' in line)
    for part in ('5 entries', '2 .gif', '1 .heic', '1 without an extension', '1 images beside the folders'):
        assert part in line


@pytest.mark.parametrize('what', ['empty', 'GIFs'])
def test_a_class_without_images_is_refused(what, folder):
    """It would count among the classes, and number those after it."""
    (folder / 'train' / 'aa').mkdir()
    if what == 'GIFs':
        Image.new('RGB', (8, 8)).save(folder / 'train' / 'aa' / '0.gif')
    for split in ('train', 'val'):
        with pytest.raises(mm.RunError, match='every folder in .*train is a class .*, got none in aa'):
            mm.ImageFolder(folder, split)


def test_links_that_lead_in_a_circle(folder, said):
    """To the folder itself, above it, and to the root; a link to a folder elsewhere is followed."""
    train = folder / 'train'
    for name, target in (('self', train / 'a'), ('above', train), ('root', folder)):
        (train / 'a' / name).symlink_to(target)
    (train / 'circle').symlink_to(folder)
    elsewhere = folder.parent / 'elsewhere'
    elsewhere.mkdir()
    Image.new('RGB', (8, 8)).save(elsewhere / '9.png')
    (train / 'b' / 'more').symlink_to(elsewhere)
    dataset = mm.ImageFolder(folder, 'train')
    assert dataset.metainfo['classes'] == ('a', 'b') and np.bincount(dataset.labels).tolist() == [4, 5]
    assert any('3 links to a folder that is there already' in line for line in said)
    (train / 'c').symlink_to(train / 'b')
    with pytest.raises(mm.RunError, match='c must be a class of its own, got a link to b'):
        mm.ImageFolder(folder, 'train')


def test_a_folder_that_cannot_be_listed_is_no_empty_one(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith('locked'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    (folder / 'train' / 'a' / 'locked').mkdir()
    monkeypatch.setattr('os.scandir', refuse)
    with pytest.raises(mm.RunError, match='cannot be read: .*Permission denied.*locked'):
        mm.ImageFolder(folder, 'train')


def test_folders_that_do_not_fit_are_refused(folder):
    with pytest.raises(mm.RunError, match='nothing must be a folder'):
        mm.ImageFolder(folder, 'nothing')
    (folder / 'val' / 'c').mkdir()
    with pytest.raises(mm.RunError, match=r"val must hold classes of the 2 in .*train, got \['c'\]"):
        mm.ImageFolder(folder, 'val')
    (folder / 'empty' / 'a').mkdir(parents=True)
    with pytest.raises(mm.RunError, match='empty must hold images'):
        mm.ImageFolder(folder, 'empty')


# ---- what happens to a batch -----------------------------------------------------------------------------------------


def batch(size=4):
    return dict(inputs=torch.randint(256, (size, 3, 8, 8), dtype=torch.uint8), data_samples=torch.arange(size) % 3)


def test_images_are_normalised():
    data = batch()
    out = mm.ImagePreprocessor(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))(data, training=True)
    expected = (data['inputs'].double() / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.4]
    ).view(3, 1, 1)
    torch.testing.assert_close(out['inputs'].double(), expected, rtol=1e-5, atol=1e-5)
    assert out['inputs'].dtype == torch.float32 and torch.equal(out['data_samples'], data['data_samples'])
    last = mm.ImagePreprocessor(channels_last=True)(data)['inputs']
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert not mm.ImagePreprocessor().state_dict()


@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_mixing(kind):
    """Labels and images are mixed in one proportion, only in training."""
    mixup = dict(mixup_alpha=float(kind == 'mixup'), cutmix_alpha=float(kind == 'cutmix'), label_smoothing=0.1)
    preprocessor = mm.ImagePreprocessor(mean=(0.0,) * 3, std=(1.0,) * 3, mixup=dict(mixup, num_classes=3))
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    images[1] = 255
    data = dict(inputs=images, data_samples=torch.tensor([0, 2]))
    same = preprocessor(data)
    assert torch.equal(same['data_samples'], data['data_samples']) and same['inputs'].unique().tolist() == [0, 1]
    seen = set()
    for seed in range(5):
        np.random.seed(seed)
        out = preprocessor({key: value.clone() for key, value in data.items()}, training=True)
        share = out['inputs'][0].mean()  # of the white image in the black one
        off, on = 0.1 / 3, 0.9 + 0.1 / 3
        expected = torch.stack([share * off + (1 - share) * on, torch.tensor(off), share * on + (1 - share) * off])
        torch.testing.assert_close(out['data_samples'][0], expected, rtol=1e-4, atol=1e-4)
        assert (out['inputs'].unique().tolist() == [0, 1]) == (kind == 'cutmix')
        seen.add(round(share.item(), 3))
    assert len(seen) > 2


def test_an_odd_batch_is_not_mixed():
    preprocessor = mm.ImagePreprocessor(mixup=dict(num_classes=3))
    with pytest.raises(mm.RunError, match='even number of images, got 3: set train_dataloader.batch_size'):
        preprocessor(batch(3), training=True)


def test_erasing_in_training_alone():
    preprocessor = mm.ImagePreprocessor(random_erasing=dict(probability=1.0, mode='pixel'))
    data = batch()
    plain, erased = preprocessor(data), preprocessor(data, training=True)
    share = (plain['inputs'] != erased['inputs']).any(1).float().mean((1, 2))
    assert (share > 0).all() and (share < 0.6).all()


# ---- losses ----------------------------------------------------------------------------------------------------------


def classifier(**kwargs):
    return mm.ImageClassifier('test_vmamba', num_classes=5, **kwargs)


def test_smoothing_is_for_numbers_alone():
    model = classifier(label_smoothing=0.2).eval()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 3])
    probabilities = torch.full((2, 5), 0.04)
    probabilities[[0, 1], labels] += 0.8
    losses = [model(images, target, mode='loss')['loss_cls'] for target in (labels, probabilities)]
    torch.testing.assert_close(losses[0], losses[1])


def test_learning_from_a_teacher():
    """The teacher's probabilities are a second target; neither its weights nor its gradients become the model's."""
    model, teacher = classifier().eval(), classifier().model.eval()
    keys, images, labels = model.state_dict().keys(), torch.randn(2, 3, 32, 32), torch.tensor([0, 4])
    model.learn_from(teacher, 1.5)
    losses = model(images, labels, mode='loss')
    log_probabilities = model(images).log_softmax(1)
    expected = -1.5 * (teacher(images).softmax(1) * log_probabilities).sum(1).mean()
    torch.testing.assert_close(losses['loss_mesa'], expected)
    losses['loss_mesa'].backward()
    assert model.model.head.fc.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert model.state_dict().keys() == keys


def test_mesa_begins_after_a_quarter_of_the_epochs(build, tmp_path):
    runner = build('test_spatial_mamba', **{'train_cfg.max_epochs': 4, 'train_cfg.val_interval': 9})
    seen = []
    forward = runner.model.forward

    def spy(inputs, data_samples=None, mode='tensor'):
        out = forward(inputs, data_samples, mode)
        if mode == 'loss':
            seen.append('loss_mesa' in out)
        return out

    runner.model.forward = spy
    runner.train()
    assert seen == [False] * 2 + [True] * 6


def test_mesa_needs_an_average(build):
    runner = build('test_spatial_mamba', custom_hooks=[dict(type='MESAHook', weight=1.0, begin=0.0)])
    with pytest.raises(ValueError, match='MESAHook needs an EMAHook'):
        runner.train()


def test_the_average_is_evaluated_and_written(build, tmp_path):
    """With a momentum of one half, so that average and model differ after two iterations, in their statistics too."""
    runner = build('test_spatial_mamba', **{'custom_hooks.0.momentum': 0.5})
    states = []
    original = runner.model.val_step
    runner.model.val_step = lambda data: (states.append(clone(runner.model.model)), original(data))[1]
    average = []
    hook = next(h for h in runner.hooks if isinstance(h, EMAHook))
    update = hook.after_train_iter

    def follow(runner, *args, **kwargs):
        weights = clone(runner.model.model)
        average[:] = [weights if not average else {k: (average[0][k] + v) / 2 for k, v in weights.items()}]
        average[0].update({k: v for k, v in weights.items() if not v.is_floating_point()})
        update(runner, *args, **kwargs)

    hook.after_train_iter = follow
    runner.train()
    written = load_file(tmp_path / 'checkpoint.safetensors')
    trained = clone(runner.model.model)
    for name, value in average[0].items():
        torch.testing.assert_close(written[name], value, msg=name)
        torch.testing.assert_close(states[0][name], value, msg=name)
    assert any(not torch.equal(written[name], value) for name, value in trained.items())
    reported = runner.message_hub.get_scalar('val/accuracy/top1').current()
    for file in ('checkpoint.safetensors', 'epoch_1.pth'):
        assert (tmp_path / file).stat().st_mode & 0o777 == 0o666 & ~umask()
        assert build('test_spatial_mamba', load_from=str(tmp_path / file)).test()['accuracy/top1'] == reported


def umask():
    os.umask(before := os.umask(0))
    return before


def clone(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


# ---- where weights come from -----------------------------------------------------------------------------------------


def test_a_training_starts_from_a_file_with_any_head(tmp_path):
    source = mm.ImageClassifier('test_vmamba', num_classes=7)
    torch.save(source.state_dict(), tmp_path / 'seven.pth')
    cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'seven.pth'))
    for classes in (7, 3):
        model = mm.ImageClassifier('test_vmamba', num_classes=classes, init_cfg=cfg)
        assert not torch.equal(model.model.stem.conv1.weight, source.model.stem.conv1.weight)
        model.init_weights()
        for name, value in source.model.state_dict().items():
            if not name.startswith('head.fc') or classes == 7:
                assert torch.equal(model.model.state_dict()[name], value), name
        assert model.model.head.fc.weight.shape == (classes, 96)


def test_a_classifier_takes_published_names(golden, tmp_path):
    tensors, metadata = golden('vmamba_micro')
    state = {k.removeprefix('state_dict.'): v for k, v in tensors.items() if k.startswith('state_dict.')}
    config = metadata['config']
    torch.save({'model': state}, tmp_path / 'published.pth')
    model = mm.ImageClassifier(
        'vmamba_tiny',
        num_classes=state['classifier.head.weight'].shape[0],
        depths=config['depths'],
        dims=config['dims'],
        mlp_ratio=config['mlp_ratio'],
        ssm_ratio=config['ssm_ratio'],
        d_state=config['ssm_d_state'],
    )
    mm.load_weights(model, tmp_path / 'published.pth')
    assert torch.equal(model.model.head.fc.weight, state['classifier.head.weight'])


@pytest.mark.parametrize(
    'kwargs, said',
    [
        (dict(init_cfg=dict(type='Normal')), r"init_cfg must be dict\(type='Pretrained', checkpoint=FILE\)"),
        (dict(pretrained='a.pth'), 'pretrained must be True or False'),
    ],
)
def test_bad_sources_are_refused(kwargs, said):
    with pytest.raises(ValueError, match=f'ImageClassifier: {said}'):
        classifier(**kwargs)


# ---- rates and precision ---------------------------------------------------------------------------------------------


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = mm.TimmFeatures('test_vmamba')
        self.head = nn.Linear(96, 4)


@pytest.mark.parametrize('make', [classifier, Detector], ids=['classifier', 'detector'])
def test_layer_decay_applies(make):
    model = make()
    optimizer = dict(type='adamw', lr=0.01, weight_decay=0.05, layer_decay=0.5)
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(type='TimmOptimWrapperConstructor', optim_wrapper_cfg=dict(optimizer=optimizer))
    )
    groups = constructor(model).optimizer.param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: (group['lr'], group['weight_decay']) for group in groups for p in group['params']}
    assert rates.keys() == set(names.values())
    by_part = {}
    for name, (rate, weight_decay) in rates.items():
        part = next((p for p in ('stem', 'stages.0', 'stages.3', 'head', 'outnorm') if p in name), 'other')
        by_part.setdefault(part, set()).add(rate)
        exempt = model.get_parameter(name).ndim == 1 or name.endswith(('.A_log', '.D', '.dt_bias'))
        assert weight_decay == (0.0 if exempt else 0.05), name
    assert {rate for name, (rate, _) in rates.items() if name.endswith(('head.fc.weight', 'head.weight'))} == {0.01}
    assert max(by_part['stem']) < min(by_part['stages.0']) < min(by_part['stages.3']) <= 0.01
    ratios = {math.log2(0.01 / rate) for rates in by_part.values() for rate in rates}
    assert all(ratio == pytest.approx(round(ratio)) for ratio in ratios) and len(ratios) > 4
    assert by_part.get('outnorm', {0.01}) == {0.01}


def test_layer_decay_needs_a_timm_model():
    cfg = dict(optimizer=dict(type='adamw', lr=0.01, layer_decay=0.5))
    with pytest.raises(ValueError, match='layer_decay needs a timm model'):
        mm.TimmOptimWrapperConstructor(cfg)(nn.Linear(2, 2))


def test_bfloat16(build):
    runner = build()
    dtypes = []
    runner.model.model.head.fc.register_forward_hook(
        lambda module, args, out: dtypes.append((module.training, out.dtype))
    )
    runner.train()
    assert set(dtypes) == {(True, torch.bfloat16), (False, torch.float32)}
    assert all(p.dtype == torch.float32 for p in runner.model.parameters())


def test_accumulated_gradients_make_a_larger_batch(build, tmp_path):
    """Without what is random about a batch; the last parameters of both runs agree."""
    states = []
    for size, counts in ((4, 1), (2, 2)):
        runner = build(
            'test_vmamba2d',
            tmp_path / str(size),
            **{
                'model.data_preprocessor': dict(mixup=None, random_erasing=None),
                'model.drop_path_rate': 0.0,
                'optim_wrapper.accumulative_counts': counts,
                'optim_wrapper.type': 'OptimWrapper',
                'train_dataloader.batch_size': size,
                'train_cfg.max_epochs': 3,
                'param_scheduler': None,
            },
        )
        runner.train()
        states.append(clone(runner.model))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_run_resumes_in_the_middle_of_a_step(build, tmp_path):
    """After one epoch of two iterations, of the three whose gradients are accumulated."""
    options = {'optim_wrapper.accumulative_counts': 3, 'train_cfg.max_epochs': 3}
    whole = build(work_dir=tmp_path / 'whole', **options)
    whole.train()
    (tmp_path / 'resumed').mkdir()
    shutil.copy(tmp_path / 'whole' / 'epoch_1.pth', tmp_path / 'resumed')
    assert mm.read_run(tmp_path / 'resumed' / 'epoch_1.pth')['gradients']
    resumed = build(work_dir=tmp_path / 'resumed', resume=True, **options)
    resumed.train()
    expected = clone(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in clone(resumed.model).items())
    assert not mm.read_run(tmp_path / 'whole' / 'epoch_3.pth')['gradients']


def test_averages_follow_the_steps(build):
    hooks = [dict(type='EMAHook', momentum=0.5)]
    runner = build(**{'optim_wrapper.accumulative_counts': 2, 'train_cfg.max_epochs': 4, 'custom_hooks': hooks})
    seen = []
    hook = next(h for h in runner.hooks if isinstance(h, EMAHook))
    after_train_iter = hook.after_train_iter

    def follow(*args, **kwargs):
        after_train_iter(*args, **kwargs)
        seen.append(hook.ema_model.module.model.head.fc.weight.clone())

    hook.after_train_iter = follow
    runner.train()
    changes = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert changes == [False, True, False, True, False, True, False]
    assert hook.ema_model.update_buffers  # of mmengine's own average, too


def test_a_run_that_was_killed_after_its_last_epoch_is_evaluated(build, tmp_path):
    build().train()
    runner = build(resume=True)
    runner.train()
    assert math.isfinite(runner.message_hub.get_scalar('val/accuracy/top1').current())


def test_another_schedule_is_named(build, tmp_path):
    scheduler = dict(type='CosineAnnealingLR', convert_to_iter_based=True)
    build(param_scheduler=[dict(scheduler, T_max=1, end=1)]).train()
    build(resume=True, param_scheduler=[dict(scheduler, T_max=2, end=2)], **{'train_cfg.max_epochs': 2}).train()
    log = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert 'CosineAnnealingLR goes on as it was saved, with T_max 2, not with 4' in log


def test_the_rate_scales_with_all_images_of_a_step(build):
    runner = build(**{'optim_wrapper.accumulative_counts': 4, 'auto_scale_lr.enable': True})
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.scale_lr(wrapper, runner.auto_scale_lr)
    assert wrapper.optimizer.param_groups[0]['lr'] == pytest.approx(1e-3 * 2 * 4 / 1024)


def test_gradient_checkpointing():
    for with_cp in (True, False):
        assert {stage.grad_checkpointing for stage in classifier(with_cp=with_cp).model.stages} == {with_cp}


# ---- what guards a run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(value, build, tmp_path):
    runner = build(**{'train_cfg.max_epochs': 3})
    before_train_iter = runner.hooks[0].before_train_iter

    def spoil(runner, *args, **kwargs):
        if runner.iter == 3:
            runner.model.model.head.fc.bias.data.fill_(value)
        before_train_iter(runner, *args, **kwargs)

    runner.hooks[0].before_train_iter = spoil
    with pytest.raises(
        mm.RunError, match=r'the loss is (nan|inf) at iteration 4; last good checkpoint: .*epoch_1\.pth'
    ):
        runner.train()
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == ['epoch_1.pth']


@pytest.mark.parametrize('interval', [1, 5])
def test_weights_that_are_not_finite_are_not_saved(interval, build, tmp_path):
    """An infinite gradient makes them so while the loss still is what it was; with and without a checkpoint due."""
    options = {'optim_wrapper.clip_grad': None, 'default_hooks.checkpoint.interval': interval, 'custom_hooks': []}
    runner = build(**{'train_cfg.max_epochs': 2, **options, 'custom_hooks': [dict(type='SafetensorsHook')]})
    bias = runner.model.model.head.fc.bias
    bias.register_hook(lambda grad: torch.full_like(grad, math.inf) if runner.iter == 3 else grad)
    with pytest.raises(mm.RunError, match=r'head\.fc\.bias is not finite: .*checkpoint\.safetensors is not written'):
        runner.train()
    assert all(value.isfinite().all() for value in load_file(tmp_path / 'checkpoint.safetensors').values())
    assert [path.name for path in tmp_path.glob('*.pth*')] == ['epoch_1.pth'] * (interval == 1)

    runner.hooks[:] = [hook for hook in runner.hooks if not isinstance(hook, mm.SafetensorsHook)]
    with pytest.raises(mm.RunError, match=r'epoch_2\.pth is not written; (last good checkpoint: |no check)'):
        runner.save_checkpoint(str(tmp_path), 'epoch_2.pth')


def test_a_disk_that_is_too_small_stops_before_the_first_iteration(build, monkeypatch):
    runner = build()
    weights = sum(v.numel() * v.element_size() for v in runner.model.state_dict().values())
    usage = lambda free: lambda path: type('Usage', (), dict(free=free))()  # noqa: E731
    monkeypatch.setattr('vssm.models.mm.resume.shutil.disk_usage', usage(8 * weights - 1))
    with pytest.raises(mm.RunError, match='must have room for two checkpoints'):
        runner.train()
    assert runner.iter == 0
    monkeypatch.setattr('vssm.models.mm.resume.shutil.disk_usage', usage(8 * weights))
    build().train()


@pytest.mark.parametrize('file, size', [('checkpoint.safetensors', 100_000), ('epoch_2.pth', 3_000_000)])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(file, size, build, tmp_path):
    """For which a limit on the size of files stands in, that one of the two exceeds."""
    build(**{'train_cfg.max_epochs': 1}).train()
    before = (tmp_path / 'checkpoint.safetensors').read_bytes()
    runner = build(resume=True, **{'train_cfg.max_epochs': 2})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(mm.RunError, match=rf'{file} cannot be written: .*File too large'):
            runner.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob('*.tmp')) and not (tmp_path / 'epoch_2.pth').exists()
    assert ((tmp_path / 'checkpoint.safetensors').read_bytes() == before) == (file == 'checkpoint.safetensors')
    assert mm.read_run(tmp_path / 'epoch_1.pth')['meta']['epoch'] == 1


def damaged(path, how):
    content = path.read_bytes()
    path.write_bytes(dict(truncated=content[: len(content) // 2], empty=b'', text=b'no image')[how])


@pytest.mark.parametrize('how', ['truncated', 'empty', 'text'])
@pytest.mark.parametrize('kind', ['jpg', 'png'])
def test_an_unreadable_image_is_named(how, kind, folder):
    (folder / 'train' / 'b' / '1.png').unlink()
    path = folder / 'train' / 'b' / f'1.{kind}'
    noise = np.random.randint(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    dataset = mm.ImageFolder(folder, 'train', dict(input_size=8))
    assert mm.GuardedDataset(dataset)[5]['data_samples'] == 1
    damaged(path, how)
    with pytest.raises(mm.RunError, match=rf'the image .*1\.{kind} cannot be read \(.*\)\.$'):
        mm.GuardedDataset(dataset)[5]
    skipping = mm.GuardedDataset(dataset, skip=True)
    assert skipping[5]['inputs'].shape == (3, 8, 8)
    assert skipping.unreadable.nonzero().tolist() == [[5]]


def test_harmless_bytes_after_an_image_are_allowed(folder):
    path = folder / 'train' / 'a' / '0.png'
    path.write_bytes(path.read_bytes() + b'harmless')
    assert mm.GuardedDataset(mm.ImageFolder(folder, 'train', dict(input_size=8)))[0]['data_samples'] == 0


class Lenient:
    """Takes any file for an image, as decoders do that fill what is missing with grey."""

    metainfo = {}

    def __init__(self, path):
        self.path = str(path)

    def __len__(self):
        return 1

    def get_data_info(self, index):
        return dict(img_path=self.path)

    def __getitem__(self, index):
        return 'image'


@pytest.mark.parametrize('kind', ['jpg', 'png'])
def test_a_truncated_image_is_seen_where_the_decoder_says_nothing(kind, tmp_path):
    path = tmp_path / f'image.{kind}'
    Image.fromarray(np.random.randint(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    dataset = mm.GuardedDataset(Lenient(path))
    assert dataset[0] == 'image'
    damaged(path, 'truncated')
    with pytest.raises(mm.RunError, match='cannot be read'):
        dataset[0]


@pytest.mark.parametrize('key', ['img_path', 'seg_map_path'])
def test_unreadable_files_of_a_segmentor_are_named(key, data, tmp_path):
    init_default_scope('mmseg')
    shutil.copytree(data / 'ADEChallengeData2016', tmp_path, dirs_exist_ok=True)
    cfg = Config.fromfile(find_config('ade20k/upernet_vmamba_tiny_4xb4-160k_ade20k-512x512')).train_dataloader.dataset
    dataset = mm.GuardedDataset(dict(cfg, data_root=str(tmp_path)))
    dataset[0]
    path = Path(dataset.get_data_info(0)[key])
    damaged(path, 'truncated')
    with pytest.raises(mm.RunError, match=f'{path.name} cannot be read'):
        dataset[0]


def test_an_error_of_the_pipeline_stays_what_it_is(folder):
    dataset = mm.ImageFolder(folder, 'train')
    dataset.transform = lambda image: 1 / 0
    with pytest.raises(ZeroDivisionError):
        mm.GuardedDataset(dataset, skip=True)[0]


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('policy', ['stop', 'skip'])
def test_a_run_with_an_unreadable_image(policy, workers, build, folder, tmp_path):
    damaged(folder / 'train' / 'b' / '1.png', 'truncated')
    options = {f'{name}_dataloader.dataset.data_root': str(folder) for name in ('train', 'val', 'test')}
    runner = build(unreadable=policy, **options, **{'train_dataloader.num_workers': workers})
    if policy == 'stop':
        with pytest.raises(
            mm.RunError, match=r'^the image .*b/1\.png cannot be read \(.*\); unreadable=skip [\w ]*\.$'
        ):
            runner.train()
        return
    runner.train()
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert log.count('b/1.png') == 1 and '1 of 8 images are unreadable' in log


@pytest.mark.parametrize(
    'task, folder',
    [pytest.param('coco', 'val2017', marks=pytest.mark.slow), ('ade20k', 'annotations/validation')],
)
def test_missing_images_stop_before_the_first_iteration(task, folder, small_config, data, tmp_path):
    source = data / dict(coco='coco', ade20k='ADEChallengeData2016')[task]
    shutil.copytree(source, tmp_path / 'data')
    shutil.rmtree(tmp_path / 'data' / folder)
    name, changes = small_config(task, 'test_vmamba')
    cfg = Config.fromfile(find_config(name))
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f'{tmp_path / "data"}/'
    cfg.val_evaluator.ann_file = f'{tmp_path}/data/annotations/instances_val2017.json'
    cfg.merge_from_dict(changes)
    cfg.work_dir, cfg.experiment_name = str(tmp_path / 'run'), uuid.uuid4().hex
    runner = RUNNERS.build(cfg)
    with pytest.raises(mm.RunError, match=rf'the data are not complete: .*{folder}.* does not exist'):
        runner.train()
    assert runner.iter == 0


def test_an_unreadable_image_stops_an_evaluation(build, folder):
    """Where a replacement would change the result."""
    damaged(folder / 'val' / 'b' / '1.png', 'truncated')
    options = {f'{name}_dataloader.dataset.data_root': str(folder) for name in ('train', 'val', 'test')}
    with pytest.raises(mm.RunError, match=r'val/b/1\.png cannot be read'):
        build(unreadable='skip', **options).test()


def test_a_sample_depends_on_seed_epoch_and_index_alone(folder):
    transform = dict(input_size=16, is_training=True, auto_augment='rand-m9-mstd0.5-inc1')
    for i in range(4):  # noise, so that every crop differs
        Image.fromarray(np.random.randint(0, 256, (30, 40, 3), dtype=np.uint8)).save(
            folder / 'train' / 'a' / f'{i}.png'
        )
    dataset = mm.GuardedDataset(mm.ImageFolder(folder, 'train', transform))

    def epoch(number, seed=0):
        sampler = mm.SeededSampler(dataset, dict(type='DefaultSampler', shuffle=True), seed)
        sampler.set_epoch(number)
        return {int(index): dataset[index]['inputs'] for index in sampler}

    first = epoch(3)
    random.random(), torch.rand(1), np.random.rand()
    again = epoch(3)
    assert list(first) == list(again) and all(torch.equal(value, again[i]) for i, value in first.items())
    for other in (epoch(4), epoch(3, seed=1)):
        assert not torch.equal(first[0], other[0])


def test_the_position_in_an_endless_sequence():
    dataset = list(range(7))
    cfg = dict(type='InfiniteSampler', shuffle=True)

    def draw(count, skip=0):
        sampler = iter(mm.SeededSampler(dataset, cfg, seed=5, skip=skip))
        return [(int(index), index.seed) for index, _ in zip(sampler, range(count), strict=False)]

    assert draw(30)[12:] == draw(18, skip=12)
    assert len({seed for _, seed in draw(30)}) == 30


def test_the_last_complete_checkpoint_is_found(build, tmp_path):
    build(**{'train_cfg.max_epochs': 2}).train()
    runner = build(resume=True, **{'train_cfg.max_epochs': 3})
    (tmp_path / f'.epoch_3.pth.{mm.current_run(tmp_path).name}.0123456789abcdef.tmp').write_bytes(b'half')
    content = (tmp_path / 'epoch_2.pth').read_bytes()
    (tmp_path / 'epoch_2.pth').write_bytes(content[: len(content) // 2])
    (tmp_path / 'epoch_x.pth').write_bytes(b'')
    runner.train()
    assert 'epoch_2.pth must be a' in ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert runner.epoch == 3 and not list(tmp_path.glob('*.tmp'))  # what a killed run left is gone, too
    for name in ('epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth'):
        (tmp_path / name).write_bytes(b'nothing')
    with pytest.raises(mm.RunError, match='none of the 3 checkpoints in .* can be read'):
        build(resume=True).train()


def test_a_checkpoint_of_mmengines_own_runner_resumes(build, tmp_path):
    """It holds histories, which pickle `getattr`."""
    Runner.from_cfg(build().cfg).train()
    file = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
    assert type(next(iter(file['message_hub']['log_scalars'].values()))).__name__ == 'HistoryBuffer'
    resumed = build(resume=True, **{'train_cfg.max_epochs': 2})
    resumed.train()
    assert resumed.iter == 4
    history = resumed.message_hub.get_scalar('train/loss')
    assert len(history.data[0]) == 4


class Evil:
    def __reduce__(self):
        return print, ('this code must not run',)


class Getattr:
    def __reduce__(self):
        return getattr, (mm.ImageFolder, '__init__')


@pytest.mark.parametrize('evil', [Evil(), Getattr()], ids=['code', 'getattr'])
def test_a_checkpoint_with_code_is_refused(evil, tmp_path, capsys):
    run = dict(meta={}, state_dict={}, message_hub={}, optimizer={}, evil=evil)
    torch.save(run, tmp_path / 'epoch_1.pth')
    with pytest.raises(ValueError, match=r'epoch_1\.pth cannot be read'):
        mm.read_run(tmp_path / 'epoch_1.pth')
    assert not capsys.readouterr().out


def test_a_config_inside_a_checkpoint_is_not_run(tmp_path):
    run = dict(
        meta=dict(config='raise SystemExit', epoch=1, iter=2, seed=0), state_dict={}, message_hub={}, optimizer={}
    )
    torch.save(run, tmp_path / 'epoch_1.pth')
    assert 'config' not in mm.read_run(tmp_path / 'epoch_1.pth')['meta']


def test_what_is_no_training_checkpoint_is_refused(build, tmp_path):
    torch.save(dict(state_dict={}), tmp_path / 'weights.pth')
    with pytest.raises(mm.RunError, match='must be one of a training, with meta, message_hub, optimizer'):
        build(resume=True, load_from=str(tmp_path / 'weights.pth')).train()
    build().train()
    wider = {'load_from': str(tmp_path / 'epoch_1.pth'), 'model.dims': 8}
    with pytest.raises(mm.RunError, match=r'epoch_1\.pth with another model \(model\.dims: not set -> 8\)\. --force'):
        build(resume=True, **wider).train()
    with pytest.raises(mm.RunError, match=r'epoch_1\.pth must be one of this model, got .* misshapen'):
        build(resume=True, force=True, **wider).train()


def test_a_resumption_without_checkpoints_begins(build, tmp_path):
    runner = build(resume=True)
    runner.train()
    assert runner.iter == 2
    assert 'starts from its beginning' in next(tmp_path.glob('*/*.log')).read_text()


def test_tensorboard_files_are_written(build, tmp_path):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    build().train()
    assert list(tmp_path.glob('*/vis_data/events.out.tfevents.*'))
