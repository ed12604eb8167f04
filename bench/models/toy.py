"""A random encoder with BERT's shape and layer names in plain torch, for tests that start
processes: importing transformers takes longer than their rounds."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 2000
HIDDEN, INNER, NUM_HEADS, NUM_LAYERS = 32, 64, 2, 2
NUM_POSITIONS = 128
_STD, _EPS = 0.02, 1e-12  # BERT's: of weights, of norms


class ToyEncoder(nn.Module):
    """input_ids, attention_mask (n, length) to a tuple of last hidden states (n, length, 32)."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embeddings = _Embeddings(dropout)
        layers = nn.ModuleList(_Layer(dropout) for _ in range(NUM_LAYERS))
        self.encoder = nn.ModuleDict({"layer": layers})
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "LayerNorm" not in name:
                nn.init.normal_(parameter, std=_STD)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        seen = attention_mask[:, None, None, :].bool()  # (n, head, query, key)
        hidden = self.embeddings(input_ids)
        for layer in self.encoder["layer"].children():
            hidden = layer(hidden, seen)
        return (hidden,)


class _Embeddings(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, HIDDEN)
        self.position_embeddings = nn.Embedding(NUM_POSITIONS, HIDDEN)
        self.LayerNorm = nn.LayerNorm(HIDDEN, eps=_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        both = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(both))  # type: ignore[no-any-return]


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, hidden: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (
            layer(hidden).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)  # (n, head, length, 16)
            for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return mixed.transpose(1, 2).flatten(2)  # (n, length, hidden)


class _Output(nn.Module):
    """A projection, the sum with the input before it, and a norm."""

    def __init__(self, num_inputs: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(num_inputs, HIDDEN)
        self.LayerNorm = nn.LayerNorm(HIDDEN, eps=_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, before: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden)) + before)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.self = _SelfAttention()
        self.output = _Output(HIDDEN, dropout)

    def forward(self, hidden: Tensor, seen: Tensor) -> Tensor:
        return self.output(self.self(hidden, seen), hidden)  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention = _Attention(dropout)
        dense = nn.Linear(HIDDEN, INNER)
        self.intermediate = nn.Sequential(OrderedDict(dense=dense, gelu=nn.GELU()))
        self.output = _Output(INNER, dropout)

    def forward(self, hidden: Tensor, seen: Tensor) -> Tensor:
        hidden = self.attention(hidden, seen)
        return self.output(self.intermediate(hidden), hidden)  # type: ignore[no-any-return]
