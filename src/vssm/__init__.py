# SPDX-License-Identifier: Apache-2.0
"""vssm: vision state-space models for timm. Importing it registers the models."""

from . import models, ops
from .models.predict import predict
from .version import __version__

__all__ = ['__version__', 'models', 'ops', 'predict']
