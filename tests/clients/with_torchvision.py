# SPDX-License-Identifier: Apache-2.0
"""torchvision's detectors over the maps of a network."""

import copy

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

ANCHORS = AnchorGenerator(((16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 4)  # sizes, and shapes, for each map


class Pyramid(nn.Module):
    """What torchvision asks of a backbone: maps by their names, all of `out_channels`."""

    out_channels = 16

    def __init__(self, name):
        super().__init__()
        self.body = timm.create_model(name, features_only=True)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, x):
        return self.fpn({str(i): y for i, y in enumerate(self.body(x))})


@pytest.mark.parametrize('kind', (FasterRCNN, MaskRCNN))
def test_a_detector(kind, model, plainly, assert_close):
    """The losses of two images of different sizes, the gradients of the stem, and boxes."""
    detector = kind(
        Pyramid(model.pretrained_cfg['architecture']),
        num_classes=3,
        rpn_anchor_generator=ANCHORS,
        min_size=64,
        max_size=96,
    )
    by_hand = copy.deepcopy(detector)
    images = [torch.rand(3, 60, 80), torch.rand(3, 64, 48)]
    box = torch.tensor([[8.0, 8.0, 40.0, 44.0]])
    targets = [
        dict(boxes=box, labels=torch.tensor([i + 1]), masks=torch.ones(1, *x.shape[1:], dtype=torch.uint8))
        for i, x in enumerate(images)
    ]

    def step(network):
        torch.manual_seed(0)  # of the boxes that are drawn
        losses = network.train()(images, targets)
        sum(losses.values()).backward()
        return torch.stack([*losses.values()]).detach()

    assert_close(step(detector), plainly(step, by_hand), 1e-4)
    others = dict(by_hand.named_parameters())
    for what, parameter in detector.named_parameters():
        if what.endswith('weight'):  # a bias before a batch norm has a gradient of rounding errors
            assert_close(parameter.grad, others[what].grad, 1e-3, what)
    with torch.no_grad():
        found = detector.eval()(images)
    assert [set(one) >= {'boxes', 'labels', 'scores'} for one in found] == [True, True]
