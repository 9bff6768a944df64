# SPDX-License-Identifier: Apache-2.0
"""What the tests run in the process of the emulator: the real host code, and kernels with faults."""

import os
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch

from .launch import emulation, install
from .machine import Launch

Outputs = tuple[torch.Tensor, ...]


def start(cache: str) -> None:
    """Prepare a process."""
    os.environ['TRITON_CACHE_DIR'] = cache
    torch.set_num_threads(1)
    install()


def faults_of(launches: Sequence[Launch]) -> list[str]:
    return [
        f'{launch.kernel.name}: {fault} ({count} times)'
        for launch in launches
        for fault, count in launch.faults.items()
    ]


def run_clean(call: Callable[[], Any]) -> tuple[Any, list[Launch]]:
    """What a call returns, and its launches, in which there was no fault."""
    with emulation() as launches:
        result = call()
    assert launches, 'no kernel was launched'
    faults = faults_of(launches)
    assert not faults, '\n'.join(faults)
    return result, list(launches)


# ---- the ops ---------------------------------------------------------------------------------------------------------


def scan_call(case: dict[str, Any]) -> tuple[Callable[[], tuple[torch.Tensor, Outputs]], tuple]:
    """A call of the scan forward and backward, as the models make it; and its tensors, options and gradient."""
    from scan_cases import make_case, random_like

    from vssm.ops.scan.triton.launch import selective_scan_triton, selective_scan_triton_backward

    tensors, options = make_case(**case)
    maps = [name for name in ('dt', 'B', 'C') if tensors[name] is not None and tensors['dt'].dim() == 5]
    joined = torch.cat([tensors[name] for name in maps], -1)  # slices of one projection
    tensors |= dict(zip(maps, joined.split([tensors[name].shape[-1] for name in maps], -1), strict=True))
    grad_y = random_like(tensors['x'])
    arguments = (*tensors.values(), *options.values())
    return (
        lambda: (selective_scan_triton(*arguments), selective_scan_triton_backward(grad_y, *arguments)),
        (tensors, options, grad_y),
    )


def host_options(tile: Any = None, bands: int = 1, wide: bool = False) -> Any:
    """Let the host code take a tile, a number of bands, and offsets of 64 bits."""
    from vssm.ops.scan.triton import launch

    options: dict[str, Any] = dict(choose_bands=lambda *_: bands)
    if tile is not None:
        options['TILES'] = {ndim: {1 << 62: (tile,)} for ndim in (1, 2)}
    if wide:
        options['WIDE_FROM'] = 0
    return mock.patch.multiple(launch, **options)


def scan(options: dict[str, Any], case: dict[str, Any]) -> list[str]:
    """Hold values and gradients of the scan to the reference; returns the names of the kernels that ran."""
    from scan_cases import assert_matches_oracle, describe, oracle

    call, (tensors, settings, grad_y) = scan_call(case)
    with host_options(**options):
        (y, grads), launches = run_clean(call)
    named = {name: grad for name, grad in zip(tensors, grads, strict=True) if tensors[name] is not None}
    expected = oracle(tensors, settings, grad_y)
    assert_matches_oracle((y, named), expected, tensors, settings, grad_y, describe(tensors, settings))
    return [launch.kernel.name for launch in launches]


def fusion_call(shape: Sequence[int], dtype: torch.dtype) -> tuple[Callable[[], tuple[torch.Tensor, ...]], Outputs]:
    """A call of the fusion forward and backward, and its map, weight and gradient."""
    from vssm.ops.fusion.triton import state_fusion_triton, state_fusion_triton_backward

    generator = torch.Generator().manual_seed(0)
    h, weight, grad_y = (torch.randn(s, generator=generator) for s in (shape, (3, shape[-1], 3, 3), shape))
    h, grad_y = h.to(dtype), grad_y.to(dtype)
    return (
        lambda: (state_fusion_triton(h, weight), *state_fusion_triton_backward(grad_y, h, weight)),
        (h, weight, grad_y),
    )


