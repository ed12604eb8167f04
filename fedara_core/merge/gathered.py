"""Every upload to every process: for methods whose server needs each client's factors."""

import torch
from torch import Tensor

from fedara_core.comm.base import Communicator
from fedara_core.merge.received import Received
from fedara_core.wire import Upload, pack, unpack


class Gathering:
    """An exchange that keeps every upload (see merge/mean.py, Exchange)."""

    def __init__(self, communicator: Communicator, reference: Tensor | None = None) -> None:
        """reference: what a lossy codec coded the uploads' difference from."""
        self._communicator, self._reference = communicator, reference
        self._own: list[Tensor] = []  # packed, since the last exchange
        self._uploads: list[Upload] = []

    def add(self, upload: Upload) -> None:
        self._own.append(pack([upload]))

    def exchange(self) -> None:
        for buffer in self._communicator.allgather(torch.cat([pack([]), *self._own])):
            self._uploads += unpack(buffer, self._reference)
        self._own.clear()

    def result(self) -> Received | None:
        if not self._uploads:
            return None
        return Received.of(sorted(self._uploads, key=lambda upload: upload.client_id))
