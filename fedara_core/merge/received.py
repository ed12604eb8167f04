"""What an exchange gives the server: headers, the mean, and where they were kept, the uploads."""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fedara_core.values import Index
from fedara_core.wire import Header, Upload

_CHUNK = 1 << 18  # values summed at a time: their float64 sum stays in the cache


class Received:
    """All uploads of a round, in client_id order.

    headers: of every client. `mean`: sum_k n_k values_k / sum_k n_k. Where clients send rows of
    their own choice, a row that one left out counts as zero, and rows weigh what their headers'
    row_weight says.
    """

    def __init__(
        self,
        headers: Sequence[Header],
        *,
        mean: Tensor | None = None,
        uploads: Sequence[Upload] | None = None,
    ) -> None:
        """Either the mean, where uploads were summed on the way, or the uploads."""
        assert (mean is None) != (uploads is None)
        self.headers = tuple(headers)
        self._mean, self._uploads = mean, uploads

    @classmethod
    def of(cls, uploads: Sequence[Upload]) -> "Received":
        """Every upload, kept."""
        return cls([upload.header for upload in uploads], uploads=uploads)

    @property
    def uploads(self) -> Sequence[Upload]:
        """Every client's upload; RuntimeError where they were summed on the way."""
        if self._uploads is None:
            raise RuntimeError(
                "this round's uploads were summed on the way, only their mean is left; a method "
                'whose `aggregate` needs every upload must say combine = "gather"'
            )
        return self._uploads

    @cached_property
    def mean(self) -> Tensor:
        """The mean (n,) float32. Raises ValueError for kept uploads of unequal length."""
        return weighted_mean(self.uploads) if self._mean is None else self._mean

    @property
    def client_ids(self) -> list[int]:
        return [header.client_id for header in self.headers]

    @property
    def shares(self) -> list[float]:
        """p_k = n_k / sum n of each client."""
        num_examples = sum(header.num_examples for header in self.headers)
        return [header.num_examples / num_examples for header in self.headers]

    def share_of_bits(self, bits_of: Callable[[Header], Tensor] | None = None) -> Tensor:
        """sum_k p_k m_k, m_k the bits that the client sent, or `bits_of` its header: (num_bits,)
        float64.

        Whole numbers are added and divided once, so that half of the examples are exactly 0.5.
        """
        bits = [header.bits if bits_of is None else bits_of(header) for header in self.headers]
        total = torch.zeros(bits[0].numel(), dtype=torch.float64)
        for header, own in zip(self.headers, bits, strict=True):
            total += own.double() * header.num_examples
        return total / sum(header.num_examples for header in self.headers)


def weighted_mean(uploads: Sequence[Upload]) -> Tensor:
    """FedAvg's sum_k n_k values_k / sum_k n_k (arXiv 1602.05629) of equally long values: float32,
    added in float64 in client_id order. ValueError for unequal lengths."""
    lengths = {upload.client_id: upload.values.numel() for upload in uploads}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"uploads differ in length, so they have no mean; by client_id: {lengths}")
    num_examples = sum(upload.num_examples for upload in uploads)
    mean = torch.empty_like(uploads[0].values)
    for start in range(0, mean.numel(), _CHUNK):
        piece = mean[start : start + _CHUNK]
        total = torch.zeros(piece.numel(), dtype=torch.float64)
        for upload in uploads:  # float32 by a whole number: exact in float64
            total.add_(upload.values[start : start + _CHUNK], alpha=upload.num_examples)
        piece.copy_(total / num_examples)
    return mean


def mean_of_whole(uploads: Sequence[Upload], index: Index) -> Tensor:
    """The weighted mean of the whole parameters: each upload's last values, however many precede
    them."""
    num_values = index.num_sent - index.num_row_values
    ends = [
        Upload(header=u.header, values=u.values[u.values.numel() - num_values :]) for u in uploads
    ]
    return weighted_mean(ends)
