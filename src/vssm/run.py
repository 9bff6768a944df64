# SPDX-License-Identifier: Apache-2.0
"""Run a script of others, such as timm's train.py, as if `import vssm` stood first in it.

    python -m vssm.run SCRIPT ARGS

SCRIPT is a file, or the name of one that an installed mmdetection or mmsegmentation has in its tools: mmdet/train.py,
mmseg/publish_model.py. In a script that imports packages of OpenMMLab `import vssm.models.mm` stands there too, as it
needs mmcv's operators before it reads any config, and loads checkpoints whose histories PyTorch's reader refuses.
"""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

PACKAGES = ('mmdet', 'mmseg')


def main(needs_mm: bool | None = None) -> None:
    """Run the script that the command line names.

    Args:
        needs_mm: Whether the adapters for mmengine are imported first; what the script imports decides unless given.
    """
    sys.argv = sys.argv[1:]
    path = find(sys.argv[0] if sys.argv else '')
    if imports_openmmlab(path) if needs_mm is None else needs_mm:
        from .models import mm  # noqa: F401  # which changes the process
    sys.path[0] = str(path.parent)  # where Python would put it
    runpy.run_path(str(path), run_name='__main__')


def imports_openmmlab(path: Path) -> bool:
    """Whether a script has a line that imports mmengine, mmcv, mmdetection or mmsegmentation."""
    return re.search(rb'^\s*(import|from) mm(engine|cv|det|seg)\b', path.read_bytes(), re.MULTILINE) is not None


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
        sys.exit(f'python -m vssm.run SCRIPT ARGS: SCRIPT must be a Python file, got {script!r}, which {which}.')
    return found[0]


if __name__ == '__main__':
    main()
