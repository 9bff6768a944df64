# SPDX-License-Identifier: Apache-2.0
"""fastai's learner over a network, which it asks for maps unless it is told that the network pools them itself."""

import copy
import functools

import torch
from fastai.vision.all import SGD, DataLoaders, vision_learner
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

LABELS = torch.tensor([1, 0, 3])
OURS = dict(pretrained=False, n_out=4, normalize=False)


def learner(model, images, **kwargs):
    name = model.pretrained_cfg['architecture']
    batches = DataLoader(TensorDataset(images, LABELS), batch_size=3)
    return vision_learner(DataLoaders(batches, batches), name, loss_func=cross_entropy, **OURS, **kwargs)


def test_the_body(model, images, plainly, assert_close):
    """Pooled and normalised as trained where timm's entry is overlaid, and the last maps where it is not."""
    pooled = learner(model, images, pretrained_cfg_overlay=dict(pool_size=None)).model[0].eval()
    maps = learner(model, images).model[0].eval()
    with torch.no_grad():
        assert_close(pooled(images), plainly(pooled.model, images), 1e-5)
        assert pooled(images).ndim == 2
        assert_close(maps(images), plainly(maps.model.forward_features, images), 1e-5)


def test_an_epoch(model, images, plainly, assert_close):
    learn = learner(
        model, images, pretrained_cfg_overlay=dict(pool_size=None), opt_func=functools.partial(SGD, mom=0.0), ps=0.0
    )
    by_hand = copy.deepcopy(learn.model).train()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, lr=0.01)

    def train():
        cross_entropy(by_hand(images), LABELS).backward()
        torch.optim.SGD(by_hand.parameters(), lr=0.01).step()

    plainly(train)
    for key, expected in by_hand.state_dict().items():
        if not key.endswith('bias'):  # one before a batch norm has a gradient of rounding errors
            assert_close(learn.model.state_dict()[key], expected, 1e-4, key)
