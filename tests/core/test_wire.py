"""The wire format: round trips, the layout byte by byte, lengths, and buffers cut short."""

import struct
from dataclasses import replace

import pytest
import torch

from fedara_core.wire import (
    Upload,
    make_upload,
    message_bytes,
    pack,
    pack_header,
    unpack,
    unpack_headers,
)

SIZES = [(0, 0), (1, 0), (0, 1), (0, 8), (3, 7), (3, 8), (3, 9), (1000, 129)]


def make(num_values: int, num_bits: int, seed: int = 0) -> Upload:
    random = torch.Generator().manual_seed(seed)
    return make_upload(
        client_id=seed,
        num_examples=10 + seed,
        train_loss=0.5 + seed,  # exact in float32
        values=torch.randn(num_values, generator=random),
        bits=torch.rand(num_bits, generator=random) < 0.5,
    )


def assert_equal(found: Upload, sent: Upload) -> None:
    for key in ("client_id", "num_examples", "train_loss", "num_bytes", "finite", "row_weight"):
        assert getattr(found.header, key) == getattr(sent.header, key), key
    assert found.values.dtype == torch.float32
    assert found.bits.dtype == torch.bool
    assert torch.equal(found.values, sent.values)
    assert torch.equal(found.bits, sent.bits)


@pytest.mark.parametrize(("num_values", "num_bits"), SIZES)
def test_round_trip(num_values: int, num_bits: int) -> None:
    upload = make(num_values, num_bits, seed=3)
    packed = pack([upload])
    assert packed.dtype == torch.uint8
    assert packed.numel() == upload.header.num_bytes == message_bytes(num_values, num_bits)
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
    upload = make_upload(
        client_id=2**32 - 1,
        num_examples=1,
        train_loss=float("nan"),
        values=values,
        bits=torch.zeros(0, dtype=torch.bool),
    )
    (found,) = unpack(pack([upload]))
    assert found.client_id == 2**32 - 1
    assert found.header.train_loss != found.header.train_loss
    assert not found.header.finite
    assert torch.equal(found.values.view(torch.int32), values.view(torch.int32))


def test_layout_is_what_the_page_says() -> None:
    upload = make_upload(
        client_id=7,
        num_examples=300,
        train_loss=1.5,
        values=torch.tensor([1.0, -2.0]),
        bits=torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 0, 1], dtype=torch.bool),
    )
    by_hand = struct.pack("<BBHIIIIf", 0xFB, 0, 0, 2, 7, 300, 10, 1.5)
    by_hand += bytes([0b1000_0001, 0b0000_0010])  # lowest bit first
    by_hand += struct.pack("<2f", 1.0, -2.0)
    assert len(by_hand) == 24 + 8 + 2
    assert bytes(pack([upload]).tolist()) == by_hand
    weighted = make_upload(
        client_id=7,
        num_examples=300,
        train_loss=1.5,
        values=torch.tensor([1.0, torch.inf]),
    )
    by_hand = struct.pack("<BBHIIIIff", 0xFB, 0x80 | 0x40, 0, 2, 7, 300, 0, 1.5, 0.5)
    assert pack_header(replace(weighted.header, row_weight=0.5)) == by_hand
    assert weighted.header.num_bytes == 24 + 8  # the weight is the server's


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
        if cut == first.header.num_bytes:  # a whole message
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


def test_headers_are_messages_without_their_values() -> None:
    headers = [make(*sizes, seed=seed).header for seed, sizes in enumerate(SIZES)]
    headers[0] = replace(headers[0], num_values=2**33, row_weight=0.25)  # beyond 32 bits
    packed = b"".join(map(pack_header, headers))
    assert len(packed) == 4 + sum(message_bytes(0, header.bits.numel()) for header in headers)
    for found, sent in zip(unpack_headers(packed), headers, strict=True):
        assert torch.equal(found.bits, sent.bits)
        assert replace(found, bits=sent.bits) == sent
    assert list(unpack_headers(b"")) == []


def test_headers_cut_anywhere_are_refused() -> None:
    packed = pack_header(make(3, 9, seed=1).header) + pack_header(make(2, 3, seed=2).header)
    for cut in range(1, len(packed)):
        if cut == message_bytes(0, 9):  # a whole header
            assert len(list(unpack_headers(packed[:cut]))) == 1
            continue
        with pytest.raises(ValueError, match="header"):
            list(unpack_headers(packed[:cut]))


def test_what_is_no_upload_is_refused() -> None:
    packed = pack([make(3, 0)])
    for place, byte in ((0, 0xFA), (1, 0x0F)):  # the mark of the format before; no such codec
        wrong = packed.clone()
        wrong[place] = byte
        with pytest.raises(ValueError, match="no upload starts at byte 0"):
            unpack(wrong)
