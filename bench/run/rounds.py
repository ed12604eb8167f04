"""THE round loop: one straight line from a config to records."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from bench.metering.codecarbon import HostEnergy, add_hosts, no_energy
from bench.metering.memory import proportional_bytes
from bench.metering.meter import Meter
from bench.run import checkpoint
from bench.run.arrivals import Arrivals
from bench.run.clients import chunks, draw_cohort, drop_client, place, train_chunk
from bench.run.evaluate import evaluate_round
from bench.run.exchange import merge_path, open_exchange
from bench.run.job import ClientState, Job
from bench.run.record import Recorder
from bench.run.resume import Notice, gather_client_state, resume_or_start, storing
from bench.run.round_record import Row, live_facts, reduce_row, traffic_since, upload_facts
from bench.run.stop import Asked
from fedara_core.comm.base import Communicator
from fedara_core.errors import Diverged, Interrupted
from fedara_core.merge.received import Received
from fedara_core.state import ServerState

Report = Callable[[dict[str, Any]], None]


def advance(
    job: Job, state: ServerState, communicator: Communicator, meter: Meter
) -> tuple[ServerState, Row]:
    """Download, local training, upload, exchange, aggregate; without looking at the result."""
    world_rank, world_size = communicator.world_rank, communicator.world_size
    with meter.phase("download"):
        cohort = draw_cohort(job, state.round_index)
        arrivals = Arrivals(job.fleet, cohort, state.round_index)
        sent, residual = job.compression.send_down(state)
        exchange = open_exchange(job, sent, communicator)
        before = replace(communicator.traffic)
        dropped = place(job, arrivals.dropped, world_size)[world_rank]
        costs = [drop_client(job, sent, client_id) for client_id in dropped]
    for chunk in chunks(job, sent, arrivals.sending, world_size):
        costs += train_chunk(job, sent, chunk, arrivals, exchange, communicator, meter)
        with meter.phase("wait"):
            communicator.barrier()
        with meter.phase("exchange"):
            exchange.exchange()
    with meter.phase("exchange"):
        received = exchange.result()
    with meter.phase("aggregate"):
        check_received(received, arrivals.arrived, state.round_index)
        if received is None:  # nobody arrives
            next_state = job.method.skip(state)
        else:
            next_state = job.method.aggregate(sent, received)
            next_state = job.config.server.step(sent, next_state)
            next_state = job.compression.with_residual(next_state, residual)
        row = {
            "round_index": state.round_index,
            "cohort": cohort,
            "merge_path": merge_path(job, communicator),
            **upload_facts(received),
            "downlink_bytes": sum(cost.downlink_bytes for cost in costs),
            **traffic_since(before, communicator.traffic),
            **live_facts(next_state),
            **arrivals.record(costs),
            "clients": costs,
        }
    return next_state, row


def one_round(
    job: Job, state: ServerState, communicator: Communicator, meter: Meter
) -> tuple[ServerState, Row]:
    """One federated round: the next state, and this process's part of the round's record."""
    next_state, row = advance(job, state, communicator, meter)
    with meter.phase("aggregate"):
        row["state_digest"] = next_state.digest()
    with meter.phase("evaluate"):
        row |= evaluate_round(job, next_state, communicator)
    if not np.isfinite(row.get("test_loss", 0.0)):  # the same on every process
        raise _diverged(f"round {state.round_index}", f"test loss {row['test_loss']}")
    return next_state, row


def run(
    job: Job,
    communicator: Communicator,
    recorder: Recorder,
    report: Report = lambda row: None,
    energy: HostEnergy | None = None,
    asked: Asked | None = None,
    notice: Notice = lambda text: None,
) -> ServerState:
    """Run every round that is not yet on disk; records and checkpoints as it goes.

    Returns the last state. `report` gets each round's record and `notice` what else there is to
    say, on world_rank 0. Without `energy` none is measured. Raises Diverged if a loss stops being
    finite (the run then stays incomplete), Interrupted after the round in which a process was
    `asked` to end, InputError if the checkpoint on disk is damaged or of another run, and JobError
    where the disk takes no more.
    """
    energy, asked = energy or no_energy("not asked for"), asked or Asked()
    state, client_state = resume_or_start(job, communicator, recorder, energy, notice)
    first_round_index = state.round_index
    energy.run.start()
    communicator.barrier()  # so that nobody's round 0 waits for a sampler to start
    interrupted = None
    try:
        state = _rounds(job, state, client_state, communicator, recorder, report, energy, asked)
    except Interrupted as error:
        interrupted = error
    except BaseException:
        # The others may be gone, so that only what one process knows can still be recorded.
        part = energy.run.stop()
        if communicator.world_rank == 0 and energy.num_hosts == 1:
            with suppress(OSError):  # a full disk is said already
                recorder.end_part(first_round_index, part)
        raise
    part, facts = _ending(energy, communicator)
    if communicator.world_rank == 0:
        with storing(recorder, state.round_index):
            recorder.end_part(first_round_index, part)
            if interrupted is None:
                recorder.finish(facts)
    communicator.barrier()
    if interrupted is not None:
        raise interrupted
    return state


def _rounds(
    job: Job,
    state: ServerState,
    client_state: ClientState,
    communicator: Communicator,
    recorder: Recorder,
    report: Report,
    energy: HostEnergy,
    asked: Asked,
) -> ServerState:
    """The rounds from `state` on. What follows a round counts in the next round's record."""
    belongs_to = job.belongs_to
    meter = Meter(job.device, counters=energy.counters, idle_watts=energy.idle_watts)
    while state.round_index < state.num_rounds:
        state, row = one_round(job, state, communicator, meter)
        with meter.phase("wait"):
            communicator.barrier()
        measured = meter.take()
        with meter.phase("meter"):
            row = reduce_row(job, row, measured, communicator)
            signal_name = asked.agree(communicator)
        with meter.phase("checkpoint"):
            client_state |= gather_client_state(job, row["cohort"], communicator)
            last = state.round_index == state.num_rounds
            due = last or signal_name or state.round_index % job.config.system.checkpoint_every == 0
            if communicator.world_rank == 0:
                with storing(recorder, state.round_index - 1):
                    recorder.add_round(row)
                    if due:
                        run_dir = recorder.run_dir
                        checkpoint.save_checkpoint(run_dir, state, client_state, belongs_to)
                report(row)
        if signal_name and not last:
            raise Interrupted(
                f"interrupted after round {state.round_index} of {state.num_rounds} by "
                f"{signal_name}; start again to resume"
            )
    return state


