# SPDX-License-Identifier: Apache-2.0
"""fvcore's trace of a model, and the parameters in it that no formula has counted."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch
from fvcore.nn.jit_analysis import JitModelAnalysis
from torch import Tensor, nn
from torch.jit._trace import _unique_state_dict

# Operations that move values, or take each by itself, though PyTorch does not say so of them.
FREE = {'aten::embedding', 'aten::index_select', 'aten::prelu'}


class Trace(JitModelAnalysis):
    """fvcore's analysis of a model for one image.

    Attributes:
        missed: Names of parameters, by the operation that met them with the image and that no formula counts.
    """

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        super().__init__(model, image)
        self.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings('none')
        self.missed: dict[str, set[str]] | None = None

    def _should_ignore_node(self, node: Any) -> bool:
        if self.missed is None:  # the first node without a formula; fvcore keeps no graph
            names = [name for name, _ in self._model.named_parameters()]
            state = [name if name in names else None for name in _unique_state_dict(self._model)]
            free = {*self._op_handles, *self._ignored_ops, *FREE}
            self.missed = missed_parameters(node.owningBlock(), state, free)
        return super()._should_ignore_node(node)


def missed_parameters(graph: Any, state: Sequence[str | None], free: Collection[str]) -> dict[str, set[str]]:
    """Follow the parameters to the operations where they meet what became of the image.

    An operation of parameters alone, such as a cast, passes them on. What takes every value by itself costs nothing.

    Args:
        graph: Graph whose inputs are the image and the state.
        state: Name of each of these inputs behind the image, None if it is no parameter.
        free: Operations that are counted, or that cost nothing.
    """
    image, *values = graph.inputs()
    images = {image.unique()}
    parameters = {value.unique(): {name} for value, name in zip(values, state, strict=True) if name}
    missed: dict[str, set[str]] = defaultdict(set)
    for node in graph.nodes():
        kind = node.kind()
        passes = kind.startswith('prim::') and kind != 'prim::PythonOp'  # such as lists
        inputs = [value.unique() for value in node.inputs()]
        found = set().union(*(parameters.get(value, ()) for value in inputs))
        meets = not images.isdisjoint(inputs)
        if found and meets and not (passes or kind in free or is_pointwise(kind)):
            name = node.pyname() if kind == 'prim::PythonOp' else kind.partition('::')[2]
            missed[name] |= found
        for value in node.outputs():
            if value.type().kind() in ('TensorType', 'ListType', 'TupleType'):
                if meets:
                    images.add(value.unique())
                if found and (passes or not meets):
                    parameters[value.unique()] = found
    return missed


def is_pointwise(kind: str) -> bool:
    namespace, _, name = kind.partition('::')
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, each).tags for each in packet.overloads())
