# SPDX-License-Identifier: Apache-2.0
"""`python -m vssm.tools.report`."""

import sys

from ..main import main

sys.exit(main(['report', *sys.argv[1:]]))
