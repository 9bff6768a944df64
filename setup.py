# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled CPU kernels and, for an editable install, the tree; everything else is in pyproject.toml."""

import sys
from pathlib import Path

import setuptools

if int(setuptools.__version__.partition('.')[0]) < 77:
    sys.exit(
        f'Building vssm needs setuptools 77 or newer, got {setuptools.__version__}: run `pip install "setuptools>=77"` '
        'first, or leave out --no-build-isolation.'
    )

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.editable_wheel import editable_wheel  # noqa: E402

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit('Building vssm needs torch: run `pip install "torch>=2.10"` first, or leave out --no-build-isolation.')


class BuildKernels(BuildExtension):
    """Build the library, which is no module of Python: its name says nothing of one."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, no_python_abi_suffix=True, **kwargs)

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            raise SystemExit(
                f'Building the CPU kernels of vssm failed ({error}); they need a C++17 compiler: on Debian or Ubuntu '
                'run `apt-get install g++`, on macOS `xcode-select --install`.'
            ) from error


class Wheel(bdist_wheel):
    """A wheel for one platform and every Python, since its library calls PyTorch alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return 'py3', 'none', super().get_tag()[2]


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


setuptools.setup(
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
                # The same bytes wherever it is built: no line numbers, and no folder of the machine in a message.
                '-g0',
                f'-ffile-prefix-map={Path(torch.__file__).parent}=torch',
                f'-ffile-prefix-map={Path(__file__).parent.resolve()}=vssm',
                # The stable ABI of torch 2.10: one library for every later version.
                '-DTORCH_TARGET_VERSION=0x020a000000000000',
            ],
            extra_link_args=['-Wl,-x' if sys.platform == 'darwin' else '-Wl,--strip-all'],
            py_limited_api=True,  # which leaves out PyTorch's own library for Python
        )
    ],
    cmdclass={'build_ext': BuildKernels, 'bdist_wheel': Wheel, 'editable_wheel': EditableWheel},
)
