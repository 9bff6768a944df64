# SPDX-License-Identifier: Apache-2.0
"""Gradients of every image, by hooks on the layers, and private training by them."""

import pytest
import timm
import torch
from opacus import GradSampleModule, PrivacyEngine, grad_sample
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

LABELS = torch.tensor([2, 0, 3])
private = pytest.mark.parametrize('model', ('test_vmamba', 'test_vmamba2d'), indirect=True)


def gradients_of_each(model, images):
    """The gradients of one image after the other, as one tensor for each parameter, (images, ...)."""
    gradients = []
    for image, label in zip(images, LABELS, strict=True):
        loss = nn.functional.cross_entropy(model(image[None]), label[None])
        gradients.append(torch.autograd.grad(loss, [*model.parameters()]))
    return [torch.stack(each) for each in zip(*gradients, strict=True)]


@pytest.fixture
def contiguous_unfold(monkeypatch):
    """opacus unfolds what a convolution takes by strides of a contiguous map, whatever it has, and networks that are
    channels-last give it others: it says nothing, and is wrong. With functorch it does not unfold."""
    unfold = grad_sample.conv.unfold2d
    monkeypatch.setattr(grad_sample.conv, 'unfold2d', lambda x, **kwargs: unfold(x.contiguous(), **kwargs))


@private
@pytest.mark.parametrize('force_functorch', (False, True), ids=('hooks', 'functorch'))
def test_gradient_samples(force_functorch, model, images, plainly, assert_close, contiguous_unfold):
    model.train()
    expected = plainly(gradients_of_each, model, images)
    sampled = GradSampleModule(model, force_functorch=force_functorch)
    nn.functional.cross_entropy(sampled(images), LABELS).backward()
    for (name, parameter), each in zip(model.named_parameters(), expected, strict=True):
        assert_close(parameter.grad_sample, each, 1e-4, name)


@private
def test_a_private_step(model, images, plainly, assert_close):
    """Without noise: the mean of the images' gradients, each clipped to a norm."""
    model.train()
    gradients = plainly(gradients_of_each, model, images)
    norms = torch.stack([each.flatten(1).norm(dim=1) for each in gradients]).norm(dim=0)
    max_norm = norms.median().item()
    scales = (max_norm / norms).clamp(max=1)
    expected = [
        p.detach() - 0.1 * torch.einsum('i,i...->...', scales, each) / len(images)
        for p, each in zip(model.parameters(), gradients, strict=True)
    ]
    sampled, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(images, LABELS), batch_size=len(images)),
        noise_multiplier=0.0,
        max_grad_norm=max_norm,
        poisson_sampling=False,
        grad_sample_mode='functorch',
    )
    ((x, labels),) = loader
    nn.functional.cross_entropy(sampled(x), labels).backward()
    optimizer.step()
    for (name, parameter), value in zip(model.named_parameters(), expected, strict=True):
        assert_close(parameter, value, 1e-5, name)


def test_batch_norms_are_refused():
    """They mix the images of a batch."""
    assert not ModuleValidator.validate(timm.create_model('test_vmamba2d').train())
    errors = ModuleValidator.validate(timm.create_model('test_spatial_mamba').train())
    assert errors and all('BatchNorm' in str(error) for error in errors)
