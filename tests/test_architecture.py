# SPDX-License-Identifier: Apache-2.0
"""The arrows between the folders: tools -> models -> ops -> torch; and what every file owes."""

import ast
import graphlib
import importlib.metadata
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from backends import IMPLIED_IF_INTERPRETED, SLOW_IF_INTERPRETED
from conftest import FIRST

import vssm

ROOT = Path(__file__).parent.parent
FOLDERS = ('benchmarks', 'configs', 'examples', 'models', 'ops', 'src', 'tests', 'tools')
PACKAGES = {'configs': 'vssm.configs', 'models': 'vssm.models', 'ops': 'vssm.ops', 'tools': 'vssm.tools'}
STDLIB = set(sys.stdlib_module_names)

# What the files of a folder may import, standard library aside: other packages, and our own by their dotted names.
ALLOWED = {
    'ops': {'torch', 'vssm.ops'},
    'models': {'torch', 'timm', 'vssm.ops', 'vssm.models'},
    'configs': {'vssm.configs'},  # which are data
}
ALSO = {  # what single files may besides
    **{f'ops/scan/triton/{name}.py': {'triton'} for name in ('bands', 'launch', 'recurrence', 'steps', 'walk')},
    'ops/scan/triton/tiles.py': {'filelock', 'triton'},
    **{f'ops/scan/triton/{way}_{n}d.py': {'triton'} for way in ('forward', 'backward') for n in (1, 2)},
    **dict.fromkeys(('ops/_triton.py', 'ops/fusion/triton.py'), {'triton'}),
    'models/weights/convert.py': {'safetensors', 'vssm.version'},
    'models/weights/checksum.py': {'safetensors'},
    'models/weights/pretrained.py': {'huggingface_hub', 'safetensors'},
    'models/images.py': {'PIL', 'numpy'},
    'models/predict.py': {'PIL'},
    'models/mm/checks.py': {'PIL', 'mmdet', 'mmengine', 'numpy'},
    'models/mm/classification.py': {'mmengine'},
    'models/mm/compare.py': {'mmengine'},
    'models/mm/complexity.py': {'mmengine'},
    'models/mm/content.py': {'mmengine', 'numpy'},
    'models/mm/data.py': {'PIL', 'mmengine', 'numpy', 'sklearn', 'torchvision'},
    'models/mm/failures.py': {'mmengine'},
    'models/mm/features.py': {'mmengine'},
    'models/mm/hooks.py': {'mmengine', 'vssm.version'},
    'models/mm/inference.py': {'PIL', 'mmdet', 'mmengine', 'mmseg', 'numpy'},
    'models/mm/inspection.py': {'PIL', 'mmengine', 'numpy'},
    'models/mm/loading.py': {'mmengine'},
    'models/mm/optim.py': {'mmengine'},
    'models/mm/own_classes.py': {'mmengine'},
    'models/mm/progress.py': {'mmengine', 'rich'},
    'models/mm/readers.py': {'PIL', 'mmengine'},
    'models/mm/resume.py': {'mmengine'},
    'models/mm/runner.py': {'mmengine', 'rich'},
    'models/mm/saved.py': {'mmengine', 'numpy'},
    'models/mm/sources.py': {'mmengine'},
    'models/mm/wsi.py': {'mmengine'},
    'models/mm/wsi_data.py': {'mmengine'},
    'models/mm/wsi_metrics.py': {'mmengine', 'torchmetrics', 'torchsurv'},
    'models/mm/wsi_notes.py': {'mmengine'},
    'models/mm/utils.py': {'mmengine', 'numpy', 'safetensors'},
    'models/mm/mmcv_ext/__init__.py': {'mmengine'},
    'models/mm/mmcv_ext/boxes.py': {'torchvision'},
    'models/mm/mmcv_ext/regions.py': {'torchvision'},
    'models/mil/arrays.py': {'h5py', 'numpy'},
}


def sources(*folders, suffixes=('.py',)):
    files = [p for folder in folders for p in (ROOT / folder).rglob('*') if p.suffix in suffixes]
    return sorted(p.relative_to(ROOT).as_posix() for p in files if '__pycache__' not in p.parts)


def package_of(path):
    """The dotted package that a file lies in."""
    folder, *rest = Path(path).parts[:-1]
    return '.'.join([PACKAGES[folder], *rest]) if folder in PACKAGES else '.'.join(rest)  # src/vssm -> vssm


