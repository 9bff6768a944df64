# SPDX-License-Identifier: Apache-2.0
"""Run a script of mmdetection or mmsegmentation as if `import vssm.models.mm` stood first in it.

    python -m vssm.tools.mm SCRIPT ARGS

SCRIPT is a file, or the name of one that an installed package has in its tools: mmdet/train.py, mmseg/publish_model.py.
The scripts import mmcv's operators before they read any config, and load checkpoints whose histories PyTorch's reader
refuses: what lets them pass must be there first.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

from ..models import mm  # noqa: F401  # which changes the process

PACKAGES = ('mmdet', 'mmseg')


def main() -> None:
    sys.argv = sys.argv[1:]
    path = find(sys.argv[0] if sys.argv else '')
    sys.path[0] = str(path.parent)  # where Python would put it
    runpy.run_path(str(path), run_name='__main__')


def find(script: str) -> Path:
    """The file of a script, by its path or by its name among the tools of the packages."""
    path = Path(script)
    if path.is_file():
        return path
    asked = PACKAGES if str(path.parent) == '.' else (str(path.parent),)
    specs = [importlib.util.find_spec(package) for package in PACKAGES if package in asked]
    roots = [Path(spec.origin).parent / '.mim/tools' for spec in specs if spec and spec.origin]
    found = [file for root in roots for file in sorted(root.rglob('*.py')) if file.name == path.name]
    if len(found) != 1:
        which = (
            f'could be {" or ".join(map(str, found))}' if found else f'is none in the tools of {" or ".join(PACKAGES)}'
        )
        sys.exit(f'python -m vssm.tools.mm SCRIPT ARGS: SCRIPT must be a Python file, got {script!r}, which {which}.')
    return found[0]


if __name__ == '__main__':
    main()
