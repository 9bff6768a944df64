# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters in place of the linear layers."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

TARGETS = ['in_proj', 'x_proj', 'out_proj', 'fc1', 'fc2', 'head.fc']


@pytest.mark.parametrize('training', (False, True), ids=('evaluation', 'training'))
def test_adapters(training, model, images, plainly, assert_close):
    """W x + s B A x, its gradients, and the network after the adapters are merged."""
    model.train(training)
    by_hand = copy.deepcopy(model)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    adapters = {n: m for n, m in adapted.base_model.model.named_modules() if hasattr(m, 'lora_A')}
    assert {n.split('.', 1)[0] for n in adapters} == {'stages', 'head'}
    factors = {}
    for name, adapter in adapters.items():
        A, B = adapter.lora_A['default'].weight, adapter.lora_B['default'].weight
        torch.nn.init.normal_(B, 0, 0.1)  # they begin at zero
        factors[name] = tuple(t.detach().clone().requires_grad_() for t in (A, B))

    def run_by_hand():
        weights = {f'{n}.weight': by_hand.get_submodule(n).weight + 6 / 4 * B @ A for n, (A, B) in factors.items()}
        y = torch.func.functional_call(by_hand, weights, images)
        y.square().sum().backward()
        return y.detach()

    expected = plainly(run_by_hand)
    y = adapted(images)
    y.square().sum().backward()
    assert_close(y.detach(), expected, 1e-5)
    for name, adapter in adapters.items():
        for layer, factor in zip((adapter.lora_A, adapter.lora_B), factors[name], strict=True):
            assert_close(layer['default'].weight.grad, factor.grad, 1e-4, name)
    if not training:
        with torch.no_grad():
            assert_close(adapted.merge_and_unload()(images), expected, 1e-5)
