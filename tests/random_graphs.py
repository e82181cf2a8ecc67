"""Random networks of the supported ops, and of a few unsupported ones: a recipe, the module it makes, how it is drawn.

A recipe is plain data: its `repr` is Python that makes it again, which is what a failing case prints.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from tests.random_ops import CATALOGUE, one_of

BATCH = 3
"""Images that shapes are worked out with."""
LARGEST = 768
"""Elements of one image's value at most."""
CANCELLED = 1e-5
"""Error of float32 that a value may have, against its range."""
HIGHEST = 1e3
"""Largest value, so that nothing ends up far beyond what a trained network has."""


@dataclass(frozen=True)
class Step:
    """One call.

    Args:
        op: name of its row in the catalogue.
        sources: values it reads: the inputs come first, then what each step made, in order.
        options: of the row.
        same_as: number of an earlier step whose module is called again, None for a module of its own.
        weight_of: number of an earlier step whose weight this one's module shares, None for its own.
    """

    op: str
    sources: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    same_as: int | None = None
    weight_of: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A random network.

    Args:
        inputs: shapes of the inputs of one image.
        steps: calls in order.
        outputs: values it returns.
        form: "tensor", "tuple" or "dict".
        seed: of the weights and the images.
        channels_last: whether images come so.
    """

    inputs: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    form: str = "tensor"
    seed: int = 0
    channels_last: bool = False


class RandomNet(nn.Module):
    """The network of a recipe; weights are as PyTorch draws them, batch norms have statistics of their own."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.parts = nn.ModuleList()
        values = [torch.zeros(BATCH, *shape) for shape in recipe.inputs]
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(recipe.seed)
            for step in recipe.steps:
                part = self._part(step, [tuple(values[k].shape) for k in step.sources])
                self.parts.append(part)
                values += results(part.eval()(*(values[k] for k in step.sources)))
        self.eval()

    def _part(self, step: Step, shapes: Sequence[tuple[int, ...]]) -> nn.Module:
        if step.same_as is not None:
            return self.parts[step.same_as]
        part = CATALOGUE[step.op].build(step.options, shapes)
        for module in part.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                unlike(module)
        if step.weight_of is not None:
            part.weight = self.parts[step.weight_of].weight
        return part

    def run(self, *inputs: Tensor) -> Any:
        values = list(inputs)
        for step, part in zip(self.recipe.steps, self.parts, strict=True):
            values += results(part(*(values[k] for k in step.sources)))
        chosen = [values[k] for k in self.recipe.outputs]
        if self.recipe.form == "dict":
            return {f"result {k}": value for k, value in enumerate(chosen)}
        return chosen[0] if self.recipe.form == "tensor" else tuple(chosen)


class OneInput(RandomNet):
    def forward(self, x: Tensor) -> Any:
        return self.run(x)


class TwoInputs(RandomNet):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.run(x, y)


def network(recipe: Recipe) -> RandomNet:
    """Return the network of a recipe."""
    return (OneInput, TwoInputs)[len(recipe.inputs) - 1](recipe)


