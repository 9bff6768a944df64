# SPDX-License-Identifier: Apache-2.0
"""Poolings, which make one vector of the tokens of a bag, however many there are.

Source: `Attention-based Deep Multiple Instance Learning` (ICML 2018) - https://arxiv.org/abs/1802.04712
"""

from torch import Tensor, nn

__all__ = ['POOLS', 'AttentionPool', 'GatedAttentionPool', 'MaxPool', 'MeanPool']


class AttentionPool(nn.Module):
    """Weighted mean of all tokens, by weights that a small network gives each of them (arXiv:1802.04712, eq. 8)."""

    def __init__(self, dim: int, hidden_dim: int = 128, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.act = nn.Tanh()
        self.fc2 = nn.Linear(hidden_dim, 1, **dd)

    def weights(self, x: Tensor) -> Tensor:
        """The weight of each token, (T, C) -> (T,); their sum is 1."""
        return self.fc2(self.act(self.fc1(x))).squeeze(1).softmax(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x)[None] @ x  # [T, C] -> [1, C]


class GatedAttentionPool(AttentionPool):
    """The same with a gate on the small network's hidden layer (arXiv:1802.04712, eq. 9)."""

    def __init__(self, dim: int, hidden_dim: int = 128, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, hidden_dim, **dd)
        self.gate = nn.Linear(dim, hidden_dim, **dd)

    def weights(self, x: Tensor) -> Tensor:
        """The weight of each token, (T, C) -> (T,); their sum is 1."""
        return self.fc2(self.act(self.fc1(x)) * self.gate(x).sigmoid()).squeeze(1).softmax(0)


class MeanPool(nn.Module):
    def weights(self, x: Tensor) -> Tensor:
        return x.new_full((len(x),), 1 / len(x))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(0, keepdim=True)  # [T, C] -> [1, C]


class MaxPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.amax(0, keepdim=True)  # [T, C] -> [1, C]


POOLS = {'attention': AttentionPool, 'gated': GatedAttentionPool, 'mean': MeanPool, 'max': MaxPool}
