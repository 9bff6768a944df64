# SPDX-License-Identifier: Apache-2.0
"""The models that the scripts measure, and their steps."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import vssm  # noqa: F401  registers the models
from vssm.tools._models import OURS, PEERS, create_for_size

MODELS = (*PEERS, *sorted(name for name in OURS if name.endswith('_tiny')))
TOKENS = ('vim_tiny_patch16_224', 'vim_small_patch16_224', 'deit_tiny_patch16_224', 'deit_small_patch16_224')
CPU_MODELS = (*MODELS, 'mambaout_tiny', *TOKENS)
LAYOUTS = dict(contiguous=torch.contiguous_format, channels_last=torch.channels_last)


def make(
    name: str, size: int, batch_size: int, train: bool = False, layout: str = 'contiguous', device: str = 'cpu'
) -> tuple[nn.Module, Tensor]:
    """A model with random weights, and images, (batch_size, 3, size, size), in a memory layout."""
    model = create_for_size(name, size).train(train).to(device, memory_format=LAYOUTS[layout])
    images = torch.randn(batch_size, 3, size, size, device=device)
    return model, images.contiguous(memory_format=LAYOUTS[layout])


def forward(model: nn.Module, images: Tensor, bfloat16: bool = False) -> None:
    """Inference, on request in bfloat16 by autocast."""
    with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
        model(images)


def step(model: nn.Module, images: Tensor, bfloat16: bool = False) -> None:
    """Forward and backward, on request in bfloat16 by autocast; no optimizer."""
    model.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
        loss = model(images).square().mean()
    loss.backward()


def better_layout(name: str, seconds: Mapping[tuple[str, str], float]) -> str:
    """The memory layout in which a model took less time; seconds are by name and by those layouts that were timed."""
    return min((layout for layout in LAYOUTS if (name, layout) in seconds), key=lambda layout: seconds[name, layout])
