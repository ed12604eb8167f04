"""raFLoRA: sums over blocks by hand, no rank collapse, FlexLoRA at equal ranks, bytes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from fedara_core.adapters import AdapterSpec, inject
from fedara_core.merge.received import Received
from fedara_core.methods.raflora import RaFLora
from fedara_core.state import ServerState, Start
from fedara_core.wire import Upload, make_upload
from support.pairs import pair, with_random_rows
from support.rounds import check_bytes_of_own_ranks, make_tiny_job, play_rounds

RAFLORA = "method.name=raflora"
UNEQUAL = "adapter.client_lora_ranks=[{lora_rank=1, share=0.5}, {lora_rank=4, share=0.5}]"


def one_adapter(client_lora_ranks: Sequence[int]) -> ServerState:
    """Adapter "a" (3 x 3), two triplets, scale 3; a head of two."""
    module = nn.ModuleDict({"a": nn.Linear(3, 3), "head": nn.Linear(1, 1)})
    model = inject(module, ["a"], ["head.weight", "head.bias"])
    adapter = AdapterSpec(
        lora_rank=2,
        lora_alpha=6.0,
        client_lora_ranks=tuple(client_lora_ranks),
        shapes=model.shapes,
    )
    start = Start(model=model, adapter=adapter, seed=0, num_rounds=4)
    return with_random_rows(RaFLora().init(start), seed=5)


def upload(
    client_id: int, num_examples: int, a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]
) -> Upload:
    """Rows A (r_k, 3) and B^T (r_k, 3), and a head of zeros."""
    values = torch.cat([*map(torch.tensor, [*a, *b]), torch.zeros(2)])
    return make_upload(
        client_id=client_id, num_examples=num_examples, train_loss=0.0, values=values
    )


def product(state: ServerState) -> np.ndarray:
    a, b = pair(state.parts, "a")
    return b @ a


E1, E2, E3 = np.eye(3).tolist()


def test_a_block_is_averaged_over_the_clients_that_have_it() -> None:
    """Client 0 of 1 example has one triplet, client 1 of 3 has two:
    Delta / scale = 1/4 e1 e1^T + 3/4 e1 2 e1^T + 1 e2 5 e2^T = diag(1.75, 5, 0)."""
    first = upload(0, 1, [E1], [E1])
    second = upload(1, 3, [E1, E2], [[2.0, 0, 0], [0, 5.0, 0]])
    after = RaFLora().aggregate(one_adapter([1, 2]), Received.of([first, second]))
    np.testing.assert_allclose(product(after), np.diag([1.75, 5.0, 0.0]), atol=1e-6)
    # FlexLoRA's second triplet would be 3/4 of 5. Ours is now the first, as the larger.
    a, b = pair(after.parts, "a")
    np.testing.assert_allclose(np.linalg.norm(b, axis=0), [5.0, 1.75], rtol=1e-6)
    np.testing.assert_allclose(np.abs(a), [E2, E1], atol=1e-6)


def test_a_block_that_nobody_has_stays_the_servers() -> None:
    state = one_adapter([1, 2])
    a, b = pair(state.parts, "a")
    only = upload(0, 4, [E1], [[0, 7.0, 0]])
    after = RaFLora().aggregate(state, Received.of([only]))
    expected = np.outer([0, 7.0, 0], E1) + np.outer(b[:, 1], a[1])
    np.testing.assert_allclose(product(after), expected, atol=1e-5)


def test_it_cuts_to_the_servers_rank() -> None:
    """Four stacked triplets, diag(3, 2, 1) as their sum: the last goes."""
    first = upload(0, 1, [E1, E2], [[6.0, 0, 0], [0, 4.0, 0]])
    second = upload(1, 1, [E3, E3], [[0, 0, 1.0], [0, 0, 1.0]])
    after = RaFLora().aggregate(one_adapter([2, 2]), Received.of([first, second]))
    np.testing.assert_allclose(product(after), np.diag([3.0, 2.0, 0.0]), atol=1e-6)


def test_the_rank_does_not_collapse() -> None:
    """Clients that send back what they got: nothing changes, but FlexLoRA's
    second triplet halves in each round."""
    state = one_adapter([1, 2])
    flexlora = make_tiny_job("method.name=flexlora").method
    before = np.linalg.svd(product(state), compute_uv=False)
    states = {"ours": state, "theirs": state}
    for _ in range(6):
        for name, method in (("ours", RaFLora()), ("theirs", flexlora)):
            now = states[name]
            sent = [
                upload(k, 1, *(now.parts[part]["a"][: k + 1].tolist() for part in "AB"))
                for k in range(2)
            ]
            states[name] = method.aggregate(now, Received.of(sent))
    ours, theirs = (np.linalg.svd(product(s), compute_uv=False) for s in states.values())
    np.testing.assert_allclose(ours, before, atol=1e-5)
    assert theirs[1] < 0.1 * ours[1]


def test_at_equal_ranks_it_is_flexlora() -> None:
    ours = play_rounds(make_tiny_job(RAFLORA, "train.lr=2e-2"))
    theirs = play_rounds(make_tiny_job("method.name=flexlora", "train.lr=2e-2"))
    for one, other in zip(ours, theirs, strict=True):
        assert one.row["state_digest"] == other.row["state_digest"]
    unequal = play_rounds(make_tiny_job(RAFLORA, UNEQUAL, "train.lr=2e-2"))
    flexible = play_rounds(make_tiny_job("method.name=flexlora", UNEQUAL, "train.lr=2e-2"))
    assert unequal[0].row["state_digest"] != flexible[0].row["state_digest"]


def test_bytes_of_a_run() -> None:
    """Up and down r_k rows."""
    job = make_tiny_job(RAFLORA, UNEQUAL, "train.local_steps=1")
    check_bytes_of_own_ranks(job, play_rounds(job))
