"""The settings of a search: what may be chosen, how the graph is prepared, and how much is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any, Literal

from fxquant.core.errors import OptionError
from fxquant.core.facts.option_fields import BY_EFFORT, BY_TARGET, Options, rules
from fxquant.core.facts.target import Target
from fxquant.core.ir import Choice, WeightFormat

EffortName = Literal["fast", "default", "best"]
Context = Literal["float", "widest"]
ScoringRounding = Literal["gptq", "nearest"]
Contest = Literal["measured", "solved", "uniform"]
FloatEnds = Literal["measured", "always", "never"]


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Args:
        estimators: sensitivity estimators, the preferred one first, which the search starts from.
        images: calibration images used at most.
        scored: images that layers are scored on at most; fewer for large networks, as `work` says.
        least_scored: images that layers of any network are scored on where there are as many.
        work: multiply-accumulates of measuring one plan, at most; all images measure plans of small networks.
        least_judged: images that plans of any network are measured on where there are as many.
        refine_moves: plans measured at most to improve the best finalist.
        rounds: times the plan is scored again around itself at most.
        rounding: algorithms that round the plan's weights.
        curve: plans at other budgets that are measured at most.
    """

    estimators: tuple[str, ...]
    images: int
    scored: int
    least_scored: int
    work: float
    least_judged: int
    refine_moves: int
    rounds: int
    rounding: str
    curve: int


LEAST_SCORED = 72
"""With 32 images, MobileNetV2's plan for a file of .14 had KL .070 on test images, with 72 .056."""
LEAST_JUDGED = 128
"""Picked on about so many, plans of MobileNetV1 and MobileNetV2 lost 2.5 % more KL than the best at hand
(`benchmarks.verdict`)."""

EFFORTS: dict[EffortName, Effort] = {
    "fast": Effort(("fisher_out",), 96, 64, 24, 5e10, 32, 8, 0, "nearest", 0),
    "default": Effort(
        ("gram_shrunk", "gram", "diagonal", "fisher_out"),
        384,
        96,
        LEAST_SCORED,
        5e10,
        LEAST_JUDGED,
        48,
        0,
        "qronos_rescaled",
        6,
    ),
    "best": Effort(
        ("gram_shrunk", "gram", "diagonal", "monotone", "pairs", "fisher", "fisher_out"),
        1024,
        256,
        LEAST_SCORED,
        inf,
        LEAST_JUDGED,
        256,
        2,
        "qronos_rescaled",
        13,
    ),
}
"""Preset name -> what it measures."""


