# SPDX-License-Identifier: Apache-2.0
"""The documents: their Python blocks run when pasted, their commands exist, and their links lead somewhere."""

import json
import re
import shlex
from pathlib import Path

import pytest
from fresh_processes import run_fresh

from vssm.tools._common import find_config
from vssm.tools.main import make_parser

ROOT = Path(__file__).parents[2]
TOP = ('README.md', 'DESIGN.md', 'CONTRIBUTING.md', 'MODEL_ZOO.md')
PAGES = (*(ROOT / name for name in TOP), *sorted((ROOT / 'docs').glob('*.md')))

# What PyTorch, torchao and OpenMMLab say of themselves.
WARNINGS = """
import warnings
warnings.simplefilter('error')
warnings.filterwarnings('ignore', '`torch.jit.', DeprecationWarning)  # how PyTorch speaks to libraries that script
warnings.simplefilter('ignore', FutureWarning)
warnings.simplefilter('ignore', UserWarning)
del warnings
"""


def python_blocks():
    """Every Python block of a document, with its page and its place there; those of the README alone are fast."""
    for path in PAGES:
        if path.stem == 'libraries':
            continue  # which `make test-clients` runs, where the libraries are
        blocks = re.findall(r'^```python\n(.*?)^```', path.read_text(), flags=re.DOTALL | re.MULTILINE)
        for i, code in enumerate(blocks):
            slow = path.stem != 'README' or 'aoti_' in code
            yield pytest.param(code, id=f'{path.stem}-block{i}', marks=pytest.mark.slow if slow else ())


BLOCKS = list(python_blocks())


@pytest.mark.parametrize('code', BLOCKS)
def test_python_block_runs_alone(code, tmp_path):
    result = run_fresh(WARNINGS + code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path):
    pytest.importorskip('pytorch_grad_cam', reason="grad-cam is not installed: pip install '.[plot]'")
    cells = json.loads((ROOT / 'examples' / 'predict.ipynb').read_text())['cells']
    code = '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code')
    assert not any(cell.get('outputs') for cell in cells)
    script = f'{code}\nassert heat.shape == (224, 224) and embedding.shape == (1, 768)'
    result = run_fresh(script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r'^ +\d+\.\d%  \w', result.stdout, flags=re.MULTILINE)) == 3


def test_readme_has_python_blocks():
    assert len(BLOCKS) >= 10
    assert sum(block.id.startswith('README-') for block in BLOCKS) >= 4


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 250


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.stem)
def test_a_table_ends_before_the_text_goes_on(page):
    """A line right below a table would be one more row of it."""
    lines = page.read_text().splitlines()
    below = [line for above, line in zip(lines, lines[1:], strict=False) if above.startswith('|') and line.strip()]
    assert [line for line in below if not line.startswith(('|', '<!--'))] == []


def commands():
    """Every call of `vssm` in a document or an example, by whatever launcher."""
    for path in (*PAGES, *(ROOT / 'examples').glob('*.py')):
        text = path.read_text().replace('\\\n', ' ')
        if path.suffix == '.md':
            text = '\n'.join(re.findall(r'^```bash\n(.*?)^```', text, flags=re.DOTALL | re.MULTILINE))
        for line in re.findall(r'^ *(?:vssm |torchrun .*vssm\.tools|srun .*vssm ).*', text, flags=re.MULTILINE):
            command = re.split(r' [|>] ', line)[0]  # without what takes its output
            yield pytest.param(command.strip(), id=command.split('#')[0].strip())


@pytest.mark.parametrize('command', list({param.id: param for param in commands()}.values()))
def test_a_command_is_one_that_exists(command):
    """Its options parse, and a config by name is there; what it does is for other tests."""
    words = shlex.split(command, comments=True)
    start = next(i for i, word in enumerate(words) if word == 'vssm' or word.startswith('vssm.tools'))
    words[start] = words[start].removeprefix('vssm.tools.')
    args = make_parser().parse_args(words[start + (words[start] == 'vssm') :])
    if getattr(args, 'config', None) and not args.config.startswith('$') and not args.config.endswith('.py'):
        find_config(args.config)


def anchors(path):
    """The headings of a page, as links name them."""
    headings = re.findall(r'^#+ (.*)', path.read_text(), flags=re.MULTILINE)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.stem)
def test_links_within_the_repository_lead_to_a_file(page):
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.DOTALL | re.MULTILINE)
    broken = []
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        if re.match(r'\w+:', link):  # another site
            continue
        name, _, anchor = link.partition('#')
        path = page.parent / name if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.stem)
def test_scripts_that_a_page_names_exist(page):
    """`python FILE ...` of a line of code, and the file of every `python -m pytest FILE ...`."""
    scripts = re.findall(r'python (?:-m pytest )?((?:benchmarks|examples|tests)/[\w/]+\.py)', page.read_text())
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
