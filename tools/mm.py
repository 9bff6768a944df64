# SPDX-License-Identifier: Apache-2.0
"""Run a script of mmdetection or mmsegmentation, such as their tools/train.py, without a compiled mmcv.

    python -m vssm.tools.mm SCRIPT ARGS

They import mmcv's operators before they read any config: the stand-in of vssm.models.mm.mmcv_ext must be there first.
"""

import runpy
import sys
from pathlib import Path

from ..models.mm import mmcv_ext


def main() -> None:
    script = sys.argv[1] if len(sys.argv) > 1 else ''
    if not Path(script).is_file():
        sys.exit(f'python -m vssm.tools.mm SCRIPT ARGS: SCRIPT must be a Python file, got {script!r}.')
    mmcv_ext.install()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).parent)  # where Python would put it
    runpy.run_path(script, run_name='__main__')


if __name__ == '__main__':
    main()
