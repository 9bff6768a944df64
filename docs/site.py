# SPDX-License-Identifier: Apache-2.0
"""What the site has beside docs/: the pages at the top of the repository, and each file that a page links to.

The pages are written for the repository, where they are read as often, and link as it lies on the disk. A link that
leaves docs/ leads to a copy in the site: of a Markdown file as a page, of any other as a page with its text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
TOP = ('README.md', 'MODEL_ZOO.md', 'DESIGN.md', 'CONTRIBUTING.md', 'CHANGELOG.md')
FENCE = re.compile(r'(^```.*?^```)', flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r'(?<=\]\()(?!\w+:|#)([^)\s#]+)')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the top, and after them what they and all others link to."""
    pages = [*TOP, *(f'docs/{file.src_uri}' for file in files.documentation_pages())]
    beside = set(TOP)
    for path in pages:  # which grows by what they link to
        for link in LINK.findall(FENCE.sub('', (ROOT / path).read_text())):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
            if not (ROOT / target).is_file():
                raise PluginError(f'{path} must link to files, got {link}.')
            if not target.startswith('docs/') and target not in beside:
                beside.add(target)
                pages += [target] * target.endswith('.md')
    for path in sorted(beside):
        files.append(File.generated(config, in_site(path), content=text_of(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn a page's links from places in the repository to places in the site."""
    uri = page.file.src_uri
    path = 'README.md' if uri == 'index.md' else uri if page.file.generated_by else f'docs/{uri}'

    def link(found: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), found[1]))
        return posixpath.relpath(in_site(target), posixpath.dirname(uri) or '.')

    pieces = FENCE.split(markdown)
    return ''.join(piece if i % 2 else LINK.sub(link, piece) for i, piece in enumerate(pieces))


def in_site(path: str) -> str:
    """Where the site has a file of the repository."""
    if path == 'README.md':
        return 'index.md'
    if path.startswith('docs/'):
        return path.removeprefix('docs/')
    return path if path.endswith('.md') else f'source/{path}.md'


def text_of(path: str) -> str:
    """A file as a page."""
    if path.endswith('.md'):
        return (ROOT / path).read_text()
    language = {'.py': 'python', '.json': 'json', '.sh': 'bash'}.get(Path(path).suffix, '')
    return f'# {path}\n\n```{language}\n{(ROOT / path).read_text()}```\n'
