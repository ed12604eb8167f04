"""Lossy codecs on a round's messages: both halves, down and up, with their error feedback.

Down, what trains of the state is coded; up, the difference of what a client trained from what it
downloaded. What the rounding of a message left out is its residual; with error feedback it is added
to the next message of that client, or of the server, as long as that has as many values. Rounding
draws from (seed, round, client), so that runs repeat bit by bit.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedara_core.codec import decode_rows, encode_rows, message_widths
from fedara_core.seeds import generator
from fedara_core.state import ServerState
from fedara_core.wire import Upload, add_reference

RESIDUAL = "codec_residual"  # its name among what the server or a client keeps


@dataclass(frozen=True, kw_only=True)
class Compression:
    """up, down: names of codecs (fedara_core/codec.py)."""

    up: str = "fp32"
    down: str = "fp32"
    error_feedback: bool = False

    @property
    def keeps_at_client(self) -> bool:
        """Whether clients keep a residual between rounds."""
        return self.error_feedback and self.up != "fp32"

    def send_down(self, state: ServerState) -> tuple[ServerState, Tensor | None]:
        """The state as clients get it, and the residual (None without error feedback).

        The start does not travel (Method.download), so that it is not coded.
        """
        if self.down == "fp32" or state.is_start:
            return state, None
        values = _with_residual(state.sent, state.extra.get(RESIDUAL))
        widths = message_widths(len(values))
        draw = generator(state.seed, "codec down", state.round_index)
        decoded = decode_rows(self.down, encode_rows(self.down, values, widths, draw), widths)
        vector = torch.cat([decoded, state.vector[len(decoded) :]])
        residual = values - decoded if self.error_feedback else None
        return replace(state, vector=vector), residual

    def with_residual(self, state: ServerState, residual: Tensor | None) -> ServerState:
        """The next state, with what this round's message to the clients left out."""
        if residual is None:
            return state
        return replace(state, extra={**state.extra, RESIDUAL: residual})

    def send_up(
        self,
        upload: Upload,
        reference: Tensor,
        residual: Tensor | None,
        *,
        seed: int,
        round_index: int,
    ) -> tuple[Upload, Tensor | None]:
        """The upload as the server gets it, and the residual (None without error feedback).

        reference (m,): what server and client both have, of values that are at least as many; what
        lies beyond it is coded as it is.
        """
        if self.up == "fp32":
            return upload, None
        values = _with_residual(upload.values, residual)
        widths = message_widths(values.numel())
        draw = generator(seed, "codec up", round_index, upload.client_id)
        payload = encode_rows(self.up, add_reference(values, -reference), widths, draw)
        decoded = add_reference(decode_rows(self.up, payload, widths), reference)
        coded = Upload(
            header=replace(upload.header, codec=self.up), values=decoded, payload=payload
        )
        return coded, values - decoded if self.error_feedback else None


def _with_residual(values: Tensor, residual: Tensor | None) -> Tensor:
    """Values and what the last message left out, unless triplets have died since."""
    return values if residual is None or len(residual) != len(values) else values + residual
