# SPDX-License-Identifier: Apache-2.0
"""Multiple-instance learning on whole slides.

* `networks`: 2DMambaMIL, its 1-D variant and the baselines, with a registry of their own.
* `grid`: patches on the grid of their slide.
* `tables`: tables of slides, and splits by case.
* `slides`: the files of slides in a folder, and their patches on the grid of each. Needs the extra wsi.
* `layouts`, `arrays`: how tools write features and coordinates, and the files of arrays that these are.
* `survival`: time bins, losses and risks.
"""

from .grid import side_of_cells, to_cells
from .networks import MIL, MambaMIL, checkpoint_filter_fn, create_mil_model, list_mil_models

__all__ = [
    'MIL',
    'MambaMIL',
    'checkpoint_filter_fn',
    'create_mil_model',
    'list_mil_models',
    'side_of_cells',
    'to_cells',
]
