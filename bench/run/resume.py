"""Where a run starts: from its last checkpoint, or anew; the same on every process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bench.metering.client_cost import profiles
from bench.metering.codecarbon import HostEnergy
from bench.run import checkpoint
from bench.run.clients import home
from bench.run.identity import require_same
from bench.run.job import ClientState, Job
from bench.run.provenance import library_fact, process_facts, provenance
from bench.run.record import Recorder
from fedara_core import shapes
from fedara_core.comm.base import Communicator
from fedara_core.comm.launch import together
from fedara_core.errors import InputError, JobError
from fedara_core.schema import RUN_FILE, rounds_fault
from fedara_core.state import ServerState

Notice = Callable[[str], None]


def resume_or_start(
    job: Job,
    communicator: Communicator,
    recorder: Recorder,
    energy: HostEnergy,
    notice: Notice,
) -> tuple[ServerState, ClientState]:
    """The state to resume from and what clients keep, and the run's files on disk.

    world_rank 0 reads for all, and what it can not read ends them all. Raises JobError where the
    disk takes no more.
    """
    facts = process_facts(communicator.world_rank, job.device)
    facts["prepare_seconds"] = round(job.prepare_seconds, 6)
    if energy.idle_watts:
        facts["idle_watts"] = {k: round(watts, 3) for k, watts in energy.idle_watts.items()}
    processes = communicator.gather_json(facts)
    belongs_to = job.belongs_to
    require_same(belongs_to | job.computes, communicator)
    # Where nothing is saved, all start from world_rank 0's state: an SVD of the same weights need
    # not give the same bits on another machine.

    def read() -> bytes:
        if communicator.world_rank != 0:
            return b""
        found = checkpoint.find_checkpoint(recorder.run_dir)
        if found is None:
            return checkpoint.dump(job.state, {}, belongs_to)
        if found.notice:
            notice(f"{found.notice}; resuming from the one before, after round {found.round_index}")
        return found.data

    data = communicator.broadcast(together(communicator, read))
    # Together: hosts may differ in their data, and one that gave up alone would hang the others.
    state, client_state = together(
        communicator, lambda: checkpoint.restore(job.state, data, belongs_to)
    )
    rows = together(communicator, lambda: _earlier_rounds(recorder, state, communicator))
    job.client_state.clear()
    for client_id, tensors in client_state.items():
        if home(client_id, communicator.world_size) == communicator.world_rank:
            job.client_state[client_id] = tensors
    if communicator.world_rank == 0:
        run_facts = provenance(
            job.config,
            **job.digests,
            labels=list(job.labels),
            **job.computes,
            comm=communicator.kind,
            **library_fact(communicator.kind, communicator.library),
            world_size=communicator.world_size,
            processes=processes,
            prepare_seconds=max(process["prepare_seconds"] for process in processes),
            device_profiles=profiles(job.devices) or None,
            num_parameters=sum(p.numel() for p in job.model.module.parameters()),
            num_adapter_parameters=_num_adapter_parameters(job.state),
        )
        with storing(recorder, state.round_index):
            recorder.start(run_facts, job.partition_summary, rows)
    return state, client_state


def _earlier_rounds(
    recorder: Recorder, state: ServerState, communicator: Communicator
) -> list[dict[str, Any]]:
    """On world_rank 0 the records of the rounds before `state`; nothing elsewhere. Raises
    InputError unless all of them are there."""
    if communicator.world_rank != 0 or state.round_index == 0:
        return []
    run = recorder.run()  # which the resumed run goes on with
    place = str(recorder.run_dir / RUN_FILE)
    shapes.require_keys(run, ["config.method.name", "config_hash"], place)
    rows = [row for row in recorder.rounds() if row["round_index"] < state.round_index]
    fault = rounds_fault([row["round_index"] for row in rows], state.round_index)
    if fault:
        raise InputError(
            f"{recorder.run_dir}: the checkpoint is of round {state.round_index}, but {fault}; "
            f"allowed: both as they were, or none (delete the folder to start over)"
        )
    return rows


def _num_adapter_parameters(state: ServerState) -> int:
    """Values in the adapters' rows before round 0, frozen ones too."""
    return sum(rows.numel() for part in state.parts.values() for rows in part.values())


def gather_client_state(job: Job, cohort: Sequence[int], communicator: Communicator) -> ClientState:
    """On world_rank 0 what the round's clients keep, for the checkpoint; nothing elsewhere."""
    if not job.keeps_client_state:
        return {}
    mine = {c: job.client_state[c] for c in cohort if c in job.client_state}
    gathered = communicator.gather_bytes(checkpoint.dump_client_state(mine))
    client_state: ClientState = {}
    for part in gathered if communicator.world_rank == 0 else ():
        client_state |= checkpoint.load_client_state(part)
    return client_state


@contextmanager
def storing(recorder: Recorder, num_rounds: int) -> Iterator[None]:
    """Say in one line what the disk refused, and how many rounds are safe."""
    try:
        yield
    except OSError as error:
        raise JobError(
            f"{recorder.run_dir}: {error.strerror}; rounds 1 to {num_rounds} are on disk; make "
            "room there and start again to resume"
        ) from error
