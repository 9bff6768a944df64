# SPDX-License-Identifier: Apache-2.0
"""GroupMamba: what its two classifiers do, and its norms."""

import re

import pytest
import timm
import torch
from golden_files import under
from torch import nn

from vssm.models.weights import identify

POOLINGS = ('avg', 'max', 'avgmax', 'catavgmax')


def create(name='test_groupmamba', **kwargs):
    return timm.create_model(name, **kwargs).eval()


def images(height=64, width=96, batch=2, dtype=None):
    return torch.randn(batch, 3, height, width, dtype=dtype)


# ---- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('pool', POOLINGS)
def test_scores_are_the_mean_of_two_classifiers(pool):
    model = create(num_classes=10, global_pool=pool)
    x = images()
    features = model.forward_features(x)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size) == (2, (1 + (pool == 'catavgmax')) * model.num_features)
    first, second = model.get_classifier()
    assert torch.equal(model(x), (first(pre_logits) + second(pre_logits)) / 2)
    model.reset_classifier(0, '')
    assert torch.equal(model(x), model.head.norm(features)) and isinstance(model.head.fc_dist, nn.Identity)


def test_vectors_of_two_poolings_do_not_mix():
    model = create(num_classes=0, global_pool='catavgmax')
    features = model.forward_features(images())
    both = model.forward_head(features)
    for i, pool in enumerate(('avg', 'max')):
        model.reset_classifier(0, pool)
        torch.testing.assert_close(model.forward_head(features), both.chunk(2, dim=-1)[i])


def test_distilled_training_gives_a_pair():
    model = create(num_classes=10)
    x, features = images(), []
    model.head.drop.register_forward_hook(lambda module, args, y: features.append(y))
    assert model.train()(x).shape == (2, 10)
    model.set_distilled_training()
    pair = model(x)
    for scores, classifier in zip(pair, model.get_classifier(), strict=True):
        assert torch.equal(scores, classifier(features[-1]))
    assert model.eval()(x).shape == (2, 10)
    model.train().set_distilled_training(False)
    assert model(x).shape == (2, 10)


def test_classifiers_are_reset_together():
    model = create(num_classes=10, dtype=torch.float64).train()
    model.reset_classifier(7, 'catavgmax')
    for classifier in model.get_classifier():
        assert classifier.weight.shape == (7, 192) and classifier.weight.dtype == torch.float64 and classifier.training
    assert model(images(dtype=torch.float64)).shape == (2, 7)


@pytest.mark.parametrize('indices, prune_head, kept', [(1, True, False), ([1], False, False), (1, False, True)])
def test_pruning_drops_the_class_attention(indices, prune_head, kept):
    model = create(device='meta')
    model.prune_intermediate_layers(indices, prune_head=prune_head)
    assert isinstance(model.head.attn, nn.Identity) != kept
    model.reset_classifier(5, 'avg')
    assert model(torch.empty(2, 3, 64, 96, device='meta')).shape == (2, 5)


def test_norms_between_the_layers_have_another_epsilon():
    for name, module in create(device='meta').named_modules():
        if isinstance(module, nn.LayerNorm):
            between = re.fullmatch(r'stages\.\d\.norm|.*\.norm2|head\.norm|head\.attn\.norm1', name)
            assert module.eps == (1e-6 if between else 1e-5), name


def test_widths_and_ratios_that_fit_no_network():
    with pytest.raises(ValueError, match=r'dims must be multiples of 4.*\(32, 48, 66, 96\)'):
        create(device='meta', dims=(32, 48, 66, 96))
    with pytest.raises(ValueError, match=r'mlp_ratio.*4 depths.*\(8, 4\)'):
        create(device='meta', mlp_ratio=(8, 4))


def test_identify_knows_the_published_tensors(golden):
    tensors, metadata = golden('groupmamba_micro')
    name, args, twins = identify(under(tensors, 'state_dict.'))
    config = metadata['config']
    assert args['stem_dim'] == config['stem_hidden_dim'] and args['dims'] == config['embed_dims'] and not twins
    timm.create_model(name, **args).load_state_dict(under(tensors, 'state_dict.'))
