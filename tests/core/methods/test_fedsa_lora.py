"""FedSA-LoRA: B stays at its client, A and the head are shared, and one client alone is LoRA."""

import pytest
import torch
from torch import Tensor

from bench.run.clients import draw_cohort
from bench.run.job import Job
from fedara_core.merge.received import Received
from fedara_core.method import Client
from fedara_core.values import Tensors
from fedara_core.wire import Upload
from support.rounds import make_tiny_job, play_rounds, train_one_client

# Not square, so that A and B differ in size: d_out, d_in of the four adapters; lora_rank 4.
TARGETS = "adapter.targets=['query', 'intermediate.dense']"
NUM_A = 4 * (2 * 32 + 2 * 32)
NUM_HEAD = 4 * 32 + 4
FEDSA = ("method.name=fedsa_lora", TARGETS, "adapter.lora_alpha=8.0", "train.local_steps=2")


def halves(job: Job) -> tuple[Tensors, Tensors]:
    """A (r, 32) and B^T (r, d_out) by adapter, a copy of what the model has."""
    parts = job.model.index.parts(job.model.vector.clone())
    return parts["A"], parts["B"]


def kept_b(job: Job, client_id: int) -> Tensors:
    """B^T (r, d_out) by adapter that this client keeps, one after the other in one vector."""
    (b,) = job.client_state[client_id].values()
    shapes = job.model.shapes
    pieces = b.split([4 * d_out for d_out, _ in shapes.values()])
    return {name: own.view(4, -1) for name, own in zip(shapes, pieces, strict=True)}


def assert_equal(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert torch.equal(values, theirs[name]), name


def test_b_stays_at_its_client() -> None:
    """Two rounds with the same two clients: each goes on from its own B and the mean A."""
    job = make_tiny_job(*FEDSA)
    state = job.state
    before: dict[int, tuple[Tensors, Tensors]] = {}
    for _ in range(2):
        uploads, trained = [], {}
        for client_id in (2, 5):
            client = Client(client_id=client_id, num_examples=1, model=job.model)
            client.kept = dict(job.client_state.get(client_id, {}))
            job.method.download(job.model, state, client)
            a, b = halves(job)
            assert_equal(a, state.parts["A"])
            if before:
                assert_equal(b, before[client_id][1])
            else:
                assert not any(values.any() for values in b.values())
            uploads.append(train_one_client(job, state, client_id))
            trained[client_id] = halves(job)
            for name, values in trained[client_id][1].items():
                assert not torch.equal(values, b[name])
        for client_id in (2, 5):
            assert_equal(kept_b(job, client_id), trained[client_id][1])
        ours, theirs = trained[2][1], trained[5][1]
        assert all(not torch.equal(ours[name], theirs[name]) for name in ours)
        state, before = job.method.aggregate(state, Received.of(uploads)), trained
        shares = [upload.num_examples / sum(u.num_examples for u in uploads) for upload in uploads]
        for name, values in state.parts["A"].items():
            mean = shares[0] * trained[2][0][name] + shares[1] * trained[5][0][name]
            torch.testing.assert_close(values, mean, rtol=0, atol=1e-6)


def test_no_other_b_reaches_a_client() -> None:
    """A client's upload is the same whatever the others keep; a new one starts from B = 0."""
    job = make_tiny_job(*FEDSA)
    state = play_rounds(job, num_rounds=1)[-1].after
    assert sorted(job.client_state) == draw_cohort(job, 0)
    kept = dict(job.client_state)
    old, new = draw_cohort(job, 0)[0], next(k for k in range(8) if k not in kept)
    assert not any(values.any() for values in state.parts["B"].values())

    def uploads() -> list[Upload]:
        return [train_one_client(job, state, client_id) for client_id in (old, new)]

    first = uploads()
    job.client_state.clear()
    job.client_state[old] = kept[old]
    second = uploads()
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours.values, theirs.values)
    job.client_state.clear()  # but its own B does
    assert not torch.equal(first[0].values, uploads()[0].values)


def test_one_client_alone_is_lora() -> None:
    common = (*FEDSA, "federation.num_clients=1", "federation.cohort=1", "train.lr=1e-2")
    job = make_tiny_job(*common)
    # The parts lie elsewhere in the vector, so that sums may go in another order.
    close = {"rtol": 0.0, "atol": 1e-4}
    for ours, theirs in zip(
        play_rounds(job), play_rounds(make_tiny_job(*common, "method.name=lora")), strict=True
    ):
        torch.testing.assert_close(
            dict(ours.after.parts["A"]), dict(theirs.after.parts["A"]), **close
        )
        torch.testing.assert_close(dict(ours.after.whole), dict(theirs.after.whole), **close)
        assert ours.row["train_loss"] == pytest.approx(theirs.row["train_loss"], rel=1e-5)
    torch.testing.assert_close(kept_b(job, 0), dict(theirs.after.parts["B"]), **close)
    assert ours.row["accuracy"] == theirs.row["accuracy"]


def test_each_client_is_evaluated_with_its_own_b() -> None:
    job = make_tiny_job(*FEDSA, "train.lr=0.05")
    state = play_rounds(job, num_rounds=2)[-1].after
    batch = job.evaluated.batch(torch.arange(8), job.device)

    def logits(client: Client | None) -> Tensor:
        job.method.download(job.model, state, client)
        job.model.module.eval()
        with torch.no_grad():
            return job.model.module(batch["input_ids"], batch["attention_mask"])  # type: ignore[no-any-return]

    seen = [logits(None)]  # the shared half alone: B = 0
    for client_id in sorted(job.client_state):
        client = Client(client_id=client_id, num_examples=1, model=job.model)
        client.kept = dict(job.client_state[client_id])
        seen.append(logits(client))
        assert_equal(halves(job)[1], kept_b(job, client_id))
    for i, one in enumerate(seen):
        assert all((one - other).abs().max() > 1e-3 for other in seen[:i])
    assert torch.equal(seen[0], logits(None))


def test_only_a_and_the_head_travel() -> None:
    """To new clients as to those that come back; in round 0 nothing."""
    for played in play_rounds(make_tiny_job(*FEDSA), num_rounds=3):
        size = 24 + 4 * (NUM_A + NUM_HEAD)
        assert played.row["uplink_bytes"] == 5 * size
        assert played.row["downlink_bytes"] == 5 * (size if played.row["round_index"] else 24)


def test_the_head_is_shared() -> None:
    job = make_tiny_job(*FEDSA)
    (played,) = play_rounds(job, num_rounds=1)
    assert set(played.after.whole) == {"classifier.bias", "classifier.weight"}
    for client_id in job.client_state:
        assert set(kept_b(job, client_id)) == set(job.state.rank_masks)
