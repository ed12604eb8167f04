"""Merge paths on several process counts (merge_check.py), the cost model, wrong input."""

import pytest
import torch

from bench.run.exchange import merge_path
from fedara_core.comm.base import Communicator
from fedara_core.merge.cost import PATHS, SAME_BITS, cheapest, moved_values
from fedara_core.merge.masked import masked_sum
from fedara_core.merge.mean import Averaging
from fedara_core.merge.received import Received
from fedara_core.wire import Upload, make_upload
from support.comm_check import CASES
from support.launch import checked
from support.merge_check import make_uploads, masked_upload
from support.rounds import make_tiny_job

pytestmark = pytest.mark.xdist_group("jobs")

MORE_JOBS = [("mpi", 3), ("mpi", 4), ("torch", 3)]
JOBS = [
    *(("plain", 1), ("mpi", 2), ("torch", 2)),
    *(pytest.param(*job, marks=pytest.mark.slow) for job in MORE_JOBS),
]


@pytest.mark.parametrize(("launcher", "world_size"), JOBS)
def test_all_paths_give_the_same_sum(launcher: str, world_size: int) -> None:
    """On MPI also with --comm mpi-node, and with two processes a host."""
    job = checked(launcher, world_size)
    assert job.code == 0, job.err
    cases = CASES["serial" if launcher == "plain" else launcher]
    assert job.out.splitlines().count("OK merge paths") == world_size * len(cases), job.out


def test_the_cases_are_worth_summing() -> None:
    uploads, widths = make_uploads("half")
    masks = torch.stack([upload.bits for upload in uploads])
    assert masks.any()
    assert not masks.all(dim=0).any()  # no row that every client has
    assert not masks.any(dim=1).all()  # a client without rows
    assert not masks.any(dim=0).all()  # rows that nobody has
    assert len({upload.values.numel() for upload in uploads}) > 3
    assert len(widths.unique()) > 10


def test_moved_values_by_hand() -> None:
    """4 processes with 2 clients each of 100 values; union 250, layout 1000."""
    sizes = {"part_values": 100, "union_values": 250, "layout_values": 1000}
    moved = moved_values(num_parts=8, world_size=4, **sizes)
    assert moved == {"allgather": 600, "split": 337.5, "allreduce": 375, "dense": 1500}
    assert set(moved) == set(PATHS)
    assert cheapest(moved) == "split"


@pytest.mark.parametrize(
    ("num_parts", "world_size", "union_values", "path"),
    [
        (1, 1, 100, "allgather"),  # nothing moves on one process
        (2, 2, 100, "allgather"),  # one client each, equal masks: all three move the same
        (3, 3, 100, "split"),  # (P-1) k against 2 (P-1)/P k
        (3, 3, 300, "allgather"),  # masks that do not overlap: every value is needed anyway
        (8, 4, 100, "split"),  # two clients a process; allreduce moves less, but not the same bits
    ],
)
def test_the_cheapest_path(num_parts: int, world_size: int, union_values: int, path: str) -> None:
    moved = moved_values(
        num_parts=num_parts,
        world_size=world_size,
        part_values=100,
        union_values=union_values,
        layout_values=1000,
    )
    assert cheapest(moved) == path


class TwoProcesses(Communicator):
    world_size = 2


@pytest.mark.parametrize(
    ("codec", "chosen"), [("fp32", "split"), ("bf16", "split"), ("int8", "allgather")]
)
def test_auto_counts_coded_bytes(codec: str, chosen: str) -> None:
    """Five clients' rows on two processes; the sums of split travel as float32 in any case."""
    job = make_tiny_job("federation.merge_path=auto", f"codec.up={codec}")
    assert job.config.federation.cohort == 5
    assert merge_path(job, TwoProcesses()) == chosen


def test_uploads_of_unequal_length_have_no_mean() -> None:
    uploads = [upload(4, 2), upload(9, 300)]
    for path in PATHS:
        mean = Averaging(Communicator(), path)
        for one in uploads:
            mean.add(one)
        with pytest.raises(ValueError, match=r"differ in length.*\{4: 2, 9: 300\}"):
            mean.exchange()
    with pytest.raises(ValueError, match=r"differ in length.*\{4: 2, 9: 300\}"):
        _ = Received.of(uploads).mean


def test_uploads_that_were_summed_on_the_way_can_not_be_asked_for() -> None:
    exchange = Averaging(Communicator(), "allgather")
    exchange.add(upload(4, 2))
    exchange.exchange()
    received = exchange.result()
    assert received is not None
    assert received.client_ids == [4]
    with pytest.raises(RuntimeError, match='must say combine = "gather"'):
        _ = received.uploads


def test_nobody_sends_anything() -> None:
    exchange = Averaging(Communicator(), "split")
    exchange.exchange()
    assert exchange.result() is None


@pytest.mark.parametrize("path", SAME_BITS)
def test_uploads_out_of_order_are_a_mistake(path: str) -> None:
    """The others would give them each other's weights."""
    mean = Averaging(Communicator(), path)
    mean.add(upload(9, 3))
    with pytest.raises(AssertionError):
        mean.add(upload(4, 3))


def upload(client_id: int, num_values: int) -> Upload:
    return make_upload(
        client_id=client_id, num_examples=1, train_loss=0.0, values=torch.zeros(num_values)
    )


def test_wrong_input_is_named() -> None:
    part = masked_upload(3, 1, torch.tensor([True]), torch.zeros(4))
    with pytest.raises(ValueError, match="merge path 'ring' is unknown; allowed: allgather"):
        masked_sum([part], torch.tensor([4]), Communicator(), "ring")
    with pytest.raises(ValueError, match="client 3: 4 values, and a rank_mask for 5"):
        masked_sum([part], torch.tensor([5]), Communicator(), "allgather")
    with pytest.raises(ValueError, match="client 3: a rank_mask of 1 rows, not 2"):
        masked_sum([part], torch.tensor([4, 1]), Communicator(), "allgather")
