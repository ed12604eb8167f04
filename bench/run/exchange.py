"""Which exchange a run's uploads take: by the method's needs and the config's merge path."""

from functools import partial

from bench.run.clients import reference_of
from bench.run.job import Job
from fedara_core.codec import ROW_VALUES, payload_bytes
from fedara_core.comm.base import Communicator
from fedara_core.merge.cost import cheapest, moved_values
from fedara_core.merge.gathered import Gathering
from fedara_core.merge.masked import MaskedAveraging
from fedara_core.merge.mean import Averaging, Exchange
from fedara_core.state import ServerState


def open_exchange(job: Job, state: ServerState, communicator: Communicator) -> Exchange:
    """The exchange of one round, for uploads of clients that downloaded `state`."""
    reference = reference_of(job, state)
    path = merge_path(job, communicator)
    if job.method.combine == "gather":
        return Gathering(communicator, reference)
    if job.method.combine == "masked":
        sent_bits = partial(job.method.sent_bits, state)
        row_weight = partial(job.method.row_weight, state)
        return MaskedAveraging(communicator, path, state.index, sent_bits, row_weight)
    return Averaging(communicator, path, reference)


def merge_path(job: Job, communicator: Communicator) -> str:
    """The merge path of this run: for auto the cheaper of those that keep the bits."""
    wanted = job.config.federation.merge_path
    if wanted != "auto":
        return wanted
    if job.method.combine == "gather":
        return "allgather"
    # Clients' rows are alike, or nearly, so that their number decides little; sums are float32.
    moved = moved_values(
        num_parts=job.config.federation.cohort,
        world_size=communicator.world_size,
        part_values=payload_bytes(job.config.codec.up, ROW_VALUES) / (4 * ROW_VALUES),
        union_values=1,
        layout_values=1,
    )
    return cheapest(moved)
