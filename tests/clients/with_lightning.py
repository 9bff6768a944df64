# SPDX-License-Identifier: Apache-2.0
"""A LightningModule around a network."""

import copy

import lightning
import pytest
import timm
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


class Classifier(lightning.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, index):
        images, labels = batch
        return cross_entropy(self.network(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize('options', ({}, dict(gradient_clip_val=0.5), dict(accumulate_grad_batches=3)), ids=str)
def test_three_steps(options, model, plainly, assert_close, tmp_path):
    """The weights after an epoch, the same by hand, and from the checkpoint of the epoch."""
    images, labels = torch.randn(6, 3, 64, 64), torch.tensor([1, 0, 3, 2, 2, 1])
    model = timm.create_model(model.pretrained_cfg['architecture'], num_classes=4)  # whose steps are small
    by_hand = copy.deepcopy(model)
    loader = DataLoader(TensorDataset(images, labels), batch_size=2)
    quiet = dict(accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_epochs=1, default_root_dir=tmp_path, **quiet, **options)
    module = Classifier(model)
    trainer.fit(module, loader)

    def train():
        optimizer = torch.optim.SGD(by_hand.train().parameters(), lr=0.01)
        many = options.get('accumulate_grad_batches', 1)
        for i, (x, target) in enumerate(zip(images.split(2), labels.split(2), strict=True)):
            (cross_entropy(by_hand(x), target) / many).backward()
            if (i + 1) % many == 0:
                if 'gradient_clip_val' in options:
                    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), options['gradient_clip_val'])
                optimizer.step()
                optimizer.zero_grad()

    plainly(train)
    (checkpoint,) = tmp_path.rglob('*.ckpt')
    saved = torch.load(checkpoint)['state_dict']
    for name, expected in by_hand.state_dict().items():
        assert_close(model.state_dict()[name], expected, 1e-4, name)
        assert_close(saved[f'network.{name}'], expected, 1e-4, name)
