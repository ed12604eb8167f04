"""Codecs: lengths, error bounds, unbiased rounding, odd values; and their effect on a run."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.config.load import parse_run
from bench.run.checkpoint import dump_client_state, load_client_state
from bench.run.clients import reference_of
from fedara_core.codec import (
    CODECS,
    ROW_VALUES,
    decode_rows,
    encode_rows,
    message_widths,
    payload_bytes,
    row_bytes,
)
from fedara_core.compression import Compression
from fedara_core.errors import InputError
from fedara_core.method import load_method, method_names
from fedara_core.seeds import generator
from fedara_core.wire import Upload, make_upload, message_bytes, pack, unpack
from support.rounds import make_tiny_job, play_rounds, train_one_client

LOSSY = [codec for codec in CODECS if codec != "fp32"]
WIDTHS = torch.tensor([5, 5, 1, 128, 128, 128, 7, 2, 300])
NONE = torch.zeros(0)


def through(codec: str, values: Tensor, widths: Tensor, seed: int = 0) -> Tensor:
    """The values as they arrive."""
    payload = encode_rows(codec, values, widths, generator(seed, "test"))
    assert payload.dtype == torch.uint8
    assert len(payload) == int(row_bytes(codec, widths).sum())
    return decode_rows(codec, payload, widths)


def make(values: Tensor, client_id: int = 3) -> Upload:
    bits = torch.tensor([True, False, True])
    return make_upload(
        client_id=client_id, num_examples=9, train_loss=0.5, values=values, bits=bits
    )


def coded(codec: str, values: Tensor, reference: Tensor) -> Upload:
    """The upload as it crosses the wire."""
    up = Compression(up=codec)
    upload, residual = up.send_up(make(values), reference, None, seed=0, round_index=0)
    assert residual is None
    return upload


def bound(codec: str, row: Tensor) -> Tensor:
    """The largest error that the page at the top of codec.py allows for each value of a row."""
    if codec in ("int8", "int4"):
        return row.abs().max().expand_as(row) / {"int8": 127, "int4": 7}[codec] * (1 + 1e-6)
    if codec == "bf16":
        return row.abs() * 2.0**-7
    return torch.where(row.abs() >= 2.0**-14, row.abs() * 2.0**-10, torch.tensor(2.0**-24))


@pytest.mark.parametrize(
    ("codec", "lengths"),
    [
        ("fp32", [4, 28, 512]),
        ("bf16", [2, 14, 256]),
        ("fp16", [2, 14, 256]),
        ("int8", [5, 11, 132]),
        ("int4", [5, 8, 68]),
    ],
)
def test_bytes_of_a_row_by_hand(codec: str, lengths: list[int]) -> None:
    assert row_bytes(codec, torch.tensor([1, 7, 128])).tolist() == lengths
    assert payload_bytes(codec, 2 * ROW_VALUES + 7) == 2 * lengths[2] + lengths[1]
    assert payload_bytes(codec, 0) == 0
    assert message_bytes(7, 9, codec) == 24 + lengths[1] + 2


def test_fp32_is_exact() -> None:
    values = torch.randn(int(WIDTHS.sum()))
    assert torch.equal(through("fp32", values, WIDTHS), values)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 300.0])
def test_every_value_is_within_the_bound(codec: str, scale: float) -> None:
    drawn = torch.Generator().manual_seed(1)
    values = torch.randn(int(WIDTHS.sum()), generator=drawn) * scale
    found = through(codec, values, WIDTHS)
    assert not torch.equal(found, values)
    rows = zip(
        torch.split(values, WIDTHS.tolist()), torch.split(found, WIDTHS.tolist()), strict=True
    )
    for row, decoded in rows:
        assert ((decoded - row).abs() <= bound(codec, row)).all(), (row, decoded)


@pytest.mark.parametrize("codec", LOSSY)
def test_the_rounding_has_no_bias(codec: str) -> None:
    """The mean of many draws comes closer to the values than any one of them can."""
    values = torch.tensor([0.31, -0.77, 0.001, 1.0, -0.5001, 2e-3, 0.123456, -0.9])
    widths = torch.tensor([len(values)])
    mean = torch.stack([through(codec, values, widths, seed) for seed in range(4000)]).mean(0)
    assert ((mean - values).abs() <= 0.06 * bound(codec, values) + 1e-9).all()


@pytest.mark.parametrize("codec", LOSSY)
def test_the_same_generator_gives_the_same_bytes(codec: str) -> None:
    values = torch.randn(1000)
    first, again, other = (
        encode_rows(codec, values, message_widths(1000), generator(seed, "test"))
        for seed in (4, 4, 5)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("codec", LOSSY)
def test_odd_values(codec: str) -> None:
    zeros = torch.zeros(int(WIDTHS.sum()))
    assert torch.equal(through(codec, zeros, WIDTHS), zeros)
    assert len(through(codec, NONE, torch.zeros(0, dtype=torch.int64))) == 0
    for odd in (torch.nan, torch.inf):
        values = torch.tensor([1.0, odd, -2.0, 3.0])
        found = through(codec, values, torch.tensor([2, 2]))
        assert not found[1].isfinite()
        assert found[2:].isfinite().all()  # rows stand alone
    exact = torch.tensor([1.0, -1.0, 0.0, 1.0])  # the levels' ends, and what float16 can say
    assert torch.equal(through(codec, exact, torch.tensor([4])), exact)


def test_float16_cuts_off_what_is_too_large() -> None:
    values = torch.tensor([1e5, -7e4, 65504.0])
    assert through("fp16", values, torch.tensor([3])).tolist() == [65504.0, -65504.0, 65504.0]


def test_int4_by_hand() -> None:
    """Scale 1: whole numbers need no rounding; two to a byte, the first in the low half."""
    values = torch.tensor([7.0, -7.0, 3.0, 0.0, -1.0])
    payload = encode_rows("int4", values, torch.tensor([5]), generator(0, "test"))
    halves = [0x7 | (0x9 << 4), 0x3, 0xF]
    assert payload.tolist() == [*torch.ones(1).view(torch.uint8).tolist(), *halves]


@pytest.mark.parametrize("codec", LOSSY)
def test_a_coded_upload_crosses_the_wire(codec: str) -> None:
    values, reference = torch.randn(1000), torch.randn(600)
    sent = coded(codec, values, reference)
    packed = pack([sent, sent])
    assert len(packed) == 2 * sent.header.num_bytes == 2 * message_bytes(1000, 3, codec)
    for found in unpack(packed, reference):
        assert torch.equal(found.values, sent.values)
        assert torch.equal(found.bits, sent.bits)
        assert found.header.codec == codec
    # The difference is what is coded, so a client that did not train is exact.
    still = coded(codec, values, values)
    assert torch.equal(still.values, values)


@pytest.mark.parametrize("name", method_names())
def test_the_reference_is_what_a_client_that_did_not_train_uploads(name: str) -> None:
    job = make_tiny_job(f"method.name={name}")
    reference = reference_of(job, job.state)
    if job.method.own_rows:
        assert len(reference) == 0
        return
    idle = make_tiny_job(f"method.name={name}")
    idle = replace(idle, training=replace(idle.training, local_steps=0, local_epochs=None))
    upload = train_one_client(idle, idle.state, 0)
    assert torch.equal(reference, upload.values[: len(reference)])
    assert len(reference)


@pytest.mark.parametrize("name", method_names())
def test_every_method_runs_under_a_codec(name: str) -> None:
    """The bytes of each upload are those of the codec, and the model is near the exact one."""
    steady = "feedback" in load_method(name).coded
    feedback = ("codec.error_feedback=true",) if steady else ()
    job = make_tiny_job(f"method.name={name}", "codec.up=int8", *feedback)
    (played,) = play_rounds(job, num_rounds=1)
    exact = make_tiny_job(f"method.name={name}")
    (plain,) = play_rounds(exact, num_rounds=1)
    assert 0.25 < played.row["uplink_bytes"] / plain.row["uplink_bytes"] < 0.45  # small messages
    assert played.row["downlink_bytes"] == plain.row["downlink_bytes"]
    assert played.row["state_digest"] != plain.row["state_digest"]
    if steady:
        assert len(job.client_state) == len(played.row["cohort"])
    assert all(("codec_residual" in kept) == steady for kept in job.client_state.values())
    # What the model does hardly changes; its factors may turn where a method factorises anew.
    assert played.row["test_loss"] == pytest.approx(plain.row["test_loss"], rel=0.02)


def test_the_residual_is_what_the_codec_left_out() -> None:
    """Twice the same client: the second message holds the first one's rounding, and no more."""
    words = ("method.name=lora", "federation.num_clients=1", "federation.cohort=1")
    job = make_tiny_job(*words, "codec.up=int4", "codec.error_feedback=true")
    first, second = play_rounds(job, num_rounds=1), None
    left_out = job.client_state[0]["codec_residual"].clone()
    assert left_out.abs().max() > 0
    kept = load_client_state(dump_client_state(job.client_state))
    second = play_rounds(job, first[0].after, 1)[0]
    again = make_tiny_job(*words, "codec.up=int4", "codec.error_feedback=true")
    again.client_state.update(kept)
    resumed = play_rounds(again, first[0].after, 1)[0]
    assert resumed.row["state_digest"] == second.row["state_digest"]
    forgetful = make_tiny_job(*words, "codec.up=int4", "codec.error_feedback=true")
    assert (
        play_rounds(forgetful, first[0].after, 1)[0].row["state_digest"]
        != second.row["state_digest"]
    )


