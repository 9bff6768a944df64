# SPDX-License-Identifier: Apache-2.0
"""Encoders of segmentation-models-pytorch, by the prefix for timm's models."""

import copy

import pytest
import segmentation_models_pytorch as smp
import torch


@pytest.mark.parametrize('kind', (smp.Unet, smp.UPerNet))
@pytest.mark.parametrize('training', (False, True), ids=('evaluation', 'training'))
def test_masks(kind, training, model, images, plainly, assert_close):
    """A network's masks and the gradients of its stem, from a fitting size: multiples of 32."""
    name = model.pretrained_cfg['architecture']
    segmentor = kind(f'tu-{name}', encoder_weights=None, classes=5).train(training)
    images = torch.nn.functional.pad(images, (0, 16, 0, 32))  # 64x64
    by_hand = copy.deepcopy(segmentor)

    def step(network):
        torch.manual_seed(0)
        masks = network(images)
        masks.square().mean().backward()
        return masks.detach()

    masks = step(segmentor)
    assert masks.shape == (3, 5, 64, 64)
    assert_close(masks, plainly(step, by_hand), 1e-5)
    (name, stem), (_, theirs) = (next(iter(n.encoder.named_parameters())) for n in (segmentor, by_hand))
    assert_close(stem.grad, theirs.grad, 1e-3, name)
