"""Perplexity and ROC AUC by hand, and the float figures of the language and sound networks on a part of their data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks import data
from benchmarks.perplexity import in_blocks, streamed, told_stories, treebank
from benchmarks.roc_auc import Sound, heard, roc_auc, spoken_digits
from benchmarks.zoo.ptb_lstm import no_states, ptb_lstm
from benchmarks.zoo.ptb_transformer import ptb_transformer
from benchmarks.zoo.silero_vad import BEFORE, STEP, silero_vad
from benchmarks.zoo.stories260k import stories260k

needs_data = pytest.mark.skipif(
    data.data_folder() is None, reason="no data folder: set FXQUANT_DATA to run the real networks"
)


def _next_is_likely(words: Tensor) -> Tensor:
    """Give the word that follows in the alphabet of 4 a probability of 1/2, each other word 1/6."""
    likely = torch.nn.functional.one_hot((words + 1) % 4, 4)
    return torch.where(likely == 1, 0.5, 1 / 6).log()


def test_perplexity_of_blocks_scores_the_last_words() -> None:
    # Blocks of 4 that move by 2: words 0..3 are asked for 3 and 4, then 2..5 for 5 and 6.
    text = torch.tensor([0, 1, 2, 3, 0, 1, 1])
    expected = math.exp(-(3 * math.log(1 / 2) + math.log(1 / 6)) / 4)
    assert in_blocks(_next_is_likely, text, context=4, scored=2, batch=1) == pytest.approx(expected)
    assert in_blocks(_next_is_likely, text[None, :5], context=4, scored=4) == pytest.approx(2.0)


def test_perplexity_of_streams_carries_their_states() -> None:
    seen: list[list[float]] = []

    def model(words: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(read.flatten().tolist())
        return _next_is_likely(words), read + words.shape[1]

    text = torch.tensor([0, 1, 2, 3, 0, 2, 3, 0, 1, 3])
    expected = math.exp(-(7 * math.log(1 / 2) + math.log(1 / 6)) / 8)
    assert streamed(model, lambda n: (torch.zeros(n, 1),), text, streams=2, steps=2) == pytest.approx(expected)
    assert seen == [[0.0, 0.0], [2.0, 2.0]]


def test_area_counts_pairs_in_order_and_half_of_equal_ones() -> None:
    scores, labels = torch.tensor([0.9, 0.4, 0.4, 0.1]), torch.tensor([True, True, False, False])
    assert roc_auc(scores, labels) == pytest.approx(3.5 / 4)
    assert roc_auc(-scores, labels) == pytest.approx(0.5 / 4)


def test_sound_is_cut_into_calls_that_overlap() -> None:
    calls = Sound(torch.arange(1.0, 2 * STEP + 1)[None], torch.ones(1, 2)).calls()[0]
    assert calls.shape == (2, BEFORE + STEP)
    assert calls[0, : BEFORE + 2].tolist() == [0.0] * BEFORE + [1.0, 2.0]
    assert calls[1, 0] == calls[0, STEP] == STEP - BEFORE + 1


@needs_data
@pytest.mark.slow
def test_language_networks_reach_their_stated_perplexity() -> None:
    text = treebank("valid")[:20_000]
    assert streamed(ptb_lstm(), no_states, text) == pytest.approx(144.2, abs=0.1)
    assert in_blocks(ptb_transformer(), text) == pytest.approx(154.6, abs=0.1)


@needs_data
def test_a_told_story_is_as_likely_as_its_teller_says() -> None:
    # 3.66 over all 256 stories.
    assert in_blocks(stories260k(), told_stories()[:16], 255, 255) == pytest.approx(3.66, rel=0.05)
    assert len(treebank("train")) == 200_000


@needs_data
def test_speech_is_detected() -> None:
    sound = spoken_digits()
    part = Sound(sound.samples[:, : 100 * STEP], sound.active[:, :100])
    speech, states = heard(silero_vad(), part)
    assert states.shape == (3, 100, 2, 128)
    assert not states[:, 0].any()
    assert roc_auc(speech, part.active) > 0.88
