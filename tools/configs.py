# SPDX-License-Identifier: Apache-2.0
"""List the configs that `vssm train` and `vssm test` find by name, or give one to build on.

A config of one's own inherits a shipped one by `_base_ = PATH`, as --path prints it, and states what differs. --copy
writes a whole one instead, which depends on no other file.
"""

import argparse
import ast
import fnmatch
import sys
from pathlib import Path

from ..version import __version__
from ._common import UsageError, console, did_you_mean, find_config, list_configs, load_config, write_file
from ._options import top_keys
from ._tables import print_table

EXAMPLE = 'vssm configs digits'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        'pattern',
        metavar='PATTERN',
        nargs='?',
        default='*',
        help='beginning of their names, or a pattern, * for any text',
    )
    what.add_argument('--path', metavar='NAME', help='print the path of a config, for _base_ of another')
    what.add_argument(
        '--copy', metavar='NAME', help='write a config to a file of its own name in this folder, its bases merged'
    )


def run(args: argparse.Namespace) -> int:
    if args.path is not None:
        print(find_config(args.path).resolve())
        return 0
    if args.copy is not None:
        return _copy(args.copy)
    known = list_configs()
    names = fnmatch.filter(known, args.pattern) or fnmatch.filter(known, f'{args.pattern}*')
    if not names:
        folders = list(dict.fromkeys(name.partition('/')[0] for name in known))
        raise UsageError(
            f'PATTERN must match a name that `vssm configs` lists, in {", ".join(folders)}, got {args.pattern!r}.'
            f'{did_you_mean(args.pattern, [*folders, *known])}'
        )
    rows = [(name, ast.get_docstring(ast.parse(find_config(name).read_text())) or '') for name in names]
    print_table(['config', 'what it trains'], rows)
    return 0


def _copy(name: str) -> int:
    path = Path(find_config(name).name)
    if path.exists():
        raise UsageError(f'--copy must not replace a file, got {name}, whose name {path} has here.')
    whole = load_config(name).to_dict()
    from mmengine.config import Config

    taken = top_keys()  # the rest are variables of the bases: to change them would change nothing
    cfg = Config({key: value for key, value in whole.items() if key in taken})
    words = f'"""A copy of {name} of vssm {__version__}, with all that it inherits."""\n\n'
    write_file(path, (words + cfg.pretty_text).encode())
    console.print(f'Written to {path}; `vssm train {path}` runs it.', highlight=False, soft_wrap=True)
    return 0


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['configs', *sys.argv[1:]]))
