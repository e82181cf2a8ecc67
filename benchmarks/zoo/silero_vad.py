"""Silero VAD for 16 kHz: is somebody speaking? A Fourier transform as a convolution, four 1-d ones, an LSTM cell."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.weights import loaded

STEP = 512
"""New samples of a call."""
BEFORE = 64
"""Samples of the call before that are given again."""
WIDTH = 128


class SileroVad(nn.Module):
    """Sound `(N, 576)` and the states `(N, 128)` before it to the probability of speech `(N, 1)` and the states."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv1d(WIDTH, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, WIDTH, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(WIDTH, WIDTH)
        self.final_conv = nn.Conv1d(WIDTH, 1, 1)

    def forward(self, sound: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        real, imaginary = self.stft_conv(F.pad(sound, (0, 64), mode="reflect").unsqueeze(1)).chunk(2, dim=1)
        x = (real.square() + imaginary.square()).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.relu(conv(x))
        hidden, cell = self.lstm_cell(x.squeeze(-1), (hidden, cell))
        speech = torch.sigmoid(self.final_conv(F.relu(hidden).unsqueeze(-1)))
        return speech.squeeze(-1), hidden, cell


def silero_vad() -> SileroVad:
    """Return the trained network."""
    return loaded(SileroVad(), "audio_rnn/silero_vad_16k.npz")
