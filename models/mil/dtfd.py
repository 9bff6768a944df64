# SPDX-License-Identifier: Apache-2.0
"""DTFD-MIL: attention in two tiers, over the patches of pseudo-bags, and over what is distilled from these.

Paper: `DTFD-MIL: Double-Tier Feature Distillation Multiple Instance Learning for Histopathology Whole Slide Image
Classification` (CVPR 2022) - https://arxiv.org/abs/2203.12081

Written from the paper, in which each tier learns by its own loss: nothing of the second tier's reaches the first. What
the paper leaves open is chosen as follows: five pseudo-bags, dealt out at random in a training, and else patch after
patch in turns; distillation by the pooled embedding (AFS); by MaxMinS it takes the most probable patch of every class,
which for two classes is the paper's; the slides of a case are one bag.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .networks import MIL
from .pooling import GatedAttentionPool

__all__ = ['DTFDMIL']

_DISTILLATIONS = ('afs', 'max', 'maxmin', 'attention')


class TwoTierPool(nn.Module):
    """Attention over the patches of each pseudo-bag, distillation, and attention over what was distilled."""

    def __init__(self, dim: int, num_classes: int, parts: int, distillation: str, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.parts = parts
        self.distillation = distillation
        self.tier1 = GatedAttentionPool(dim, **dd)
        self.head = nn.Linear(dim, num_classes, **dd)
        self.tier2 = GatedAttentionPool(dim, **dd)

    def pseudo_bags(self, x: Tensor) -> Iterator[Tensor]:
        """The indices of the tokens of each pseudo-bag; there are fewer of these where there are fewer tokens."""
        order = torch.randperm(len(x), device=x.device) if self.training else torch.arange(len(x), device=x.device)
        for i in range(min(self.parts, len(x))):
            yield order[i :: self.parts]

    def choose(self, x: Tensor, weights: Tensor) -> Tensor:
        """What is distilled from a pseudo-bag, as weights of its tokens, (r, n).

        The share of a token in a logit is that of its weighted embedding, and its probabilities are the softmax over
        the classes of these shares (the paper's section 3.2).

        Args:
            x: Tokens of the pseudo-bag, (n, C).
            weights: Their weights in the first tier, (n,).
        """
        if self.distillation == 'afs':
            return weights[None]
        shares = weights[:, None] * (x @ self.head.weight.t())  # [n, num_classes]
        classes = shares.shape[1]
        scores = shares if classes == 1 else shares.softmax(1)
        if self.distillation == 'attention':
            chosen = weights.argmax()[None]
        elif self.distillation == 'max':
            chosen = scores[:, -1].argmax()[None]  # of the last class, the positive one of two
        elif classes == 1:
            chosen = torch.stack([scores[:, 0].argmax(), scores[:, 0].argmin()])
        else:
            chosen = scores.argmax(0)
        return nn.functional.one_hot(chosen, len(x)).to(x.dtype)

    def distil(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, (T, C) -> the logits of the pseudo-bags, (P, num_classes), and weights of all tokens, (R, T)."""
        logits, rows = [], []
        for index in self.pseudo_bags(x):
            part = x[index]
            weights = self.tier1.weights(part)
            logits.append(self.head(weights[None] @ part))
            chosen = self.choose(part, weights).detach()
            rows.append(chosen.new_zeros(len(chosen), len(x)).index_copy(1, index, chosen))
        return torch.cat(logits), torch.cat(rows)

    def forward_parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, (T, C) -> the second tier's embedding, (1, C), and the pseudo-bags' logits, (P, num_classes)."""
        logits, rows = self.distil(x)
        return self.tier2(rows @ x.detach()), logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_parts(x)[0]

    def weights(self, x: Tensor) -> Tensor:
        """The weight of each token in both tiers together, (T, C) -> (T,); their sum is 1."""
        _, rows = self.distil(x)
        return self.tier2.weights(rows @ x) @ rows


class DTFDMIL(MIL):
    """DTFD-MIL: linear, ReLU, gated attention over each pseudo-bag, distillation, gated attention over these, linear.

    Args:
        in_dim: Width of the features.
        num_classes: Number of classes or time bins, or 1 for a risk.
        dim: Width of the tokens.
        parts: Number of pseudo-bags.
        distillation: What the second tier gets of each pseudo-bag: 'afs', its pooled embedding; 'max', its most
            probable patch (MaxS); 'maxmin', its most and its least probable one (MaxMinS); 'attention', the one with
            most attention (MAS).
        drop_rate: Dropout of the embedded features.
    """

    heads = ('head', 'pool.head')

    def __init__(
        self,
        in_dim: int = 1024,
        num_classes: int = 2,
        dim: int = 512,
        parts: int = 5,
        distillation: str = 'afs',
        drop_rate: float = 0.25,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(in_dim, num_classes, dim, 'mean', drop_rate, **dd)
        if parts < 1 or distillation not in _DISTILLATIONS:
            raise ValueError(
                f'DTFDMIL: parts must be 1 or more and distillation one of {", ".join(_DISTILLATIONS)}, got {parts!r} '
                f'and {distillation!r}.'
            )
        self.act = nn.ReLU()
        self.pool = TwoTierPool(dim, num_classes, parts, distillation, **dd)

    def forward_train(
        self,
        features: Tensor,
        coords: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        steps: Sequence[int | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        tokens, _ = self.forward_slides(features, coords, lengths, steps)
        bag, parts = self.pool.forward_parts(tokens)
        return self.head(bag), parts
