# SPDX-License-Identifier: Apache-2.0
"""Weights that are on the device only while a layer is called: a layer that is not called has none."""

import copy

import accelerate
import pytest
import torch


@pytest.mark.parametrize('where', ('cpu', 'disk'))
def test_offloaded_weights(where, model, images, plainly, tmp_path, assert_close):
    offloaded, cpu = copy.deepcopy(model), torch.device('cpu')
    if where == 'cpu':
        offloaded = accelerate.cpu_offload(offloaded, execution_device=cpu)
    else:
        offloaded = accelerate.disk_offload(offloaded, tmp_path, execution_device=cpu)
    assert {p.device.type for p in offloaded.parameters()} == {'meta'}
    with torch.no_grad():
        expected = plainly(model, images)
        for _ in range(2):
            assert_close(offloaded(images), expected, 1e-5)
