# SPDX-License-Identifier: Apache-2.0
"""Survival with censoring: time bins, the discrete-time likelihood, Cox's partial likelihood, and risks.

The logits of a discrete-time model are hazards after a sigmoid: the probability that the event falls into a bin of
time, if it did not fall into an earlier one. Survival is S[k] = prod over j <= k of (1 - hazard[j]).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['cox_loss', 'risk_score', 'survival', 'survival_nll', 'time_bin', 'time_edges']


def time_edges(times: Tensor, censored: Tensor, bins: int) -> Tensor:
    """The inner edges of bins that hold equally many of the events, (bins - 1,), as in CLAM's survival models.

    Args:
        times: Times of the event or of censoring, of the training data alone, (n,).
        censored: Whether the event was not seen, (n,).
        bins: Number of bins.

    Raises:
        ValueError: There are too few events, or too few different times, for so many bins.
    """
    events = times[~censored.bool()].double()
    if bins < 2 or len(events) < bins:
        raise ValueError(f'time_edges: bins must be from 2 to the number of events, {len(events)}, got {bins}.')
    edges = events.quantile(torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1])
    if time_bin(events, edges).bincount(minlength=bins).min() == 0:
        raise ValueError(
            f'time_edges: there must be events in each of {bins} bins, got {len(events)} events at '
            f'{len(events.unique())} different times.'
        )
    return edges


def time_bin(times: Tensor, edges: Tensor) -> Tensor:
    """The bin of each time, (n,), (bins - 1,) -> (n,). A bin begins with its edge."""
    return torch.bucketize(times.double(), edges, right=True)


def survival(logits: Tensor) -> Tensor:
    """The probability to survive each bin, (batch, bins) -> (batch, bins)."""
    return F.logsigmoid(-logits).cumsum(1).exp()


def survival_nll(logits: Tensor, bins: Tensor, censored: Tensor, alpha: float = 0.0) -> Tensor:
    """The negative log-likelihood of discrete-time hazards (Zadeh and Schmid, 2020), as a mean over the batch.

    A case with an event in bin k has the loss -log(S[k-1] hazard[k]), a case that is censored in it -log(S[k]).

    Args:
        logits: Logits of the hazards, (batch, bins).
        bins: Bin of the event or of censoring, (batch,).
        censored: Whether the event was not seen, (batch,).
        alpha: Share of their weight that censored cases lose; at 1 they do not count.
    """
    log_hazards = F.logsigmoid(logits)
    log_survival = F.logsigmoid(-logits).cumsum(1)
    log_before = F.pad(log_survival, (1, 0))[:, :-1]  # survival of the bin before
    event = -(log_before + log_hazards).gather(1, bins[:, None]).squeeze(1)
    censoring = -log_survival.gather(1, bins[:, None]).squeeze(1)
    return torch.where(censored.bool(), (1 - alpha) * censoring, event).mean()


def cox_loss(log_hazards: Tensor, times: Tensor, censored: Tensor) -> Tensor:
    """Cox's negative log partial likelihood over the cases of a batch, with Efron's ties, as a mean over the events.

    All sums of hazards stay logarithms, so that neither a common drift of the outputs nor their spread matters.

    Args:
        log_hazards: Outputs of the network, (batch, 1).
        times: Times of the event or of censoring, (batch,).
        censored: Whether the event was not seen, (batch,). A batch without an event has a loss of 0.
    """
    events = ~censored.bool()
    if not events.any():
        return log_hazards.sum() * 0.0
    r = log_hazards.squeeze(1)
    own, when = r[events], times[events]
    at_risk = torch.where(times >= when[:, None], r, -torch.inf).logsumexp(1)  # [events, batch] -> [events]
    tied = when == when[:, None]  # [events, events]
    together = torch.where(tied, own, -torch.inf).logsumexp(1)
    share = tied.tril(-1).sum(1) / tied.sum(1)  # of the tied events' hazards, which those before in a tie have left
    log_sum = at_risk + torch.log1p(-share * (together - at_risk).exp())
    return (log_sum - own).mean()


def risk_score(logits: Tensor) -> Tensor:
    """A number that is higher the sooner the event is expected, (batch, bins) -> (batch,).

    It is the negative sum of S over the bins, and Cox's output as it is.
    """
    return logits.squeeze(1) if logits.shape[1] == 1 else -survival(logits).sum(1)
