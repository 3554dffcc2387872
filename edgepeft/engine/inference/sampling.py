"""How the next token is drawn from a row of logits.

Top-k (Fan et al. 2018, arXiv 1805.04833), nucleus or top-p (Holtzman et al. 2020, arXiv 1904.09751), min-p (Nguyen et
al. 2024, arXiv 2407.01082) and the repetition penalty (Keskar et al. 2019, arXiv 1909.05858). They apply in that order
after the temperature, each to what the one before it left; the penalty comes first, on the raw logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgepeft.chat.protocol import Sampling, check_sampling


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divides positive and multiplies negative logits of tokens that occurred.

    Args:
        logits: [V], float32.
        seen: token ids that occurred in the prompt and the answer so far, [n], int64.
        penalty: above 1 discourages repetition.

    Returns:
        [V]; the input itself when the penalty is 1.
    """
    if penalty == 1.0 or seen.numel() == 0:
        return logits
    occurred = seen.unique()
    values = logits[occurred]
    changed = logits.clone()
    changed[occurred] = torch.where(values > 0, values / penalty, values * penalty)
    return changed


def next_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that the next token is drawn from.

    Args:
        logits: [V], float32.
        sampling: with a temperature above 0.

    Returns:
        [V], float32, sums to 1; tokens that the filters leave out have exactly 0.
    """
    ordered, order = torch.sort(logits / sampling.temperature, descending=True, stable=True)
    if sampling.top_k:
        ordered, order = ordered[: sampling.top_k], order[: sampling.top_k]
    kept = torch.softmax(ordered, dim=0)
    if sampling.top_p < 1.0:
        # A token stays while the mass before it is below top-p, so the one that crosses it stays too.
        before = kept.cumsum(0) - kept
        kept = kept * (before < sampling.top_p)
        kept = kept / kept.sum()
    if sampling.min_p > 0.0:
        kept = kept * (kept >= sampling.min_p * kept[0])
        kept = kept / kept.sum()
    return torch.zeros_like(logits).scatter_(0, order, kept)


class Sampler:
    """Draws the tokens of one answer; the same seed draws the same answer on every device.

    Args:
        sampling: what the request asked for.
        seen: token ids of the prompt, for the repetition penalty.
        row: position in a batch; rows draw independently of each other and of the batch they share.
    """

    def __init__(self, sampling: Sampling, seen: list[int], row: int = 0) -> None:
        check_sampling(sampling)
        self._sampling = sampling
        self._seen = list(seen) if sampling.repetition_penalty != 1.0 else []
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            # A plain sum would make row 1 of seed 0 the same as row 0 of seed 1.
            self._generator.manual_seed((sampling.seed * 1_000_003 + row) % (1 << 63))

    def draw(self, logits: Tensor) -> int:
        """The next token's id, from logits of shape [V]."""
        row = logits.float()
        if self._sampling.repetition_penalty != 1.0:
            row = penalise(
                row, torch.tensor(self._seen, dtype=torch.int64, device=row.device), self._sampling.repetition_penalty
            )
        if self._sampling.temperature == 0:
            token = int(row.argmax())
        else:
            cumulative = next_probabilities(row, self._sampling).cumsum(0)
            point = torch.rand(1, generator=self._generator).to(row.device) * cumulative[-1]
            token = int(torch.searchsorted(cumulative, point, right=True).clamp_(max=row.numel() - 1))
        if self._sampling.repetition_penalty != 1.0:
            self._seen.append(token)
        return token
