"""A round's clients: who takes part, on which process, and what each one does and costs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bench.metering.client_cost import ClientCost, batch_shape, text_lengths
from bench.metering.flops import BatchShape
from bench.metering.meter import Meter
from bench.run.arrivals import Arrivals
from bench.run.job import ClientState, Job
from fedara_core.comm.base import Communicator
from fedara_core.compression import RESIDUAL
from fedara_core.merge.mean import Exchange
from fedara_core.method import Batch, Client, Size
from fedara_core.seeds import generator
from fedara_core.state import ServerState
from fedara_core.train import batches, start_client
from fedara_core.wire import Upload

HELD_VALUES = 1 << 26  # a process trains and sends clients with so many values in all at a time


def draw_cohort(job: Job, round_index: int) -> list[int]:
    """The round's client ids, sorted: a uniform draw without replacement from (seed, round)."""
    drawn = torch.randperm(
        len(job.shards), generator=generator(job.config.seed, "cohort", round_index)
    )
    return sorted(drawn[: job.config.num_drawn].tolist())


def place(job: Job, cohort: Sequence[int], world_size: int) -> list[list[int]]:
    """Clients of each process: the client with most local steps first, to the least loaded process.

    Ties go to the lower client_id and the lower world_rank. Where a client runs changes no result,
    but clients that keep tensors between rounds stay on one process.
    """
    if job.keeps_client_state:
        return [
            [client_id for client_id in cohort if home(client_id, world_size) == world_rank]
            for world_rank in range(world_size)
        ]
    steps = {client_id: job.training.num_steps(len(job.shards[client_id])) for client_id in cohort}
    placed: list[list[int]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for client_id in sorted(cohort, key=lambda client_id: (-steps[client_id], client_id)):
        least = load.index(min(load))
        placed[least].append(client_id)
        load[least] += max(1, steps[client_id])  # a client that takes no step is work, too
    return [sorted(clients) for clients in placed]


def home(client_id: int, world_size: int) -> int:
    """world_rank of the process where a client stays that keeps tensors between rounds."""
    return client_id % world_size


def chunks(
    job: Job, state: ServerState, cohort: Sequence[int], world_size: int
) -> Iterator[Sequence[int]]:
    """The cohort in stretches of client_ids, so that a process holds few clients' values.

    Sums come in the same order however it is cut. All of it where more than a mean is needed, and
    where only the fastest clients count.
    """
    size = max(1, len(cohort))
    if job.method.combine == "mean" and job.config.clients.over_selection == 1:
        size = max(1, HELD_VALUES // max(1, state.index.size)) * world_size
    for first in range(0, len(cohort), size):
        yield cohort[first : first + size]


def train_chunk(
    job: Job,
    state: ServerState,
    chunk: Sequence[int],
    arrivals: Arrivals,
    exchange: Exchange,
    communicator: Communicator,
    meter: Meter,
) -> list[ClientCost]:
    """Train this process's clients of the chunk and hand over what arrives; what they cost.

    Where modelled time decides who arrives, uploads wait until all processes have exchanged theirs.
    """
    mine = place(job, chunk, communicator.world_size)[communicator.world_rank]
    if not job.config.clients.timed:
        return [train_client(job, state, client_id, meter, exchange.add) for client_id in mine]
    uploads: list[Upload] = []
    state_before = dict(job.client_state)
    costs = [train_client(job, state, client_id, meter, uploads.append) for client_id in mine]
    with meter.phase("wait"):
        communicator.barrier()
    with meter.phase("exchange"):
        arrivals.agree(costs, communicator)
    with meter.phase("pack"):
        late = set(mine).difference(arrivals.arrived)
        restore_client_state(job, late, state_before)
        for upload in uploads:
            if upload.client_id not in late:
                exchange.add(upload)
    return costs


def train_client(
    job: Job,
    state: ServerState,
    client_id: int,
    meter: Meter,
    send: Callable[[Upload], None],
) -> ClientCost:
    """One client's download, local training and upload; what it cost. send: gets the upload."""
    with meter.phase("download"):
        client = make_client(job, client_id)
        size = job.method.download(job.model, state, client)
        start_client(client, job.method, job.training, state)
    depth = job.prefix.settle() if job.prefix else 0
    step = job.counter.step_cost(depth) if job.counter else None
    shapes: list[BatchShape] = []
    lengths: dict[int, int] = {}  # by the number of each text
    with meter.phase("local_train"):
        for batch in client_batches(job, state.round_index, client_id):
            shapes.append(batch_shape(job.model.module, batch))
            if depth:
                lengths |= text_lengths(batch)
            job.method.local_step(client, batch)
    alone = [BatchShape(1, n, n) for n in lengths.values()]
    counts = job.counter.counts(client, step, shapes, alone) if job.counter else {}
    counts["activation_bytes"] = meter.device_bytes_above_rest()
    with meter.phase("pack"):
        upload = job.method.upload(client, state)
        if not isinstance(upload, Upload) or upload.client_id != client_id:
            raise RuntimeError(f"round {state.round_index}: client {client_id} sent no upload")
        upload = _code(job, client, state, upload)
        if job.keeps_client_state:
            job.client_state[client_id] = client.kept
        send(upload)
    return _cost(job, client_id, size, uplink_bytes=upload.header.num_bytes, **counts)


def drop_client(job: Job, state: ServerState, client_id: int) -> ClientCost:
    """What a client costs that vanishes after its download."""
    size = load_client(job, state, client_id)
    return _cost(job, client_id, size, uplink_bytes=0, flops=0)


def make_client(job: Job, client_id: int) -> Client:
    """A client before its download, with what it has kept since it last took part."""
    return Client(
        client_id=client_id,
        num_examples=len(job.shards[client_id]),
        model=job.model,
        kept=without_residual(job.client_state.get(client_id, {})),
    )


def load_client(job: Job, state: ServerState, client_id: int) -> Size:
    """Make the model what this client would use; what a server would send for it."""
    return job.method.download(job.model, state, make_client(job, client_id))


def without_residual(kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a client keeps for its method: all but what its codec left out."""
    return {name: tensor for name, tensor in kept.items() if name != RESIDUAL}


def restore_client_state(job: Job, late: set[int], before: ClientState) -> None:
    """A late client keeps what it has kept before the round."""
    for client_id in late:
        job.client_state.pop(client_id, None)
        if client_id in before:
            job.client_state[client_id] = before[client_id]


def client_batches(job: Job, round_index: int, client_id: int) -> Iterator[Batch]:
    """A client's batches of a round, the same wherever and whenever they are drawn."""
    return batches(
        job.train,
        job.shards[client_id],
        job.training,
        seed=job.config.seed,
        round_index=round_index,
        client_id=client_id,
        device=job.device,
    )


def reference_of(job: Job, state: ServerState) -> Tensor:
    """What a lossy codec codes an upload's difference from; empty where clients send own rows."""
    return torch.zeros(0) if job.method.own_rows else state.sent


def _code(job: Job, client: Client, state: ServerState, upload: Upload) -> Upload:
    """The upload under the job's codec; its residual stays at the client."""
    upload, residual = job.compression.send_up(
        upload,
        reference_of(job, state),
        job.client_state.get(client.client_id, {}).get(RESIDUAL),
        seed=job.config.seed,
        round_index=state.round_index,
    )
    if residual is not None:
        client.kept[RESIDUAL] = residual
    return upload


def _cost(job: Job, client_id: int, size: Size, **counts: int | None) -> ClientCost:
    """A client's cost, with its modelled time where that decides who arrives."""
    downlink_bytes = size.num_bytes(job.config.codec.down)
    cost = ClientCost(client_id=client_id, downlink_bytes=downlink_bytes, **counts)  # type: ignore[arg-type]
    seconds = job.fleet.seconds(cost)
    return cost if seconds is None else replace(cost, modelled_seconds=seconds)
