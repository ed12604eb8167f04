"""What every method owes: these tests take in a new file of fedara_core/methods without an edit."""

import ast
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bench
from bench.config.load import load_runs
from bench.run import clients
from bench.run.checkpoint import find_checkpoint, restore, save_checkpoint
from bench.run.clients import draw_cohort, make_client, place, train_client
from bench.run.job import Job
from bench.tools.estimate import round_bytes
from fedara_core import methods
from fedara_core.comm.base import Communicator
from fedara_core.errors import InputError
from fedara_core.merge.cost import SAME_BITS
from fedara_core.method import Method, load_method, method_names
from fedara_core.state import ServerState
from fedara_core.wire import Upload, make_upload, pack, unpack
from support.in_turn import in_turn
from support.launch import TINY
from support.rounds import Round, make_tiny_job, play_rounds, received, train_one_client

# 4 clients on 3 processes: one of them has two.
SETTINGS = ("train.local_steps=2", "federation.cohort=4", "evaluate.every=100")
NUM_ROUNDS = 6
# The program's own name, the method that is measured if none is named, and texts of full length.
ALLOWED_NAMES = {
    **{"cli.py": {"fedara"}, "cache.py": {"fedara"}},
    **{"overhead.py": {"lora"}, "prepare.py": {"lora"}},
    **{"commands.py": {"lora", "full"}, "step.py": {"full"}},
}
HEAD = {"classifier.bias", "classifier.weight"}


@dataclass(frozen=True)
class Complete:
    """A whole run twice: by hand with every upload kept, and through bench.run.rounds."""

    name: str
    states: list[ServerState]  # before each round by hand, and the last
    uploads: list[list[Upload]]  # of each round, not packed
    job: Job  # the second run's
    frozen: dict[str, Tensor]  # its frozen weights before training
    rounds: list[Round]
    kept: list[dict[int, dict[str, Tensor]]]  # what clients keep, before each round and at the end


@pytest.fixture(scope="module", params=method_names())
def complete(request: pytest.FixtureRequest) -> Complete:
    overrides = (f"method.name={request.param}", *SETTINGS)
    job = make_tiny_job(*overrides)
    states, uploads, kept = [job.state], [], [{}]
    for round_index in range(NUM_ROUNDS):
        cohort = draw_cohort(job, round_index)
        uploads.append([train_one_client(job, states[-1], client_id) for client_id in cohort])
        mean = received(job.method, states[-1], uploads[-1])
        states.append(job.method.aggregate(states[-1], mean))
        kept.append(dict(job.client_state))
    again = make_tiny_job(*overrides)
    frozen = {k: t.clone() for k, t in _frozen(again).items()}
    return Complete(request.param, states, uploads, again, frozen, play_rounds(again), kept)


def test_names_its_class() -> None:
    assert {"fedara", "lora", "slora", "head_only"} <= set(method_names())
    assert all(issubclass(load_method(name), Method) for name in method_names())


def test_a_method_is_named_in_its_own_file_only() -> None:
    """No import of another method, and no string that is a method's name, in the suite's code."""
    names, package = set(method_names()), Path(methods.__file__).parent
    for path in [*package.parent.rglob("*.py"), *Path(bench.__file__).parent.rglob("*.py")]:
        others = names - {path.stem if path.parent == package else ""}
        others -= ALLOWED_NAMES.get(path.name, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant):
                assert node.value not in others, f"{path}:{node.lineno}"
            if isinstance(node, ast.ImportFrom | ast.Import):
                imported = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
                found = {name.rpartition(".")[2] for name in imported} & others
                assert not found, f"{path}:{node.lineno}"


def test_two_fresh_runs_give_the_same_bits(complete: Complete) -> None:
    digests = [state.digest() for state in complete.states[1:]]
    assert digests == [played.row["state_digest"] for played in complete.rounds]
    assert len({complete.states[0].digest(), *digests}) == NUM_ROUNDS + 1  # every round moves it


def test_another_seed_gives_other_bits(complete: Complete) -> None:
    (other,) = play_rounds(
        make_tiny_job(f"method.name={complete.name}", *SETTINGS, "seed=1"), num_rounds=1
    )
    assert other.before.digest() != complete.states[0].digest()
    assert other.after.digest() != complete.states[1].digest()


