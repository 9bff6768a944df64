# SPDX-License-Identifier: Apache-2.0
"""What the papers and their repositories report, and where its weights lie. None of it was measured here."""

SOURCES = {  # where a family's numbers are from
    'vmamba2d': '2DMamba, CVPR 2025',
    'spatial_mamba': "Spatial-Mamba's repository",
    'vmamba': "VMamba's repository",
    'vanilla_vmamba': "VMamba's repository",
    'vim': "Vim's repository",
    'groupmamba': "GroupMamba's repository",
    'mambavision': 'MambaVision, CVPR 2025',
}

# Per cent of ImageNet-1K's validation images, at the size of the model's own images.
IMAGENET_TOP1 = {
    'vmamba_tiny': 82.6,
    'vmamba_small': 83.6,
    'vmamba_base': 83.9,
    'vmamba2d_tiny': 82.8,
    'spatial_mamba_tiny': 83.5,
    'spatial_mamba_small': 84.6,
    'spatial_mamba_base': 85.3,
    'vmamba_tiny_s2l5': 82.5,
    'vmamba_small_s1l20': 83.3,
    'vmamba_base_s1l20': 83.8,
    'vanilla_vmamba_tiny': 82.2,
    'vanilla_vmamba_small': 83.5,
    'vanilla_vmamba_base': 83.7,
    'vim_tiny_patch16_224': 76.1,
    'vim_tiny_patch16_stride8_224': 78.3,
    'vim_small_patch16_224': 80.5,
    'vim_small_patch16_stride8_224': 81.6,
    'vim_base_patch16_224': 81.9,
    'groupmamba_tiny': 83.3,
    'groupmamba_small': 83.9,
    'groupmamba_base': 84.5,
    'mambavision_tiny': 82.3,
    'mambavision_tiny2': 82.7,
    'mambavision_small': 83.3,
    'mambavision_base': 84.2,
    'mambavision_large': 85.0,
    'mambavision_large2': 85.3,
    'mambavision_large3': 87.3,
    'mambavision_large3_512': 88.1,
}

# Millions of parameters and billions of multiply-accumulates, as printed.
IMAGENET_COST = {
    'vmamba_tiny': ('30', '4.9'),
    'vmamba_small': ('50', '8.7'),
    'vmamba_base': ('89', '15.4'),
    'spatial_mamba_tiny': ('27', '4.5'),
    'spatial_mamba_small': ('43', '7.1'),
    'spatial_mamba_base': ('96', '15.8'),
    'vmamba_tiny_s2l5': ('31', '4.9'),
    'vmamba_small_s1l20': ('49', '8.6'),
    'vmamba_base_s1l20': ('87', '15.2'),
    'vanilla_vmamba_tiny': ('22', '5.6'),
    'vanilla_vmamba_small': ('44', '11.2'),
    'vanilla_vmamba_base': ('75', '18.0'),
    'vim_tiny_patch16_224': ('7', '-'),
    'vim_tiny_patch16_stride8_224': ('7', '-'),
    'vim_small_patch16_224': ('26', '-'),
    'vim_small_patch16_stride8_224': ('26', '-'),
    'vim_base_patch16_224': ('98', '-'),
    'groupmamba_tiny': ('23', '4.5'),
    'groupmamba_small': ('34', '7.0'),
    'groupmamba_base': ('57', '14'),
    'mambavision_tiny': ('31.8', '4.4'),
    'mambavision_tiny2': ('35.1', '5.1'),
    'mambavision_small': ('50.1', '7.5'),
    'mambavision_base': ('97.7', '15.0'),
    'mambavision_large': ('227.9', '34.9'),
    'mambavision_large2': ('241.5', '37.5'),
    'mambavision_large3_512': ('739.6', '489.1'),
}

# mIoU of UPerNet on ADE20K at one scale and at several.
ADE20K_MIOU = {
    'vmamba_tiny': (47.9, 48.8),
    'vmamba_small': (50.6, 51.2),
    'vmamba_base': (51.0, 51.6),
    'vmamba2d_tiny': (48.6, 49.3),
    'spatial_mamba_tiny': (48.6, 49.4),
    'spatial_mamba_small': (50.6, 51.4),
    'spatial_mamba_base': (51.8, 52.6),
}

