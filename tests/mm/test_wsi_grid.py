# SPDX-License-Identifier: Apache-2.0
"""The grid of each slide: its step, pieces of tissue with grids of their own, and patches drawn where they lie."""

import json
import re
import sys

import pytest
import torch
from PIL import Image
from processes import options

from vssm.models.mil import create_mil_model, to_cells
from vssm.models.mil.grid import find_step, place
from vssm.tools._memory import peak_growth
from vssm.tools.main import main

h5py = pytest.importorskip('h5py', reason="h5py is not installed: pip install '.[wsi]'")
pytest.importorskip('mmengine', reason="mmengine is not installed: pip install '.[wsi]'")

from vssm.models.mil.slides import read_slide  # noqa: E402
from vssm.models.mm import RunError  # noqa: E402
from vssm.models.mm.wsi import SlideClassifier, SlideDataset  # noqa: E402
from vssm.tools import wsi_heatmap  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread')
WIDTH = 6


def run(*argv):
    return main([str(argument) for argument in argv])


def rectangle(rows, columns, step=1, x=0, y=0):
    """Coordinates of a full grid whose first patch lies at (x, y), row by row."""
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1)
    return (cells * step + torch.tensor([x, y])).round().long()


def write(path, coords, features=None, **attributes):
    with h5py.File(path, 'w') as file:
        file['features'] = (torch.randn(len(coords), WIDTH) if features is None else features).numpy()
        file['coords'] = coords.numpy()
        file['coords'].attrs.update(attributes)
    return path


def trident(size, size_at_0, overlap=0, **more):
    return dict(patch_size=size, patch_size_level0=size_at_0, overlap=overlap, **more)


def clam(size, downsample):
    return dict(patch_size=size, patch_level=1, downsample=(downsample, downsample))


# ---- the step --------------------------------------------------------------------------------------------------------

SCATTERED = (
    torch.rand(60, 60, generator=torch.Generator().manual_seed(0)) < 0.1
).nonzero()  # many more gaps than pairs
ONE = torch.zeros(1, 2).long()
STEPS = {  # cells, their distance, where the first lies, attributes; and the step and the first cell that come out
    '20x of a 40x slide': (rectangle(4, 4), 1024, (0, 0), trident(512, 1024), 1024, (0, 0)),
    'no attributes': (rectangle(4, 4), 1024, (0, 0), {}, 1024, (0, 0)),
    'a level of CLAM': (rectangle(4, 4), 1024, (1300, 900), clam(256, 4.0), 1024, (1, 0)),
    'overlap': (rectangle(4, 4), 768, (0, 0), trident(512, 1024, 128), 768, (0, 0)),
    'overlap by CLAM, which does not say it': (rectangle(4, 4), 128, (0, 0), clam(256, 1.0), 128, (0, 0)),
    'physical size': (rectangle(3, 160), 519, (0, 600), {}, 519, (0, 1)),
    'physical size of no whole pixels': (rectangle(3, 400), 518.6, (0, 600), {}, 519, (0, 1)),
    'small patches': (rectangle(5, 7), 256, (0, 0), {}, 256, (0, 0)),
    'scattered': (SCATTERED, 224, (100, 300), {}, 224, (0, 1)),
    'one column': (rectangle(9, 1), 256, (70, 0), {}, 256, (0, 0)),
    'one patch': (ONE, 1, (2100, 1030), trident(256, 1024), 1024, (2, 1)),
    'one patch of CLAM': (ONE, 1, (2100, 1030), clam(256, 4.0), 1024, (2, 1)),
    'one patch of which nothing is known': (ONE, 1, (2100, 1030), {}, None, None),
}