def test_uploads_survive_packing(complete: Complete) -> None:
    for sent in complete.uploads:
        packed = pack(sent)
        received = unpack(packed)
        assert packed.dtype == torch.uint8
        assert len(received) == len(sent)
        for ours, theirs in zip(sent, received, strict=True):
            assert theirs.client_id == ours.client_id
            assert theirs.num_examples == ours.num_examples
            assert theirs.header.train_loss == np.float32(ours.header.train_loss)
            assert ours.values.dtype == theirs.values.dtype == torch.float32
            assert torch.equal(_bits(theirs.values), _bits(ours.values))
            assert torch.equal(theirs.bits, ours.bits)


def test_uplink_bytes_are_the_packed_uploads(complete: Complete) -> None:
    for sent, played in zip(complete.uploads, complete.rounds, strict=True):
        assert [upload.header.num_bytes for upload in sent] == [
            len(pack([upload])) for upload in sent
        ]
        assert played.row["cohort"] == [upload.client_id for upload in sent]
        assert played.row["uplink_bytes"] == len(pack(sent))


def test_bytes_of_the_first_round_are_known_before_training(complete: Complete) -> None:
    """Exactly, unless each client chooses rows, which may be wider or narrower."""
    row = complete.rounds[0].row
    up, down = round_bytes(complete.job.config)
    tolerance = 0.2 if complete.job.method.own_rows else 0.0
    assert up == pytest.approx(row["uplink_bytes"], rel=tolerance)
    assert down == row["downlink_bytes"]


def test_downlink_bytes_are_what_download_says_under_the_codec(complete: Complete) -> None:
    """Of each client of the cohort; nothing that the seed gives, and later not less than what
    trains whole."""
    job = complete.job
    for played, kept in zip(complete.rounds, complete.kept, strict=False):
        job.client_state.clear()
        job.client_state.update(kept)
        state = played.before
        sizes = [
            job.method.download(job.model, state, make_client(job, client_id))
            for client_id in played.row["cohort"]
        ]
        by_client = [
            len(pack([_message(size.num_values + size.num_exact, size.num_bits)])) for size in sizes
        ]
        costs = sorted(played.row["clients"], key=lambda cost: cost.client_id)
        assert [cost.downlink_bytes for cost in costs] == by_client
        assert played.row["downlink_bytes"] == sum(by_client)
        if state.is_start:
            assert all(size.num_values == size.num_bits == 0 for size in sizes)
            continue
        num_whole = state.index.num_sent - state.index.num_row_values
        assert all(size.num_values >= num_whole for size in sizes)
        if type(job.method).downlink is Method.downlink and not job.method.uses_client_lora_ranks:
            assert {size.num_values for size in sizes} == {state.index.num_sent}


def test_the_model_holds_what_the_state_says(complete: Complete) -> None:
    """After a download for evaluation the vector is the state's, bit by bit."""
    for state in complete.states:
        complete.job.method.download(complete.job.model, state, None)
        assert torch.equal(_bits(complete.job.model.vector), _bits(state.vector))
        assert state.index.size == len(state.vector)
        assert state.num_live == sum(int(mask.sum()) for mask in state.rank_masks.values())


def test_aggregate_is_pure(complete: Complete) -> None:
    for state, sent in zip(complete.states, complete.uploads, strict=False):
        state_before, sent_before = state.digest(), pack(sent)
        first = complete.job.method.aggregate(state, received(complete.job.method, state, sent))
        second = complete.job.method.aggregate(state, received(complete.job.method, state, sent))
        assert first.digest() == second.digest()
        assert first.round_index == second.round_index == state.round_index + 1
        assert state.digest() == state_before
        assert torch.equal(pack(sent), sent_before)


@pytest.mark.parametrize("path", SAME_BITS)
def test_sums_on_the_way_give_the_same_bits(complete: Complete, path: str) -> None:
    """A method whose `aggregate` needs every upload, and does not say so, fails here at once."""
    method = complete.job.method
    if method.combine == "gather":
        return
    for state, sent in zip(complete.states, complete.uploads, strict=False):
        expected = method.aggregate(state, received(method, state, sent))
        summed = received(method, state, sent, path=path)
        mean = summed.mean.clone()
        assert method.aggregate(state, summed).digest() == expected.digest()
        assert torch.equal(summed.mean, mean)