def check_received(received: Received | None, arrived: list[int], round_index: int) -> None:
    """Every client that arrived has sent one upload of finite numbers, and nobody else has.

    Every process sees the same headers, so that all of them stop at the same place.
    """
    headers = () if received is None else received.headers
    found = [header.client_id for header in headers]
    missing = sorted(set(arrived) - set(found))
    if missing:
        raise RuntimeError(f"round {round_index}: no upload came from clients {missing}")
    if found != list(arrived):
        raise RuntimeError(f"round {round_index}: uploads of {found} came, not of {arrived}")
    for header in headers:
        if not (header.finite and np.isfinite(header.train_loss)):
            where = f"client {header.client_id}, round {round_index}"
            raise _diverged(where, f"loss {header.train_loss}")


def _diverged(where: str, what: str) -> Diverged:
    return Diverged(
        f"{where}: training diverged ({what}); the run stays incomplete; allowed: finite losses "
        "(try a smaller train.lr)"
    )


def _ending(
    energy: HostEnergy, communicator: Communicator
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What codecarbon says of all hosts, and the keys of run.json that only the end knows."""
    run = energy.run
    mine = [run.stop(), run.samples, run.missing, proportional_bytes()]
    results, samples, reasons, shares = zip(*communicator.gather_json(mine), strict=True)
    hosts = [result for result, sampled in zip(results, samples, strict=True) if sampled]
    total = add_hosts(hosts) if hosts else {}
    facts: dict[str, Any] = {} if None in shares else {"pss_bytes_by_process": shares}
    if not total:
        sources = dict.fromkeys(str(host.get("energy_source")) for host in hosts)
        unlike = f"hosts differ in their source: {', '.join(sources)}"
        facts["energy_missing"] = next(filter(None, reasons), unlike)
    return total, facts
