"""The wire format: round trips, the layout byte by byte, lengths, and buffers cut short."""

import struct
from dataclasses import replace

import pytest
import torch

from fedara_core.wire import Upload, message_bytes, pack, pack_heads, unpack, unpack_heads

SIZES = [(0, 0), (1, 0), (0, 1), (0, 8), (3, 7), (3, 8), (3, 9), (1000, 129)]


def make(num_values: int, num_bits: int, seed: int = 0) -> Upload:
    random = torch.Generator().manual_seed(seed)
    return Upload(
        client_id=seed,
        num_examples=10 + seed,
        train_loss=0.5 + seed,  # exact in float32
        values=torch.randn(num_values, generator=random),
        bits=torch.rand(num_bits, generator=random) < 0.5,
    )


def assert_equal(found: Upload, sent: Upload) -> None:
    for key in ("client_id", "num_examples", "train_loss", "num_bytes"):
        assert getattr(found, key) == getattr(sent, key), key
    assert found.values.dtype == torch.float32
    assert found.bits.dtype == torch.bool
    assert torch.equal(found.values, sent.values)
    assert torch.equal(found.bits, sent.bits)


@pytest.mark.parametrize(("num_values", "num_bits"), SIZES)
def test_round_trip(num_values: int, num_bits: int) -> None:
    upload = make(num_values, num_bits, seed=3)
    packed = pack([upload])
    assert packed.dtype == torch.uint8
    assert packed.numel() == upload.num_bytes == message_bytes(num_values, num_bits)
    (found,) = unpack(packed)
    assert_equal(found, upload)


def test_round_trip_of_random_sizes() -> None:
    random = torch.Generator().manual_seed(0)
    for seed in range(50):
        num_values, num_bits = torch.randint(0, 200, (2,), generator=random).tolist()
        upload = make(num_values, num_bits, seed)
        assert_equal(unpack(pack([upload]))[0], upload)


def test_odd_values_keep_their_bits() -> None:
    values = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45, -3.4e38])
    upload = Upload(
        client_id=2**32 - 1,
        num_examples=1,
        train_loss=float("nan"),
        values=values,
        bits=torch.zeros(0, dtype=torch.bool),
    )
    (found,) = unpack(pack([upload]))
    assert found.client_id == 2**32 - 1
    assert found.train_loss != found.train_loss
    assert torch.equal(found.values.view(torch.int32), values.view(torch.int32))


def test_layout_is_what_the_page_says() -> None:
    upload = Upload(
        client_id=7,
        num_examples=300,
        train_loss=1.5,
        values=torch.tensor([1.0, -2.0]),
        bits=torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 0, 1], dtype=torch.bool),
    )
    by_hand = struct.pack("<BBHIIIIf", 0xFA, 0, 0, 2, 7, 300, 10, 1.5) + struct.pack(
        "<2f", 1.0, -2.0
    )
    by_hand += bytes([0b1000_0001, 0b0000_0010])  # lowest bit first
    assert len(by_hand) == 24 + 8 + 2
    assert bytes(pack([upload]).tolist()) == by_hand


@pytest.mark.parametrize(
    ("num_values", "num_bits", "length"),
    [(0, 0, 24), (1, 0, 28), (0, 1, 25), (0, 8, 25), (0, 9, 26), (10, 17, 24 + 40 + 3)],
)
def test_message_bytes(num_values: int, num_bits: int, length: int) -> None:
    assert message_bytes(num_values, num_bits) == length


def test_messages_are_concatenated_in_order() -> None:
    uploads = [make(*sizes, seed=seed) for seed, sizes in enumerate(SIZES)]
    packed = pack(uploads)
    assert torch.equal(packed, torch.cat([pack([upload]) for upload in uploads]))
    found = unpack(packed)
    assert len(found) == len(uploads)
    for one, upload in zip(found, uploads, strict=True):
        assert_equal(one, upload)


def test_no_upload_is_an_empty_buffer() -> None:
    assert pack([]).numel() == 0
    assert unpack(pack([])) == []


def test_a_buffer_cut_anywhere_is_refused() -> None:
    first, second = make(3, 9, seed=1), make(2, 3, seed=2)
    packed = pack([first, second])
    for cut in range(1, packed.numel()):
        if cut == first.num_bytes:  # a whole message
            assert_equal(unpack(packed[:cut])[0], first)
            continue
        with pytest.raises(ValueError, match=r"header|needs"):
            unpack(packed[:cut])


def test_unpacked_values_do_not_share_the_buffer() -> None:
    packed = pack([make(4, 8)])
    (found,) = unpack(packed)
    kept = found.values.clone()
    packed.zero_()
    assert torch.equal(found.values, kept)


def test_heads_are_messages_without_their_values() -> None:
    uploads = [make(*sizes, seed=seed) for seed, sizes in enumerate(SIZES)]
    lengths = [upload.values.numel() for upload in uploads]
    lengths[0] = 2**33  # more than 32 bits hold
    packed = pack_heads(zip(uploads, lengths, strict=True))
    assert len(packed) == sum(message_bytes(0, upload.bits.numel()) for upload in uploads)
    found = unpack_heads(packed)
    assert [num_values for _, num_values in found] == lengths
    for (head, _), upload in zip(found, uploads, strict=True):
        assert_equal(head, replace(upload, values=torch.zeros(0)))
    assert unpack_heads(pack_heads([])) == []


def test_heads_cut_anywhere_are_refused() -> None:
    first, second = make(3, 9, seed=1), make(2, 3, seed=2)
    packed = pack_heads([(first, 3), (second, 2)])
    for cut in range(1, len(packed)):
        if cut == message_bytes(0, 9):  # a whole head
            assert len(unpack_heads(packed[:cut])) == 1
            continue
        with pytest.raises(ValueError, match=r"header|needs"):
            unpack_heads(packed[:cut])
