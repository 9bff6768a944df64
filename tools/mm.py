# SPDX-License-Identifier: Apache-2.0
"""Run a script as `python -m vssm.run` does, with `import vssm.models.mm` first in it whatever it imports.

python -m vssm.tools.mm SCRIPT ARGS
"""

from ..run import main

if __name__ == '__main__':
    main(needs_mm=True)
