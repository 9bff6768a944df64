# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled CPU kernels and, for an editable install, the tree; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

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


class EditableWheel(editable_wheel):
    """Put `src` on the path, with a link to every folder that pyproject.toml maps into the package.

    So Python finds a real package. A map of names alone, which setuptools would install, is asked only after the path:
    in the folder that holds a clone named vssm, the clone itself would be taken for an empty package of that name.
    """

    def finalize_options(self) -> None:
        for package, folder in self.distribution.package_dir.items():
            link = Path('src', *package.split('.'))
            if link.is_symlink():
                link.unlink()  # it may lead to where the folder once was
            if not link.exists():
                link.symlink_to(Path('..', '..', folder), target_is_directory=True)
        self.distribution.package_dir = {'': 'src'}
        super().finalize_options()


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
    cmdclass={'build_ext': BuildKernels, 'editable_wheel': EditableWheel},
    options={'bdist_wheel': {'py_limited_api': 'cp311'}},
)
