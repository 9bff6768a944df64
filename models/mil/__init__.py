# SPDX-License-Identifier: Apache-2.0
"""Multiple-instance learning on whole slides: the networks here; `slides` reads files, `survival` has the losses."""

from .networks import MIL, MambaMIL, checkpoint_filter_fn, create_mil_model, list_mil_models, to_cells

__all__ = ['MIL', 'MambaMIL', 'checkpoint_filter_fn', 'create_mil_model', 'list_mil_models', 'to_cells']
