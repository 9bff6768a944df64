# SPDX-License-Identifier: Apache-2.0
"""The scan in bands, which teaches what the CUDA kernels do: it gives what the definition gives, wherever it cuts."""

import pytest
import torch
from scan_cases import make_case, random_like, values_and_grads

from vssm.ops import selective_scan_ref
from vssm.ops.scan.chunked import scan_axis_in_bands, selective_scan_chunked
from vssm.ops.scan.reference import scan_axis

HEIGHT, WIDTH = 5, 3
BANDS = {'one': 1, 'ragged': 2, 'bands-of-one': HEIGHT, 'more-bands-than-lines': 7, 'more-than-places': 17}


@pytest.mark.parametrize('bands', BANDS.values(), ids=BANDS)
@pytest.mark.parametrize('orders', ((0,), (1,), (2,), (3,), (0, 1, 2, 3)), ids=lambda o: '-'.join(map(str, o)))
@pytest.mark.parametrize('ndim', (1, 2))
def test_scan_in_bands_is_the_definition(ndim, orders, bands, assert_close):
    tensors, options = make_case(2, HEIGHT, WIDTH, channels=3, rank=2, ndim=ndim, orders=orders)
    grad_y = random_like(tensors['x'])
    expected, expected_grads = values_and_grads(tensors, options, grad_y, selective_scan_ref)
    y, grads = values_and_grads(tensors, {**options, 'bands': bands}, grad_y, selective_scan_chunked)
    assert_close(y, expected, 1e-10, 'y')
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], 1e-10, f'gradient of {name}')


@pytest.mark.parametrize('bands', (1, 2, 3, 4, 6, 11, 12))
def test_a_long_walk_keeps_the_state_that_enters_each_band_of_a_scan(bands, assert_close):
    """Without decay the last state is the sum of all: nothing may be lost on the way."""
    a, b = torch.ones(1, 11, 1, dtype=torch.float64), torch.rand(1, 11, 1, dtype=torch.float64)
    assert_close(scan_axis_in_bands(a, b, bands), b.cumsum(1), 1e-14)
    a = torch.rand(1, 11, 1, dtype=torch.float64)
    assert_close(scan_axis_in_bands(a, b, bands), scan_axis(a, b, dim=1), 1e-14)


def test_scan_in_bands_of_one_state_without_C(assert_close):
    tensors, options = make_case(1, 4, 6, orders=(2,), states=1, ndim=1, has_C=False, has_D=False)
    y = selective_scan_chunked(**tensors, **options, bands=4)
    assert_close(y, selective_scan_ref(**tensors, **options), 1e-10)