@dataclass(frozen=True)
class Settings(Options):
    """Options of a search.

    Args:
        bits: candidate weight formats: bits of evenly spaced levels (2..8), "2c" for a codebook, "3p" for powers of
            two, "2.5r" for output channels of several widths; 32 adds float. By default codebooks of 2 and 3 bits, and
            4, 6 and 8 bits, as far as the target executes them.
        activation_bits: candidate activation bits.
        target: what will run the model: a name, the path of a target file (.json), or a `Target`.
        effort: how much is measured.
        dynamic_image: leave height and width of images free; for fully convolutional models, or those that pool to one
            pixel.
        pins: pattern of layers -> the only precision allowed there.
        pin_ends: pin the first and the last layer to 8 bits.
        keep_float: pattern of layers that stay in float.
        float_ends: whether the first and the last layers stay in float. "measured" leaves them there if the model
            returns an image, they have little work and no pin, and the loss falls clearly; recipes do not, nor does
            `fxquant.prepare`, which has no images to measure with.
        forbid: pattern of layers -> precisions that may not be used there.
        observer: how the range of an activation is chosen.
        loss: what plans are judged by. By default the sum over the model's float outputs: KL of each class score along
            its axis, relative squared error of other values. A name is for the first output, "kl+mse" for two in
            order; "ce" needs labels (CLADO as published). A function (float output, quantized output, labels) returns
            one number for each image; on the
            command line it is net.py:function.
        estimators: sensitivity estimators, the preferred one first; by default those of the effort.
        context: how all other layers are quantized while one is scored: not at all, or at their widest integer
            precision (CalibTIP, arXiv 2006.10518).
        solver: algorithm that solves the integer program.
        choose: which plan is taken: "measured" compares those of all estimators and the uniform ones by their measured
            loss, and improves the best by measured swaps; "solved" takes that of the preferred estimator as the solver
            gave it, as published methods do; "uniform" the best plan of one precision within the limits.
        time_limit: seconds for each solve.
        held_out: share of the calibration images kept for verification.
        confidence: limits on answers hold for all images like the held-out ones with this probability: not the measured
            value, but its upper bound is within the limit.
        requantization_cost: added to a plan's modelled loss, in its unit, for every two neighbouring layers that take
            their activations at unlike widths, or one of them in float.
        refine_moves: plans measured at most to improve the best one by swaps; by default that of the effort.
        rounds: times at most the plan is scored again around itself and solved near it; by default that of the effort.
        scoring_rounding: how weights are rounded before there is a plan, in every candidate format: plans are scored,
            solved, measured and compared with these weights. "nearest" thinks low widths worse than they will be.
        curve: plans at other budgets that are solved and measured, to show what more or less room would bring; by
            default that of the effort.
        rounding: algorithms that round the plan's weights, joined by "+"; by default that of the effort. A rounding is
            kept only where it lowers the loss: the geometric mean of that on the held-out images and that which plans
            are measured by.
        rounding_options: option of the reconstruction engine -> value, for example iterations=300.
        expand: shares of each layer's input channels that may be split in two, exactly in float, so that they have
            twice the range; formats and shares are chosen by one program, within limits on bits, bytes or bit
            operations.
        prune: shares that may be left out where one layer alone reads another's output, the weights of the channels
            that stay reconstructed; chosen likewise.
        routed: make, besides the plan, a network that runs one of two plans for each image: `Result.routed`. The
            limits hold in the mean over images.
        training: how the plan's network is trained at the end, without labels unless the loss needs them: a name in
            `fxquant.qat.TRAINERS`; by default it is not. The training is kept only where it lowers the held-out loss.
        training_options: option of that training -> value, for example steps=300.
        recipe: published method by its name in `fxquant.recipes`; its values apply wherever no other is given.
        seed: same seed, same answer.
        threads: threads of the target's runtime; by default it chooses.
        distributed: share the scoring among the processes that torchrun started. Each of them makes the same call, all
            get the same scores, and one of them should write the result.

    Raises:
        OptionError: a value that is not allowed.
    """

    bits: tuple[int | str, ...] = BY_TARGET
    activation_bits: tuple[int, ...] = (8,)
    target: str | Path | Target = "onnxruntime"
    effort: EffortName = "default"
    dynamic_image: bool = False
    pins: Mapping[str, Choice] = field(default_factory=dict, metadata=rules(flag="pin"))
    pin_ends: bool = False
    keep_float: tuple[str, ...] = ()
    float_ends: FloatEnds = "measured"
    forbid: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)
    observer: str = "mse"
    loss: str | Callable[..., Any] | None = None
    estimators: tuple[str, ...] = BY_EFFORT
    context: Context = "float"
    solver: str = "iqp"
    choose: Contest = "measured"
    time_limit: float = field(default=60.0, metadata=rules(above=0))
    held_out: float = field(default=0.25, metadata=rules(above=0, below=1))
    confidence: float = field(default=0.95, metadata=rules(above=0, below=1))
    requantization_cost: float = field(default=0.0, metadata=rules(least=0))
    refine_moves: int = field(default=BY_EFFORT, metadata=rules(least=0))
    rounds: int = field(default=BY_EFFORT, metadata=rules(least=0))
    scoring_rounding: ScoringRounding = "gptq"
    curve: int = field(default=BY_EFFORT, metadata=rules(least=0))
    rounding: str = BY_EFFORT
    rounding_options: Mapping[str, object] = field(default_factory=dict, metadata=rules(flag="rounding_option"))
    expand: tuple[float, ...] = field(default=(), metadata=rules(above=0, most=1))
    prune: tuple[float, ...] = field(default=(), metadata=rules(above=0, below=1))
    routed: bool = False
    training: str | None = None
    training_options: Mapping[str, object] = field(default_factory=dict, metadata=rules(flag="training_option"))
    recipe: str | None = None
    seed: int = 0
    threads: int | None = field(default=None, metadata=rules(least=1))
    distributed: bool = field(default=False, metadata=rules(saved=False))

    def __post_init__(self) -> None:
        if isinstance(self.target, Path):
            object.__setattr__(self, "target", str(self.target))
        super().__post_init__()
        if self.bits is not None:
            formats = sorted({WeightFormat.parse(text) for text in self.bits})
            found = [weight.bits if weight.kind == "uniform" else weight.label for weight in formats]
            object.__setattr__(self, "bits", tuple(found))
        object.__setattr__(self, "activation_bits", tuple(sorted(set(self.activation_bits))))
        empty = [name for name in ("bits", "activation_bits", "estimators") if getattr(self, name) == ()]
        if empty:
            raise OptionError(f"{empty[0]} is empty; give at least one")

    def settled(self, **chosen: Any) -> Settings:
        """Return settings in which nothing is left to the effort.

        Args:
            chosen: option -> value for those that are None, in the place of the effort's; `bits` of the target.
        """
        preset = EFFORTS[self.effort]
        named = {
            name: getattr(preset, name) for name in ("estimators", "refine_moves", "rounds", "rounding", "curve")
        } | chosen
        return replace(self, **{name: value for name, value in named.items() if getattr(self, name) is None})