def imports(path):
    """The absolute dotted names that a file imports, wherever in it, with their lines."""
    package = package_of(path).split('.')
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = '.'.join([*base, *([node.module] if node.module else [])])
            if module in ('', 'vssm'):  # `from .. import ops`, where the names are packages
                for alias in node.names:
                    yield node.lineno, f'{module}.{alias.name}'
            else:
                yield node.lineno, module


def offences(paths, allowed):
    return [
        f'{path}:{line} imports {name}'
        for path in paths
        for line, name in imports(path)
        if name.split('.')[0] not in STDLIB
        and not any(name == a or name.startswith(f'{a}.') for a in allowed | ALSO.get(path, set()))
    ]


@pytest.mark.parametrize('folder', ALLOWED)
def test_a_folder_imports_what_it_may(folder):
    paths = sources(folder)
    assert paths
    assert not offences(paths, ALLOWED[folder])


def test_the_front_door_imports_models_and_ops_alone():
    assert not offences(sources('src'), {'vssm.models', 'vssm.ops', 'vssm.version'})


# Which rooms a room may use. An `__init__.py`, which gathers what lies below, is free to.
ROOMS = {
    'ops': {'ops/fusion', 'ops/readout', 'ops/scan'},  # for the table of decompositions
    'ops/fusion': {'ops'},
    'ops/readout': {'ops'},
    'ops/scan': {'ops', 'ops/scan/triton'},
    'ops/scan/triton': {'ops'},
    'models': {'models/weights', 'ops'},
    'models/mil': {'models', 'models/weights'},
    'models/mm': {'models', 'models/mil', 'models/weights', 'ops', 'src/vssm'},
    'models/mm/mmcv_ext': set(),
    'models/weights': {'models', 'src/vssm'},
    'tools': {'configs', 'models', 'models/mil', 'models/mm', 'models/weights', 'ops', 'src/vssm'},
    'tools/report': {'tools'},
}


def used_files(path):
    """The files of ours that a file imports, wherever in it."""

    def file_of(name):
        stem = name.replace('.', '/')
        stem = f'src/{stem}' if stem in ('vssm', 'vssm/version') else stem.removeprefix('vssm/')
        return next((f for f in (f'{stem}.py', f'{stem}/__init__.py') if (ROOT / f).is_file()), None)

    package = package_of(path).split('.')
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = '.'.join([*base, *([node.module] if node.module else [])])
            names = [f'{module}.{alias.name}' for alias in node.names]  # each a module, or what one holds
            yield from filter(None, (file_of(name) or file_of(module) for name in names))
        elif isinstance(node, ast.Import):
            yield from filter(None, (file_of(alias.name) for alias in node.names if alias.name.startswith('vssm')))


@pytest.mark.parametrize('room', ROOMS)
def test_a_room_uses_what_it_may(room):
    paths = [path for path in sources(room) if Path(path).parent == Path(room)]
    assert paths
    uses = {(path, used) for path in paths for used in used_files(path) if not path.endswith('__init__.py')}
    assert not {(path, used) for path, used in uses if Path(used).parent.as_posix() not in ROOMS[room] | {room}}


def test_no_file_uses_itself_around_a_circle():
    paths = sources('src', 'ops', 'models', 'tools')
    assert {Path(path).parent.as_posix() for path in paths} == ROOMS.keys() | {'src/vssm'}  # no room is without a rule
    graph = {path: set(used_files(path)) - {path} for path in paths}
    assert 'ops/scan/__init__.py' in graph['models/ssm.py'] | graph['ops/__init__.py']
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises a CycleError that names the circle
    assert order.index('ops/scan/op.py') < order.index('models/ssm.py') < order.index('models/vmamba.py')
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter({**graph, 'ops/scan/op.py': {'models/vmamba.py'}}).static_order())


def test_importing_vssm_imports_no_optional_package():
    """The adapters for mmengine and the Triton kernels are reached by those who ask for them."""
    reached, todo = set(), ['src/vssm/__init__.py']
    files = {
        package_of(p) + ('' if p.endswith('__init__.py') else f'.{Path(p).stem}'): p
        for p in sources('ops', 'models', 'src')
    }
    while todo:
        path = todo.pop()
        reached.add(path)
        for node in ast.parse((ROOT / path).read_text()).body:  # at the top of the file alone
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {name for line, name in imports(path) if line == node.lineno}
                todo += [files[name] for name in names if name in files and files[name] not in reached]
    assert {'models/vmamba.py', 'ops/scan/op.py'} <= reached
    assert not any('/mm' in path or 'triton' in path for path in reached)