# AP of boxes and of masks of Mask R-CNN on COCO, after 12 epochs and after 36.
COCO_1X_AP = {
    'vmamba_tiny': (47.3, 42.7),
    'vmamba_small': (48.7, 43.7),
    'vmamba_base': (49.2, 44.1),
    'spatial_mamba_tiny': (47.6, 42.9),
    'spatial_mamba_small': (49.2, 44.0),
    'spatial_mamba_base': (50.4, 45.1),
}
COCO_3X_AP = {
    'vmamba_tiny': (48.8, 43.7),
    'vmamba_small': (49.9, 44.2),
    'spatial_mamba_tiny': (49.3, 43.6),
    'spatial_mamba_small': (50.5, 44.6),
}

_RELEASES = 'https://github.com/MzeroMiko/VMamba/releases/download'
_DRIVE = 'https://drive.google.com/file/d'

# Detectors and segmentors by their configs; classifiers are in timm's registry.
DENSE_WEIGHTS = {
    'ade20k/upernet_vmamba_tiny_4xb4-160k_ade20k-512x512': (
        f'{_RELEASES}/%23v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_tiny_s_iter_160000.pth'
    ),
    'ade20k/upernet_vmamba_small_4xb4-160k_ade20k-512x512': (
        f'{_RELEASES}/%23v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_small_iter_144000.pth'
    ),
    'ade20k/upernet_vmamba_base_4xb4-160k_ade20k-512x512': (
        f'{_RELEASES}/%23v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_base_iter_160000.pth'
    ),
    'ade20k/upernet_spatial_mamba_tiny_4xb4-160k_ade20k-512x512': f'{_DRIVE}/1ngRweMh6vLjfZ43fb_o_ZyHs6psxb6Ix',
    'ade20k/upernet_spatial_mamba_small_4xb4-160k_ade20k-512x512': f'{_DRIVE}/1Ve07Um4dIPCcdg0mdNLjGxJtxKNWB_Sy',
    'ade20k/upernet_spatial_mamba_base_4xb4-160k_ade20k-512x512': f'{_DRIVE}/1DLSC20TiSfzWrdgLRSdgrhnDn79nruB6',
    'coco/mask-rcnn_vmamba_tiny_fpn_8xb2-1x_coco': (
        f'{_RELEASES}/%23v2det/mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth'
    ),
    'coco/mask-rcnn_vmamba_small_fpn_8xb2-1x_coco': (
        f'{_RELEASES}/%23v2det/mask_rcnn_vssm_fpn_coco_small_epoch_11.pth'
    ),
    'coco/mask-rcnn_vmamba_base_fpn_8xb2-1x_coco': f'{_RELEASES}/%23v2det/mask_rcnn_vssm_fpn_coco_base_epoch_11.pth',
    'coco/mask-rcnn_vmamba_tiny_fpn_8xb2-ms-3x_coco': (
        f'{_RELEASES}/%23v2det/mask_rcnn_vssm_fpn_coco_tiny_ms_3x_s_epoch_31.pth'
    ),
    'coco/mask-rcnn_vmamba_small_fpn_8xb2-ms-3x_coco': (
        f'{_RELEASES}/%23v2det/mask_rcnn_vssm_fpn_coco_small_ms_3x_epoch_32.pth'
    ),
    'coco/mask-rcnn_spatial_mamba_tiny_fpn_8xb2-1x_coco': f'{_DRIVE}/1lmA0_pBQbvuMkJD1R5m3oS_2jXaSy3N3',
    'coco/mask-rcnn_spatial_mamba_small_fpn_8xb2-1x_coco': f'{_DRIVE}/1pzjz1A6nWA9W2FW2Ymg5JSAMbvxmc2hP',
    'coco/mask-rcnn_spatial_mamba_base_fpn_8xb2-1x_coco': f'{_DRIVE}/1oTyT0q88ernqc1_IyqBWHrVJJPGNRN8r',
    'coco/mask-rcnn_spatial_mamba_tiny_fpn_8xb2-ms-3x_coco': f'{_DRIVE}/1PY0_8ZCwogssmaULdc6MzVbCTGm_83Ew',
    'coco/mask-rcnn_spatial_mamba_small_fpn_8xb2-ms-3x_coco': f'{_DRIVE}/19fDAk8cyMplgVRKqU0BC_3l1NxXzHYl_',
}