def test_the_server_sends_under_a_codec() -> None:
    job = make_tiny_job("method.name=lora", "codec.down=int8", "codec.error_feedback=true")
    exact = make_tiny_job("method.name=lora")
    played, plain = play_rounds(job, num_rounds=2), play_rounds(exact, num_rounds=2)
    num_values = exact.state.index.num_sent
    saved = 4 * num_values - payload_bytes("int8", num_values)
    assert [one.row["uplink_bytes"] for one in played] == [one.row["uplink_bytes"] for one in plain]
    # The start does not travel, so that it is not coded.
    assert played[0].row["state_digest"] == plain[0].row["state_digest"]
    assert played[0].row["downlink_bytes"] == plain[0].row["downlink_bytes"] == 5 * 24
    assert plain[1].row["downlink_bytes"] - played[1].row["downlink_bytes"] == saved * 5
    residual = played[1].after.extra["codec_residual"]
    assert residual.shape == (num_values,)
    plain_codec = play_rounds(make_tiny_job("codec.down=int8"), num_rounds=2)
    assert "codec_residual" not in plain_codec[1].after.extra


def test_refusals() -> None:
    train = {"local_steps": 1}

    def refused(codec: dict[str, Any], method: str = "lora") -> str:
        with pytest.raises(InputError) as caught:
            parse_run({"method": {"name": method}, "train": train, "codec": codec})
        return str(caught.value)

    assert "codec.up = 'int2' is not allowed" in refused({"up": "int2"})
    assert "fp32 leaves nothing out" in refused({"error_feedback": True})
    for name in method_names():
        cls = load_method(name)
        if "down" not in cls.coded:
            assert f"method.name = {name!r}" in refused({"down": "int8"}, name)
        if "feedback" not in cls.coded:
            assert f"method.name = {name!r}" in refused(
                {"up": "int8", "error_feedback": True}, name
            )
