# SPDX-License-Identifier: Apache-2.0
"""Multiple-instance learning on whole slides.

* `registry`: all networks by name.
* `networks`, `pooling`: the baselines that embed and pool, 2DMambaMIL and its 1-D variant.
* `mambamil`, `s4mil`, `transmil`, `dtfd`: the networks of other papers, for comparison.
* `grid`: patches on the grid of their slide.
* `tables`: tables of slides, and splits by case.
* `slides`: files of features and coordinates, and the step of each slide's grid. Needs the extra wsi.
* `survival`: time bins, losses and risks.
"""

from .grid import side_of_cells, to_cells
from .networks import MIL, MambaMIL, checkpoint_filter_fn
from .registry import create_mil_model, current_name, list_mil_models

__all__ = [
    'MIL',
    'MambaMIL',
    'checkpoint_filter_fn',
    'create_mil_model',
    'current_name',
    'list_mil_models',
    'side_of_cells',
    'to_cells',
]
