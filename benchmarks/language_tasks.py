"""Tasks with words and sound: language models by their perplexity, detection of speech by its ROC AUC."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import perplexity, roc_auc
from benchmarks.task import Answers, Task
from benchmarks.zoo.ptb_lstm import no_states, ptb_lstm
from benchmarks.zoo.ptb_transformer import CONTEXT, ptb_transformer
from benchmarks.zoo.silero_vad import silero_vad
from benchmarks.zoo.stories260k import stories260k

_BATCH = 8
_STEPS = 35
_VALID = 20_000
"""Words of the validation text; all of it takes four times as long, and rounded weights are known by these."""
_TOLD = 64
"""Stories that are calibrated on; the others are evaluated."""

Metrics = Callable[[Answers, int | None], dict[str, float]]


def _called(answers: Answers) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *inputs: answers(inputs)


def _logits(answers: Answers) -> Callable[[Tensor], Tensor]:
    return lambda words: answers((words,))[0]


def _sentences(steps: int, count: int) -> list[Tensor]:
    """Return batches of `count` stretches of the training text, spread over it."""
    text = perplexity.treebank("train")
    return [*torch.split(text.unfold(0, steps, len(text) // count - 1)[:count], _BATCH)]


def _read(count: int = 64) -> list[tuple[Tensor, ...]]:
    """Return stretches with the states that the float network has behind the stretch before."""
    model, batches = ptb_lstm(), []
    with torch.inference_mode():
        for words in _sentences(2 * _STEPS, count):
            _, *states = model(words[:, :_STEPS], *no_states(len(words)))
            batches.append((words[:, _STEPS:], *(state.clone() for state in states)))
    return batches


def _valid_streamed(answers: Answers, samples: int | None) -> dict[str, float]:
    text = perplexity.treebank("valid")[: samples or _VALID]
    return {"perplexity": perplexity.streamed(_called(answers), no_states, text)}


def _valid_in_blocks(answers: Answers, samples: int | None) -> dict[str, float]:
    text = perplexity.treebank("valid")[: samples or _VALID]
    return {"perplexity": perplexity.in_blocks(_logits(answers), text)}


def _told(answers: Answers, samples: int | None) -> dict[str, float]:
    stories = perplexity.told_stories()[_TOLD:][:samples]
    return {"perplexity": perplexity.in_blocks(_logits(answers), stories, stories.shape[1] - 1, stories.shape[1] - 1)}


def _heard(count: int = 128) -> list[tuple[Tensor, ...]]:
    """Return calls on the sound of 10 dB, which is not evaluated, with the states that the float network has there."""
    sound = roc_auc.spoken_digits()
    quiet = roc_auc.Sound(sound.samples[2:], sound.active[2:])
    _, states = roc_auc.heard(silero_vad(), quiet)
    chosen = torch.linspace(1, states.shape[1] - 1, count).long()
    calls = quiet.calls()[0, chosen], *states[0, chosen].unbind(1)
    return [*zip(*(torch.split(each.clone(), _BATCH) for each in calls), strict=True)]


def _speech(answers: Answers, samples: int | None) -> dict[str, float]:
    sound = roc_auc.spoken_digits()
    noisy = roc_auc.Sound(sound.samples[:2], sound.active[:2, :samples])
    speech, _ = roc_auc.heard(_called(answers), noisy)
    return {"ROC AUC %": 100 * roc_auc.roc_auc(speech[:, : noisy.active.shape[1]], noisy.active)}


def _language(name: str, model: Callable[[], torch.nn.Module], batches: Callable[[], object], metrics: Metrics) -> Task:
    return Task(name, model, batches, metrics, "perplexity", average_bits=(4, 3), lower_is_better=True)


LANGUAGE = (
    _language("ptb_lstm", ptb_lstm, _read, _valid_streamed),
    _language("ptb_transformer", ptb_transformer, partial(_sentences, CONTEXT, 64), _valid_in_blocks),
    _language(
        "stories260k", stories260k, lambda: [*torch.split(perplexity.told_stories()[:_TOLD, :-1], _BATCH)], _told
    ),
    Task("silero_vad", silero_vad, _heard, _speech, "ROC AUC %", average_bits=(5, 4)),
)
"""Rows of `benchmarks.task_table.TASKS`."""
