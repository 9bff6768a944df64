# SPDX-License-Identifier: Apache-2.0
"""What networks of tokens share, as `backbone.py` is what pyramids do: patches, positions, and the methods that timm
expects of a vision transformer.

The class token stands in the middle of the patches, at index M // 2 of M, and the position embedding has a row for it
there: what treats the patches as a map takes it out first.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from timm.layers import (
    global_pool_nlc,
    lecun_normal_,
    resample_abs_pos_embed,
    resample_patch_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .layers import Blocks

__all__ = ['PatchEmbed', 'TokenBackbone', 'fit_to_input_size', 'patches_of', 'put_in_middle', 'token_of']


def put_in_middle(patches: Tensor, token: Tensor) -> Tensor:
    """Patches, (batch, M, C), and one token, (batch, 1, C) -> tokens, (batch, M + 1, C)."""
    middle = patches.shape[1] // 2
    return torch.cat([patches[:, :middle], token, patches[:, middle:]], dim=1)


def token_of(tokens: Tensor) -> Tensor:
    """Tokens, (batch, M + 1, C) -> the token in their middle, (batch, 1, C)."""
    middle = (tokens.shape[1] - 1) // 2
    return tokens[:, middle : middle + 1]  # a slice, as an index would fix the size in a compiler's graph


def patches_of(tokens: Tensor) -> Tensor:
    """Tokens, (batch, M + 1, C) -> patches, (batch, M, C)."""
    middle = (tokens.shape[1] - 1) // 2
    return torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1)


@torch.fx.wrap  # one node of a graph, as it looks at sizes
def resample_positions(pos_embed: Tensor, old_grid: list[int], new_grid: list[int]) -> Tensor:
    """Position embeddings of another grid of patches, (1, M + 1, C) -> (1, M' + 1, C); the class token's stays."""
    patches = resample_abs_pos_embed(patches_of(pos_embed), new_grid, old_grid, num_prefix_tokens=0)
    return put_in_middle(patches, token_of(pos_embed))


class PatchEmbed(nn.Module):
    """Image to a grid of patches, which overlap where the stride is less than their size. What is no whole patch at the
    right and the bottom is left out.

    Args:
        img_size: Height and width of the images.
        patch_size: Height and width of the patches.
        patch_stride: Distance from one patch to the next, in rows and in columns.
        in_chans: Number of channels of the images.
        embed_dim: Width of the tokens.
        strict_img_size: Whether images of another size are refused.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        patch_stride: int | tuple[int, int],
        in_chans: int,
        embed_dim: int,
        strict_img_size: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.strict_img_size = strict_img_size
        self.img_size = to_2tuple(img_size)
        self.patch_size = to_2tuple(patch_size)
        self.patch_stride = to_2tuple(patch_stride)
        self._set_grid()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_stride, **dd)

    def _set_grid(self) -> None:
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        if min(self.grid_size) < 1:
            raise ValueError(f'img_size must hold a patch of {self.patch_size}, got {self.img_size}.')

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        patch_stride: int | tuple[int, int] | None = None,
    ) -> None:
        proj, old_size, old_stride = self.proj, self.patch_size, self.patch_stride
        if img_size is not None:
            self.img_size = to_2tuple(img_size)
        if patch_size is not None:
            self.patch_size = to_2tuple(patch_size)
            self.patch_stride = tuple(
                new * stride // old for new, old, stride in zip(self.patch_size, old_size, old_stride, strict=True)
            )
        if patch_stride is not None:
            self.patch_stride = to_2tuple(patch_stride)
        self._set_grid()
        if self.patch_size != old_size:
            weight = resample_patch_embed(proj.weight.detach(), list(self.patch_size))
            proj.weight = nn.Parameter(weight, requires_grad=proj.weight.requires_grad)
            proj.kernel_size = self.patch_size
        proj.stride = self.patch_stride

    def feat_ratio(self) -> int:
        return max(self.patch_stride)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Number of rows and columns of patches in an image."""
        return (
            (img_size[0] - self.patch_size[0]) // self.patch_stride[0] + 1,
            (img_size[1] - self.patch_size[1]) // self.patch_stride[1] + 1,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.strict_img_size:
            H, W = x.shape[2], x.shape[3]
            need = f'images must be of the size img_size, {self.img_size}, unless dynamic_img_size is set'
            torch._assert(H == self.img_size[0], f'{need}, got height {H}.')
            torch._assert(W == self.img_size[1], f'{need}, got width {W}.')
        return self.proj(x).permute(0, 2, 3, 1)  # [B, C, H, W] -> [B, rows, columns, C']


class TokenBackbone(nn.Module):
    """Patches with a class token in their middle, blocks that keep their number and width, norm, pooling and head.

    It has the methods of timm's vision transformers. What these call a prefix token, the class token, is no prefix
    here: in features too it stands in the middle.

    Args:
        blocks: Blocks, which map tokens to tokens, (batch, M + 1, C).
        norm: Norm of what the last block gives.
        img_size: Height and width of the images, (batch, in_chans, H, W).
        patch_size: Height and width of the patches.
        patch_stride: Distance from one patch to the next.
        in_chans: Number of channels of the image.
        num_classes: Number of classes of the head; 0 leaves the pooled features.
        global_pool: Pooling of the head, 'token', 'avg', 'max' or 'avgmax', '' for none; the three in the middle leave
            out the class token.
        embed_dim: Width of the tokens, C.
        dynamic_img_size: Whether images may have other sizes than img_size, to which the position embeddings are then
            resampled.
        drop_rate: Dropout before the classifier.
    """

    dynamic_img_size: Final[bool]

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        patch_stride: int | tuple[int, int],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        embed_dim: int,
        dynamic_img_size: bool,
        drop_rate: float,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        _check_pool(global_pool)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.dynamic_img_size = dynamic_img_size
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            img_size, patch_size, patch_stride, in_chans, embed_dim, strict_img_size=not dynamic_img_size, **dd
        )
        self.grid_size = self.patch_embed.grid_size  # of the position embeddings
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches + 1, embed_dim, **dd))
        self.blocks = Blocks(*blocks)
        self.norm = norm
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=reduction, module=f'blocks.{i}') for i in range(len(blocks))
        ]
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]  # it has one
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        return {'pos_embed', 'cls_token', '*.A_log', '*.D', '*.dt_bias'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(stem=r'^cls_token|pos_embed|patch_embed', blocks=[(r'^blocks\.(\d+)', None), (r'^norm', (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            _check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        dd: dict[str, Any] = {'device': self.cls_token.device, 'dtype': self.cls_token.dtype}
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        patch_stride: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the size of the images or of the patches; convolution and position embeddings are resampled.

        Args:
            img_size: Height and width of the images, the present ones unless given.
            patch_size: Height and width of the patches, the present ones unless given.
            patch_stride: Distance from one patch to the next, in proportion to their size as it was unless given.
        """
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, patch_size, patch_stride)
        if self.patch_embed.grid_size != old_grid:
            pos_embed = resample_positions(self.pos_embed.detach(), list(old_grid), list(self.patch_embed.grid_size))
            self.pos_embed = nn.Parameter(pos_embed, requires_grad=self.pos_embed.requires_grad)
        self.grid_size = self.patch_embed.grid_size
        for info in self.feature_info:
            info['reduction'] = self.patch_embed.feat_ratio()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """The blocks' outputs along with the final features.

        Args:
            x: Images, (batch, in_chans, H, W).
            indices: Indices of the blocks whose outputs are wanted, or the number of last blocks; None for all.
            return_prefix_tokens: Whether an intermediate is a pair of the patches and the class token, (batch, 1, C).
            norm: Whether the last norm is applied to the intermediates.
            stop_early: Whether the blocks after the last that is asked for are left out.
            output_fmt: Layout of the patches, 'NCHW' or 'NLC'.
            intermediates_only: Whether the intermediates are returned alone.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"forward_intermediates: output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}.")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        intermediates: list[Any] = []

        x = self.embed(x)
        blocks = list(self.blocks)[: max_index + 1] if stop_early else self.blocks
        for i, block in enumerate(blocks):
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            if i in take_indices:
                tokens = self.norm(x) if norm else x
                patches = patches_of(tokens)
                if output_fmt == 'NCHW':
                    patches = patches.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()
                intermediates.append((patches, token_of(tokens)) if return_prefix_tokens else patches)

        if intermediates_only:
            return intermediates
        return self.norm(x), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what `forward_intermediates` with these indices does not need, and return the kept indices."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = Blocks(*list(self.blocks)[: max_index + 1])
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def embed(self, x: Tensor) -> Tensor:
        """Images, (batch, in_chans, H, W) -> patches with the class token in their middle, (batch, M + 1, C)."""
        x = self.patch_embed(x)
        pos_embed = self.pos_embed
        if self.dynamic_img_size:
            pos_embed = resample_positions(pos_embed, self.grid_size, (x.shape[1], x.shape[2]))
        x = x.flatten(1, 2)  # [B, rows, columns, C] -> [B, M, C]
        return put_in_middle(x, self.cls_token.expand(x.shape[0], -1, -1)) + pos_embed

    def forward_features(self, x: Tensor) -> Tensor:
        """Images, (batch, in_chans, H, W) -> tokens before the head, the class token at M // 2, (batch, M + 1, C)."""
        x = self.embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def pool(self, x: Tensor) -> Tensor:
        if self.global_pool == '':
            return x
        if self.global_pool == 'token':
            return token_of(x).squeeze(1)  # [B, M + 1, C] -> [B, C]
        return global_pool_nlc(patches_of(x), self.global_pool, num_prefix_tokens=0)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _check_pool(global_pool: str) -> None:
    pools = ('', 'token', 'avg', 'max', 'avgmax')
    if global_pool not in pools:
        raise ValueError(f'global_pool must be one of {pools}, got {global_pool!r}.')


def fit_to_input_size(state_dict: dict[str, Tensor], model: nn.Module) -> None:
    """Resample the tensors of a network of another size of images or patches in place, to those of the model.

    The patches of the tensors' network must have been a square grid; any other keeps its sizes, which a strict load
    then reports.
    """
    if not isinstance(model, TokenBackbone):
        return
    patch_embed, kernel, pos_embed = (
        model.patch_embed,
        state_dict.get('patch_embed.proj.weight'),
        state_dict.get('pos_embed'),
    )
    if kernel is not None and kernel.dim() == 4 and kernel.shape[2:] != patch_embed.patch_size:
        state_dict['patch_embed.proj.weight'] = resample_patch_embed(kernel, list(patch_embed.patch_size))
    if pos_embed is not None and pos_embed.dim() == 3 and pos_embed.shape[1] != patch_embed.num_patches + 1:
        side = math.isqrt(pos_embed.shape[1] - 1)
        if side**2 == pos_embed.shape[1] - 1:
            state_dict['pos_embed'] = resample_positions(pos_embed, [side, side], list(patch_embed.grid_size))
