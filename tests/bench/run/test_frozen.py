"""Frozen weights: one copy of each host, and what a process changes is its own."""

from pathlib import Path

import torch
from torch import nn

from bench.run import frozen
from bench.run.frozen import share_frozen
from fedara_core.comm.base import Communicator
from support.in_turn import in_turn

NUM_ROWS = frozen._LEAST_BYTES // 4 // 1000 // 16 * 16 + 16  # whole lines of a cache


def model() -> nn.Module:
    """Two layers, of which the second trains."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(1000, NUM_ROWS), nn.Linear(10, 10))
    layers[0].requires_grad_(False)
    return layers


def share(world_size: int, *, one_host: bool) -> list[nn.Module]:
    """The models of all processes, after they have shared."""

    def run(communicator: Communicator) -> nn.Module:
        if one_host:
            communicator.host_rank, communicator.host_size = communicator.world_rank, world_size
            communicator.host_of = (0,) * world_size
        own = model()
        share_frozen(own, communicator)
        return own

    return in_turn(world_size, run)


def mapped(parameter: nn.Parameter) -> bool:
    return frozen._lies_in(parameter, frozen._mapped_files())


def test_processes_of_a_host_map_what_does_not_train() -> None:
    expected = model().state_dict()
    for found in share(3, one_host=True):
        assert [mapped(p) for p in found.parameters()] == [True, True, False, False]
        assert all(torch.equal(t, expected[name]) for name, t in found.state_dict().items())
        # As torch's own: products of one row could have other bits elsewhere.
        assert {p.data_ptr() % 64 for p in found.parameters()} == {0}


def test_what_a_process_changes_is_its_own() -> None:
    first, second = share(2, one_host=True)
    with torch.no_grad():
        first[0].weight[0] += 1
    assert torch.equal(second[0].weight, model()[0].weight)
    assert torch.equal(first[0].weight[1:], second[0].weight[1:])
    assert not torch.equal(first[0].weight[0], second[0].weight[0])


def test_a_process_alone_on_its_host_keeps_its_own() -> None:
    for found in share(2, one_host=False):
        assert not any(mapped(p) for p in found.parameters())


def test_weights_that_lie_in_a_file_are_known(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(40_000))
    of_file = torch.from_file(str(tmp_path / "x"), shared=False, size=10_000)
    assert frozen._lies_in(of_file, frozen._mapped_files())
    assert not frozen._lies_in(torch.zeros(10_000), frozen._mapped_files())
