# SPDX-License-Identifier: Apache-2.0
"""The loop of damaged files, short: `python tests/weights/flip_loop.py --flips 1000` is the long one."""

import flip_loop
import pytest


@pytest.mark.parametrize('kind', flip_loop.KINDS)
def test_damaged_files_are_refused_or_give_the_same(kind, tmp_path):
    if kind == 'run':
        pytest.importorskip('vssm.models.mm')
    outcomes = flip_loop.flip_loop(kind, 6, tmp_path, seed=1)
    assert outcomes['changed'] == 0 and outcomes['refused'] >= 4
