"""Triplet importance, budgets, and the top-k and the votes that pick rank_masks.

Scores follow AdaLoRA (arXiv 2303.10512, eq. 7-11): a weight's sensitivity is |w dL/dw|; a triplet's
score is the sum over its parts (A_i, E_i, B_i) of the mean score of the part's weights.
"""

from collections.abc import Callable, Mapping
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from fedara_core.adapters import AdaptedModel
from fedara_core.state import ServerState
from fedara_core.values import Tensors

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
        self._sums: Tensor | None = None  # of the adapters' rows: (num_row_values,)
        self._uncertainty: Tensor | None = None

    def observe(self, model: AdaptedModel) -> None:
        """Take in the gradient of one backward pass, before clipping and before the step."""
        if self.kind in ("magnitude", "norm"):
            return
        rows = slice(model.index.num_row_values)
        score = model.gradient[rows].abs()
        if self.kind != "gradient":
            score = (model.vector[rows] * model.gradient[rows]).abs()
        if self.kind != "smoothed":
            self._sums = score if self._sums is None else self._sums.add_(score)
            return
        smooth, unsure = self._sums, self._uncertainty
        if smooth is None or unsure is None:
            smooth, unsure = torch.zeros_like(score), torch.zeros_like(score)
        self._sums = BETA1 * smooth + (1 - BETA1) * score
        deviation = (score - self._sums).abs()
        self._uncertainty = BETA2 * unsure + (1 - BETA2) * deviation

    def scores(self, model: AdaptedModel) -> Tensor:
        """(live triplets,) float32 on the CPU, over the adapters in name order.

        Scores of gradients are sums over batches, and 0 before any.
        """
        index = model.index
        parts = index.parts(model.vector)
        if self.kind == "magnitude":
            return torch.cat(
                [e.abs().squeeze(1) for e in parts.get("E", {}).values()] or [_NONE]
            ).cpu()
        if self.kind == "norm":
            return _by_triplet(parts, lambda rows: rows.norm(dim=1)).prod(dim=0).cpu()
        if self._sums is None:
            return torch.zeros(sum(adapter.num_live for adapter in model.adapters.values()))
        weight = 1.0 if self._uncertainty is None else self._uncertainty
        scores = torch.zeros_like(model.vector)
        scores[: index.num_row_values] = self._sums * weight
        return _by_triplet(index.parts(scores), lambda rows: rows.mean(dim=1)).sum(dim=0).cpu()


def _by_triplet(parts: Mapping[str, Tensors], measure: Callable[[Tensor], Tensor]) -> Tensor:
    """A measure of each part of each triplet: rows (r, width) -> (r,); in all (parts, triplets)."""
    measured = [torch.cat([measure(rows) for rows in own.values()]) for own in parts.values()]
    return torch.stack(measured) if measured else torch.zeros(0, 0)


_NONE = torch.zeros(0)


def relative_costs(model: AdaptedModel) -> Tensor:
    """Cost of keeping each live triplet, over the mean of all: (live triplets,) float32 on the CPU,
    over the adapters in name order. Ours, in no paper.

        cost(l) = 3 (d_in + d_out) + sum over linear layers k above l of d_in[k] d_out[k] / n[k]

    in multiplications a token. First come the triplet's own products, one forward and two backward.
    Then what it has to bear of the backward pass above it: the gradient of layer k's input is
    needed as long as any of the n[k] triplets below k lives, so they share its product with W0[k]
    equally (the Shapley value of an airport game, Littlechild and Owen 1973). All costs add up to
    those of the live triplets and of the backward pass down to the lowest of them.

    Layers count as a chain, in the order of the model's modules; attention's own products do not
    count. A cached prefix would save the forward pass likewise; it has no say in the choice, which
    does not go by how a round is computed.
    """
    num_below = 0
    passed = 0.0  # a triplet's share of all layers so far, had it been there from the first on
    before: dict[str, float] = {}
    for name, layer in model.module.named_modules():
        if isinstance(layer, nn.Linear):
            if num_below:
                passed += layer.in_features * layer.out_features / num_below
            adapter = model.adapters.get(name.removesuffix(".base"))
            if adapter is not None:
                before[adapter.name] = passed
                num_below += adapter.num_live
    costs: list[float] = []
    for name, adapter in model.adapters.items():
        costs += [3 * sum(adapter.shape) + passed - before[name]] * adapter.num_live
    together = torch.tensor(costs, dtype=torch.float64)
    return (together / together.mean()).float()


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


def top_k(scores: Tensor, k: int) -> Tensor:
    """True for the k largest scores (n,); ties go to the lower index."""
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[torch.sort(scores, descending=True, stable=True).indices[:k]] = True
    return chosen


def top_shares(shares: Tensor, mean_scores: Tensor, k: int) -> Tensor:
    """True for the k largest shares (n,); ties go to the larger mean score, then lower index."""
    order = torch.sort(mean_scores, descending=True, stable=True).indices
    order = order[torch.sort(shares[order], descending=True, stable=True).indices]
    keep = torch.zeros(len(shares), dtype=torch.bool)
    keep[order[:k]] = True
    return keep
