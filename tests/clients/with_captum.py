# SPDX-License-Identifier: Apache-2.0
"""Attributions to pixels and to what layers give, which hooks collect."""

import numpy
import pytest
import torch
from captum.attr import DeepLift, IntegratedGradients, LayerActivation, LayerGradCam

LAYERS = ('stem', 'stages.1.downsample', 'stages.0.blocks.0', 'stages.2.blocks.1.mlp', 'stages.2.blocks.1.mlp.fc1')
LAYERS += ('stages.2.blocks.1.mlp.act', 'stages.2.blocks.0.mixer', 'stages.2.blocks.0.mixer.norm')
LAYERS += ('stages.0.blocks.0.mixer.in_proj', 'stages.0.blocks.0.mixer.out_proj', 'stages.3.blocks', 'head.norm')
TARGET = 2


def outputs(model, names, x):
    """What layers give, by their names, and the score of a class."""
    found = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *args, name=name: found.__setitem__(name, args[-1]))
        for name in names
    ]
    score = model(x)[:, TARGET].sum()
    for handle in handles:
        handle.remove()
    return found, score


def test_activations_of_layers(model, images, plainly, assert_close):
    layers = [name for name in LAYERS if name in dict(model.named_modules())]  # not all networks have MLPs
    expected, _ = plainly(outputs, model, layers, images)
    for name in layers:
        activation = LayerActivation(model, model.get_submodule(name)).attribute(images)
        assert activation.shape[:1] == images.shape[:1]
        assert_close(activation, expected[name], 1e-5, name)


@pytest.mark.parametrize('layer', ('stem.conv1', 'stages.1.blocks.0.mixer.conv', 'stages.3.blocks.0.mixer.conv'))
def test_grad_cam_of_a_convolution(layer, model, images, plainly, assert_close):
    def by_hand():
        found, score = outputs(model, [layer], images)
        (gradient,) = torch.autograd.grad(score, found[layer])
        return (gradient.mean((2, 3), keepdim=True) * found[layer]).sum(1, keepdim=True)

    cam = LayerGradCam(model, model.get_submodule(layer)).attribute(images, TARGET)
    assert_close(cam, plainly(by_hand), 1e-4)


def test_integrated_gradients(model, images, plainly, assert_close):
    """From black to the image, by Gauss's quadrature."""
    steps = 3

    def by_hand():
        total = torch.zeros_like(images)
        for node, weight in zip(*numpy.polynomial.legendre.leggauss(steps), strict=True):  # on [-1, 1]
            x = (images * (1 + float(node)) / 2).requires_grad_()
            (gradient,) = torch.autograd.grad(model(x)[:, TARGET].sum(), x)
            total += gradient * float(weight) / 2
        return images * total

    attribution = IntegratedGradients(model).attribute(images, target=TARGET, n_steps=steps).float()
    assert_close(attribution, plainly(by_hand), 1e-4)


@pytest.mark.parametrize('model', ['test_spatial_mamba'], indirect=True)
def test_deep_lift(model, images, plainly, assert_close):
    """It keeps what each ReLU saw, with the image and with black in one batch."""

    def attribute():
        return DeepLift(model).attribute(images, torch.zeros_like(images), target=TARGET).detach()

    assert_close(attribute(), plainly(attribute), 1e-4)
