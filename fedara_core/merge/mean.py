"""The mean of uploads that all hold the same rows, summed on the way by a merge path."""

from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedara_core.codec import message_widths
from fedara_core.comm.base import Communicator
from fedara_core.merge.received import Received
from fedara_core.merge.sums import Contribution, Rows, RunningSum, byte_starts, running_sum
from fedara_core.wire import Header, Upload, add_reference, pack_header, unpack_headers


class Exchange(Protocol):
    """How a round's uploads come together: each process adds its own clients, in client_id order,
    then all exchange, in one chunk or several; all ask for the result."""

    def add(self, upload: Upload) -> None:
        """One of this process's uploads."""

    def exchange(self) -> None:
        """Bring together what all processes have added since the last exchange."""

    def result(self) -> Received | None:
        """All clients' uploads; None where there is none."""


class Averaging:
    """Sums uploads as they come, so that memory does not grow with the cohort."""

    def __init__(
        self, communicator: Communicator, path: str, reference: Tensor | None = None
    ) -> None:
        """reference: what a lossy codec coded the uploads' difference from."""
        self._communicator, self._path, self._reference = communicator, path, reference
        self._own: list[Header] = []  # since the last exchange
        self._headers: list[Header] = []
        self._total: RunningSum | None = None
        self._num_values = 0

    def add(self, upload: Upload) -> None:
        """One of this process's uploads, of which only the header is kept."""
        header = upload.header
        self._own.append(header)
        total = self._sum(header)
        if header.num_values == self._num_values:  # if not, every process says so in `exchange`
            total.add(_contribution(self._communicator.world_rank, header), upload.coded)

    def exchange(self) -> None:
        """Raises ValueError on every process if uploads are not equally long."""
        gathered = gather_headers(self._own, self._communicator)
        self._own.clear()
        self._headers += [header for _, header in gathered]
        lengths = {header.client_id: header.num_values for header in self._headers}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"uploads differ in length, so they have no mean; by client_id: {lengths}"
            )
        if gathered:
            contributions = [_contribution(*item) for item in gathered]
            self._sum(gathered[0][1]).exchange(contributions)

    def result(self) -> Received | None:
        if self._total is None:
            return None
        num_examples = sum(header.num_examples for header in self._headers)
        mean = self._total.result(whole_divisor=num_examples)
        if self._headers[0].codec != "fp32" and self._reference is not None:
            mean = add_reference(mean, self._reference)
        return Received(self._headers, mean=mean)

    def _sum(self, header: Header) -> RunningSum:
        """The sum of all uploads; the first one says how long they are."""
        if self._total is None:
            rows, _, _ = _message_rows(header.codec, header.num_values)
            self._total = running_sum(rows, self._communicator, self._path)
            self._num_values = header.num_values
        return self._total


def gather_headers(own: list[Header], communicator: Communicator) -> list[tuple[int, Header]]:
    """world_rank and header of every process's clients, in client_id order."""
    packed = b"".join(map(pack_header, own))
    gathered = [
        (world_rank, header)
        for world_rank, data in enumerate(communicator.gather_bytes(packed))
        for header in unpack_headers(data)
    ]
    return sorted(gathered, key=lambda item: item[1].client_id)


@lru_cache(maxsize=4)
def _message_rows(codec: str, num_values: int) -> tuple[Rows, Tensor, np.ndarray]:
    """The rows in which a message's values are coded, all held, and where their bytes start."""
    rows = Rows(widths=message_widths(num_values), codec=codec)
    held = torch.ones(len(rows.widths), dtype=torch.bool)
    return rows, held, byte_starts(held, rows)


def _contribution(world_rank: int, header: Header) -> Contribution:
    _, held, starts = _message_rows(header.codec, header.num_values)
    return Contribution(
        world_rank=world_rank,
        client_id=header.client_id,
        row_weight=header.num_examples,
        whole_weight=header.num_examples,
        starts=starts,
        held=held,
    )