def test_the_arrows_are_seen_when_broken(tmp_path, monkeypatch):
    """A rule that reads files is worth what it finds in a bad one."""
    bad = {
        'ops/a.py': 'def f():\n    from ..models import ssm\n',
        'ops/b.py': 'from .. import models\n',
        'ops/c.py': 'import numpy as np, math\n',
        'ops/d.py': 'import vssm\n',
        'models/e.py': 'from vssm.tools.train import main\n',
        'models/f.py': 'import mmengine.model\n',
        'models/g.py': 'from ..ops import selective_scan\nfrom .ssm import x\nimport timm.layers, torch, re\n',
    }
    for path, text in bad.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(sys.modules[__name__], 'ROOT', tmp_path)
    assert offences(sources('ops'), ALLOWED['ops']) == [
        'ops/a.py:2 imports vssm.models',
        'ops/b.py:1 imports vssm.models',
        'ops/c.py:1 imports numpy',
        'ops/d.py:1 imports vssm',
    ]
    assert offences(sources('models'), ALLOWED['models']) == [
        'models/e.py:1 imports vssm.tools.train',
        'models/f.py:1 imports mmengine.model',
    ]


def test_every_source_file_names_its_license():
    paths = ['setup.py', *sources(*FOLDERS, suffixes=('.py', '.cpp', '.h'))]
    for path in paths:
        comment = '#' if path.endswith('.py') else '//'
        text = (ROOT / path).read_text()
        assert text.startswith(f'{comment} SPDX-License-Identifier: Apache-2.0\n'), path


def test_the_library_prints_nothing():
    for path in sources('src', 'ops', 'models'):
        calls = [n for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.Call)]
        assert not [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == 'print'], path


def test_no_test_has_the_name_of_another():
    """Which `-k` would not tell apart; and what names tests names ones that there are."""
    trees = [ast.parse((ROOT / path).read_text()) for path in sources('tests')]
    functions = [node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    tests = Counter(name for name in functions if name.startswith('test_'))
    assert [name for name, count in tests.items() if count > 1] == []
    assert IMPLIED_IF_INTERPRETED.keys() | SLOW_IF_INTERPRETED | FIRST <= tests.keys()


def test_the_version_is_written_once():
    """It is written once; pyproject.toml and the installed package follow."""
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    assert 'version' in project['project']['dynamic'] and 'version' not in project['project']
    assert project['tool']['setuptools']['dynamic']['version'] == {'attr': 'vssm.version.__version__'}
    assert vssm.__version__ == importlib.metadata.version('vssm')


def drawn_tree():
    """The paths in the map of DESIGN.md: names, two spaces or more, a phrase; two spaces deeper lies within."""
    lines = (ROOT / 'DESIGN.md').read_text().split('## The map\n')[1].split('```text\n')[1].split('```')[0].splitlines()
    folders, paths = [], []
    for line in lines:
        depth = (len(line) - len(line.lstrip())) // 2
        names = line.strip().split('  ')[0].split()
        paths += ['/'.join([*folders[:depth], name.rstrip('/')]) for name in names]
        if names[-1].endswith('/'):
            folders[depth:] = [names[-1].rstrip('/')]
    return paths


def test_the_tree_in_design_is_the_tree_on_disk():
    paths = drawn_tree()
    assert len(paths) == len(set(paths)) and len(paths) > 50
    assert not [path for path in paths if not (ROOT / path).exists()]
    setuptools = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']
    for package in setuptools['packages']:
        root = '.'.join(package.split('.')[:2])
        folder = '/'.join([setuptools['package-dir'][root], *package.split('.')[2:]])
        assert folder in paths, f'{package} is not in the map'
    tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert {name.split('/')[0] for name in tracked if '/' in name} <= {path.split('/')[0] for path in paths}
    for folder in ('ops', 'models', 'tools'):
        assert not set(sources(folder, suffixes=('.py', '.cpp', '.h'))) - set(paths), 'files that are not in the map'