def fusion(shape: Sequence[int], dtype: torch.dtype) -> list[str]:
    """Hold values and gradients of the fusion to the reference; returns the names of the kernels that ran."""
    from conftest import relative_error

    from vssm.ops import state_fusion_ref

    call, inputs = fusion_call(shape, dtype)
    results, launches = run_clean(call)
    h, weight, grad_y = (t.double() for t in inputs)
    h.requires_grad_(), weight.requires_grad_()
    y = state_fusion_ref(h, weight)
    expected = (y.detach(), *torch.autograd.grad(y, (h, weight), grad_y))
    for name, actual, right in zip(('y', 'grad h', 'grad weight'), results, expected, strict=True):
        limit = 2e-6 if actual.dtype == torch.float32 else 1e-2
        error = relative_error(actual, right)
        assert error <= limit, f'{name}: error {error:.2e} exceeds {limit:.0e}'
    return [launch.kernel.name for launch in launches]


# ---- barriers --------------------------------------------------------------------------------------------------------


def barriers(op: str, options: dict[str, Any], case: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Judge each barrier of each kernel: without it there is a race, or it is redundant.

    Redundant is a barrier without which there is none, and every bit of memory is as it was though the last warps come
    first. With all barriers that holds too.

    Returns:
        The barriers that are needed, and those that are redundant.
    """
    call = scan_call(case)[0] if op == 'scan' else fusion_call(**case)[0]
    with host_options(**options):
        _, launches = run_clean(call)
    needed, redundant = [], []
    for launch in {launch.kernel: launch for launch in launches}.values():  # the last walk by each code
        assert_order_is_of_no_account(launch, None)
        found = launch.again(traces_barriers=True).needed_barriers
        for index, instruction in enumerate(launch.kernel.instructions):
            if instruction.name == 'BAR':
                if index not in found and not faults_of([launch.again(index)]):
                    assert_order_is_of_no_account(launch, index)
                    redundant.append(f'{launch.kernel.name} {instruction}')
                else:
                    needed.append(f'{launch.kernel.name} {instruction}')
    return needed, redundant


def assert_order_is_of_no_account(launch: Launch, skipped: int | None) -> None:
    again = launch.again(skipped, range(launch.warps)[::-1])
    what = 'with all barriers' if skipped is None else f'without {launch.kernel.instructions[skipped]}'
    same = (again.memory.units == launch.memory.units).all()
    assert same, f'{launch.kernel.name} {what}: values hang on the order of warps'


# ---- kernels with faults, and products -------------------------------------------------------------------------------

PLANTED = {  # what is found
    'clean': set(),
    'no barrier': {'race, read and written by two warps'},
    'no mask': {'address outside'},
    'unwritten input': {'read before it was written'},
    'two programs': {'written, written by another program', 'read, written by another program'},
}


def planted(name: str) -> set[str]:
    """The kinds of faults of a small kernel that is launched with one."""
    from .planted import reverse

    size, block = 100, 128
    with emulation() as launches:
        x, y, z = torch.arange(float(size)), torch.empty(size), torch.empty(size)
        if name == 'unwritten input':
            x = torch.empty(size)
        grid = (2 if name == 'two programs' else 1,)
        reverse[grid](x, y, z, size, block, MASKED=name != 'no mask', BARRIER=name != 'no barrier', num_warps=4)
    if name == 'clean':
        assert torch.equal(z, x.flip(0))
    (launch,) = launches
    return {fault.kind for fault in launch.faults}


def product_error(rows: int, warps: int, dtype: torch.dtype) -> float:
    """The relative error of a product of matrices."""
    from conftest import relative_error

    from .planted import multiply

    a, b, c = torch.randn(rows, 32).to(dtype), torch.randn(32, 16).to(dtype), torch.empty(rows, 16)
    run_clean(lambda: multiply[(1,)](a, b, c, *c.shape, 32, num_warps=warps))
    return relative_error(c, a.double() @ b.double())
