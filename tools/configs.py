# SPDX-License-Identifier: Apache-2.0
"""List the configs that `vssm train` and `vssm test` find by name."""

import argparse
import ast
import fnmatch
import sys

from ._common import UsageError, find_config, list_configs
from ._tables import print_table

EXAMPLE = "vssm configs 'digits/*'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'pattern', metavar='PATTERN', nargs='?', default='*', help='pattern of their names, * for any text'
    )


def run(args: argparse.Namespace) -> int:
    names = fnmatch.filter(list_configs(), args.pattern)
    if not names:
        raise UsageError(f'PATTERN must match one of {", ".join(list_configs())}, got {args.pattern!r}.')
    rows = [(name, ast.get_docstring(ast.parse(find_config(name).read_text())) or '') for name in names]
    print_table(['config', 'what it trains'], rows)
    return 0


if __name__ == '__main__':
    from .main import main

    sys.exit(main(['configs', *sys.argv[1:]]))
