# SPDX-License-Identifier: Apache-2.0
"""The networks that clients get, with shortcuts that are taken at small sizes, and the way past them."""

import pytest
import timm
import torch
from torch import nn

from vssm.models import layers

NAMES = timm.list_models('test_*', module=['vmamba', 'spatial_mamba'])


@pytest.fixture(params=NAMES)
def model(request):
    """A network in evaluation mode, each of whose parameters moves the output."""
    model = timm.create_model(request.param, num_classes=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 48)


@pytest.fixture(autouse=True)
def low_thresholds(monkeypatch, one_thread):
    monkeypatch.setattr(layers, '_GROUP_BYTES', 20_000)
    monkeypatch.setattr(layers, '_CONV_ROWS', 0)
    monkeypatch.setattr(layers, '_CONV_MACS', 0)


@pytest.fixture
def plainly(monkeypatch):
    """plainly(f, *args): what f returns where no shortcut is taken."""

    def call(f, *args):
        with monkeypatch.context() as patch:
            patch.setattr(layers, '_is_eager_on_cpu', lambda *tensors: False)
            return f(*args)

    return call
