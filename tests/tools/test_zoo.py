# SPDX-License-Identifier: Apache-2.0
"""MODEL_ZOO.md says what the registry, the configs and the benchmarks say."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from vssm.models.backbone import ALIASES
from vssm.models.weights import list_models
from vssm.tools import published, zoo
from vssm.tools._bench import conditions
from vssm.tools._common import list_configs
from vssm.tools.main import main

ROOT = Path(__file__).parents[2]
PAGE = ROOT / 'MODEL_ZOO.md'


@pytest.fixture
def quick(monkeypatch):
    """Take the costs from the page, for counting them all takes a minute."""
    costs, dense_costs = {}, {}
    for line in PAGE.read_text().splitlines():
        if line.startswith('| `'):
            name, *cells = (cell.strip(' `') for cell in line.strip('|').split('|'))
            config = re.search(r'\(configs/((?:ade20k|coco)/.*)\.py\)', line)
            if config:
                dense_costs[config[1]] = tuple(cells[:2])
            else:
                costs[name] = tuple(cells[:3])
    monkeypatch.setattr(zoo, 'cost', costs.__getitem__)
    monkeypatch.setattr(zoo, 'dense_cost', lambda config, shape: dense_costs[config])
    return costs


def test_the_page_is_up_to_date(quick, capsys):
    assert main(['zoo', str(PAGE), '--check']) == 0, 'run `vssm zoo`'
    assert 'up to date' in capsys.readouterr().out


@pytest.mark.parametrize('family', published.SOURCES)
def test_the_costs_of_classifiers_are_up_to_date(family):
    """Of the smallest of each family; the larger ones are among all below."""
    name = next(name for name in zoo.OURS if zoo.family_of(name) == family)
    assert f'| `{name}` | {" | ".join(zoo.cost(name))} |' in PAGE.read_text()


@pytest.mark.slow
def test_all_costs_are_up_to_date():
    pytest.importorskip('mmdet', reason="mmdet is not installed: pip install '.[mmlab]'")
    torch.use_deterministic_algorithms(False)  # else PyTorch interpolates by other operations; conftest restores
    assert main(['zoo', str(PAGE), '--check']) == 0, 'run `vssm zoo`'


def test_every_model_and_config_is_on_the_page():
    text = PAGE.read_text()
    names = [name for name in list_models() if not name.startswith('test_')]
    assert all(f'| `{name}` |' in text for name in names) and len(zoo.OURS) == len(names)
    assert set(published.IMAGENET_TOP1) | set(published.IMAGENET_COST) <= set(names)
    tasks = ('imagenet/', 'ade20k/', 'coco/')
    assert all(text.count(f'(configs/{name}.py)') == 1 for name in list_configs() if name.startswith(tasks))
    assert set(published.DENSE_WEIGHTS) <= set(list_configs())


def test_published_numbers(golden):
    """They are those quoted beside the golden files, of the families that are there."""
    tables = dict(
        imagenet_top1=published.IMAGENET_TOP1,
        ade20k_upernet_miou=published.ADE20K_MIOU,
        coco_maskrcnn_1x=published.COCO_1X_AP,
        coco_maskrcnn_3x=published.COCO_3X_AP,
    )
    quoted = {name: {} for name in tables}
    variants = {ALIASES.get(alias, alias): entry for alias, entry in golden('reported.json')['variants'].items()}
    for model, entry in variants.items():
        reported = entry['reported']
        if 'ade20k_upernet_miou_ss' in reported:
            reported['ade20k_upernet_miou'] = [reported[f'ade20k_upernet_miou_{s}'] for s in ('ss', 'ms')]
        for name in tables.keys() & reported.keys():
            value = reported[name]
            quoted[name][model] = tuple(value) if isinstance(value, list) else value
        if 'params_m' in reported:
            assert published.IMAGENET_COST[model] == (str(reported['params_m']), str(reported['flops_g']))
    for name, table in tables.items():
        assert quoted[name] == {model: value for model, value in table.items() if model in variants}, name


def test_counts_are_the_published_ones(quick):
    """But for what is cut off or not rounded alike, and GroupMamba's, of which the page says more."""
    for name, (params, macs) in published.IMAGENET_COST.items():
        _, counted, gmacs = quick[name]
        assert float(counted.split()[0]) == pytest.approx(float(params), rel=0.05), name
        if macs != '-':
            assert float(gmacs) == pytest.approx(float(macs), rel=0.05 if 'group' in name else 0.02), name


def test_a_stale_page_is_found_and_mended(quick, tmp_path, capsys):
    page = tmp_path / 'MODEL_ZOO.md'
    page.write_text(PAGE.read_text().replace('| 82.8 |', '| 99.9 |'))
    shutil.copytree(ROOT / 'benchmarks' / 'results', tmp_path / 'benchmarks' / 'results')
    before = page.read_text()
    assert main(['zoo', str(page), '--check']) == 1
    assert 'stale' in capsys.readouterr().out and page.read_text() == before
    assert main(['zoo', str(page)]) == 0
    assert page.read_text() == PAGE.read_text() and not list(tmp_path.glob('*.tmp'))


def test_speeds_come_from_the_benchmarks(quick, tmp_path, capsys):
    page, results = tmp_path / 'zoo.md', tmp_path / 'results'
    page.write_text(PAGE.read_text())
    results.mkdir()
    content = json.loads((ROOT / 'benchmarks' / 'results' / 'model_cpu.json').read_text())
    content['conditions'] = conditions()  # as the benchmarks write them; the kept file has other names
    for row in content['rows']:
        row['images_per_s'] = 1234.56
    (results / 'model_cpu.json').write_text(json.dumps(content))
    assert main(['zoo', str(page), '--results', str(results)]) == 0
    assert page.read_text().count('1234.6') == len(content['rows'])
    assert f'of an {content["conditions"]["processor"]} (' in page.read_text()
    (results / 'model_cpu.json').unlink()
    assert main(['zoo', str(page), '--results', str(results)]) == 2
    assert 'without model_cpu.json' in capsys.readouterr().err


@pytest.mark.parametrize('text', ['', '<!-- /imagenet -->\n<!-- imagenet -->\n'], ids=['no markers', 'reversed'])
def test_a_page_without_markers_is_refused(text, quick, tmp_path, capsys):
    page = tmp_path / 'page.md'
    page.write_text(text)
    assert main(['zoo', str(page), '--results', str(ROOT / 'benchmarks' / 'results')]) == 2
    assert 'must have the line <!-- imagenet --> once' in capsys.readouterr().err
    assert main(['zoo', str(tmp_path / 'none.md')]) == 2
    assert 'none.md, which does not exist' in capsys.readouterr().err
