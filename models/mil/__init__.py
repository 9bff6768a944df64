# SPDX-License-Identifier: Apache-2.0
"""Multiple-instance learning on whole slides.

* `registry`: all networks by name.
* `networks`, `pooling`: the baselines that embed and pool, 2DMambaMIL and its 1-D variant.
* `mambamil`, `s4mil`, `transmil`, `dtfd`: the networks of other papers, for comparison.
* `grid`: patches on the grid of their slide.
* `tables`: tables of slides, and splits by case.
* `slides`: the files of slides in a folder, and their patches on the grid of each. Needs the extra wsi.
* `layouts`, `arrays`: how tools write features and coordinates, and the files of arrays that these are.
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
