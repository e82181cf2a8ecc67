"""Detection of speech: the area under the receiver operating characteristic, and the sound with its labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.data import read_arrays
from benchmarks.zoo.silero_vad import BEFORE, STEP, WIDTH


@dataclass(frozen=True)
class Sound:
    """Sounds side by side, `(clips, samples)` within -1..1, and whether somebody speaks in each 512 samples."""

    samples: Tensor
    active: Tensor

    def calls(self) -> Tensor:
        """Return what each call of the network hears, `(clips, calls, 576)`: 64 samples once more, 512 new ones."""
        return F.pad(self.samples, (BEFORE, 0)).unfold(1, BEFORE + STEP, STEP)


def spoken_digits() -> Sound:
    """Return ten seconds of digits in noise at each of 0, 5 and 10 dB.

    Raises:
        FileFormatError: the data are missing.
    """
    arrays = read_arrays("audio_rnn/digits_noise_dev.npz")
    samples = torch.from_numpy(arrays["noisy"]).float() / 2**15
    return Sound(samples, torch.from_numpy(arrays["active"]).bool())


def heard(model: Callable[..., tuple[Tensor, ...]], sound: Sound) -> tuple[Tensor, Tensor]:
    """Return the probability of speech in every call, `(clips, calls)`, and what each call was given.

    Args:
        model: (sound (N, 576), hidden (N, 128), cell (N, 128)) -> (probability (N, 1), hidden, cell).
        sound: of any number of clips.

    Returns:
        Probabilities, and the states in front of each call, `(clips, calls, 2, 128)`.
    """
    calls = sound.calls()
    hidden = cell = torch.zeros(len(calls), WIDTH)
    speech, states = [], []
    with torch.inference_mode():
        for call in calls.unbind(1):
            states.append(torch.stack((hidden, cell), 1))
            said, hidden, cell = model(call, hidden, cell)
            speech.append(said)
    return torch.cat(speech, 1), torch.stack(states, 1)


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """Return the probability that a positive scores above a negative, equal scores counting half.

    Args:
        scores: any shape.
        labels: bool, of the same shape, both kinds among them.
    """
    positive, negative = scores[labels].double(), scores[~labels].double()
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive, right=False)
    not_above = torch.searchsorted(ordered, positive, right=True)
    return float((below + not_above).double().mean() / (2 * len(negative)))
