# SPDX-License-Identifier: Apache-2.0
"""`vssm erf` and `vssm cam`: the numbers they print, the pictures they leave, how they refuse bad input."""

import json
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from vssm.models.weights import write_safetensors
from vssm.ops import selective_scan
from vssm.tools import _pictures, cam, erf
from vssm.tools._common import UsageError
from vssm.tools.main import main

pytest.importorskip('matplotlib', reason="matplotlib is not installed: pip install '.[plot]'")

TEST_MODELS = ['test_vmamba', 'test_vmamba2d', 'test_spatial_mamba']
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class Toy(nn.Module):
    """A function on (1, 3, H, W) as a network, with the attributes of timm's that the commands use."""

    pretrained_cfg = IMAGENET

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward_intermediates(self, x, indices, intermediates_only):
        assert indices == 1 and intermediates_only
        return [self.function(x)]


def scan(orders, ndim):
    """A network that only scans a map of 8x8 patches, with the same step everywhere."""

    def function(x):
        x = F.avg_pool2d(x, 8).permute(0, 2, 3, 1)
        K, (_, height, width, E) = len(orders), x.shape
        ones = torch.ones(1, height, width, K, 1)
        A = -torch.ones(K, E, 1)
        dt = torch.full((1, height, width, K, E), 0.1)
        y = selective_scan(x, dt, A, ones, ones, ndim=ndim, orders=orders, softplus=False)
        return y.permute(0, 3, 1, 2)

    return Toy(function)


def white(size):
    return [torch.ones(3, size, size)]


def gaussian(size, row, column, width):
    y, x = torch.arange(size).unsqueeze(1) - row, torch.arange(size).unsqueeze(0) - column
    return torch.exp(-(x**2 + y**2) / (2 * width**2)).double()


@pytest.mark.parametrize('row, column', [(112, 112), (96, 96), (111.5, 103)], ids=str)
@pytest.mark.parametrize('width', [25, 60, 1000])
def test_a_round_field_has_no_cross(width, row, column):
    assert erf.measure_cross(gaussian(224, row, column, width), 32) == pytest.approx((1, 1, 1), rel=0.06)


def test_a_flat_field_has_no_cross():
    assert erf.measure_cross(torch.ones(250, 230), 32) == pytest.approx((1, 1, 1), rel=1e-9)


def test_a_blur_has_no_cross():
    def blur(x):
        x = F.avg_pool2d(x, 8)
        for _ in range(12):
            x = F.avg_pool2d(x, 3, stride=1, padding=1)
        return x

    field = erf.receptive_field(Toy(blur), white(136))
    assert erf.measure_cross(field, 8) == pytest.approx((1, 1, 1), rel=0.1)


@pytest.mark.parametrize('orders', [(0,), (0, 2), (0, 1, 2, 3)], ids=str)
def test_a_1d_scan_has_a_cross(orders):
    cross = erf.measure_cross(erf.receptive_field(scan(orders, ndim=1), white(136)), 8)
    assert cross.mean > 3 and cross.rim > 3


def test_a_2d_scan_has_no_cross_but_two_empty_quadrants():
    one, two = (erf.receptive_field(scan((0, 1, 2, 3), ndim), white(136)) for ndim in (1, 2))
    assert not two[:64, 72:].any() and not two[72:, :64].any()
    cross = erf.measure_cross(two, 8)
    assert cross.diagonals == float('inf')
    # Its brightness falls with the rows and columns to go, of which there are sqrt(2) times as many on a diagonal.
    assert cross.rim < erf.measure_cross(one, 8).rim / 5


def test_the_numbers_of_the_theory():
    """As docs/theory.md has them, in the section on numbers."""
    one, two = (erf.measure_cross(erf.receptive_field(scan((0, 1, 2, 3), ndim), white(136)), 8) for ndim in (1, 2))
    assert one == pytest.approx((9.2, 1376, 3.1), rel=0.02)
    assert two[:2] == pytest.approx((0.85, 0.98), rel=0.02)


