# SPDX-License-Identifier: Apache-2.0
"""A plugin of pytest by which timm's own tests run over our models: see tests/README.md.

They ask for models of timm's files by name, and so of ours none: here each list that they ask for holds ours alone.
"""

import timm

from vssm.models import weights

_list_models = timm.list_models
OURS = {*weights.list_models()}


def list_models(filter='', module='', **kwargs):
    """Our models among those of a filter, whatever modules timm's test asks for; no pretrained ones, as their names end
    in a tag."""
    return [name for name in _list_models(filter, **kwargs) if name in OURS]


timm.list_models = list_models
