# SPDX-License-Identifier: Apache-2.0
"""Features of slides as each tool writes them: every layout reads the same, and what is none is named."""

import json
import re
import sys
import tracemalloc
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vssm.models.mil import create_mil_model
from vssm.tools.main import main

h5py = pytest.importorskip('h5py', reason="h5py is not installed: pip install '.[wsi]'")
pytest.importorskip('mmengine', reason="mmengine is not installed: pip install '.[wsi]'")

from vssm.models.mil.slides import SlideFolder, count_patches, read_slide  # noqa: E402
from vssm.models.mm import RunError  # noqa: E402
from vssm.models.mm.wsi import SlideClassifier, SlideDataset  # noqa: E402
from vssm.tools import wsi_heatmap  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread')
WIDTH = 6
FEATURES = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(0)).half().float()  # exact in float16
CELLS = torch.cartesian_prod(torch.arange(3), torch.arange(4)).flip(1)
COORDS = 512 * CELLS
TRIDENT = dict(patch_size=256, patch_size_level0=512, overlap=0, level0_width=4096, level0_height=2048)


def h5(path, attributes=None, of_coords=None, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, 'w') as file:
        for key, array in arrays.items():
            file[key.replace('__', '/')] = array.numpy() if isinstance(array, torch.Tensor) else array
        file.attrs.update(attributes or {})
        if of_coords:
            file['coords'].attrs.update(of_coords)