def test_bands_are_measured_as_documented():
    """The row and the column are of brightness 5, at the rim of 10, the diagonals of 2 and 3, the rest of 1."""
    size, cell = 256, 32
    y = (torch.arange(size) - 127.5).unsqueeze(1).expand(size, size)
    x = y.T
    field = torch.ones(size, size)
    field[(x - y).abs() <= 16 * 2**0.5] = 2
    field[(x + y).abs() <= 16 * 2**0.5] = 3
    axes = (x.abs() <= 16) | (y.abs() <= 16)
    field[axes] = 5
    field[torch.hypot(x, y) <= 41] = 50  # where the bands overlap; it makes the middle the centre
    assert erf.measure_cross(field, cell) == pytest.approx((5 / 3, 5 / 3, 3 / 2))
    field[axes & (torch.hypot(x, y) > 127.5 - 32)] = 10
    assert erf.measure_cross(field, cell)[1:] == pytest.approx((10 / 3, 3 / 2))
    assert 5 / 3 < erf.measure_cross(field, cell).mean < 10 / 3
    assert erf.measure_cross(field.flip(0).T, cell) == pytest.approx(erf.measure_cross(field, cell))


def test_black_bands_have_no_quotient():
    field = gaussian(224, 111.5, 111.5, 5).where(gaussian(224, 111.5, 111.5, 5) > 1e-3, 0)
    assert all(number != number for number in erf.measure_cross(field, 32))


def test_a_cross_needs_six_cells():
    with pytest.raises(ValueError, match='field must be at least 192 wide and high, got .191, 256.'):
        erf.measure_cross(torch.ones(191, 256), 32)


def test_the_field_of_a_mean_is_what_it_covers():
    """The central one of 5x5 means covers 4x4 pixels, of a white and of a black image."""
    model = Toy(lambda x: F.avg_pool2d(x, 4) ** 2)  # whose gradient is negative for dark images
    field = erf.receptive_field(model, [torch.ones(3, 20, 20), torch.zeros(3, 20, 20)])
    expected = torch.zeros(20, 20)
    means = [[(value - m) / s for m, s in zip(*IMAGENET.values(), strict=True)] for value in (1, 0)]
    expected[8:12, 8:12] = sum(2 * abs(mean) / 16 for image in means for mean in image) / 2
    torch.testing.assert_close(field.float(), expected)


@pytest.mark.parametrize('name', [*TEST_MODELS, 'test_resnet'])
def test_networks_have_fields(name):
    model = timm.create_model(name).eval()
    field = erf.receptive_field(model, _pictures.sample_images(96)[:1])
    assert field.shape == (96, 96)
    assert field.isfinite().all() and (field >= 0).all() and field[24:56, 24:56].mean() > field.mean()


def arguments(*argv):
    from vssm.tools.main import make_parser

    args = make_parser().parse_args(list(argv))
    _pictures.check_picture_arguments(args)
    return args


def test_models_of_the_same_shapes_get_the_same_random_weights():
    models = {
        name: model for model, name, *_ in _pictures.build_models(arguments('erf', 'test_vmamba', 'test_vmamba2d'))
    }
    one, two = (models[name].state_dict() for name in ('test_vmamba', 'test_vmamba2d'))
    assert all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()
    ((other, _, weights, names),) = _pictures.build_models(arguments('erf', 'test_vmamba', '--seed', '1'))
    assert (weights, names) == ('random, seed 1', None) and not torch.equal(one['head.fc.weight'], other.head.fc.weight)


def test_checkpoints_go_to_the_models_in_turn(tmp_path):
    path = tmp_path / 'mine.pth'
    torch.save({'model': timm.create_model('test_vmamba2d', num_classes=5).state_dict()}, path)
    argv = ('erf', 'test_vmamba', 'test_vmamba2d', '--checkpoint', '-', '--checkpoint', str(path))
    built = list(_pictures.build_models(arguments(*argv)))
    assert [built[i][1:] for i in (0, 1)] == [
        ('test_vmamba', 'random, seed 0', None),
        ('test_vmamba2d', 'mine.pth', [f'class {i}' for i in range(5)]),
    ]
    model = built[1][0]
    assert torch.equal(model.head.fc.weight, torch.load(path)['model']['head.fc.weight']) and not model.training


def test_models_have_their_other_names():
    names = ('2dvmamba_tiny', 'vmamba_tiny_s1l8', 'vmamba_tiny.in1k', 'resnet18')
    assert arguments('erf', *names).models == ['vmamba2d_tiny', 'vmamba_tiny', 'vmamba_tiny.in1k', 'resnet18']


