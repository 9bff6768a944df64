# SPDX-License-Identifier: Apache-2.0
"""What makes the layers fast on a CPU changes no result, and steps aside for whoever looks on."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations

import vssm  # noqa: F401  registers the models
from vssm.models import layers

SMALL = timm.list_models('test_*', module=['vmamba', 'spatial_mamba'])


class Recorder(nn.Module):
    """Twice its input, and the sizes of the batches that came."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        return 2 * x


@pytest.fixture
def always(monkeypatch):
    """The smallest groups, and a convolution for every linear layer."""
    monkeypatch.setattr(layers, '_GROUP_BYTES', 1e-9)
    monkeypatch.setattr(layers, '_CONV_ROWS', 0)


def results(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return dict(
        y=y.detach(),
        x=x.grad,
        **{name: p.grad for name, p in model.named_parameters()},
        **{name: b.clone() for name, b in model.named_buffers()},
    )


@pytest.mark.parametrize('training', (False, True), ids=('evaluation', 'training'))
@pytest.mark.parametrize('name', SMALL)
def test_groups_and_convolutions_change_nothing(name, training, monkeypatch, assert_close):
    model = timm.create_model(name, num_classes=10).train(training)
    other = copy.deepcopy(model)
    x = torch.randn(3, 3, 48, 80)
    monkeypatch.setattr(layers, '_GROUP_BYTES', 1e18)
    monkeypatch.setattr(layers, '_CONV_ROWS', 1e18)
    expected = results(model, x)
    monkeypatch.setattr(layers, '_GROUP_BYTES', 1e-9)
    monkeypatch.setattr(layers, '_CONV_ROWS', 0)
    found = results(other, x)
    assert not torch.equal(found['y'], expected['y'])  # they did run
    for key in expected:
        if training and key.endswith('conv3.bias'):
            continue  # a batch norm takes it away again: its gradient is rounding
        assert_close(found[key], expected[key], 2e-5, key)


def test_groups_are_even(monkeypatch):
    module = Recorder().eval()
    x = torch.randn(7, 4, 4, 25)
    monkeypatch.setattr(layers, '_GROUP_BYTES', 3 * 4 * x[0].nbytes / torch.get_num_threads())
    assert torch.equal(layers.in_groups(module, x), 2 * x)
    assert module.sizes == [3, 2, 2]


@pytest.mark.parametrize('who', ('hook', 'training', 'vmap', 'grad', 'trace', 'compile', 'meta'))
@pytest.mark.filterwarnings('ignore:.*torch.jit.*:DeprecationWarning')
def test_onlookers_get_whole_batches(who, always):
    module = Recorder().train(who == 'training')
    x = torch.randn(5, 2, 2, 3, device='meta' if who == 'meta' else 'cpu')

    def call(x):
        return layers.in_groups(module, x)

    if who == 'hook':
        seen = []
        module.register_forward_hook(lambda module, args, y: seen.append(y.shape[0]))
        call(x)
        assert seen == [5]
    elif who == 'vmap':
        torch.vmap(call)(torch.stack([x, x]))
    elif who == 'grad':
        torch.func.grad(lambda x: call(x).sum())(x)
    elif who == 'trace':
        torch.jit.trace(call, x, check_trace=False)
    elif who == 'compile':
        torch.compile(call, backend='eager', fullgraph=True)(x)
    else:
        call(x)
    assert set(module.sizes) == {5}


@pytest.mark.parametrize('chunks', (1, 2))
@pytest.mark.parametrize('bias', (False, True))
@pytest.mark.parametrize('shape', ((700, 12), (2, 5, 7, 12), (1, 1, 1, 12)), ids=str)
def test_a_linear_layer_is_a_convolution(shape, bias, chunks, always, assert_close):
    layer = nn.Linear(12, 20, bias=bias)
    x = torch.randn(shape)

    def run(forward):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        ys = forward(leaf)
        sum((i + 1) * y.square().sum() for i, y in enumerate(ys)).backward()
        return [*ys, leaf.grad, *(p.grad.clone() for p in layer.parameters())]

    found = run(lambda x: layers.linear_chunks(layer, x, chunks))
    for a, b in zip(found, run(lambda x: layer(x).chunk(chunks, dim=-1)), strict=True):
        assert a.shape == b.shape and a.is_contiguous()
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize('what', ('subclass', 'hook', 'parametrized', 'float64', 'autocast', 'replaced'))
def test_what_is_no_plain_linear_layer_is_called(what, always, monkeypatch):
    layer = nn.modules.linear.NonDynamicallyQuantizableLinear(12, 12) if what == 'subclass' else nn.Linear(12, 12)
    if what == 'replaced':
        layer = nn.Sequential(layer)
    if what == 'hook':
        layer.register_forward_pre_hook(lambda module, args: None)
    if what == 'parametrized':
        parametrizations.weight_norm(layer)
    if what == 'float64':
        layer.double()
    x = torch.randn(600, 12, dtype=torch.float64 if what == 'float64' else torch.float32)
    monkeypatch.setattr(layers.F, 'conv2d', None)
    with torch.autocast('cpu', enabled=what == 'autocast'):
        assert torch.equal(layers.linear(layer, x), layer(x))
