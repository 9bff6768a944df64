# SPDX-License-Identifier: Apache-2.0
"""Count the CUDA kernels that a training and a detection compile; compiles and computes nothing.

For each batch, in bfloat16, a mixer of each stage goes forward and backward on the meta device, and the host code makes
its launches. Prints json: for each network and task how many kernels there are, with the default tiles, and where a
card chooses its own, for which it tries each tile in the first launch of a kind.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

os.environ.pop('TRITON_INTERPRET', None)
sys.path.append(str(Path(__file__).parents[2] / 'benchmarks'))

import timm  # noqa: E402
import torch  # noqa: E402
from compile_cuda import Card  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from vssm.ops.fusion import triton as fusion  # noqa: E402
from vssm.ops.scan.triton import launch as scan  # noqa: E402

PROCESSORS = 132  # of an H100
SIZES = (
    '800x1344 800x1088 800x800 640x1344 480x704 1344x800 1088x800 768x1344 512x864 576x992 704x1216 608x1024'.split()
)
BATCHES = {  # images, height, width
    'training': [(128, 224, 224)],
    'detection': [(2, *map(int, size.split('x'))) for size in SIZES],
}

launched: set[tuple[str, str]] = set()  # kernels, by name and by what Triton compiles one for


def launch(self, *args, grid, warmup, **kwargs):
    """In the place of Triton's."""
    assert kwargs['enable_fp_fusion'] is True, f'{self.__name__} leaves to Triton whether products and sums are fused'
    binder = self.device_caches[0][4]
    bound, specialization, options = binder(*args, debug=False, **kwargs)
    launched.add((self.__name__.lstrip('_'), f'{specialization} {options}'))


def tune(kernel, choices, kind, grid, arguments, keywords):
    """In the place of the tuner: launches every tile, and takes the first, which a card may find the fastest."""
    for tile in choices[::-1]:
        kernel[grid](*arguments, **keywords, J=tile[0], S=tile[1], **scan.resources(tile))
    return choices[0]


def count(mixers, batches, tuned):
    launched.clear()
    scan.chosen.clear()
    torch.use_deterministic_algorithms(not tuned)
    for images, height, width in batches:
        for stage, (mixer, channels) in enumerate(mixers):
            side = 4 * 2**stage
            x = torch.empty(images, height // side, width // side, channels, dtype=torch.bfloat16, device='meta')
            mixer(x.requires_grad_()).sum().backward()
    return len(launched)


def mixers_of(name):
    """A mixer of each stage of a network, and its channels."""
    model = timm.create_model(name, depths=(1, 1, 1, 1), device='meta').to(torch.bfloat16)
    return [
        (stage.blocks[0].mixer, info['num_chs']) for stage, info in zip(model.stages, model.feature_info, strict=True)
    ]


def main():
    driver.set_active(Card(90))
    JITFunction.run = launch
    scan.tune, scan.processors = tune, lambda device: PROCESSORS
    torch.autocast = lambda *_, **__: contextlib.nullcontext()  # which knows no meta device
    torch.cuda.is_current_stream_capturing = lambda: False
    library = torch.library.Library('vssm', 'IMPL')
    for module, op in ((scan, 'selective_scan'), (fusion, 'state_fusion')):
        for suffix in ('', '_backward'):
            library.impl(op + suffix, getattr(module, f'{op}_triton{suffix}'), 'Meta', allow_override=True)
    counts = {
        f'{name} {task} {way}': count(mixers, batches, way == 'tuned')
        for name, mixers in {name: mixers_of(name) for name in ('vmamba2d_tiny', 'spatial_mamba_tiny')}.items()
        for task, batches in BATCHES.items()
        for way in ('default', 'tuned')
    }
    print(json.dumps(counts))


if __name__ == '__main__':
    main()
