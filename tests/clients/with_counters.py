# SPDX-License-Identifier: Apache-2.0
"""Counters of operations: PyTorch's counts the scan; those that hook modules miss it and say nothing."""

import ptflops
import pytest
import thop
import torch
import torchinfo
from torch.utils.flop_counter import FlopCounterMode

from vssm.tools._count import count_fvcore


def count_torch(model, images):
    """The operations of all, and those of the scan, two for each multiplication with its sum."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(images)
    ops = counter.get_flop_counts()['Global']
    return counter.get_total_flops(), sum(count for op, count in ops.items() if str(op).startswith('vssm.'))


def count_thop(model, images):
    return thop.profile(model, (images,), verbose=False)[0]


def count_ptflops(model, images):
    options = dict(as_strings=False, print_per_layer_stat=False, backend='pytorch')
    return ptflops.get_model_complexity_info(model, tuple(images.shape[1:]), **options)[0]


def count_torchinfo(model, images):
    return torchinfo.summary(model, input_data=images, verbose=0).total_mult_adds


@pytest.mark.parametrize('count', (count_thop, count_ptflops, count_torchinfo))
def test_what_counters_miss(count, model):
    """They find no more than what is left without the scan, which PyTorch's counter sees."""
    images = torch.randn(1, 3, 64, 64)
    flops, scan = count_torch(model, images)
    assert 0 < scan < flops
    assert count(model, images) <= (flops - scan) / 2 * 1.05
    assert scan / 2 <= count_fvcore(model, images).macs <= flops
