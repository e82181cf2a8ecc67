"""What a tuned unit depends on, as the name it is kept under: plans that begin alike share their first units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.fx import GraphModule

from fxquant.core.ir import Choice, FakeQuantize, resolve, tensor_at
from fxquant.core.storage import tensor_digest, text_digest
from fxquant.passes.rounding.learned.units import Unit


def unit_keys(
    method: str,
    module: GraphModule,
    units: Sequence[Unit],
    choices: Mapping[str, Choice],
    starts: Sequence[Mapping[str, Tensor]],
    settings: Sequence[str],
) -> list[str]:
    """Return a name for each unit's result, in order: a digest of the unit, its grids, its start and all units before.

    What lies behind a unit runs in float while it is tuned and judged, so it does not count. Images, model and seed are
    in the identity of the store.

    Args:
        method: name of the run of the engine.
        module: bare simulated graph, whose quantizers hold the grids of the plan.
        units: of that graph.
        choices: site -> precision.
        starts: tensors of an earlier algorithm by the name of a site or an op.
        settings: for each unit, everything else that its result depends on.
    """
    keys, before = list[str](), method
    for index, (unit, setting) in enumerate(zip(units, settings, strict=True)):
        grids, tensors = _read(module, unit)
        tensors |= {
            f"start {number} of {name}": value
            for number, known in enumerate(starts)
            for name, value in known.items()
            if name in (*unit.sites, *unit.nodes)
        }
        labels = [f"{site} {choices[site].label}" for site in unit.sites]
        before = text_digest(f"{before} {unit} {labels} {grids} {setting} {tensor_digest(tensors)}")
        keys.append(f"{method}-{index:03d}-{before}")
    return keys


def _read(module: GraphModule, unit: Unit) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the kinds of grids of a unit's quantizers, and the constants and the tensors of grids that it reads."""
    kinds, tensors = dict[str, str](), dict[str, Tensor]()
    for node in (resolve(module.graph, name) for name in unit.nodes):
        # A quantizer of an earlier unit counts with that unit.
        for source in (node, *(each for each in node.all_input_nodes if each.name not in unit.inputs)):
            constants = [source] if source.op == "get_attr" else []
            if source.op == "call_module":
                quantizer = module.get_submodule(str(source.target))
                assert isinstance(quantizer, FakeQuantize)
                kinds[source.name] = str(quantizer.spec)
                tensors |= {f"{source.name}.{name}": value for name, value in quantizer.state_dict().items()}
                constants = [held for held in source.all_input_nodes if held.op == "get_attr"]
            tensors |= {str(held.target): tensor_at(module, str(held.target)) for held in constants}
    return kinds, tensors
