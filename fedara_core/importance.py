"""Triplet importance, budgets, and the top-k and the votes that pick rank_masks.

Scores follow AdaLoRA (arXiv 2303.10512, eq. 7-11): a weight's sensitivity is |w dL/dw|; a triplet's
score is the sum over its parts (A_i, E_i, B_i) of the mean score of the part's weights.
"""

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from fedara_core.adapters import Masks, named_adapters
from fedara_core.method import ServerState
from fedara_core.wire import Upload

Importance = Literal["sensitivity", "gradient", "magnitude", "norm", "smoothed"]
IMPORTANCES: tuple[str, ...] = get_args(Importance)

BETA1 = BETA2 = 0.85  # AdaLoRA's smoothing of sensitivity and of its uncertainty


class ImportanceMeter:
    """Scores the live triplets of a model over one client's local steps.

    sensitivity: |w dL/dw|, summed over the steps; gradient: |dL/dw|, summed; smoothed: AdaLoRA's
    exponential mean of the sensitivity times that of its deviation; magnitude: |E_i| and norm:
    ||B_i E_i A_i||_F, both of the final weights.
    """

    def __init__(self, kind: Importance) -> None:
        self.kind = kind
        self._sums: dict[str, dict[str, Tensor]] = {}  # adapter -> part -> (r, width)
        self._uncertainty: dict[str, dict[str, Tensor]] = {}

    def observe(self, model: nn.Module) -> None:
        """Take in the gradients of one backward pass, before clipping and before the step."""
        if self.kind in ("magnitude", "norm"):
            return
        for name, adapter in named_adapters(model):
            if not adapter.num_live:
                continue
            sums = self._sums.setdefault(name, {})
            uncertainty = self._uncertainty.setdefault(name, {})
            for part, weight in adapter.parts.items():
                assert weight.grad is not None
                score = weight.grad.abs()
                if self.kind != "gradient":
                    score = (weight.detach() * weight.grad).abs()
                if self.kind != "smoothed":
                    sums[part] = sums[part] + score if part in sums else score
                    continue
                smooth = sums.get(part, torch.zeros_like(score))
                sums[part] = BETA1 * smooth + (1 - BETA1) * score
                unsure = uncertainty.get(part, torch.zeros_like(score))
                deviation = (score - sums[part]).abs()
                uncertainty[part] = BETA2 * unsure + (1 - BETA2) * deviation

    def scores(self, model: nn.Module) -> dict[str, Tensor]:
        """Adapter name -> (r_live,) float32 on the CPU, in name order.

        Scores of gradients are sums over batches, and 0 before any.
        """
        result = {}
        for name, adapter in named_adapters(model):
            if not adapter.num_live:
                continue
            parts = {part: weight.detach() for part, weight in adapter.parts.items()}
            if self.kind == "magnitude":
                score = parts["E"].abs().squeeze(1)
            elif self.kind == "norm":
                norms = [weight.norm(dim=1) for weight in parts.values()]
                score = torch.stack(norms).prod(dim=0)
            elif name not in self._sums:
                score = torch.zeros(adapter.num_live)
            else:
                score = torch.stack([self._weight_scores(name, part) for part in parts]).sum(dim=0)
            result[name] = score.cpu()
        return result

    def _weight_scores(self, name: str, part: str) -> Tensor:
        """Mean score of one part's weights, by triplet: (r,)."""
        score = self._sums[name][part]
        if self.kind == "smoothed":
            score = score * self._uncertainty[name][part]
        return score.mean(dim=1)


def cubic_budget(
    round_index: int, *, first: int, last: int, num_rounds: int, warmup: int, final: int
) -> int:
    """AdaLoRA's schedule (arXiv 2303.10512, eq. 12): live triplets allowed after a round.

    `first` up to round `warmup`, `last` in the last `final` rounds, a cubic in between.
    """
    if round_index <= warmup:
        return first
    if round_index >= num_rounds - final:
        return last
    left = 1 - (round_index - warmup) / (num_rounds - final - warmup)
    return last + round((first - last) * left**3)


class Schedule(Protocol):
    """Hyperparameters of a budget: its end as a share of all triplets that there ever were, and the
    phases before and after the cubic as shares of the rounds."""

    @property
    def final_budget(self) -> float: ...
    @property
    def warmup_fraction(self) -> float: ...
    @property
    def final_fraction(self) -> float: ...


def scheduled_budget(state: ServerState, schedule: Schedule) -> int:
    """b(t) of the state's round: `cubic_budget` by a method's own hyperparameters.

    With E = 0 the scores of the first step say nothing, so one round at least warms up.
    """
    return cubic_budget(
        state.round_index,
        first=state.num_triplets,
        last=round(schedule.final_budget * state.num_triplets),
        num_rounds=state.num_rounds,
        warmup=max(1, round(schedule.warmup_fraction * state.num_rounds)),
        final=round(schedule.final_fraction * state.num_rounds),
    )


def top_k_masks(scores: dict[str, Tensor], k: int) -> Masks:
    """True for the k largest scores over all adapters together; ties go to the lower index.

    scores: adapter name -> (r,); the index runs over adapters in name order, then over rows.
    """
    names = sorted(scores)
    if not names:
        return {}
    flat = torch.cat([scores[name] for name in names])
    order = torch.sort(flat, descending=True, stable=True).indices
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[order[:k]] = True
    pieces = torch.split(chosen, [len(scores[name]) for name in names])
    return dict(zip(names, pieces, strict=True))


def vote_shares(uploads: Sequence[Upload]) -> Tensor:
    """share[i] = sum_k n_k m_k[i] / sum_k n_k over the cohort: (live triplets,) float64.

    Whole numbers are added and divided once, so that half of the examples are exactly 0.5.
    """
    votes = torch.zeros(uploads[0].bits.numel(), dtype=torch.float64)
    for upload in uploads:
        votes += upload.bits.double() * upload.num_examples
    return votes / sum(upload.num_examples for upload in uploads)


def top_shares(shares: Tensor, mean_scores: Tensor, k: int) -> Tensor:
    """True for the k largest shares (n,); ties go to the larger mean score, then lower index."""
    order = torch.sort(mean_scores, descending=True, stable=True).indices
    order = order[torch.sort(shares[order], descending=True, stable=True).indices]
    keep = torch.zeros(len(shares), dtype=torch.bool)
    keep[order[:k]] = True
    return keep
