# SPDX-License-Identifier: Apache-2.0
"""Linear layers in 8 bits, whose weights are no plain tensors."""

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_


@pytest.mark.parametrize('config', (Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig))
def test_int8(config, model, images, plainly, assert_close):
    # An activation that is rounded too may fall to the other side of a step.
    tolerance = 1e-5 if config is Int8WeightOnlyConfig else 4e-2
    quantised = copy.deepcopy(model)
    quantize_(quantised, config())
    linear = {n: m for n, m in quantised.named_modules() if isinstance(m, nn.Linear)}
    assert all(type(m.weight) is not nn.Parameter for m in linear.values())
    with torch.no_grad():
        y = quantised(images)
        assert_close(y, plainly(quantised, images), tolerance)
        rounded = copy.deepcopy(model)
        for name, layer in linear.items():
            rounded.get_submodule(name).weight.copy_(layer.weight.dequantize())
        assert (rounded(images) - model(images)).abs().max() > 1e-3 * y.abs().max()
        assert_close(y, plainly(rounded, images), tolerance)
