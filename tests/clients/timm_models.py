# SPDX-License-Identifier: Apache-2.0
"""A plugin of pytest by which timm's own tests run over our models: see tests/README.md.

They ask for models of timm's files by name, and so of ours none: here each list that they ask for holds ours alone.
"""

import timm

from vssm.models import weights

_list_models = timm.list_models
OURS = {*weights.list_models()}


TOKENS = ['vim_*', 'test_vim']  # timm's tests keep networks without feature maps apart, by their names


def list_models(filter='', module='', exclude_filters='', **kwargs):
    """Our models among those of a filter, whatever modules timm's test asks for; no pretrained ones, as their names end
    in a tag."""
    filter, exclude_filters = ([*names, *TOKENS] if 'vit_*' in names else names for names in (filter, exclude_filters))
    return [name for name in _list_models(filter, exclude_filters=exclude_filters, **kwargs) if name in OURS]


timm.list_models = list_models
