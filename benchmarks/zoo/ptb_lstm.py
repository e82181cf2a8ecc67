"""A language model of the Penn Treebank: two LSTM layers of 256, embedding and output layer of one table.

The size of Zaremba et al. (2014), "small"; trained with dropout by the makers of the data folder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.weights import loaded

WORDS = 10_000
WIDTH = 256
LAYERS = 2

States = tuple[Tensor, Tensor]


class PtbLstm(nn.Module):
    """Words `(N, T)` and the states `(N, 2, 256)` before them to logits `(N, T, 10000)` and the states behind."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(WORDS, WIDTH)
        self.rnn = nn.LSTM(WIDTH, WIDTH, LAYERS, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(WORDS))

    def forward(self, words: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # nn.LSTM counts layers in front of sequences; here every input counts sequences first.
        states = (hidden.transpose(0, 1).contiguous(), cell.transpose(0, 1).contiguous())
        seen, (hidden, cell) = self.rnn(self.emb(words), states)
        logits = F.linear(seen, self.emb.weight, self.bias)
        return logits, hidden.transpose(0, 1), cell.transpose(0, 1)


def no_states(count: int) -> States:
    """Return the states of `count` sequences before their first word, hidden and cell."""
    return torch.zeros(count, LAYERS, WIDTH), torch.zeros(count, LAYERS, WIDTH)


def ptb_lstm() -> PtbLstm:
    """Return the trained network."""
    return loaded(PtbLstm(), "language_models/ptb_lstm_2x256_fp16.npz")
