# SPDX-License-Identifier: Apache-2.0
"""Stands in for mmcv's compiled extension, `mmcv._ext`, with operators of torchvision and of plain PyTorch.

mmdet and mmseg import all of mmcv's operators and call a few, some of them on a GPU alone. Those are here, forward and
backward, so that `mmcv-lite` is enough, where a compiled mmcv, of which recent PyTorch has no wheels, takes half an
hour. A compiled extension always wins: Python asks the stand-in last.

* `boxes`: overlaps and the suppression of boxes.
* `regions`: pooling over regions.
* `losses`: the focal losses.
* `deform`: attention and convolutions that sample where they are told.
* `windows`: operators over the window around each position.
* `norm`: a batch norm over several processes.

Every operator has the name, the arguments and the layouts of mmcv's, and writes into the tensors that it is given. Half
precision is computed in float32.
"""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import boxes, deform, losses, norm, regions, windows

__all__ = ['OPERATORS', 'install']

NAME = 'mmcv._ext'

OPERATORS: dict[str, Callable[..., Any]] = {
    name: getattr(module, name) for module in (boxes, deform, losses, norm, regions, windows) for name in module.__all__
}


def install() -> None:
    """Let `import mmcv._ext` find the stand-in wherever nothing else is found; a second call does nothing."""
    if _Finder not in sys.meta_path:
        sys.meta_path.append(_Finder)


class _Finder:
    """Finder and loader in one, as `sys.meta_path` takes them."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != NAME:
            return None
        return ModuleSpec(name, cls, origin=__file__)  # type: ignore[arg-type]  # a class can be a loader

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        return None  # so that Python makes a plain module

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        from mmengine.logging import print_log  # mmcv needs mmengine itself

        unknown = dict.fromkeys(('get_compiler_version', 'get_compiling_cuda_version'), _not_compiled)
        vars(module).update(OPERATORS, **unknown, __getattr__=_missing)
        print_log("mmcv has no compiled operators: torchvision's and PyTorch's stand in for them.", 'current')


def _not_compiled() -> str:
    """What `mmcv.utils.collect_env` says of compilers where there are no operators."""
    return 'n/a'


def _missing(name: str) -> Callable[..., Any]:
    """mmcv takes every operator by name when it is imported; one that is not here says so when it is called."""
    if name.startswith('__'):
        raise AttributeError(name)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f'{NAME}.{name} needs the compiled mmcv, got the stand-in, which does not have it: '
            '`pip uninstall mmcv-lite`, then `pip install --no-build-isolation "mmcv>=2.1,<2.2"`, which compiles it.'
        )

    return refuse
