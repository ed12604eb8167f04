"""What one client's round costs besides time: FLOPs, and bytes of what it trains with."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.metering.devices import Device, Precision, model_round
from bench.metering.flops import BatchShape, StepCost, StepFlops
from fedara_core.adapters import AdaptedModel
from fedara_core.method import Batch, Client

MIX = "mix"  # the name of a federation whose clients have unlike devices


@dataclass(frozen=True, kw_only=True)
class ClientCost:
    """One client's round; what is not known is None.

    adapter_bytes: of the client's live rows. optimizer_bytes: of the optimiser's tensors after the
    last step. activation_bytes: on a GPU, the peak of the local steps above what lies there after
    them: activations and temporaries. lowest, num_backward_layers: see StepCost.
    modelled_seconds: until the upload is sent, where modelled time decides whose upload counts.
    """

    client_id: int
    uplink_bytes: int
    downlink_bytes: int
    adapter_bytes: int | None = None
    optimizer_bytes: int | None = None
    activation_bytes: int | None = None
    flops: int | None = None
    lowest: str | None = None
    num_layers: int | None = None
    num_backward_layers: int | None = None
    modelled_seconds: float | None = None


class ClientCounter:
    """Counts the local training of one model's clients; it changes nothing."""

    def __init__(self, model: AdaptedModel) -> None:
        """Where FLOPs can not be counted: one warning, and costs without them."""
        self._adapters = list(model.adapters.values())
        self._flops: StepFlops | None = None
        try:
            self._flops = StepFlops(model)
        except Exception as error:  # whatever ails an observer, the run goes on
            _warn_no_flops(error)

    @property
    def counts_flops(self) -> bool:
        return self._flops is not None

    def step_cost(self, depth: int = 0) -> StepCost | None:
        """The cost of a local step on the model as it is now, after a download. depth: of the
        layers that do not run in it."""
        try:
            return self._flops.now(depth) if self._flops else None
        except Exception as error:  # as above
            self._flops = None
            _warn_no_flops(error)
            return None

    def counts(
        self,
        client: Client,
        step: StepCost | None,
        shapes: Iterable[BatchShape],
        alone: Iterable[BatchShape] = (),
    ) -> dict[str, Any]:
        """The counted fields of ClientCost, of a client that has trained on such batches. alone:
        its texts, for which the layers that do not run in a step count once a round: what a process
        keeps of earlier rounds and of other clients is no property of the client."""
        parts = [p for adapter in self._adapters for p in adapter.parts.values()]
        counts: dict[str, Any] = {
            "adapter_bytes": sum(p.nbytes for p in parts),
            "optimizer_bytes": _optimizer_bytes(client),
        }
        if step is not None:
            counts["flops"] = step.total(shapes) + step.prefix_total(alone)
            for key in ("lowest", "num_layers", "num_backward_layers"):
                counts[key] = getattr(step, key)
        return counts


def batch_shape(module: nn.Module, batch: Batch) -> BatchShape:
    """What the FLOPs of a batch depend on, by whether the model reads it without padding."""
    num_examples, length = batch["input_ids"].shape
    packed = getattr(module, "packed", False)
    num_tokens = int(batch["attention_mask"].sum()) if packed else num_examples * length
    return BatchShape(num_examples, length, num_tokens)


def text_lengths(batch: Batch) -> dict[int, int]:
    """The number of each text of a batch, and its tokens."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    return dict(zip(batch["texts"].tolist(), lengths, strict=True))


def reduce_clients(parts: Iterable[Iterable[Mapping[str, Any]]]) -> dict[str, Any]:
    """The record's keys from every process's clients, by-client lists in order of client_id.
    Clients that did not train count where something is known of them."""
    clients = sorted((c for part in parts for c in part), key=lambda c: c["client_id"])
    reduced: dict[str, Any] = {}
    for key in ("flops", "uplink_bytes", "downlink_bytes", "modelled_seconds"):
        if all(client[key] is not None for client in clients):
            reduced[f"{key}_by_client"] = [client[key] for client in clients]
    for key in ("adapter_bytes", "optimizer_bytes", "activation_bytes"):
        known = [client[key] for client in clients if client[key] is not None]
        if known:
            reduced[key] = max(known)
    if "flops_by_client" in reduced:
        reduced["flops"] = sum(reduced["flops_by_client"])
    traced = [client for client in clients if client["num_layers"] is not None]
    if "flops_by_client" in reduced and traced:
        deepest = max(traced, key=lambda client: client["num_backward_layers"])
        reduced["num_layers"] = deepest["num_layers"]
        reduced["num_backward_layers"] = deepest["num_backward_layers"]
        if deepest["lowest"] is not None:
            reduced["lowest_trained_layer"] = deepest["lowest"]
    return reduced


def model_devices(
    row: Mapping[str, Any],
    devices: Mapping[str, Device],
    names: Iterable[str],
    device_of: Sequence[str],
    speeds: Sequence[float],
    precision: Precision,
) -> dict[str, Any]:
    """modelled_by_device of a round's record; nothing without its FLOPs.

    names: of each of these devices, as if all clients had it. device_of: client_id -> the name of
    its device, or empty; modelled under the name MIX. speeds: client_id -> factor on its device's.
    """
    if "flops_by_client" not in row:
        return {}
    peak = row.get("peak_device_memory_bytes", row.get("peak_memory_bytes"))
    by_client = [row[f"{key}_by_client"] for key in ("flops", "uplink_bytes", "downlink_bytes")]

    def one_round(name_of: Mapping[int, str]) -> dict[str, float]:
        clients = {
            client_id: devices[name_of[client_id]].client(
                flops=flops,
                uplink_bytes=up,
                downlink_bytes=down,
                precision=precision,
                speed=speeds[client_id],
                peak_memory_bytes=peak,
            )
            for client_id, flops, up, down in zip(row["cohort"], *by_client, strict=True)
        }
        return {key: round(value, 6) for key, value in model_round(clients).items()}

    modelled = {name: one_round(dict.fromkeys(row["cohort"], name)) for name in names}
    if device_of:
        modelled[MIX] = one_round(dict(enumerate(device_of)))
    return {"modelled_by_device": modelled} if modelled else {}


def profiles(devices: Mapping[str, Device]) -> dict[str, dict[str, float]]:
    """The numbers of the devices, for the record."""
    return {name: asdict(device) for name, device in devices.items()}


def _optimizer_bytes(client: Client) -> int | None:
    """None for a client that made no optimiser."""
    optimizer = client.__dict__.get("optimizer")  # the property would make one
    if not isinstance(optimizer, torch.optim.Optimizer):
        return None
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def _warn_no_flops(error: Exception) -> None:
    text = f"FLOPs are not counted: {type(error).__name__}: {error}"
    warnings.warn(text, RuntimeWarning, stacklevel=3)