def test_images_of_every_mode_are_read(tmp_path):
    for mode in ('RGB', 'RGBA', 'L', 'P', '1'):
        Image.new(mode, (50, 40)).save(tmp_path / f'{mode}.png')
    Image.new('RGB', (33, 90), 'white').save(tmp_path / 'z.JPEG')
    (tmp_path / 'notes.txt').touch()
    images = _pictures.read_images(tmp_path, count=100, size=32)
    assert len(images) == 6 and all(image.shape == (3, 32, 32) for image in images)
    assert images[-1].min() > 0.99
    assert len(_pictures.read_images(tmp_path, count=4, size=32)) == 4


def test_what_is_transparent_lies_on_white(tmp_path):
    Image.new('RGBA', (40, 40), (255, 0, 0, 0)).save(tmp_path / 'clear.png')
    assert _pictures.read_image(tmp_path / 'clear.png', 32).min() > 0.99


def test_pictures_of_more_bits(tmp_path):
    Image.new('I;16', (40, 40), 0x80FF).save(tmp_path / 'deep.png')
    assert (255 * _pictures.read_image(tmp_path / 'deep.png', 32) - 0x80).abs().max() < 0.01
    Image.new('F', (40, 40), 0.5).save(tmp_path / 'float.tif')
    with pytest.raises(UsageError, match='float.tif must be an image .* got floating-point numbers'):
        _pictures.read_image(tmp_path / 'float.tif', 32)


def test_a_size_that_a_network_does_not_take(tmp_path, capsys):
    Image.new('RGB', (64, 64), 'red').save(tmp_path / 'photo.png')
    output = ['--output', str(tmp_path / 'cam.png')]
    assert main(['cam', 'swin_tiny_patch4_window7_224', str(tmp_path / 'photo.png'), '--size', '64', *output]) == 2
    assert '--size must fit swin_tiny_patch4_window7_224, got 64' in capsys.readouterr().err


@pytest.mark.parametrize('size', [64, 512])
def test_the_photographs_are_cut_into_different_crops(size):
    images = _pictures.sample_images(size)
    count = 12 if size < 427 else 6
    assert len(images) == count and all(image.shape == (3, size, size) for image in images)
    assert len({image.sum().item() for image in images}) == count


def test_erf_prints_numbers_and_leaves_a_picture(tmp_path, capsys, monkeypatch):
    output, photographs = tmp_path / 'fields.png', _pictures.sample_images(192)
    monkeypatch.setattr(erf, 'sample_images', lambda size: photographs[::6])
    assert main(['erf', 'test_vmamba2d', 'test_resnet', '--size', '192', '--output', str(output)]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if 'random, seed 0' in line}
    assert list(rows) == ['test_vmamba2d', 'test_resnet']
    assert '2 images, 192x192' in out and list(tmp_path.iterdir()) == [output]
    with Image.open(output) as picture:
        assert picture.format == 'PNG' and picture.width > 700


def test_erf_takes_images_of_a_folder(tmp_path, capsys):
    for i in range(3):
        Image.effect_noise((200, 220), 30).save(tmp_path / f'{i}.png')
    output = tmp_path / 'out.png'
    argv = ['erf', 'test_vmamba', '--size', '192', '--images', str(tmp_path), '--count', '1', '--output', str(output)]
    assert main(argv) == 0
    assert '1 images, 192x192' in capsys.readouterr().out and output.is_file()