@pytest.mark.parametrize("path", ["split", "allreduce"])
def test_a_run_takes_every_merge_path(complete: Complete, path: str) -> None:
    """split keeps the bits; allreduce sums in another order."""
    if complete.job.method.combine == "gather":
        return
    words = (f"method.name={complete.name}", *SETTINGS, f"federation.merge_path={path}")
    jobs = [make_tiny_job(*words) for _ in range(3)]
    state, kept = complete.states[3], complete.kept[3]

    def run(communicator: Communicator) -> tuple[ServerState, dict[str, Any]]:
        job = jobs[communicator.world_rank]
        job.client_state.update(kept)
        (played,) = play_rounds(job, state, 1, communicator)
        return played.after, played.row

    for after, row in in_turn(3, run):
        assert row["merge_path"] == path
        assert row["uplink_bytes"] == complete.rounds[3].row["uplink_bytes"]
        if path == "split":
            assert row["state_digest"] == complete.rounds[3].row["state_digest"]
        assert after.live_triplets == complete.states[4].live_triplets
        torch.testing.assert_close(after.vector, complete.states[4].vector, rtol=1e-5, atol=1e-6)


def test_the_base_weights_stay_frozen(complete: Complete) -> None:
    after = _frozen(complete.job)
    base = {f"{name}.base.weight" for name in complete.job.model.adapters}
    assert base <= set(after) | set(complete.states[0].whole)
    assert after.keys() == complete.frozen.keys()
    for name, tensor in complete.frozen.items():
        assert torch.equal(tensor, after[name]), name


def test_the_head_is_in_every_upload(complete: Complete) -> None:
    for state, sent in zip(complete.states, complete.uploads, strict=False):
        assert set(state.whole) >= HEAD
        num_whole = sum(tensor.numel() for tensor in state.whole.values())
        assert all(upload.values.numel() >= num_whole for upload in sent)


def test_the_head_is_averaged_by_num_examples(complete: Complete) -> None:
    state = complete.states[0]
    first, second = complete.uploads[0][:2]
    assert first.num_examples != second.num_examples
    both = received(complete.job.method, state, [first, second])
    whole = complete.job.method.aggregate(state, both).whole
    share = first.num_examples / (first.num_examples + second.num_examples)
    behind = 0  # in round 0 the whole parameters, in name order, end an upload
    for name in sorted(whole, reverse=True):
        count = whole[name].numel()
        a, b = (u.values[len(u.values) - behind - count :][:count] for u in (first, second))
        behind += count
        if name in HEAD:
            assert not torch.equal(a, b)
            mean = share * a.double() + (1 - share) * b.double()
            torch.testing.assert_close(whole[name].reshape(-1).double(), mean, rtol=0, atol=1e-7)


def test_a_server_optimizer_acts_on_plain_means_only(complete: Complete) -> None:
    """There the mean is the next state, in one layout for good; elsewhere the config is refused."""
    words = [f"method.name={complete.name}", "federation.server_optimizer=fedadam"]
    if not complete.job.method.plain_mean:
        with pytest.raises(InputError, match=r"^federation.server_optimizer = 'fedadam' .* = 1$"):
            load_runs(TINY, words)
        return
    assert load_runs(TINY, words)[0].federation.server_lr == 0.01
    first = complete.states[0]
    for before, after, sent in zip(
        complete.states, complete.states[1:], complete.uploads, strict=False
    ):
        mean = received(complete.job.method, before, sent).mean
        assert torch.equal(_bits(after.sent), _bits(mean))
        assert (after.index, after.extra) == (first.index, {})
        assert complete.job.method.form(after) == complete.job.method.form(first)
        assert after.fixed.keys() == first.fixed.keys()
        for part, tensors in after.fixed.items():
            for name, tensor in tensors.items():
                assert torch.equal(tensor, first.fixed[part][name])


def test_adapter_dropout_acts_on_low_rank_branches_in_training_only(complete: Complete) -> None:
    """In the form that a run ends with; where no layer has such a branch, the config is refused."""
    model, words = complete.job.model, (f"method.name={complete.name}", "adapter.dropout=0.5")
    if not complete.job.method.low_rank:
        with pytest.raises(InputError, match=r"^adapter.dropout = 0.5 .* allowed: 0$"):
            load_runs(TINY, list(words))
        return
    assert make_tiny_job(*words).model.adapters.popitem()[1].dropout.p == 0.5
    complete.job.method.download(model, complete.states[-1], None)
    live = [adapter for adapter in model.adapters.values() if adapter.num_live]
    assert live
    model.vector.normal_(0, 0.3)  # no part is zero, as B is where clients keep theirs
    for adapter in live:
        x = torch.randn(4, adapter.shape[1])
        adapter.dropout.p = 0.5
        assert not torch.equal(adapter.train()(x), adapter.train()(x)), adapter.name
        assert torch.equal(adapter.eval()(x), adapter.eval()(x)), adapter.name
        adapter.dropout.p = 0.0
        torch.testing.assert_close(adapter.train()(x), adapter.eval()(x))


