# SPDX-License-Identifier: Apache-2.0
"""What the papers and their repositories report. None of it was measured here."""

# Per cent of ImageNet-1K's validation images at 224x224: VMamba's and Spatial-Mamba's repositories, 2DMamba's paper.
IMAGENET_TOP1 = {
    'vmamba_tiny': 82.6,
    'vmamba_small': 83.6,
    'vmamba_base': 83.9,
    'vmamba2d_tiny': 82.8,
    'spatial_mamba_tiny': 83.5,
    'spatial_mamba_small': 84.6,
    'spatial_mamba_base': 85.3,
}