@pytest.mark.parametrize('name', STEPS)
def test_the_step_of_each_slide(name, tmp_path):
    """Each patch comes into its cell, whichever the order of the patches; whole steps leave coordinates as they are."""
    cells, distance, corner, attributes, step, first = STEPS[name]
    cells = cells[torch.randperm(len(cells))]
    coords = (cells * distance + torch.tensor(corner)).round().long()
    bag = read_slide(write(tmp_path / 's.h5', coords, **attributes))
    assert bag.step == step and not bag.left_out and torch.equal(bag.pixels, coords)
    assert torch.equal(bag.coords, coords) == isinstance(distance, int)
    if step is not None:
        assert torch.equal(bag.coords // step, cells + torch.tensor(first))


def test_patches_of_a_whole_slide_have_all_the_attention(tmp_path):
    """The default network on 4 x 4 patches that are 1,024 pixels apart: 16 tokens, as those of patches 512 apart."""
    bag = read_slide(write(tmp_path / 's.h5', rectangle(4, 4, 1024), **trident(512, 1024)))
    model = create_mil_model('mamba2d_mil', in_dim=WIDTH, dim=16).eval()
    assert len(model.forward_features(bag.features, bag.coords, bag.step)[0]) == 16
    torch.testing.assert_close(model.attention(bag.features, bag.coords, steps=[bag.step]).sum(), torch.tensor(1.0))
    assert torch.equal(model(bag.features, bag.coords, steps=[1024]), model(bag.features, rectangle(4, 4, 512)))


@pytest.mark.parametrize(
    'coords, attributes, said',
    [
        (rectangle(4, 4, 1024), trident(512, 512), 'must be .* 512 pixels by patch_size_level0 and overlap, got 1024'),
        (rectangle(4, 4, 256), trident(512, 512), '.*512 pixels .* got 256'),
        (rectangle(4, 4, 512), trident(256, 512, 64), '.*384 pixels .* got 512'),
        (rectangle(3, 160, 519), trident(512, 512), '.*512 pixels .* got 519'),
    ],
)
def test_attributes_that_contradict_the_distances_are_refused(coords, attributes, said, tmp_path):
    with pytest.raises(ValueError, match=f's.h5: the distance of neighbouring patches {said}'):
        read_slide(write(tmp_path / 's.h5', coords, **attributes))


@pytest.mark.parametrize('bounds', [dict(level0_width=8000, level0_height=3000), dict(level0_width=0)])
def test_y_before_x_is_refused_where_the_file_knows_the_slide(bounds, tmp_path):
    coords = rectangle(5, 15, 512)
    assert read_slide(write(tmp_path / 's.h5', coords, **trident(512, 512, **bounds))).step == 512
    turned = write(tmp_path / 't.h5', coords.flip(1), **trident(512, 512, **bounds))
    if bounds['level0_width']:
        with pytest.raises(
            ValueError, match=r't.h5: coords row 6 must lie on .* 8000 x 3000 .* got \(0, 3072\): is y before x'
        ):
            read_slide(turned)
    else:
        assert read_slide(turned).step == 512


@pytest.fixture
def cohort(tmp_path):
    """A folder with slides of steps of 256 and 512 pixels, whose features are the same in pairs, and its labels.csv."""
    lines = ['slide_id,label,split']
    for i in range(12):
        step = (256, 512)[i % 2]
        torch.manual_seed(i // 2)
        write(tmp_path / f's{i}.h5', rectangle(3, 4, step, 600, 700), torch.randn(12, WIDTH))
        lines.append(f's{i},{"ab"[i // 2 % 2]},{("train", "train", "val", "test")[i // 3]}')
    (tmp_path / 'labels.csv').write_text('\n'.join(lines))
    return tmp_path


def test_a_cohort_of_two_spacings(cohort, capsys):
    """No single size fits it; each slide has its own, in the check, the data set and the network."""
    assert run('wsi-check', cohort / 'labels.csv', cohort) == 0
    rows = [re.split('  +', line) for line in capsys.readouterr().out.splitlines()]
    assert ['slides with patches 256 pixels apart', '6'] in rows and [
        'slides with patches 512 pixels apart',
        '6',
    ] in rows
    for size, other in ((256, 512), (512, 256)):
        assert run('wsi-check', cohort / 'labels.csv', cohort, '--patch-size', size) == 2
        said = f"slide 's[0-9]+': patch_size must be the step of the slide's patches, {other} pixels, got {size}"
        assert len(re.findall(said, capsys.readouterr().out)) == 6

    samples = [*SlideDataset(str(cohort), 'labels.csv', 'train')]
    assert [sample['inputs']['steps'] for sample in samples] == [[256], [512]] * 3
    model = SlideClassifier('mamba2d_mil', in_dim=WIDTH, dim=16, crop=True).eval()
    logits = model([sample['inputs'] for sample in samples])
    assert torch.equal(logits[::2], logits[1::2]) and not torch.equal(logits[0], logits[2])
    fixed = SlideClassifier('mamba2d_mil', in_dim=WIDTH, dim=16, patch_size=512)
    with pytest.raises(RunError, match="s0: patch_size must be the step of the slide's patches, 256 pixels, got 512"):
        fixed(**{key: [sample[key] for sample in samples] for key in ('inputs', 'data_samples')})


def test_slides_of_a_case_have_steps_of_their_own():
    model = create_mil_model('mamba2d_mil', in_dim=WIDTH, dim=16).eval()
    features = torch.randn(8, WIDTH)
    coords = torch.cat([rectangle(2, 2, 256), rectangle(2, 2, 512)])
    mixed = model(features, coords, lengths=[4, 4], steps=[256, None])
    assert torch.equal(mixed, model(features, rectangle(2, 2, 512).repeat(2, 1), lengths=[4, 4]))
    assert torch.equal(
        model.attention(features, coords, [4, 4], [256, 512]),
        model.attention(features, rectangle(2, 2, 512).repeat(2, 1), [4, 4]),
    )
    for steps in ([256], [256, 0]):
        with pytest.raises(ValueError, match='steps must be 2 numbers from 1 up, or None'):
            model(features, coords, lengths=[4, 4], steps=steps)


def test_mixed_cohorts_train(cohort, tmp_path):
    changes = {'model.in_dim': WIDTH, 'model.dim': 16, 'train_cfg.max_epochs': 1, 'num_threads': 1, 'device': 'cpu'}
    for split in ('train', 'val', 'test'):
        changes |= {f'{split}_dataloader.num_workers': 0}
        changes |= {} if split == 'test' else {f'{split}_dataloader.persistent_workers': False}
    arguments = ['--data-root', cohort, '--work-dir', tmp_path / 'run', *options(**changes)]
    assert run('train', 'wsi/classification', *arguments) == 0


# ---- pieces of tissue ------------------------------------------------------------------------------------------------


def pieces(second_x):
    """A piece of 5 x 5 patches at (0, 0), and one of 3 x 3 whose first patch lies at (second_x, 200)."""
    return torch.cat([rectangle(5, 5, 512), rectangle(3, 3, 512, second_x, 200)])


@pytest.mark.parametrize(
    'second_x, column, left_out',
    [(2560, 5, 0), (2760, 5, 0), (2860, 6, 0), (3000, 6, 0), (2400, 5, 0), (2300, 4, 3)],
)
def test_a_piece_of_tissue_is_placed_by_its_own_phase(second_x, column, left_out, tmp_path):
    """In the cells that it lies on most; where two patches share one, that at its place stays."""
    coords = pieces(second_x)
    bag = read_slide(write(tmp_path / 's.h5', coords))
    cells = bag.coords // bag.step
    assert bag.step == 512 and bag.left_out == left_out
    assert torch.equal(cells[:25], rectangle(5, 5))
    expected = rectangle(3, 3, 1, column, 0)
    assert torch.equal(cells[25:], expected[expected[:, 0] > 4] if left_out else expected)
    assert torch.equal(bag.features, torch.from_numpy(h5py.File(tmp_path / 's.h5')['features'][()])[bag.kept])
    to_cells(bag.coords, bag.step)
    values = bag.spread(torch.arange(float(len(cells))))
    assert values.shape == (34,) and values.isnan().sum() == left_out
    assert values[25:].isnan().nonzero().flatten().tolist() == [0, 3, 6][:left_out]


def test_the_patch_nearer_to_the_cells_centre_is_kept():
    """Of three small pieces that meet in one cell; the grid is that of the large one."""
    coords = torch.cat([rectangle(6, 6, 512), torch.tensor([[3272, 112], [3172, 50], [3072 + 200, 0]])])
    placed, kept = place(coords, 512)
    assert kept.tolist() == [*range(36), 37]
    assert placed[-1].tolist() == [3072, 0]


def test_a_piece_before_the_grid_of_the_others_gets_a_column():
    coords = torch.cat([rectangle(3, 3, 512, 900, 0), rectangle(2, 1, 512, 100, 0)])
    placed, kept = place(coords, 512)
    cells = placed // 512
    assert len(kept) == 11 and cells[:, 0].min() == 0
    assert torch.equal(cells[:9] - cells[0], rectangle(3, 3))
    assert torch.equal(cells[9:] - cells[0], rectangle(2, 1, 1, -2, 0))


@pytest.mark.parametrize(
    'coords',
    [
        torch.cat([rectangle(3, 3, 512), rectangle(1, 1, 1, 512, 512)]),
        torch.cat([rectangle(3, 3, 512), rectangle(3, 3, 512, 100, 0)]),
    ],
    ids=['the same coordinates', 'a slide cut twice'],
)
def test_two_patches_in_a_cell_stay_an_error(coords):
    placed, kept = place(coords, 512)
    assert torch.equal(placed, coords) and kept.tolist() == list(range(len(coords)))
    with pytest.raises(ValueError, match='one patch into a cell of 512 pixels'):
        to_cells(placed, 512)


def test_ragged_pieces_keep_their_form():
    """Pieces as CLAM finds them, at coordinates that are multiples of 64, on one grid: each is what it was, moved."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        coords, sizes = [], []
        for i in range(6):
            mask = torch.rand(9, 12, generator=generator) < 0.8
            corner = torch.randint(0, 30, (2,), generator=generator) * 64 + torch.tensor([i % 3 * 9000, i // 3 * 7000])
            coords.append(mask.nonzero().flip(1) * 512 + corner)
            sizes.append(len(coords[-1]))
        step = find_step(torch.cat(coords))
        placed, kept = place(torch.cat(coords), step)
        assert step == 512 and len(kept) == sum(sizes)
        for before, after in zip(coords, placed.split(sizes), strict=True):
            moved = after - before
            assert (moved == moved[0]).all()
        spread = (placed - torch.cat(coords)).amax(0) - (placed - torch.cat(coords)).amin(0)
        assert (spread <= 512).all()


@pytest.fixture
def overlapping(tmp_path):
    """A folder with a slide of two pieces, of which three patches share cells, and its labels.csv."""
    write(tmp_path / 's.h5', pieces(2300))
    (tmp_path / 'labels.csv').write_text('slide_id,label,split\ns,a,train\n')
    return tmp_path


def test_patches_that_are_left_out_are_counted(overlapping, capsys, monkeypatch):
    assert run('wsi-check', overlapping / 'labels.csv', overlapping) == 0
    out = capsys.readouterr().out
    assert re.search(r'^patches left out, \D* 3\nslides with patches left out +1$', out, re.MULTILINE)
    said = []
    monkeypatch.setattr('vssm.models.mm.wsi_data.print_log', lambda text, *rest: said.append(text))
    dataset = SlideDataset(str(overlapping), 'labels.csv', 'train')
    for _ in range(2):
        assert dataset[0]['inputs']['lengths'] == [31] and len(dataset[0]['inputs']['coords']) == 31
    assert len(said) == 1 and 's.h5: 3 of 34 patches are left out' in said[0]


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is read from /proc')
@pytest.mark.parametrize('layout', ['h5', 'h5 of halves', 'pt'])
def test_a_bag_is_read_within_its_own_size(layout, tmp_path):
    """The arrays of one slide are there once, from the file to what the data set gives."""
    features, coords = torch.ones(20_000, 1024), rectangle(100, 200, 512)
    if layout == 'pt':
        torch.save(dict(features=features, coords=coords), tmp_path / 's.pt')
    else:
        write(tmp_path / 's.h5', coords, features.half() if layout == 'h5 of halves' else features)
    (tmp_path / 'labels.csv').write_text('slide_id,label,split\ns,a,train\n')
    dataset = SlideDataset(str(tmp_path), 'labels.csv', 'train')
    assert torch.equal(dataset[0]['inputs']['features'], features)
    size = features.nbytes
    del features
    assert size <= peak_growth(lambda: dataset[0], torch.device('cpu')) < size + 15e6


def test_large_numbers_whose_sum_overflows_are_finite(tmp_path):
    features = torch.full((4, WIDTH), 3e38)
    assert torch.equal(read_slide(write(tmp_path / 's.h5', rectangle(2, 2, 512), features)).features, features)


# ---- the heat map ----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    from safetensors.torch import save_file

    def save(**more):
        args = dict(in_dim=WIDTH, dim=16, **more)
        torch.manual_seed(0)
        tensors = dict(create_mil_model('mamba2d_mil', **args).state_dict())
        save_file(tensors, tmp_path / 'best.safetensors', dict(model='mamba2d_mil', model_args=json.dumps(args)))
        return tmp_path / 'best.safetensors'

    return save


def test_a_heat_map_draws_each_patch_where_it_lies(overlapping, checkpoint, capsys, monkeypatch):
    """The second piece too, which has another phase; what shares a cell stays blank, and the count is said."""
    figures = []
    monkeypatch.setattr(wsi_heatmap, 'save_figure', lambda figure, path: figures.append(figure))
    path = checkpoint()
    assert run('wsi-heatmap', path, overlapping / 's.h5', '--output', overlapping / 'map.png') == 0
    assert '3 of 34 patches, left out of the grid, are blank' in capsys.readouterr().out.replace('\n', ' ')
    (squares,) = figures[0].axes[0].collections
    corners = [tuple(path.vertices.min(0)) + tuple(path.vertices.max(0)) for path in squares.get_paths()]
    bag = read_slide(overlapping / 's.h5')
    assert corners == [(x, y, x + 512, y + 512) for x, y in pieces(2300)[bag.kept].tolist()]
    weights = wsi_heatmap.load_model(path).attention(bag.features, bag.coords, steps=[512])
    torch.testing.assert_close(torch.tensor(squares.get_array()), weights / weights.mean(), rtol=0.5, atol=0)
    order = (weights / weights.mean()).argsort()
    assert (torch.tensor(squares.get_array())[order].diff() >= 0).all()


def test_the_heat_map_takes_the_slides_step(checkpoint, tmp_path, capsys):
    slide = write(tmp_path / 's.h5', rectangle(4, 4, 1024))
    command = ['wsi-heatmap', checkpoint(), slide, '--output', tmp_path / 'map.png']
    assert run(*command) == 0 and (tmp_path / 'map.png').exists()
    capsys.readouterr()
    assert run(*command, '--patch-size', 512) == 2
    assert "the step of the slide's patches, 1024 pixels, got 512" in capsys.readouterr().err
    checkpoint(patch_size=256)
    assert run(*command) == 2
    assert '1024 pixels, got 256' in capsys.readouterr().err


def test_a_slide_that_is_too_small_for_the_patches_is_refused(checkpoint, tmp_path, capsys, monkeypatch):
    """As that of another slide, or a level of it, which would show patches where they do not lie."""
    features = write(tmp_path / 's.h5', rectangle(2, 6, 512))
    monkeypatch.setattr(wsi_heatmap, 'read_thumbnail', lambda *_: ((Image.new('RGB', (25, 20)), (2500, 2000)), ''))
    command = ['wsi-heatmap', checkpoint(), features, '--slide', 's.svs', '--output', tmp_path / 'map.png']
    assert run(*command) == 2
    error = capsys.readouterr().err.replace('\n', ' ')
    assert '(2560, 512), got s.svs of (2500, 2000) pixels' in error and not (tmp_path / 'map.png').exists()