@pytest.mark.slow
def test_it_learns(complete: Complete) -> None:
    settings = ("partition.scheme=iid", "train.local_steps=10", "evaluate.every=100")
    # Methods differ by much in the learning rate that suits them.
    for lr in (2e-2, 2e-3):
        job = make_tiny_job(f"method.name={complete.name}", *settings, f"train.lr={lr}")
        rounds = play_rounds(job)
        losses = [played.row["train_loss"] for played in rounds]
        learnt = losses[-1] < 0.85 * losses[0] and rounds[-1].row["accuracy"] > 0.55
        if learnt:  # chance is 0.25
            break
    assert learnt, (losses, rounds[-1].row["accuracy"])
    first, last = _rows(rounds[0].before), _rows(rounds[-1].after)
    still = [name for name in last if torch.equal(first[name], last[name])]
    # Clients that choose rows may all leave out an adapter.
    assert len(still) < len(last) / 2 if job.method.combine == "masked" else not still


def test_a_run_resumes_with_the_same_bits(complete: Complete, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, complete.states[3], complete.kept[3], {})
    job = make_tiny_job(f"method.name={complete.name}", *SETTINGS)
    found = find_checkpoint(tmp_path)
    assert found is not None
    resumed, kept = restore(job.state, found.data, {})
    job.client_state.update(kept)
    assert resumed.round_index == 3
    assert resumed.digest() == complete.states[3].digest()
    rest = play_rounds(job, resumed)
    assert [p.row["state_digest"] for p in rest] == [
        p.row["state_digest"] for p in complete.rounds[3:]
    ]
    assert [p.row["uplink_bytes"] for p in rest] == [
        p.row["uplink_bytes"] for p in complete.rounds[3:]
    ]


@pytest.mark.parametrize(
    "world_size",
    [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)],
)
def test_the_number_of_processes_changes_nothing(
    complete: Complete, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process has a model of its own and its own clients; 7 processes leave some idle."""
    overrides = (f"method.name={complete.name}", *SETTINGS)
    trained: dict[int, list[int]] = {}

    def noting(job: Job, state: ServerState, client_id: int, *rest: Any) -> Any:
        trained.setdefault(threading.get_ident(), []).append(client_id)
        return train_client(job, state, client_id, *rest)

    monkeypatch.setattr(clients, "train_client", noting)
    jobs = [make_tiny_job(*overrides) for _ in range(world_size)]
    for round_index in (0, 3):
        state = complete.states[round_index]

        def run(
            communicator: Communicator,
            state: ServerState = state,
            kept: dict[int, dict[str, Tensor]] = complete.kept[round_index],
        ) -> tuple[Any, list[int]]:
            job = jobs[communicator.world_rank]
            job.client_state.clear()
            job.client_state.update(kept)
            (played,) = play_rounds(job, state, 1, communicator)
            return played.row, trained.pop(threading.get_ident(), [])

        rows, client_ids = zip(*in_turn(world_size, run), strict=True)
        assert list(client_ids) == place(
            complete.job, draw_cohort(complete.job, round_index), world_size
        )
        for row in rows:
            assert row["state_digest"] == complete.states[round_index + 1].digest()
            assert row["uplink_bytes"] == complete.rounds[round_index].row["uplink_bytes"]


def _message(num_values: int, num_bits: int) -> Upload:
    """A message of this size."""
    bits = torch.zeros(num_bits, dtype=torch.bool)
    values = torch.zeros(num_values)
    return make_upload(client_id=0, num_examples=0, train_loss=0.0, values=values, bits=bits)


def _rows(state: ServerState) -> dict[str, Tensor]:
    """All values of each live adapter."""
    names = {
        name: [own[name] for own in state.parts.values()]
        for name in state.live_triplets
        if state.live_triplets[name]
    }
    return {name: torch.cat([rows.flatten() for rows in own]) for name, own in names.items()}


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)


def _frozen(job: Job) -> dict[str, Tensor]:
    """What does not train: the base weights and the buffers."""
    weights = {
        name: parameter.detach()
        for name, parameter in job.model.module.named_parameters()
        if not parameter.requires_grad and ".parts." not in name
    }
    return weights | dict(job.model.module.named_buffers())
