# SPDX-License-Identifier: Apache-2.0
"""GroupMamba: sizes and numbers as the golden files have them, and what its two classifiers do."""

import pytest
import timm
import torch
from golden_files import under
from torch import nn

from vssm.models.groupmamba import checkpoint_filter_fn
from vssm.models.weights import identify

SIZES = {  # parameters, widths, depths
    'groupmamba_tiny': (23_361_917, (64, 128, 348, 448), (3, 4, 9, 3)),
    'groupmamba_small': (34_781_555, (64, 128, 348, 512), (3, 4, 16, 3)),
    'groupmamba_base': (57_150_838, (96, 192, 424, 512), (3, 6, 21, 3)),
}
POOLINGS = ('avg', 'max', 'avgmax', 'catavgmax')


def create(name='test_groupmamba', **kwargs):
    return timm.create_model(name, **kwargs).eval()


def images(height=64, width=96, batch=2, dtype=None):
    return torch.randn(batch, 3, height, width, dtype=dtype)


# ---- golden files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', SIZES)
def test_groupmamba_holds_the_published_tensors(golden, name):
    published = golden(f'keys_{name}.json')
    model = create(name, device='meta')
    params, dims, depths = SIZES[name]
    assert sum(p.numel() for p in model.parameters()) == published['num_params'] == params
    assert len(list(model.buffers())) == len(published['buffers'])
    assert tuple(info['num_chs'] for info in model.feature_info) == dims
    assert tuple(len(stage.blocks) for stage in model.stages) == depths
    tensors = {key: torch.empty(shape, device='meta') for key, shape in published['state_dict'].items()}
    model.load_state_dict(tensors)  # strictly
    renamed = checkpoint_filter_fn(tensors, model)
    assert checkpoint_filter_fn(renamed, model) == renamed


@pytest.mark.parametrize('case', ('square', 'nonsquare', 'odd'))
def test_golden_groupmamba(golden, backend, case, assert_close):
    tensors, metadata = golden('groupmamba_micro')
    config = metadata['config']
    model = create(
        'groupmamba_tiny',
        stem_dim=config['stem_hidden_dim'],
        dims=config['embed_dims'],
        depths=config['depths'],
        num_classes=config['num_classes'],
        dtype=backend.dtype,
    )
    model.load_state_dict(under(tensors, 'state_dict.'))
    value_tolerance, grad_tolerance = (1e-6, 1e-6) if backend.dtype == torch.float64 else (1e-5, 1e-4)
    x = tensors[f'{case}.input'].to(backend.dtype).requires_grad_()
    logits = model(x)
    assert_close(logits, tensors[f'{case}.logits'], value_tolerance, 'logits')

    if case == 'square' and backend.dtype == torch.float32:
        return  # rounding image and weights to float32 alone moves its gradients by up to 1e-4: judged in float64
    (logits * tensors[f'{case}.loss_weight']).sum().backward()
    expected = under(tensors, f'{case}.grad.')
    assert_close(x.grad, expected.pop('input'), grad_tolerance, 'gradient of the image')
    parameters = dict(model.named_parameters())
    # A gradient is named and laid out as its parameter.
    expected = checkpoint_filter_fn(expected, model)
    assert expected.keys() == (set() if case == 'odd' else parameters.keys())
    for name, grad in expected.items():
        if name.endswith('.skip_scale') and backend.dtype == torch.float32:
            continue  # the norm behind it takes out every scale: what is left of this gradient is rounding
        actual = parameters[name].grad
        actual = torch.zeros_like(grad) if actual is None else actual
        assert_close(actual, grad, grad_tolerance, f'gradient of {name}')


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
