"""The plain loops and library calls that the suite is timed against; nothing of the suite in them.

LoRA as one would write it in a notebook; the copies and sums of a round on plain tensors; the
library's allgather.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedara_core.comm.base import Communicator


def bare_allgather(mine: Tensor, communicator: Communicator) -> Callable[[], list[Tensor]] | None:
    """The library's allgather of equally long uint8 vectors into buffers that are there already.

    None where there is no library, or where the vectors would have to move to a GPU first.
    """
    gathered = torch.empty(communicator.world_size, mine.numel(), dtype=torch.uint8)
    buffers = list(gathered)
    if communicator.kind in ("mpi", "mpi-node"):
        from mpi4py import MPI

        counts = [mine.numel()] * communicator.world_size
        source = [mine.numpy(), MPI.BYTE]
        target = [gathered.numpy(), counts, None, MPI.BYTE]

        def bare_allgatherv() -> list[Tensor]:
            MPI.COMM_WORLD.Allgatherv(source, target)
            return buffers

        return bare_allgatherv
    if communicator.library == "gloo":
        import torch.distributed as dist

        def bare_all_gather() -> list[Tensor]:
            dist.all_gather(buffers, mine)
            return buffers

        return bare_all_gather
    return None


def average(
    parameters: list[Tensor], mean: list[Tensor], weights: Sequence[int], *, messages: bool = False
) -> list[Tensor]:
    """A round's copies and sums on plain tensors; returns the new mean.

    For every client copy the mean's tensors into the model's, and add these to a sum by the
    client's weight. Divide the sum. messages: each client's is a copy of its tensors, and the sum
    is taken when all are there.
    """
    total = [torch.zeros_like(tensor) for tensor in mean]
    sent: list[list[Tensor]] = []
    for weight in weights:
        _copy(mean, parameters)
        if messages:
            sent.append([parameter.clone() for parameter in parameters])
        else:
            _add(parameters, weight, total)
    for message, weight in zip(sent, weights, strict=messages):
        _add(message, weight, total)
    for summed in total:
        summed.div_(sum(weights))
    return total


def _copy(mean: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    for parameter, tensor in zip(parameters, mean, strict=True):
        parameter.copy_(tensor)


def _add(tensors: Sequence[Tensor], weight: int, total: Sequence[Tensor]) -> None:
    for summed, tensor in zip(total, tensors, strict=True):
        summed.add_(tensor, alpha=weight)


class BareLora(nn.Module):
    """A linear layer with LoRA beside it."""

    def __init__(self, base: nn.Linear, r: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.A = nn.Parameter(torch.empty(r, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        change = functional.linear(functional.linear(x, self.A), self.B) * self.scale
        return self.base(x) + change  # type: ignore[no-any-return]


def add_lora(model: nn.Module, r: int) -> list[nn.Parameter]:
    """Put LoRA beside every linear layer but the classifier; returns what trains."""
    model.requires_grad_(False)
    model.get_submodule("classifier").requires_grad_(True)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "classifier":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, BareLora(module, r, 1.0))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train_round(
    model: nn.Module,
    trained: list[nn.Parameter],
    start_values: list[Tensor],
    cohort: Sequence[Sequence[Mapping[str, Tensor]]],
    lr: float,
) -> list[Tensor]:
    """Train each client on its batches from start_values; returns the average of `trained`."""
    totals = [torch.zeros_like(value) for value in start_values]
    for batches in cohort:
        with torch.no_grad():
            _copy(start_values, trained)
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        for batch in batches:
            logits = model(batch["input_ids"], batch["attention_mask"])
            functional.cross_entropy(logits, batch["labels"]).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        for total, parameter in zip(totals, trained, strict=True):
            total += parameter.detach() / len(cohort)
    return totals