def pt(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def npy(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array.numpy())


# ---- layouts ---------------------------------------------------------------------------------------------------------


def clam(folder):
    h5(folder / 's.h5', features=FEATURES, coords=COORDS.int())


def clam_folders(folder):
    h5(folder / 'h5_files/s.h5', features=FEATURES, coords=COORDS)
    pt(folder / 'pt_files/s.pt', FEATURES)


def clam_features_apart(folder):
    h5(folder / 'h5_files/s.h5', of_coords=dict(patch_size=512, downsample=(1.0, 1.0)), coords=COORDS.double())
    pt(folder / 'pt_files/s.pt', FEATURES)


def clam_beside(folder):
    h5(folder / 's.h5', coords=COORDS)
    pt(folder / 's.pt', FEATURES)


def trident(folder):
    """A job folder, with the patches that the features are of, and features of the whole slide."""
    job = folder / '20x_256px_0px_overlap'
    h5(job / 'features_uni_v1/s.h5', of_coords=TRIDENT, features=FEATURES, coords=COORDS)
    h5(job / 'patches/s_patches.h5', of_coords=TRIDENT, coords=COORDS)
    h5(job / 'slide_features_titan/s.h5', features=FEATURES[0], coords=COORDS)


def trident_old(folder):
    h5(folder / 's.h5', of_coords=TRIDENT, features=FEATURES[None], coords=COORDS)


def trident_pt(folder):
    pt(folder / 'features_uni_v1/s.pt', FEATURES)
    h5(folder / 'patches/s_patches.h5', of_coords=TRIDENT, coords=COORDS)


def atlaspatch(folder):
    coords = torch.cat([COORDS, torch.tensor([256, 256, 1]).expand(12, 3)], 1).int()
    passports = np.array([b's__x0_y0'] * 12)
    h5(folder / 'patches/s.h5', TRIDENT, coords=coords, passports=passports, features__uni_v2=FEATURES)


def stamp(folder):
    """Micrometres in float32, in folders as those of the slides, under the encoder's name."""
    notes = dict(unit='um', tile_size_um=256.0, tile_size_px=224, stamp_version='2.3.0', extractor='uni2')
    h5(folder / 'uni2-1a2b/batch 3/s.h5', notes, feats=FEATURES.half(), coords=256.0 * CELLS + 0.001 * CELLS.flip(0))


def stamp_2_0(folder):
    h5(folder / 's.h5', dict(unit='um', tile_size=256.0), feats=FEATURES.half(), coords=256.0 * CELLS)


def stamp_1(folder):
    h5(folder / 's.h5', feats=FEATURES.half(), coords=224 * CELLS)


def lazyslide(folder):
    """What AnnData's write_h5ad makes of `fetch.features_anndata`."""
    spec = {'uns__tile_spec__stride_width': 256, 'uns__tile_spec__base_downsample': 2.0}
    names = [f'{i}'.encode() for i in range(12)]
    h5(folder / 's.h5ad', X=FEATURES, obs___index=names, obsm__spatial=COORDS.double(), **spec)


def slideflow(folder):
    """Centres of tiles."""
    pt(folder / 's.pt', FEATURES)
    np.savez(folder / 's.index', arr_0=COORDS.numpy() + 256)


def tiatoolbox(folder):
    npy(folder / 's.features.0.npy', FEATURES)
    npy(folder / 's.position.npy', torch.cat([COORDS, COORDS + 512], 1))


def tiatoolbox_json(folder):
    npy(folder / 's.npy', FEATURES)
    (folder / 's.position.json').write_text(json.dumps(COORDS.tolist()))


def torchmil(folder):
    for name, array in (('features', FEATURES.double()), ('coords', COORDS), ('labels', torch.ones(1))):
        npy(folder / name / 's.npy', array)


def torchmil_nested(folder):
    npy(folder / 'features/features_UNI/s.npy', FEATURES.T.contiguous().T)  # written by columns
    npy(folder / 'coords/s.npy', COORDS)


def torchmil_h5(folder):
    for name, array in (('features', FEATURES), ('coords', COORDS), ('labels', torch.ones(1))):
        h5(folder / name / 's.h5', **{name: array})


def dictionary(folder):
    pt(folder / 's.pt', dict(slide_id='s', patch_size=256, patch_size_level0=512, features=FEATURES, coords=COORDS))


def arrays(folder):
    np.savez(folder / 's.npz', features=FEATURES.numpy(), coords=COORDS.numpy(), names=np.array(['a']))


def beside(folder):
    pt(folder / 's.pt', FEATURES)
    pt(folder / 's_coords.pt', COORDS)


def eva(folder):
    """A list of vectors for each slide, in folders; no coordinates."""
    pt(folder / 'train/s.pt', [row.clone() for row in FEATURES])


def eva_manifest(folder):
    """Several files of a slide."""
    pt(folder / 'a/1.pt', [row[None].clone() for row in FEATURES[:5]])
    pt(folder / 'a/2.pt', FEATURES[5:])
    rows = ['x.png,a/1.pt,0,train,s', 'y.png,a/2.pt,0,train,s']
    (folder / 'manifest.csv').write_text('\n'.join(['origin,embeddings,target,split,wsi_id', *rows]))


def mambamil(folder):
    """A tensor of PyTorch before 1.6."""
    folder.mkdir(exist_ok=True)
    torch.save(FEATURES, folder / 's.pt', _use_new_zipfile_serialization=False)


def suffixes(name):
    def write(folder):
        h5(folder / name, features=FEATURES, coords=COORDS)

    write.__name__ = name
    return write


LAYOUTS = {  # with the coordinates that come out, and their step
    **dict.fromkeys((clam, clam_folders, clam_features_apart, clam_beside), (COORDS, 512)),
    **dict.fromkeys((trident, trident_old, trident_pt, atlaspatch, lazyslide), (COORDS, 512)),
    **dict.fromkeys((stamp, stamp_1), (224 * CELLS, 224)),
    stamp_2_0: (256 * CELLS, 256),
    **dict.fromkeys((slideflow, tiatoolbox, tiatoolbox_json), (COORDS, 512)),
    **dict.fromkeys((torchmil, torchmil_nested, torchmil_h5, dictionary, arrays, beside), (COORDS, 512)),
    **dict.fromkeys((eva, eva_manifest, mambamil), (None, None)),
    **dict.fromkeys(map(suffixes, ('s.svs.h5', 's.SVS.h5', 's.czi.h5', 's.ome.tiff.h5', 's.h5.h5')), (COORDS, 512)),
}


@pytest.mark.parametrize('write', LAYOUTS, ids=lambda write: write.__name__)
def test_layouts(write, tmp_path):
    """Features, coordinates and step come out the same however they are kept, and the count of patches before them."""
    coords, step = LAYOUTS[write]
    write(tmp_path)
    folder = SlideFolder(tmp_path)
    paths = folder.find('s')
    for name in ('s.svs', 's.SVS', 's.czi', 's.ome.tiff', 's.h5', 's.pt'):
        assert folder.find(name) == paths
    assert count_patches(*paths) == 12
    bag = read_slide(*paths)
    assert bag.features.dtype == torch.float32 and torch.equal(bag.features, FEATURES) and bag.step == step
    if coords is None:
        assert bag.coords is None and bag.pixels is None
    else:
        assert bag.coords.dtype == torch.int64 and torch.equal(bag.coords, coords)
        assert torch.equal(bag.pixels, coords)
    assert (bag.total, bag.left_out) == (12, 0) and torch.equal(bag.spread(torch.arange(12.0)), torch.arange(12.0))


# ---- what is refused -------------------------------------------------------------------------------------------------

OBJECTS = np.array([dict(a=1)] * 3, dtype=object)
UNKNOWN = {
    'h5': (
        lambda folder: h5(folder / 's.h5', embeddings=FEATURES, xy=COORDS, name='s'),
        r's.h5 .* known layout \(features and coords; features/ENCODER .*\), got embeddings \(12, 6\), '
        r'xy \(12, 2\), name \(a single object\)',
    ),
    'pt': (
        lambda folder: pt(folder / 's.pt', dict(x=FEATURES, names=['a'], label=1)),
        r's.pt .* got x \(12, 6\), names \(a list\)',
    ),
    'text': (lambda folder: pt(folder / 's.pt', 'abc'), 's.pt .* got nothing'),
    'objects': (lambda folder: np.save(folder / 's.npy', OBJECTS), r's.npy .* got an array \(3,\) of object'),
    'npz': (lambda folder: np.savez(folder / 's.npz', x=FEATURES.numpy()), r's.npz .* got x \(12, 6\)'),
    'list': (
        lambda folder: pt(folder / 's.pt', [torch.ones(3), torch.ones(4)]),
        'got a list of 2 tensors of several widths',
    ),
    'cut npy': (lambda folder: (folder / 's.npy').write_bytes(b'\x93NUMPY'), 's.npy cannot be read as an array of Num'),
    'cut numbers': (
        lambda folder: [np.save(folder / 's.npy', FEATURES), cut(folder / 's.npy', 40)],
        's.npy cannot be read as an array of NumPy',
    ),
    'no zip': (lambda folder: (folder / 's.npz').write_bytes(b'x'), 's.npz cannot be read as arrays of NumPy'),
    'vectors': (lambda folder: h5(folder / 's.h5', features=FEATURES[0]), r'must be \(n, width\), got \(6,\)'),
    'step of STAMP': (
        lambda folder: h5(
            folder / 's.h5', dict(unit='um', tile_size_um=256.0, tile_size_px=224), feats=FEATURES, coords=128.0 * CELLS
        ),
        '224 pixels by tile_size_px, got 112',
    ),
    'size of STAMP': (
        lambda folder: h5(folder / 's.h5', dict(unit='um'), feats=FEATURES, coords=COORDS),
        'must note tile_size_um',
    ),
    'three columns': (
        lambda folder: h5(folder / 's.h5', features=FEATURES, coords=torch.ones(12, 3)),
        r'coords must be \(12, 2\), got \(12, 3\)',
    ),
    'coordinates of another slide': (
        lambda folder: [npy(folder / 's.npy', FEATURES), npy(folder / 's.position.npy', COORDS[:5])],
        r'coords must be \(12, 2\), got \(5, 2\)',
    ),
    'two folders': (
        lambda folder: [h5(folder / name / 's.h5', features=FEATURES) for name in ('features_uni', 'features_conch')],
        'features of s must be in one place, got .*features_conch/s.h5 and .*features_uni/s.h5: give',
    ),
    'two names': (
        lambda folder: [h5(folder / name, features=FEATURES, coords=COORDS) for name in ('s.h5', 's.svs.h5')],
        'features of s must be in one place, got .*/s.h5 and .*/s.svs.h5',
    ),
    'several encoders': (
        lambda folder: h5(folder / 's.h5', coords=COORDS, features__uni=FEATURES, features__conch=FEATURES),
        's.h5 has the features of conch, uni: name one by dataset.encoder',
    ),
    'another slide': (
        lambda folder: h5(folder / 't.h5', features=FEATURES, coords=COORDS),
        'no features, neither s.h5 nor s.pt, in .*, but of t and so on',
    ),
    'a file of the list': (
        lambda folder: (folder / 'manifest.csv').write_text('embeddings,wsi_id\na.pt,s\nb.pt,s\n'),
        'a.pt cannot be read as tensors: .*No such file',
    ),
    'widths of the list': (
        lambda folder: [
            (folder / 'manifest.csv').write_text('embeddings,wsi_id\na.pt,s\nb.pt,s\n'),
            pt(folder / 'a.pt', FEATURES),
            pt(folder / 'b.pt', FEATURES[:, :5]),
        ],
        'b.pt: features must be as wide as those of a.pt, 6, got 5',
    ),
}


def cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.parametrize('name', UNKNOWN)
def test_what_is_no_layout_is_named(name, tmp_path):
    write, said = UNKNOWN[name]
    write(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        read_slide(*SlideFolder(tmp_path).find('s'))


def test_an_encoder_is_chosen(tmp_path):
    """By the groups of a file, or by the names of folders; the others of a folder do not count."""
    h5(tmp_path / 'a.h5', coords=COORDS, features__uni=FEATURES, features__conch=FEATURES + 1)
    for i, encoder in enumerate(('uni', 'conch')):
        h5(tmp_path / f'20x/features_{encoder}/b.h5', features=FEATURES + i, coords=COORDS)
        h5(tmp_path / encoder / 'c.h5', feats=FEATURES + i, coords=COORDS)
    h5(tmp_path / '20x/features_conch/d.h5', features=FEATURES, coords=COORDS)
    for i, encoder in enumerate(('uni', 'conch')):
        folder = SlideFolder(tmp_path, encoder)
        assert torch.equal(read_slide(*folder.find('a'), encoder=encoder).features, FEATURES + i)
        assert torch.equal(read_slide(*folder.find('b'), encoder=encoder).features, FEATURES + i)
        assert torch.equal(read_slide(*folder.find('c'), encoder=encoder).features, FEATURES + i)
    with pytest.raises(FileNotFoundError, match='no features'):
        SlideFolder(tmp_path, 'uni').find('d')
    with pytest.raises(ValueError, match="a.h5: encoder must be one of conch, uni, got 'gigapath'"):
        read_slide(tmp_path / 'a.h5', encoder='gigapath')


def test_links_are_followed_once(tmp_path):
    clam(tmp_path / 'real')
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/features').symlink_to(tmp_path / 'real')
    (tmp_path / 'data/features/again').symlink_to(tmp_path / 'data')
    assert SlideFolder(tmp_path / 'data').find('s') == (tmp_path / 'data/features/s.h5',)
    (tmp_path / 'data/fold').mkdir()
    (tmp_path / 'data/fold/s.h5').symlink_to(tmp_path / 'real/s.h5')
    assert len(SlideFolder(tmp_path / 'data').find('s')) == 1


# ---- data sets, networks, commands -----------------------------------------------------------------------------------


@pytest.fixture
def cohort(tmp_path):
    """Eight slides in one layout or another, of which two have no patches and one no coordinates, and labels.csv."""
    for i, write in enumerate((clam, atlaspatch, eva, tiatoolbox)):
        write(tmp_path / f'{i}')
    for path in list(tmp_path.rglob('s.*')):
        path.rename(path.with_name(path.name.replace('s.', f's{path.relative_to(tmp_path).parts[0]}.', 1)))
    h5(tmp_path / 's4.h5', of_coords=TRIDENT, features=torch.empty(0, WIDTH), coords=torch.empty(0, 2).long())
    h5(tmp_path / 's5.h5', TRIDENT, coords=torch.empty(0, 5).int())
    rows = [f's{i},{"ab"[i % 2]},{split}' for split, ids in (('train', range(6)), ('test', ())) for i in ids]
    (tmp_path / 'labels.csv').write_text('\n'.join(['slide_id,label,split', *rows]))
    return tmp_path


def test_slides_without_patches_are_left_out(cohort, monkeypatch):
    said = []
    monkeypatch.setattr('vssm.models.mm.wsi_data.print_log', lambda text, *_: said.append(text))
    dataset = SlideDataset(str(cohort), 'labels.csv', 'train')
    assert said == ['labels.csv: 2 of 6 slides of train have no patches: s4, s5. They are left out.']
    assert [dataset[i]['data_samples']['name'] for i in range(len(dataset))] == ['s0', 's1', 's2', 's3']
    (cohort / 'labels.csv').write_text('slide_id,label,split\ns4,a,train\n')
    with pytest.raises(RunError, match='1 of 1 slides of train have no patches: s4.$'):
        SlideDataset(str(cohort), 'labels.csv', 'train')


def test_a_case_has_its_slides_that_have_patches(cohort):
    rows = ['p,s0,0,3', 'p,s4,0,3', 'q,s5,0,2', 'r,s2,0,5', 'r,s3,0,5']
    header = 'case_id,slide_id,censorship,survival_months,split'
    (cohort / 'survival.csv').write_text('\n'.join([header, *(f'{row},train' for row in rows)]))
    dataset = SlideDataset(str(cohort), 'survival.csv', 'train', task='survival', bins=None)
    samples = [dataset[i] for i in range(len(dataset))]
    assert [sample['data_samples']['name'] for sample in samples] == ['p', 'r']
    assert [sample['inputs']['lengths'] for sample in samples] == [[12], [12, 12]]
    assert samples[0]['inputs']['coords'].shape == (12, 2) and samples[1]['inputs']['coords'] is None


def test_the_check_counts_what_is_left_out_and_what_has_no_coordinates(cohort, capsys):
    assert main(['wsi-check', str(cohort / 'labels.csv'), str(cohort)]) == 0
    counts = dict(re.split('  +', line) for line in capsys.readouterr().out.splitlines())
    assert counts['slides'] == '6' and counts['patches of a slide'] == '12 to 12'
    assert counts['slides without patches, left out'] == '2'
    assert counts['slides without coordinates, for networks that need none'] == '1'
    assert counts['slides with patches 512 pixels apart'] == '3'
    assert main(['wsi-check', str(cohort / 'labels.csv'), str(cohort), '--encoder', 'conch']) == 2
    assert "slide 's1': s1.h5: encoder must be one of uni_v2, got 'conch'" in capsys.readouterr().out


@pytest.mark.parametrize('name', ['mamba2d_mil', 'mamba_mil', 'attention_mil', 'mean_mil', 'max_mil'])
def test_networks_without_a_grid_need_no_coordinates(name, cohort):
    dataset = SlideDataset(str(cohort), 'labels.csv', 'train')
    model = SlideClassifier(name, in_dim=WIDTH, dim=16).eval()
    batch = model.data_preprocessor([dataset[2]['inputs']], False)
    if name == 'mamba2d_mil':
        with pytest.raises(RunError, match=r's2: MambaMIL: coords must be \(n, 2\) for a 2-D scan, got None'):
            model(batch, [dataset[2]['data_samples']])
    else:
        expected = model([dataset[0]['inputs']])  # the same features with coordinates
        assert torch.equal(model(batch, [dataset[2]['data_samples']]), expected)


def test_the_encoder_of_a_training_is_that_of_the_test(tmp_path):
    from mmengine.config import Config
    from safetensors.torch import save_file

    from vssm.models.mm.wsi_notes import follow_checkpoint
    from vssm.tools._common import config_dir

    h5(tmp_path / 's.h5', coords=COORDS, features__uni=FEATURES, features__conch=FEATURES)
    (tmp_path / 'labels.csv').write_text('slide_id,label,split\ns,a,train\n')
    dataset = SlideDataset(str(tmp_path), 'labels.csv', 'train', encoder='conch')
    args = dict(in_dim=WIDTH, dim=16)
    notes = dict(model='mean_mil', model_args=json.dumps(args), data=json.dumps(dataset.notes))
    save_file(dict(create_mil_model('mean_mil', **args).state_dict()), tmp_path / 'best.safetensors', notes)
    for split in ('train', 'test'):  # the table of the training, and another
        (tmp_path / 'labels.csv').write_text(f'slide_id,label,split\ns,a,{split}\n')
        cfg = Config.fromfile(config_dir() / 'wsi/classification.py')
        cfg.dataset.data_root = str(tmp_path)
        said = follow_checkpoint(cfg, tmp_path / 'best.safetensors', {})
        assert cfg.test_dataloader.dataset.encoder == 'conch' and 'dataset.encoder=conch' in said[0]
        with pytest.raises(RunError, match='dataset.encoder=conch, not uni'):
            follow_checkpoint(cfg, tmp_path / 'best.safetensors', {'dataset': {'encoder': 'uni'}})


def test_a_heat_map_of_micrometres_lies_on_the_thumbnail(tmp_path, monkeypatch, capsys):
    """Tiles of STAMP, 256 micrometres wide: 512 pixels of the slide, which is four of them wide and eight high."""
    from safetensors.torch import save_file

    slide = SimpleNamespace(
        dimensions=(2048, 4096),
        properties={'openslide.mpp-x': '0.5', 'openslide.mpp-y': '0.5'},
        get_thumbnail=lambda size: Image.new('RGB', (512, 1024)),
    )
    openslide = SimpleNamespace(OpenSlide=lambda path: nullcontext(slide), OpenSlideError=OSError)
    monkeypatch.setitem(sys.modules, 'openslide', openslide)
    args, figures = dict(in_dim=WIDTH, dim=16), []
    notes = dict(model='mamba2d_mil', model_args=json.dumps(args))
    save_file(dict(create_mil_model('mamba2d_mil', **args).state_dict()), tmp_path / 'best.safetensors', notes)
    stamp(tmp_path)
    (tmp_path / 's.svs').touch()
    monkeypatch.setattr(wsi_heatmap, 'save_figure', lambda figure, path: figures.append(figure))
    command = ['wsi-heatmap', tmp_path / 'best.safetensors', *SlideFolder(tmp_path).find('s')]
    command = [str(part) for part in [*command, '--slide', tmp_path / 's.svs', '--output', tmp_path / 'map.png']]
    assert main(command) == 0
    axes = figures[0].axes[0]
    assert tuple(axes.images[0].get_extent()) == (0, 4 * 224, 8 * 224, 0)
    corners = [path.vertices.max(0).tolist() for path in axes.collections[0].get_paths()]
    assert max(corners) == [4 * 224, 3 * 224]
    slide.properties.clear()
    assert main(command) == 2
    assert '--slide must tell the size of its pixels' in capsys.readouterr().err
    pt(tmp_path / 'lonely.pt', FEATURES)
    assert main([*command[:2], str(tmp_path / 'lonely.pt')]) == 2
    assert 'FEATURES must have coordinates' in capsys.readouterr().err


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('layout', ['npy of halves', '(1, N, D)', 'several encoders'])
def test_all_layouts_are_read_within_the_size_of_the_bag(layout, tmp_path):
    """From arrays of NumPy, with a leading axis, and beside the features of another encoder."""
    features, coords = np.ones((2_500, 1024), np.float32), 512 * torch.cartesian_prod(*[torch.arange(50)] * 2)
    if layout == 'npy of halves':
        np.save(tmp_path / 's.npy', features.astype(np.float16))
        np.save(tmp_path / 's.position.npy', coords)
    elif layout == '(1, N, D)':
        h5(tmp_path / 's.h5', features=features[None], coords=coords)
    else:
        h5(tmp_path / 's.h5', features__uni=features, features__conch=features, coords=coords)
    paths = SlideFolder(tmp_path).find('s')
    encoder = 'uni' if layout == 'several encoders' else None
    tracemalloc.start()  # which sees what NumPy allocates, and tensors here are of NumPy's memory
    try:
        count_patches(*paths, encoder=encoder)
        assert tracemalloc.get_traced_memory()[1] < 1e6
        assert torch.equal(read_slide(*paths, encoder=encoder).features, torch.from_numpy(features))
        assert features.nbytes <= tracemalloc.get_traced_memory()[1] < features.nbytes + 3e6
    finally:
        tracemalloc.stop()
