"""Server optimisers: the clients' mean as a pseudo-gradient, for all that travels, the head too.

Equations, by coordinate, with x_t what the clients downloaded and D_t = mean - x_t:

fedavg    x <- x + lr D                                            arXiv 1602.05629; lr 1: the mean
fedavgm   m <- momentum m + D;                    x <- x + lr m    arXiv 1909.06335, section 4.2
fedadam   m <- momentum m + (1 - momentum) D                       arXiv 2003.00295, algorithm 2
          v <- beta2 v + (1 - beta2) D^2;         x <- x + lr m / (sqrt(v) + tau)
fedyogi   as fedadam, with v <- v - (1 - beta2) D^2 sign(v - D^2)

Start: m = 0, v = tau^2 (the paper: v >= tau^2). There is no correction of the bias.
Deviation: clients weigh what they weigh in the mean, their num_examples; algorithm 2 has equal
    weights. A round without uploads leaves x, m and v alone.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedara_core.state import ServerState

MOMENTUM, VARIANCE = "server_momentum", "server_variance"  # names of m and v in ServerState.extra


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer:
    """lr: of the server; momentum: fedavgm's, and beta1 of the others; beta2, tau: see above."""

    name: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = "fedavg"
    lr: float = 1.0
    momentum: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    @property
    def keeps_the_mean(self) -> bool:
        """Whether the next state is the mean itself."""
        return self.name == "fedavg" and self.lr == 1

    def step(self, state: ServerState, after: ServerState) -> ServerState:
        """The next state, from the one that clients downloaded and the one that has their mean in
        its place; of a method with `plain_mean`. Computed in float64, kept in float32."""
        if self.keeps_the_mean:
            return after
        start = state.sent.double()  # (num_sent,)
        moments, move = self._move(after.sent.double() - start, state)
        vector = after.vector.clone()
        vector[: len(start)] = start + self.lr * move
        kept = {name: moment.float() for name, moment in moments.items()}
        return replace(after, vector=vector, extra={**after.extra, **kept})

    def _move(self, change: Tensor, state: ServerState) -> tuple[dict[str, Tensor], Tensor]:
        """The new moments, and what lr multiplies; change: D (num_sent,) float64."""
        if self.name == "fedavg":
            return {}, change
        zeros = torch.zeros(len(change))
        momentum = self.momentum * state.extra.get(MOMENTUM, zeros).double()
        if self.name == "fedavgm":
            momentum += change
            return {MOMENTUM: momentum}, momentum
        momentum += (1 - self.momentum) * change
        variance = state.extra.get(VARIANCE, zeros + self.tau**2).double()
        square = change.square()
        if self.name == "fedadam":
            variance = self.beta2 * variance + (1 - self.beta2) * square
        else:
            variance -= (1 - self.beta2) * square * torch.sign(variance - square)
        moments = {MOMENTUM: momentum, VARIANCE: variance}
        return moments, momentum / (variance.sqrt() + self.tau)
