"""The rows of a lowering table: how a runtime computes each kind of op, and the target that follows from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fxquant.backends.affine import ByteGrid
from fxquant.backends.exact import JoinFormula, LayerFormula, Requantization
from fxquant.core.errors import OptionError
from fxquant.core.facts import Target
from fxquant.core.ir import FORMAT_KINDS, OPS, ScaleRule


@dataclass(frozen=True)
class KernelRow:
    """How a runtime computes one kind of op of the op table.

    Args:
        kernel: name of the integer kernel.
        refuse: why the kind runs in float although it could be quantized; empty where it runs on integers.
        writes_integers: whether the kernel can only write integers, so that its output carries a quantizer.
        adds_operand: whether the kernel of a weighted op adds a second operand before it rounds.
        layer: how the kernel of a weighted op rounds, to the last bit, for the exact reference; None where not known.
        join: the same of an op without weights; without it the reference computes the op in float and quantizes.
    """

    kernel: str = ""
    refuse: str = ""
    writes_integers: bool = False
    adds_operand: bool = False
    layer: LayerFormula | None = None
    join: JoinFormula | None = None


def target_of(
    name: str,
    rows: Mapping[str, KernelRow],
    weight_bits: tuple[int, ...],
    activation_bits: tuple[int, ...],
    storage_bits: Mapping[int, int],
) -> Target:
    """Return what a runtime executes in integers, read off its lowering table.

    Args:
        name: name of the target.
        rows: kind of op -> its row; kinds without a row run in float.
        weight_bits: widths that execute.
        activation_bits: widths that execute.
        storage_bits: weight width -> width it is stored in.

    Raises:
        OptionError: a row for a kind that the op table does not have.
    """
    rules = {rule.kind: rule for rule in OPS.values()}
    unknown = sorted(set(rows) - set(rules))
    if unknown:
        raise OptionError(
            f"the lowering table of target {name!r} has rows for {', '.join(unknown)}, which no op of the op table is; "
            f"add the op to OPS first, or name one of its kinds: {', '.join(sorted(rules))}"
        )
    computed = {kind: row for kind, row in rows.items() if not row.refuse}
    multiplied = [kind for kind in computed if rules[kind].macs is not None]
    return Target(
        name=name,
        kernels={kind: computed[kind].kernel for kind in multiplied},
        joins=frozenset(k for k in computed if k not in multiplied and rules[k].scale is ScaleRule.OWN),
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        storage_bits=storage_bits,
        output_quantized=frozenset(kind for kind, row in computed.items() if row.writes_integers),
        fused_sums=frozenset(kind for kind, row in computed.items() if row.adds_operand),
        refuse_joins={kind: row.refuse for kind, row in rows.items() if row.refuse},
        # Without a weight both operands of a product are activations.
        products=frozenset(kind for kind in multiplied if rules[kind].weight is None),
        # An integer kernel multiplies int8, whatever says which of the int8 integers a channel uses.
        weight_formats=tuple(kind for kind in FORMAT_KINDS if kind != "uniform"),
    )


def formulas_of(rows: Mapping[str, KernelRow], quantize: Callable[[Tensor, ByteGrid], Tensor]) -> Requantization:
    """Return the formulas of a runtime, read off its lowering table.

    Args:
        rows: kind of op -> its row.
        quantize: how float32 values become integers, not yet clamped to the grid.
    """
    return Requantization(
        quantize,
        layers={kind: row.layer for kind, row in rows.items() if row.layer is not None},
        joins={kind: row.join for kind, row in rows.items() if row.join is not None},
        adding=frozenset(kind for kind, row in rows.items() if row.adds_operand),
    )