def unlike(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    """Give a batch norm statistics and gains as training would leave them."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_(std=0.3)
    norm.running_var.uniform_(0.3, 2.0)
    if norm.weight is not None:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)


def results(made: Any) -> list[Tensor]:
    """Return what a module made, as a list."""
    return list(made) if isinstance(made, tuple | list) else [made]


def images(recipe: Recipe, count: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Return seeded inputs; those of one seed begin alike whatever the count."""
    made = []
    for k, shape in enumerate(recipe.inputs):
        source = torch.Generator().manual_seed(recipe.seed * 1000 + seed * 10 + k)
        tensor = torch.randn(count, *shape, generator=source)
        last = recipe.channels_last and tensor.dim() == 4
        made.append(tensor.contiguous(memory_format=torch.channels_last) if last else tensor)
    return tuple(made)


INPUTS = ((3, 6, 6), (4, 5, 7), (3, 8, 8), (2, 1, 1), (1, 9, 4), (6, 4), (5, 8), (7,), (12,))


def draw_recipe(chance: Random, most: int = 8) -> Recipe:
    """Return a random recipe; a chance that hypothesis made shrinks to few and simple steps."""
    first = one_of(chance, *INPUTS)
    inputs = (first, one_of(chance, first, first, *INPUTS)) if chance.randrange(5) == 4 else (first,)
    recipe = Recipe(inputs, (), (0,), seed=chance.randrange(1000), channels_last=chance.randrange(6) == 5)
    values, parts = list(images(recipe, BATCH)), list[nn.Module]()
    steps = list[Step]()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for number in range(chance.randrange(1, most + 1)):
            for _ in range(6):
                step = _draw_step(chance, steps, parts, values, number)
                if step is not None and _take(step, steps, parts, values):
                    break
    read = {source for step in steps for source in step.sources}
    # What nothing reads must be returned, or it would not be computed.
    outputs = [k for k in range(len(inputs), len(values)) if k not in read] or [len(values) - 1]
    outputs += [chance.randrange(len(values)) for _ in range(2) if chance.randrange(6) == 5]
    turn = chance.randrange(len(outputs))
    outputs = outputs[turn:] + outputs[:turn]
    form = one_of(chance, "tuple", "dict") if len(outputs) > 1 else one_of(chance, "tensor", "tensor", "dict")
    return replace(recipe, steps=tuple(steps), outputs=tuple(outputs), form=form)


def _draw_step(
    chance: Random, steps: Sequence[Step], parts: Sequence[nn.Module], values: Sequence[Tensor], number: int
) -> Step | None:
    source = len(values) - 1 if chance.randrange(4) < 3 else chance.randrange(len(values))
    rank = values[source].dim()
    known = [k for k, step in enumerate(steps) if any(True for _ in parts[k].parameters())]
    if known and chance.randrange(8) == 7:
        other = int(one_of(chance, *known))
        return replace(steps[other], sources=(source,), same_as=other, weight_of=None)
    rows = {name: row for name, row in CATALOGUE.items() if rank in row.ranks and len(values) >= row.operands - 1}
    if number == 0:
        # Without a layer to quantize there is nothing to look at.
        rows = {name: row for name, row in rows.items() if name in ("conv", "linear", "attention", "squeeze_excite")}
    tickets = [name for name, row in rows.items() for _ in range(row.weight)]
    name = one_of(chance, *tickets)
    sources = [source, *(_partner(chance, values, source) for _ in range(rows[name].operands - 1))]
    if chance.randrange(2) == 1:
        sources.reverse()
    options = rows[name].draw(chance, [tuple(values[k].shape) for k in sources])
    if options is None:
        return None
    sharing = [k for k in known if steps[k].op == name and name in ("conv", "linear")]
    weight_of = one_of(chance, *sharing) if sharing and chance.randrange(3) == 2 else None
    return Step(name, tuple(sources), options, weight_of=weight_of)


def _partner(chance: Random, values: Sequence[Tensor], source: int) -> int:
    """Return a value of the same shape where there is one, or any of the same rank."""
    alike = [k for k, value in enumerate(values) if value.shape == values[source].shape]
    near = [k for k, value in enumerate(values) if value.dim() == values[source].dim()]
    return int(one_of(chance, *(alike if chance.randrange(3) < 2 else near)))


def _take(step: Step, steps: list[Step], parts: list[nn.Module], values: list[Tensor]) -> bool:
    """Add a step if torch can compute it and what it makes is small enough."""
    given = [values[k] for k in step.sources]
    try:
        if step.same_as is not None:
            part = parts[step.same_as]
        else:
            part = CATALOGUE[step.op].build(step.options, [tuple(v.shape) for v in given]).eval()
        if step.weight_of is not None:
            shared = parts[step.weight_of].weight
            if not isinstance(shared, nn.Parameter) or shared.shape != getattr(part.weight, "shape", None):
                return False
            part.weight = shared
        made, exact = results(part(*given)), results(copy.deepcopy(part).double()(*(v.double() for v in given)))
        fewer = results(part(*(value[:-1] for value in given)))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    for value, part_of_it, wanted in zip(made, fewer, exact, strict=True):
        small = 0 < value.numel() <= LARGEST * BATCH and value.dim() in (2, 3, 4)
        if not small or value.shape[0] != BATCH or not float(value.abs().max()) < HIGHEST:
            return False
        # Where all cancels, what is left is rounding, and no two runtimes have it alike.
        if float((value - wanted).abs().max()) > CANCELLED * max(float(wanted.max() - wanted.min()), 1e-3):
            return False
        # A convolution takes an image without a batch too, and then the images would be its channels.
        if part_of_it.shape != value[:-1].shape or not torch.allclose(part_of_it, value[:-1], atol=1e-4):
            return False
    steps.append(step)
    parts.append(part)
    values += made
    return True
