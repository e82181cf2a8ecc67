"""The plan: a precision for every site, with the proof that came with it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fxquant.core.errors import FileFormatError, OptionError
from fxquant.core.host import card, printable, table, tiles
from fxquant.core.ir import Choice
from fxquant.core.storage import read_json, write_json

FORMAT_VERSION = 1
STATUSES = ("optimal", "feasible", "measured", "uniform", "manual")


@dataclass(frozen=True)
class BitAllocation:
    """Precision of every site, with the losses and costs it was chosen by; a person may review and edit its file.

    Args:
        choices: site name -> precision, for every site.
        estimator: sensitivity estimator that the plan was solved for, or another origin.
        objective: modelled loss of the plan.
        bound: proven lower bound of the modelled loss and `border_cost` together, over all plans within `limits` that
            use no more of what was minimized.
        gap: `(objective + border_cost - bound)` against its own size, 0 when proved.
        status: "optimal" (a solver proved it best for the estimator's model), "feasible" (a solver found it and proved
            no more than the gap), "measured" (chosen by measuring plans that no solver proposed as they are),
            "uniform" (one precision everywhere, of least measured loss) or "manual".
        used: limit name -> what the plan uses, in the limit's unit; what was minimized too.
        limits: limit name -> what was allowed.
        measured_loss: real loss on the images that decide between plans; None if not measured.
        compared_loss: the same before the weights got their final rounding, as in `finalists`; None where that changed
            nothing.
        loss: name of the loss that was measured, "" if it is not known.
        images: how many images `measured_loss` is the mean of, 0 if that is not known.
        finalists: name of each plan that was measured -> its real loss, all with weights rounded in one way.
        border_cost: modelled cost of requantization between layers, in the unit of the loss; not part of `objective`.
        notes: irregularities while solving.
        quality: name of each quality limit -> what was measured on held-out images.
        quality_bounds: name of each -> its upper bound for all images like them, which keeps the limit.
        quality_limits: name of each quality limit -> what was allowed.
        quality_images: how many images `quality` was measured on.
        minimized: the cost that was minimized under limits on answers, which `used` holds too; "" for none.

    Raises:
        OptionError: no sites, or an unknown status.
    """

    choices: dict[str, Choice]
    estimator: str = "manual"
    objective: float = math.nan
    bound: float = math.nan
    gap: float = math.nan
    status: str = "manual"
    used: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    measured_loss: float | None = None
    compared_loss: float | None = None
    loss: str = ""
    images: int = 0
    finalists: dict[str, float] = field(default_factory=dict)
    border_cost: float = 0.0
    notes: tuple[str, ...] = ()
    quality: dict[str, float] = field(default_factory=dict)
    quality_bounds: dict[str, float] = field(default_factory=dict)
    quality_limits: dict[str, float] = field(default_factory=dict)
    quality_images: int = 0
    minimized: str = ""

    def __post_init__(self) -> None:
        if not self.choices:
            raise OptionError("a plan needs at least one site")
        if self.status not in STATUSES:
            raise OptionError(f"plan status {self.status!r} is unknown; allowed: {', '.join(STATUSES)}")

    @property
    def slack(self) -> dict[str, float]:
        """Limit name -> what the plan leaves unused."""
        return {name: limit - self.used[name] for name, limit in self.limits.items() if name in self.used}

    @property
    def asked(self) -> dict[str, Any]:
        """The budget that was asked for, as the arguments of `Budget`."""
        return {**self.limits, **self.quality_limits, **({"minimize": self.minimized} if self.minimized else {})}

    @property
    def texts(self) -> dict[str, str]:
        """What exported files say about themselves: the choices, as JSON."""
        labels = {site: choice.label for site, choice in self.choices.items()}
        return {"fxquant_plan": json.dumps(labels, separators=(",", ":"))}

    def remeasured(self, loss: float, images: int) -> BitAllocation:
        """Return the plan with the loss of better weights; the one it was compared by stays beside it."""
        compared = self.measured_loss if self.compared_loss is None else self.compared_loss
        return replace(self, measured_loss=loss, images=images, compared_loss=compared)

    def __repr__(self) -> str:
        counts = Counter(choice.label for choice in self.choices.values())
        held = ", ".join(f"{count} x {label}" for label, count in sorted(counts.items()))
        return printable(f"BitAllocation({len(self.choices)} layers: {held}; {self.summary()})")

    def _repr_html_(self) -> str:
        numbers = [
            ("Plan", self.status, self.estimator),
            ("Modelled loss", _shown(self.objective), f"proven bound {_shown(self.bound)}"),
        ]
        if self.measured_loss is not None:
            numbers.append(("Measured loss", _shown(self.measured_loss), "0 is the float model"))
        for name, limit in self.limits.items():
            numbers.append((name, _shown(self.used.get(name, math.nan)), f"of {_shown(limit)}"))
        for name, limit in self.quality_limits.items():
            bound = _shown(self.quality_bounds.get(name, math.nan))
            numbers.append(
                (name, _shown(self.quality.get(name, math.nan)), f"at most {bound}, {_shown(limit)} allowed")
            )
        rows = [(site, choice.label) for site, choice in self.choices.items()]
        return card("fxquant plan", tiles(numbers), table(("layer", "precision"), rows))

    def summary(self) -> str:
        """Return status, losses and what is used of each limit in one line."""
        measured = "" if self.measured_loss is None else f", measured {self.measured_loss:.4g}"
        used = "".join(f", {name} {value:.4g}" for name, value in {**self.used, **self.quality}.items())
        return f"{self.status}, loss {self.objective:.4g}{measured}{used}"

    def to_json(self, path: str | Path | None = None) -> dict[str, Any]:
        """Return the plan as plain JSON values, and write it if a path is given.

        Raises:
            OutputError: the path cannot be written.
        """
        numbers = {"objective": self.objective, "bound": self.bound, "gap": self.gap}
        document: dict[str, Any] = {
            "choices": {site: choice.label for site, choice in self.choices.items()},
            "estimator": self.estimator,
            # JSON has no NaN; a hand-made plan simply has no objective.
            **{name: _plain(value) for name, value in numbers.items()},
            "status": self.status,
            "used": self.used,
            "limits": self.limits,
            "measured_loss": _plain(self.measured_loss),
            "compared_loss": _plain(self.compared_loss),
            "loss": self.loss,
            "images": self.images,
            "finalists": {name: _plain(loss) for name, loss in self.finalists.items()},
            "border_cost": self.border_cost,
            "notes": list(self.notes),
            "quality": self.quality,
            "quality_bounds": {name: _plain(bound) for name, bound in self.quality_bounds.items()},
            "quality_limits": self.quality_limits,
            "quality_images": self.quality_images,
            "minimized": self.minimized,
        }
        if path is not None:
            write_json(Path(path), "plan", FORMAT_VERSION, document)
        return document

    @staticmethod
    def from_json(source: str | Path | Mapping[str, Any]) -> BitAllocation:
        """Read a plan back from a file or from the values `to_json` gave.

        Raises:
            FileFormatError: the file is missing, damaged, or holds a precision that is not understood.
        """
        origin = "the plan" if isinstance(source, Mapping) else str(source)
        document = source if isinstance(source, Mapping) else read_json(Path(source), "plan", FORMAT_VERSION)
        try:
            numbers = {name: _number(document.get(name)) for name in ("objective", "bound", "gap")}
            return BitAllocation(
                choices={str(site): Choice.parse(label) for site, label in document["choices"].items()},
                estimator=str(document.get("estimator", "manual")),
                status=str(document.get("status", "manual")),
                used={str(k): float(v) for k, v in document.get("used", {}).items()},
                limits={str(k): float(v) for k, v in document.get("limits", {}).items()},
                measured_loss=_optional(document.get("measured_loss")),
                compared_loss=_optional(document.get("compared_loss")),
                loss=str(document.get("loss", "")),
                images=int(document.get("images", 0)),
                finalists={str(k): _number(v) for k, v in document.get("finalists", {}).items()},
                border_cost=float(document.get("border_cost", 0.0)),
                notes=tuple(map(str, document.get("notes", ()))),
                quality={str(k): float(v) for k, v in document.get("quality", {}).items()},
                quality_bounds={str(k): _number(v) for k, v in document.get("quality_bounds", {}).items()},
                quality_limits={str(k): float(v) for k, v in document.get("quality_limits", {}).items()},
                quality_images=int(document.get("quality_images", 0)),
                minimized=str(document.get("minimized", "")),
                **numbers,
            )
        except (KeyError, TypeError, ValueError, AttributeError, OptionError) as error:
            raise FileFormatError(f"{origin} is not an intact plan ({type(error).__name__}: {error})") from error


def _shown(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"


def _plain(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


@dataclass(frozen=True)
class BudgetCurve:
    """Plans at other budgets by name, each with its loss on held-out images, weights rounded as in comparing plans."""

    plans: dict[str, BitAllocation]


@dataclass(frozen=True)
class Finalists:
    """Plans within the budget that are worth measuring, by name."""

    plans: dict[str, BitAllocation]