def test_a_picture_that_cannot_be_written_leaves_the_former_one(tmp_path, monkeypatch):
    fig = erf.draw([torch.rand(64, 64)], [8], ['title'], 1)
    path = tmp_path / 'a.png'
    _pictures.save_figure(fig, path)
    before = path.read_bytes()

    def write_bytes(path, data):
        with open(path, 'wb') as file:
            file.write(data[:9])
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('pathlib.Path.write_bytes', write_bytes)
    with pytest.raises(UsageError, match='a.png cannot be written: .*No space left'):
        _pictures.save_figure(fig, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def grad_cam():
    return pytest.importorskip('pytorch_grad_cam', reason="grad-cam is not installed: pip install '.[plot]'")


class Colours(nn.Module):
    """A classifier of three colours: their means over patches of 8x8 are its features, over the image its logits."""

    pretrained_cfg = IMAGENET
    feature_info = [dict(module='patches')]

    def __init__(self, output_fmt):
        super().__init__()
        self.output_fmt = output_fmt
        self.patches = nn.Conv2d(3, 3, kernel_size=8, stride=8, groups=3, bias=False)
        nn.init.constant_(self.patches.weight, 1 / 64)
        if output_fmt == 'NHWC':
            self.patches.register_forward_hook(lambda module, args, out: out.permute(0, 2, 3, 1))

    def forward(self, x):
        x = self.patches(x)
        return x.mean((2, 3)) if self.output_fmt == 'NCHW' else x.mean((1, 2))


@pytest.mark.parametrize('output_fmt', ['NCHW', 'NHWC'])
def test_a_map_shows_where_the_class_is(output_fmt, grad_cam):
    image = torch.zeros(3, 64, 64)
    image[0, 40:56, 8:24] = 1  # red below on the left,
    image[2, :32, 32:] = 1  # and more of blue above on the right
    for class_index, (row, column) in {0: (48, 16), 2: (16, 48), None: (16, 48)}.items():
        activation, found, probability = cam.activation_map(Colours(output_fmt), image, class_index)
        assert activation.shape == (64, 64) and activation.min() == 0 and activation.max() == pytest.approx(1)
        assert activation[row, column] > 0.9 and activation[48, 48] < 0.1
        assert found == (2 if class_index is None else class_index) and 0 < probability < 1


@pytest.mark.parametrize('name', TEST_MODELS[1:])
def test_a_map_is_grad_cam(name, grad_cam):
    """The last stage's channels, weighted by their mean gradients, where the sum is positive."""
    model, image = timm.create_model(name).eval(), torch.rand(3, 96, 96)
    activation, class_index, probability = cam.activation_map(model, image, 7)

    features = model.forward_features(_pictures.normalize(model, image)[None])
    logits = model.forward_head(features)
    (grad,) = torch.autograd.grad(logits[0, 7], features)
    expected = (grad.mean((1, 2), keepdim=True) * features).sum(-1).relu().detach()
    expected = (expected - expected.min()) / expected.max()
    expected = F.interpolate(expected[None], (96, 96), mode='bilinear')[0, 0]
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    assert class_index == 7 and probability == pytest.approx(logits.softmax(-1)[0, 7].item(), rel=1e-4)
    torch.testing.assert_close(activation, expected, rtol=0, atol=1e-3)


def test_cam_draws_models_side_by_side(tmp_path, capsys, grad_cam):
    Image.effect_noise((80, 100), 50).save(tmp_path / 'photo.png')
    output = tmp_path / 'cam.png'
    argv = [
        'cam',
        *TEST_MODELS[1:],
        str(tmp_path / 'photo.png'),
        '--class',
        '5',
        '--size',
        '64',
        '--output',
        str(output),
    ]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert [line.split(', ')[0] for line in out.splitlines()[:2]] == TEST_MODELS[1:] and out.count('class 5,') == 2
    assert sorted(tmp_path.iterdir()) == [output, tmp_path / 'photo.png']
    with Image.open(output) as picture:
        assert picture.format == 'PNG' and picture.width > 800


@pytest.mark.parametrize('name', ['test_vmamba', 'test_resnet'])
def test_cam_names_the_classes_of_a_checkpoint(name, tmp_path, capsys, grad_cam):
    Image.effect_noise((64, 64), 50).save(tmp_path / 'photo.png')
    model = timm.create_model(name, num_classes=2)
    metadata = dict(model=name, model_args='{"num_classes": 2}', classes='["kea", "kiwi"]')
    write_safetensors(tmp_path / 'mine.safetensors', model.state_dict(), metadata)
    if name == 'test_resnet':  # whose file timm reads, and fits to as many classes as it has
        metadata['classes'] = json.dumps([f'bird {i}' for i in range(1000)])
        write_safetensors(tmp_path / 'mine.safetensors', timm.create_model(name).state_dict(), metadata)
    argv = ['cam', name, str(tmp_path / 'photo.png'), '--checkpoint', str(tmp_path / 'mine.safetensors')]
    assert main([*argv, '--class', '1', '--size', '64', '--output', str(tmp_path / 'cam.png')]) == 0
    assert f'class 1 ({"kiwi" if name == "test_vmamba" else "bird 1"}), probability' in capsys.readouterr().out


@pytest.mark.parametrize(
    'argv, said',
    [
        (['erf', 'test_vmmaba'], ("got 'test_vmmaba'", "Did you mean 'test_vmamba'")),
        (['erf', 'test_vmamba', '--size', '31'], ('--size must be at least 32, got 31',)),
        (['erf', 'test_vmamba', '--size', '160'], ('--size must be at least 192 for test_vmamba, got 160',)),
        (['erf', 'swin_tiny_patch4_window7_224', '--size', '256'], ('--size must fit swin_tiny', 'got 256')),
        (['erf', 'test_vmamba', '--images', 'nowhere'], ('--images must be a folder, got nowhere',)),
        (['erf', 'test_vmamba', '--images', '.'], ('--images must hold images', '.png', 'got . without one')),
        (['erf', 'test_vmamba', '--images', '.', '--count', '0'], ('--count must be at least 1, got 0',)),
        (['erf', 'test_vmamba', '--checkpoint', 'no.pth'], ('--checkpoint must be a file, got no.pth',)),
        (
            ['erf', 'test_vmamba', 'test_vmamba2d', '--checkpoint', '-'],
            ('--checkpoint must be given once for each of the 2 models', 'got 1'),
        ),
        (['erf', 'test_vmamba', '--output', 'erf.jpg'], ('--output must be a .png file', 'got erf.jpg')),
        (['erf', 'test_vmamba', '--output', 'no/erf.png'], ('in a folder that exists, got no/erf.png',)),
        (['erf', 'vmamba2d_tiny', '--pretrained'], ('vmamba2d_tiny: no weights are published',)),
        (['cam', 'test_vmamba', 'no.png'], ('no.png must be an image that Pillow reads', 'No such file')),
        (['cam', 'test_vmamba', 'no.png', '--size', '0'], ('--size must be at least 32, got 0',)),
        (['cam', 'test_vmmaba', 'no.png'], ("got 'test_vmmaba'", "Did you mean 'test_vmamba'")),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_bad_input_of_pictures_gives_one_sentence(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f'vssm {argv[0]}: ') and captured.err.count('\n') == 1, captured.err
    assert all(part in captured.err for part in said), captured.err
    assert not captured.out.strip() and not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    (folder / 'notes.png').write_text('no picture')
    Image.new('RGB', (64, 64)).save(folder / 'image.png')
    torch.save(timm.create_model('test_vmamba', in_chans=1).state_dict(), folder / 'grey.pth')
    torch.save(timm.create_model('test_spatial_mamba').state_dict(), folder / 'other.pth')
    return folder


@pytest.mark.parametrize(
    'argv, said',
    [
        (['cam', 'test_vmamba', 'notes.png'], ('notes.png must be an image that Pillow reads',)),
        (['cam', 'test_vmamba', 'image.png', '--class', '1000'], ('--class must be one of 0 to 999, got 1000',)),
        (
            ['cam', 'test_vit', 'image.png', '--size', '160'],
            ('with feature maps, got VisionTransformer, which has tokens',),
        ),
        (['erf', 'test_vmamba', '--checkpoint', 'notes.png'], ('checkpoint notes.png must be a .safetensors file',)),
        (['erf', 'test_vmamba', '--checkpoint', 'grey.pth'], ('images of 3 channels, got test_vmamba with grey.pth',)),
        (['erf', 'test_vmamba', '--checkpoint', 'other.pth'], ('checkpoint must hold', 'test_vmamba')),
        (['erf', 'test_resnet', '--checkpoint', 'notes.png'], ()),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_bad_files_give_one_sentence_and_exit_code_2(argv, said, capsys, bad_files, monkeypatch, grad_cam):
    monkeypatch.chdir(bad_files)
    before = sorted(bad_files.iterdir())
    assert main([*argv, '--output', 'out.png']) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f'vssm {argv[0]}: ') and captured.err.count('\n') == 1, captured.err
    assert all(part in captured.err for part in said), captured.err
    assert not captured.out.strip() and sorted(bad_files.iterdir()) == before


@pytest.mark.parametrize(
    'missing, argv, extra',
    [
        ('matplotlib', ['erf', 'test_vmamba'], 'plot'),
        ('sklearn', ['erf', 'test_vmamba'], 'demo'),
        ('pytorch_grad_cam', ['cam', 'test_vmamba', 'image.png'], 'plot'),
    ],
)
def test_a_missing_package_is_named(missing, argv, extra, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (64, 64)).save('image.png')
    for module in [missing, *(name for name in sys.modules if name.startswith(f'{missing}.'))]:
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails as if it were not installed
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert f'needs the package {missing}' in error and f'`pip install ".[{extra}]"`' in error
