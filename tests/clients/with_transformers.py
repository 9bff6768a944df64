# SPDX-License-Identifier: Apache-2.0
"""Networks in a folder of weights, as the Hub has them, and what transformers wraps around them."""

import json

import pytest
import timm
import torch
from timm.models import save_for_hf
from transformers import (
    AutoModelForImageClassification,
    TimmBackbone,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
)


@pytest.fixture
def folder(model, tmp_path):
    """As timm writes it, but for the number of classes among the arguments, which transformers passes a second time."""
    folder = tmp_path / 'saved'
    save_for_hf(model, folder, safe_serialization=True)
    config = json.loads((folder / 'config.json').read_text())
    del config['model_args']['num_classes']
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize('kind', (AutoModelForImageClassification, TimmWrapperForImageClassification))
def test_a_classifier(kind, folder, model, images, plainly, assert_close):
    wrapped = kind.from_pretrained(folder).eval()
    assert isinstance(wrapped, TimmWrapperForImageClassification)
    with torch.no_grad():
        assert_close(wrapped(images).logits, plainly(model, images), 1e-5)


def test_what_the_headless_wrapper_gives(folder, model, images, plainly, assert_close):
    wrapped = TimmWrapperModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found = wrapped(images)
        features = plainly(model.forward_features, images)
        assert_close(found.last_hidden_state, features, 1e-5)
        assert_close(found.pooler_output, model.forward_head(features, pre_logits=True), 1e-5)


def test_it_is_saved_and_read_again(folder, images, tmp_path, assert_close):
    wrapped = TimmWrapperForImageClassification.from_pretrained(folder).eval()
    wrapped.save_pretrained(tmp_path / 'again')
    again = TimmWrapperForImageClassification.from_pretrained(tmp_path / 'again').eval()
    with torch.no_grad():
        assert_close(again(images).logits, wrapped(images).logits, 1e-5)


def test_a_training_step(folder, model, images, plainly, assert_close):
    """Its loss, and the gradients that reach the first layer."""
    wrapped = TimmWrapperForImageClassification.from_pretrained(folder).train()
    labels = torch.tensor([0, 1, 3])
    loss = wrapped(images, labels=labels).loss
    loss.backward()

    def by_hand():
        expected = torch.nn.functional.cross_entropy(model.train()(images), labels)
        expected.backward()
        return expected.detach()

    assert_close(loss.detach(), plainly(by_hand), 1e-5)
    name, parameter = next(iter(model.named_parameters()))
    assert_close(wrapped.timm_model.get_parameter(name).grad, parameter.grad, 1e-4)


def test_a_backbone(folder, images, plainly, assert_close):
    """Of a folder by timm's name for it, as transformers takes names alone. It resets batch norms of any network."""
    name = f'local-dir:{folder}'
    backbone = TimmBackbone.from_pretrained(name, out_indices=(1, 3)).eval()
    whole = timm.create_model(name, pretrained=True, features_only=True, out_indices=(1, 3)).eval()
    assert backbone.channels == whole.feature_info.channels()
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in whole.modules()):
        backbone._backbone.load_state_dict(whole.state_dict())
    with torch.no_grad():
        for found, expected in zip(backbone(images).feature_maps, plainly(whole, images), strict=True):
            assert_close(found, expected, 1e-5)
