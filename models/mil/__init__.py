# SPDX-License-Identifier: Apache-2.0
"""Multiple-instance learning on whole slides.

* `networks`: 2DMambaMIL, its 1-D variant and the baselines, with a registry of their own.
* `grid`: patches on the grid of their slide.
* `tables`: tables of slides, and splits by case.
* `slides`: files of features and coordinates, and the step of each slide's grid. Needs the extra wsi.
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
