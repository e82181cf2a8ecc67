"""A recipe: a published method as values of settings, and how a user's own settings are laid over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fxquant.core.errors import OptionError
from fxquant.core.facts import Settings, options_of
from fxquant.core.registry import Registry
from fxquant.core.run import JOIN
from fxquant.passes.rounding.learned import PROFILES
from fxquant.qat import TRAINERS

Need = Literal["labels", "gradients", "training"]
"""What a method takes beside calibration images: labels of them, gradients of the network, gradient steps on them."""


@dataclass(frozen=True)
class Recipe:
    """A published method on this engine.

    Args:
        name: in `RECIPES`.
        about: what the method does, in a phrase.
        source: paper, with the section or equation.
        options: setting -> value, for the parts that the method says something of.
        essence: the settings that make the method what it is; other values of these are refused.
        needs: what it takes beside calibration images; "training" implies gradients.

    Raises:
        OptionError: an unknown setting or need, a value that is not allowed, or an essence that is no part.
    """

    name: str
    about: str
    source: str
    options: Mapping[str, Any]
    essence: tuple[str, ...]
    needs: tuple[Need, ...] = ()

    def __post_init__(self) -> None:
        _ = self.settings
        odd = [name for name in self.essence if name not in self.options]
        odd += [need for need in self.needs if need not in get_args(Need)]
        if odd or not self.essence:
            raise OptionError(f"recipe {self.name!r}: {odd or 'no essence'}; name parts of it, and known needs")

    @property
    def settings(self) -> Settings:
        """The recipe alone, all else by default."""
        return Settings.of(self.options)

    @property
    def rounding(self) -> tuple[str, ...]:
        """Names of the algorithms that round the plan's weights."""
        return tuple((self.settings.rounding or "nearest").split(JOIN))

    @property
    def allocator(self) -> str:
        """What chooses the plan: "uniform", "training", or the name of a solver."""
        if self.training and TRAINERS[self.training].chooses:
            return "training"
        return "uniform" if self.settings.choose == "uniform" else self.settings.solver

    @property
    def training(self) -> str:
        """Name of what trains the network at the end; "" for nothing."""
        return self.settings.training or ""

    @property
    def estimator(self) -> str:
        """What scores the choices; "" where no score decides."""
        if self.training and TRAINERS[self.training].chooses:
            return self.training
        chosen = self.settings.estimators or ()
        return "" if self.allocator == "uniform" else "+".join(chosen)

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the algorithms that learn a rounding by gradient steps on the calibration images."""
        return tuple(name for name in self.rounding if name in PROFILES)


RECIPES: Registry[Recipe] = Registry("recipe")
"""Name -> recipe."""


def settings_of(given: Settings | Mapping[str, Any] | None = None, **named: Any) -> Settings:
    """Return the settings of a call: the parts of its recipe, and in their place whatever the user gives.

    Mappings (`pins`, `rounding_options`) are laid over each other by key. A recipe's `rounding_options` belong to its
    rounding, its `training_options` to its training: another one leaves them out.

    Args:
        given: settings as an object, of which those count that are not the default, or name -> value.
        named: values that replace those in `given`; None replaces nothing.

    Raises:
        OptionError: an unknown recipe, name or value, or one that contradicts what makes the recipe.
    """
    known = options_of(Settings)
    if isinstance(given, Settings):
        own = {name: value for name in known if (value := getattr(given, name)) != known[name].default}
    else:
        own = {name: value for name, value in (given or {}).items() if value is not None}
    own |= {name: value for name, value in named.items() if value is not None}
    # Checked before they are compared: a list is a tuple, a label a precision.
    asked = Settings.of(own)
    if asked.recipe is None:
        return asked
    recipe = RECIPES[asked.recipe]
    parts = dict(recipe.options)
    for part in ("rounding", "training"):
        if part in own and own[part] != recipe.options.get(part):
            _ = parts.pop(f"{part}_options", None)
    _refuse_contradictions(recipe, asked, own)
    for name, value in own.items():
        ours = parts.get(name)
        parts[name] = {**ours, **value} if isinstance(ours, Mapping) and isinstance(value, Mapping) else value
    return Settings.of(parts)


def _refuse_contradictions(recipe: Recipe, asked: Settings, own: Mapping[str, Any]) -> None:
    """Refuse values that would leave nothing of the recipe but its name.

    Raises:
        OptionError: there are such.
    """
    for name in recipe.essence:
        ours, theirs = getattr(recipe.settings, name), getattr(asked, name)
        if isinstance(ours, Mapping):
            theirs = {**ours, **theirs}
        if name in own and theirs != ours:
            raise OptionError(
                f"{name}={theirs!r} contradicts recipe {recipe.name!r}, which is {name}={ours!r}; leave one of the two "
                "out (`fxquant recipes` lists all)"
            )
