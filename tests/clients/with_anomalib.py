# SPDX-License-Identifier: Apache-2.0
"""Anomalies by the features of a network: PatchCore's memory of patches."""

import timm
import torch
from anomalib.models.components.feature_extractors import TimmFeatureExtractor
from anomalib.models.image.patchcore.torch_model import PatchcoreModel


def names(model):
    """A model's own, and those of two of its maps."""
    name = model.pretrained_cfg['architecture']
    return name, timm.create_model(name, features_only=True).feature_info.module_name()[1:3]


def test_features_of_layers(model, images, plainly, assert_close):
    extractor = TimmFeatureExtractor(*names(model), pre_trained=False)
    network = extractor.feature_extractor
    assert extractor.out_dims == network.feature_info.channels()
    with torch.no_grad():
        expected = plainly(network.eval(), images)
        for found, each in zip(extractor(images).values(), expected, strict=True):
            assert_close(found, each, 1e-5)


def test_patchcore(model):
    """An image that it has seen is less strange to it than noise."""
    name, layers = names(model)
    model = PatchcoreModel(layers=layers, backbone=name, pre_trained=False)
    seen = torch.rand(2, 3, 64, 64)
    model.train()
    model(seen)
    model.subsample_embedding(sampling_ratio=0.5)
    model.eval()
    with torch.no_grad():
        scores = model(torch.stack([seen[0], 5 * torch.randn(3, 64, 64)])).pred_score.flatten()
    assert scores[0] < scores[1]
