# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled CPU kernels; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit('Building vssm needs torch: run `pip install "torch>=2.10"` first, or leave out --no-build-isolation.')


class BuildKernels(BuildExtension):
    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            raise SystemExit(
                f'Building the CPU kernels of vssm failed ({error}); they need a C++17 compiler: on Debian or Ubuntu '
                'run `apt-get install g++`, on macOS `xcode-select --install`.'
            ) from error


setup(
    ext_modules=[
        CppExtension(
            'vssm.ops._C',
            sorted(str(p) for p in Path('ops/csrc').glob('*.cpp')),
            depends=sorted(str(p) for p in Path('ops/csrc').glob('*.h')),
            extra_compile_args=[
                '-std=c++17',
                '-O3',
                '-fvisibility=hidden',
                '-ffp-contract=fast',
                '-Wno-psabi',
                # The stable ABI of torch 2.10: one library for every later version.
                '-DTORCH_TARGET_VERSION=0x020a000000000000',
            ],
            py_limited_api=True,
        )
    ],
    cmdclass={'build_ext': BuildKernels},
    options={'bdist_wheel': {'py_limited_api': 'cp311'}},
)
