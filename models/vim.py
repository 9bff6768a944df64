# SPDX-License-Identifier: Apache-2.0
"""Vim: tokens as in a vision transformer, mixed by scans from both ends.

Paper: `Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model` (ICML 2024)
- https://arxiv.org/abs/2401.09417

Tokens, (batch, M + 1, C), are M patches in raster order with the class token in their middle, see `tokens.py`.
"""

import copy
import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from . import ssm
from .backbone import build_backbone, register_aliases
from .layers import Linear, in_chunks
from .tokens import TokenBackbone, fit_to_input_size
from .weights.rename import rename_checkpoint

__all__ = ['Vim']


class Scan(nn.Module):
    """One direction of the mixer: a depthwise convolution of a token and the three that come before it in this
    direction, then the selective scan.

    Args:
        dim: Width of the tokens, E.
        dt_rank: Rank of the step sizes, R.
        d_state: Number of states per channel, N.
        order: Order of the scan, 0 from the first token to the last, 2 from the last to the first.
    """

    def __init__(self, dim: int, dt_rank: int, d_state: int, order: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.splits = [dt_rank, d_state, d_state]
        self.orders = [order]
        # Its taps lie in the order of the tokens in both directions.
        self.conv = nn.Conv2d(dim, dim, kernel_size=(1, 4), padding=(0, 3), groups=dim, **dd)
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(dim, dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_weight = nn.Parameter(torch.empty(1, dim, dt_rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(1, dim, **dd))
        self.A_log = nn.Parameter(torch.empty(1, dim, d_state, **dd))
        self.D = nn.Parameter(torch.empty(1, dim, **dd))
        ssm.init_scan_(self.A_log, self.D, self.dt_weight, self.dt_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [B, 1, L, E] -> [B, 1, L + 3, E]
        x = self.act(x[:, :, :-3] if self.orders[0] == 0 else x[:, :, 3:])  # -> [B, 1, L, E]
        dt, B, C = self.x_proj(x).unsqueeze(3).split(self.splits, dim=-1)  # [B, 1, L, K, R or N] with K = 1
        A = ssm.decay_rates(self.A_log)
        return ssm.scan(x, dt, A, B, C, self.D, self.dt_bias, self.dt_weight, ndim=1, orders=self.orders)


class BiMixer(nn.Module):
    """The mixer: scans from the first token to the last and back, each with parameters of its own, and a gate."""

    def __init__(self, dim: int, d_state: int = 16, ssm_ratio: float = 2.0, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        inner_dim, dt_rank = int(dim * ssm_ratio), math.ceil(dim / 16)
        self.in_proj = Linear(dim, 2 * inner_dim, bias=False, **dd)
        self.scan_ahead = Scan(inner_dim, dt_rank, d_state, order=0, **dd)
        self.scan_back = Scan(inner_dim, dt_rank, d_state, order=2, **dd)
        self.act = nn.SiLU()
        self.out_proj = Linear(inner_dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.project(x.unsqueeze(1))  # [B, L, C] -> two [B, 1, L, E], maps of one row
        y = (self.scan_ahead(x) + self.scan_back(x)) * (0.5 * self.act(z))
        return self.out_proj(y).squeeze(1)

    @in_chunks('in_proj', 2)
    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        return x, z


class Block(nn.Module):
    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=1e-5, **dd)
        self.mixer = BiMixer(dim, d_state=d_state, ssm_ratio=ssm_ratio, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path1(self.mixer(self.norm1(x)))


class Vim(TokenBackbone):
    """Vim.

    Args:
        img_size: Height and width of the images, (batch, in_chans, H, W).
        patch_size: Height and width of the patches.
        patch_stride: Distance from one patch to the next.
        in_chans: Number of channels of the image.
        num_classes: Number of classes of the head; 0 leaves the pooled features.
        global_pool: Pooling of the head, 'token', 'avg', 'max' or 'avgmax', '' for none.
        embed_dim: Width of the tokens.
        depth: Number of blocks.
        d_state: Number of states per channel, N.
        ssm_ratio: Inner width of the mixer over that of the tokens, E / C.
        dynamic_img_size: Whether images may have other sizes than img_size, to which the position embeddings are then
            resampled.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        patch_stride: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'token',
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        drop_path = cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
        super().__init__(
            [Block(embed_dim, d_state=d_state, ssm_ratio=ssm_ratio, drop_path=rate, **dd) for rate in drop_path],
            nn.RMSNorm(embed_dim, eps=1e-5, **dd),
            img_size,
            patch_size,
            patch_stride,
            in_chans,
            num_classes,
            global_pool,
            embed_dim,
            dynamic_img_size,
            drop_rate,
            **dd,
        )
        for block in cast(Iterable[Any], self.blocks):  # every block adds to the same tokens
            block.mixer.out_proj.weight.data.div_(math.sqrt(depth))

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the tensors of a checkpoint, whether under our names or under published ones, of any size of images."""
        return super().load_state_dict(checkpoint_filter_fn(state_dict, self), strict=strict, assign=assign)


# The published names, in the order in which the rules apply.
_RENAMES = (
    (r'^norm_f\.', 'norm.'),
    (r'^layers\.(\d+)\.norm\.', r'blocks.\1.norm1.'),
    (r'^layers\.(\d+)\.mixer\.', r'blocks.\1.mixer.'),
    (r'\.mixer\.(A|D|conv1d|x_proj|dt_proj)_b(?=_log$|\.|$)', r'.mixer.scan_back.\1'),
    (r'\.mixer\.(?=(A_log|D)$|(conv1d|x_proj|dt_proj)\.)', '.mixer.scan_ahead.'),
    (r'\.(scan_ahead|scan_back)\.conv1d\.', r'.\1.conv.'),
    (r'\.(scan_ahead|scan_back)\.dt_proj\.', r'.\1.dt_'),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring a published checkpoint to our names and shapes by `rename_checkpoint`, and one of another size of images or
    patches to the model's."""
    out = copy.copy(rename_checkpoint(state_dict, model, _RENAMES))  # with the versions that it may note
    for name, value in out.items():
        if name.endswith('.conv.weight') and value.dim() == 3:  # published: the taps in the direction's own order
            out[name] = (value.flip(-1) if '.scan_back.' in name else value).unsqueeze(2)  # [E, 1, 4] -> [E, 1, 1, 4]
    fit_to_input_size(out, model)
    return out


def constructor_args(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """The constructor's arguments that decide names and shapes, from tensors under our names.

    Patches in a square grid are taken for those of an image of 224 pixels or, where no stride gives as many, for such
    as lie side by side. Of any other grid nothing is told.

    Raises:
        LookupError: A tensor that tells an argument is missing, or has too few dimensions.
        ZeroDivisionError: A tensor is empty.
    """
    kernel, rates = state_dict['patch_embed.proj.weight'].shape, state_dict['blocks.0.mixer.scan_ahead.A_log'].shape
    args: dict[str, Any] = dict(
        in_chans=kernel[1],
        num_classes=state_dict['head.weight'].shape[0] if 'head.weight' in state_dict else 0,
        patch_size=kernel[2],
        embed_dim=kernel[0],
        depth=len({name.split('.')[1] for name in state_dict if name.startswith('blocks.')}),
        d_state=rates[-1],
        ssm_ratio=rates[-2] / kernel[0],
    )
    if 'norm.weight' not in state_dict:  # the backbone of a detector or segmentor
        args['features_only'] = True
        del args['num_classes']
    num_patches = max(state_dict['pos_embed'].shape[1] - 1, 0)
    side = math.isqrt(num_patches)
    if side > 0 and side**2 == num_patches:
        stride, rest = divmod(224 - kernel[2], max(side - 1, 1))
        fits = rest == 0 and 0 < stride <= kernel[2]
        args |= (
            dict(img_size=224, patch_stride=stride) if fits else dict(img_size=side * kernel[2], patch_stride=kernel[2])
        )
    return args


def _cfg(hub_id: str = '', file: str = '', **kwargs) -> dict[str, Any]:
    return {
        'url': '',
        'hf_hub_id': f'hustvl/{hub_id}' if hub_id else None,
        'hf_hub_filename': file or None,  # a pattern, as the name holds the accuracy
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': None,
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'fixed_input_size': True,
        'license': 'apache-2.0',
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        'vim_tiny_patch16_224.in1k': _cfg('Vim-tiny-midclstok', 'vim_t_midclstok_??p?acc.pth'),
        'vim_small_patch16_224.in1k': _cfg('Vim-small-midclstok', 'vim_s_midclstok_??p?acc.pth'),
        'vim_base_patch16_224.in1k': _cfg('Vim-base-midclstok', 'vim_b_midclstok_??p?acc.pth'),
        'vim_tiny_patch16_stride8_224.in1k': _cfg('Vim-tiny-midclstok', 'vim_t_midclstok_ft_??p?acc.pth'),
        'vim_small_patch16_stride8_224.in1k': _cfg('Vim-small-midclstok', 'vim_s_midclstok_ft_??p?acc.pth'),
        'test_vim': _cfg(input_size=(3, 64, 64), fixed_input_size=False),
    }
)


def _create_vim(variant: str, pretrained: bool = False, **kwargs) -> Vim:
    kwargs.setdefault('out_indices', 3)  # of features_only: the last blocks, as of timm's vision transformers
    reduction = max(to_2tuple(kwargs.get('patch_stride', 16)))
    return build_backbone(Vim, variant, pretrained, checkpoint_filter_fn, reduction=reduction, **kwargs)


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs) -> Vim:
    model_args = dict(embed_dim=192, depth=24)
    return _create_vim('vim_tiny_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs) -> Vim:
    model_args = dict(embed_dim=384, depth=24)
    return _create_vim('vim_small_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs) -> Vim:
    model_args = dict(embed_dim=768, depth=24)
    return _create_vim('vim_base_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs) -> Vim:
    model_args = dict(embed_dim=192, depth=24, patch_stride=8)
    return _create_vim('vim_tiny_patch16_stride8_224', pretrained, **dict(model_args, **kwargs))


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs) -> Vim:
    model_args = dict(embed_dim=384, depth=24, patch_stride=8)
    return _create_vim('vim_small_patch16_stride8_224', pretrained, **dict(model_args, **kwargs))


@register_model
def test_vim(pretrained: bool = False, **kwargs) -> Vim:
    model_args = dict(img_size=64, dynamic_img_size=True, embed_dim=32, depth=4)
    return _create_vim('test_vim', pretrained, **dict(model_args, **kwargs))


_PUBLISHED = 'bimambav2_final_pool_mean_abs_pos_embed_with'

register_aliases(
    __name__,
    {
        f'vim_tiny_patch16_224_{_PUBLISHED}_midclstok_div2': 'vim_tiny_patch16_224',
        f'vim_small_patch16_224_{_PUBLISHED}_midclstok_div2': 'vim_small_patch16_224',
        f'vim_base_patch16_224_{_PUBLISHED}_middle_cls_token_div2': 'vim_base_patch16_224',
        f'vim_tiny_patch16_stride8_224_{_PUBLISHED}_midclstok_div2': 'vim_tiny_patch16_stride8_224',
        f'vim_small_patch16_stride8_224_{_PUBLISHED}_midclstok_div2': 'vim_small_patch16_stride8_224',
        'vim_tiny': 'vim_tiny_patch16_224',
        'vim_small': 'vim_small_patch16_224',
        'vim_base': 'vim_base_patch16_224',
    },
)
