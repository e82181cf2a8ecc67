"""An FX graph that computes convolutions and linear layers in integers, with uint8 tensors between them.

The simulated graph is walked once. A value is known as float, as uint8 on a grid, or both; what is missing is made
on demand, so that no quantize/dequantize pair is ever written inside a chain. An op whose only reader is a quantizer
writes that quantizer's integers itself, a clipping activation in between included.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxquant.backends.affine import ByteGrid
from fxquant.backends.base import Executable
from fxquant.backends.int8.attention import STANDS_FOR, fuse_attention
from fxquant.backends.int8.conv import IntegerConv
from fxquant.backends.int8.inductor import compiled
from fxquant.backends.int8.linear import IntegerLinear
from fxquant.backends.int8.modules import Dequantize, IntegerAdd, Quantize
from fxquant.backends.int8.rules import INTEGER_OPS, Ending, IntegerOp, Maker, OpCall
from fxquant.backends.int8.stored_weight import StoredTable, StoredWeight, stored, weight_quantizer
from fxquant.backends.int8.tables import look_up
from fxquant.backends.kernel_rows import target_of
from fxquant.backends.reference import STORAGE_BITS
from fxquant.core.errors import LoweringError
from fxquant.core.facts import Target
from fxquant.core.ir import (
    REFUSED,
    FakeQuantize,
    ScaleRule,
    activation_inputs,
    clip_bounds,
    erase_dead,
    finish,
    rule_of,
    shape_of,
    tensor_at,
)
from fxquant.core.run import first_tensor

aten = torch.ops.aten

NAME = "fx_int8"
WIDTHS = (2, 3, 4, 5, 6, 7, 8)

_REASON = "float_reason"


@dataclass(frozen=True)
class FxInt8Backend:
    """PyTorch itself: eager execution of the integer graph, or Inductor's code for it.

    Args:
        inductor: hand the integer graph to torch.compile.
        exact: compute integers in float64 instead of integer kernels, the fallback of CPUs without them.
    """

    inductor: bool = False
    exact: bool = False

    @property
    def target(self) -> Target:
        """What the rows of `INTEGER_OPS` run on integers."""
        # Kernels here multiply int8; the state dict and exported programs hold weights packed.
        return target_of(NAME, INTEGER_OPS, WIDTHS, WIDTHS, STORAGE_BITS)

    def lower(self, module: GraphModule, batch: int = 1) -> GraphModule:
        """Return the graph that computes in integers; weights are packed on its first call.

        Args:
            module: simulated or float graph; it is not changed.
            batch: images per call that kernels are chosen for; any number runs.

        Raises:
            LoweringError: a quantizer's grid does not fit uint8.
        """
        return _Lowering(module, self.exact, batch).run()

    def compile(self, module: GraphModule, inputs: tuple[Tensor, ...], threads: int | None = None) -> Executable:
        """Make a float or simulated graph run here; see `Backend.compile`.

        Raises:
            LoweringError: a quantizer's grid does not fit uint8, or there are no inputs.
        """
        if not inputs:
            raise LoweringError("a graph is compiled for example inputs; give at least one tensor")
        lowered = self.lower(module, int(inputs[0].shape[0]))
        call = compiled(lowered) if self.inductor else lowered

        def run(batch: tuple[Tensor, ...]) -> Tensor:
            before = torch.get_num_threads()
            torch.set_num_threads(threads or before)
            try:
                with torch.no_grad():
                    return first_tensor(call(*batch)).float()
            finally:
                torch.set_num_threads(before)

        return run


def kernel_report(lowered: GraphModule) -> dict[str, str]:
    """Return which kernel runs each multiply-accumulate op of a lowered graph, or `float: ` and the reason."""
    report = {}
    for node in lowered.graph.nodes:
        module = lowered.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, IntegerConv | IntegerLinear):
            report[node.name] = module.kernel
        elif _REASON in node.meta:
            for name in node.meta.get(STANDS_FOR, (node.name,)):
                report[name] = f"float: {node.meta[_REASON]}"
    return report


def traced_forms(lowered: GraphModule) -> dict[str, str]:
    """Return convolution of a lowered graph -> the form in which a compiler traces it; see `IntegerConv.traced_as`."""
    calls = {n.name: lowered.get_submodule(str(n.target)) for n in lowered.graph.nodes if n.op == "call_module"}
    return {name: module.traced_as for name, module in calls.items() if isinstance(module, IntegerConv)}


def reuse_memory(lowered: GraphModule) -> None:
    """Let a convolution add into its second operand's memory wherever nothing reads that operand afterwards."""
    order = {node: index for index, node in enumerate(lowered.graph.nodes)}
    for node in order:
        module = lowered.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, IntegerConv) or len(node.args) != 2:
            continue
        other = node.args[1]
        assert isinstance(other, Node)
        made = lowered.get_submodule(str(other.target)) if other.op == "call_module" else None
        # Anything but a module's own call may be a view of the operand, and live on.
        read_as_it_is = all(user.op == "call_module" for user in other.users)
        last = max(order[user] for user in other.users) == order[node] and other is not node.args[0]
        module.may_overwrite = isinstance(made, IntegerConv | IntegerAdd) and read_as_it_is and last


@dataclass(frozen=True)
class _Pending:
    """An op that waits for what is behind it: its quantizer, or the sum that its kernel computes as well.

    Args:
        base: the op whose kernel will run.
        inputs: lowered operands of that kernel.
        maker: makes it.
        ending: what is known of its end so far.
        low: lower bound of a clip on the way, in real units.
        high: upper bound.
    """

    base: Node
    inputs: tuple[Node, ...]
    maker: Maker
    ending: Ending = field(default_factory=Ending)
    low: float = -torch.inf
    high: float = torch.inf


def _row(node: Node) -> IntegerOp | None:
    rule = rule_of(node)
    return None if rule is None else INTEGER_OPS.get(rule.kind)


class _Lowering:
    """One walk over a simulated graph."""

    def __init__(self, module: GraphModule, exact: bool, batch: int) -> None:
        self.source, self.exact, self.batch = module, exact, batch
        self.graph = Graph()
        self.attributes: dict[str, object] = {}
        self.floats: dict[Node, Node] = {}
        self.integers: dict[Node, tuple[Node, ByteGrid]] = {}
        self.pending: dict[Node, _Pending] = {}

    def run(self) -> GraphModule:
        """Return the lowered graph."""
        for node in self.source.graph.nodes:
            if node.op == "output":
                self.graph.output(map_arg(node.args[0], self.as_float))
            elif node.op == "placeholder":
                self.floats[node] = self.graph.node_copy(node)
            elif node.op != "get_attr" and weight_quantizer(self.source, node) is None and not self._in_integers(node):
                self._copy(node)
        # Called as the source is, and answering as it does: a tensor, a tuple or a dictionary.
        self.graph.set_codegen(copy.copy(self.source.graph._codegen))
        lowered = GraphModule(self.attributes, self.graph, "IntegerGraph")
        erase_dead(lowered)
        fuse_attention(lowered)
        look_up(lowered)
        reuse_memory(lowered)
        return finish(lowered).eval()

    def as_float(self, node: Node) -> Node:
        """Return the lowered node with the real value of a source node, made now if need be."""
        if node not in self.floats:
            if node in self.pending:
                waiting = self.pending[node]
                self.floats[node] = self._call(node.name, waiting.maker(waiting.ending), waiting.inputs, node)
            elif node in self.integers:
                value, grid = self.integers[node]
                self.floats[node] = self._call(f"dequantize_{node.name}", Dequantize(grid), (value,), node)
            elif node.op == "call_module":
                self.floats[node] = self._call(node.name, stored(self.source, node, StoredWeight), (), node)
            else:
                self.attributes[str(node.target)] = tensor_at(self.source, str(node.target)).detach()
                self.floats[node] = self.graph.node_copy(node)
        return self.floats[node]

    def _in_integers(self, node: Node) -> bool:
        """Lower a node to integers, or put it off until its quantizer comes; False if it must run in float."""
        fake = self._quantizer(node)
        if fake is not None:
            return self._quantize(node, fake)
        rule = rule_of(node)
        if rule is None:
            return self._query_shape(node)
        if rule.scale in (ScaleRule.KEEP, ScaleRule.SHARE):
            return self._rearrange(node)
        if rule.scale is ScaleRule.ABSORB:
            return self._clip(node)
        if self._joins_pending(node):
            return True
        maker = self._maker(node)
        if isinstance(maker, str):
            return False
        waiting = _Pending(node, self._inputs(node), maker)
        if self._ends_in_quantizer(node) or self._is_summand(node) or self._is_activated(node):
            self.pending[node] = waiting
            return True
        if rule.weight is None:
            return False
        self.floats[node] = self._call(node.name, maker(waiting.ending), waiting.inputs, node)
        return True

    def _is_summand(self, node: Node) -> bool:
        """Whether the only reader is a sum behind which the kernel itself can round."""
        row = _row(node)
        if row is None or not row.adds_operand or len(node.users) != 1:
            return False
        reader = next(iter(node.users))
        joined = rule_of(reader)
        if joined is None or not joined.adds:
            return False
        same = [shape_of(source) == shape_of(reader) for source in activation_inputs(reader)]
        return same == [True, True] and not reader.kwargs and self._ends_in_quantizer(reader)

    def _is_activated(self, node: Node) -> bool:
        """Whether the only reader is an activation that the kernel computes, with a quantizer behind it."""
        row = _row(node)
        if row is None or len(node.users) != 1:
            return False
        reader = next(iter(node.users))
        return row.activation(reader) is not None and self._ends_in_quantizer(reader)

    def _joins_pending(self, node: Node) -> bool:
        """Take a sum or an activation into the kernel that waits in front of it."""
        sources = activation_inputs(node)
        waiting = next((self.pending[source] for source in reversed(sources) if source in self.pending), None)
        if waiting is None:
            return False
        row = _row(waiting.base)
        activation = row.activation(node) if row is not None and self._is_activated(waiting.base) else None
        if activation is not None:
            self.pending[node] = replace(waiting, ending=Ending(activation=activation))
            return True
        if len(sources) != 2 or not self._is_summand(waiting.base):
            return False
        other = sources[0] if self.pending.get(sources[1]) is waiting else sources[1]
        if other not in self.integers:
            return False
        value, grid = self.integers[other]
        self.pending[node] = replace(waiting, inputs=(*waiting.inputs, value), ending=Ending(addend=grid))
        return True

    def _quantizer(self, node: Node) -> FakeQuantize | None:
        """Return the quantizer of activations that a node calls; kernels know only one scale per tensor."""
        fake = self.source.get_submodule(str(node.target)) if node.op == "call_module" else None
        is_activation = isinstance(fake, FakeQuantize) and fake.spec.channel_axis is None
        constant = isinstance(node.args[0], Node) and node.args[0].op == "get_attr" if node.args else False
        return fake if isinstance(fake, FakeQuantize) and is_activation and not constant else None

    def _quantize(self, node: Node, fake: FakeQuantize) -> bool:
        source = node.args[0]
        assert isinstance(source, Node)
        grid = ByteGrid.of(fake.grid)
        if source in self.integers and self.integers[source][1] == grid:
            self.integers[node] = self.integers[source]
        elif source in self.pending:
            waiting = self.pending[source]
            made = waiting.maker(replace(waiting.ending, out=grid.clipped(waiting.low, waiting.high)))
            self.integers[node] = self._call(waiting.base.name, made, waiting.inputs, waiting.base), grid
        else:
            self.integers[node] = self._call(node.name, Quantize(grid), (self.as_float(source),), node), grid
        return True

    def _maker(self, node: Node) -> Maker | str:
        """Return what makes the integer module of an arithmetic op, or why it runs in float."""
        rule, row, inputs = rule_of(node), _row(node), activation_inputs(node)
        if row is not None and row.refuse:
            return row.refuse
        if rule is None or rule.scale is not ScaleRule.OWN:
            return "its form has no integer kernel"
        if not inputs or any(source not in self.integers for source in inputs):
            return "its input carries no quantizer: the plan leaves it in float"
        if row is None or row.make is None:
            return "it has no integer kernel here"
        grids = [self.integers[source][1] for source in inputs]
        return row.make(OpCall(self.source, node, grids, self.exact, self.batch))

    def _ends_in_quantizer(self, node: Node) -> bool:
        """Whether the only reader, behind clips with one reader each, is a quantizer of activations."""
        while len(node.users) == 1:
            node = next(iter(node.users))
            rule = rule_of(node)
            if rule is None or rule.scale is not ScaleRule.ABSORB:
                return self._quantizer(node) is not None
        return False

    def _clip(self, node: Node) -> bool:
        source = activation_inputs(node)[0]
        low, high = clip_bounds(node)
        if source in self.pending:
            waiting = self.pending[source]
            # The later clip wins where the two do not overlap.
            lowest, highest = (min(max(bound, low), high) for bound in (waiting.low, waiting.high))
            self.pending[node] = replace(waiting, low=lowest, high=highest)
            return True
        if source not in self.integers or (low, high) != (0.0, torch.inf):
            return False
        value, grid = self.integers[source]
        clipped = self.graph.call_function(aten.clamp_min.default, (value, grid.zero_point))
        self.integers[node] = self._described(clipped, node), grid
        return True

    def _rearrange(self, node: Node) -> bool:
        """Run an op that only moves values, or picks among them, on uint8."""
        sources = activation_inputs(node)
        known = [self.integers.get(source) for source in sources]
        if not known or any(found is None or found[1] != (known[0] or found)[1] for found in known):
            return False
        value, grid = self.integers[sources[0]]
        row = _row(node)
        if row is not None and row.make is not None:
            made = row.make(OpCall(self.source, node, [grid], self.exact, self.batch))
            if isinstance(made, str):
                return False
            self.integers[node] = self._call(node.name, made(Ending(grid)), (value,), node), grid
            return True
        moved = self.graph.node_copy(node, lambda n: self.integers[n][0] if n in sources else self.as_float(n))
        self.integers[node] = self._described(moved, node), grid
        return True

    def _query_shape(self, node: Node) -> bool:
        """Read a size off the integers where they are all there is."""
        source = node.args[0] if node.args else None
        if node.target is not aten.sym_size.int or not isinstance(source, Node) or source not in self.integers:
            return False
        self.floats[node] = self.graph.node_copy(node, lambda n: self.integers[n][0])
        return True

    def _copy(self, node: Node) -> None:
        if node.target is aten.embedding.default and weight_quantizer(self.source, node.args[0]) is not None:
            made, index = stored(self.source, node.args[0], StoredTable), self.as_float(node.all_input_nodes[1])
            self.floats[node] = self._call(node.name, made, (index,), node)
            self.floats[node].meta[_REASON] = REFUSED[node.target]
            return
        if node.op == "call_module":
            self.attributes[str(node.target)] = self.source.get_submodule(str(node.target))
        self.floats[node] = copied = self.graph.node_copy(node, self.as_float)
        rule = rule_of(node)
        if node.target in REFUSED:
            copied.meta[_REASON] = REFUSED[node.target]
        elif rule is not None and rule.macs is not None:
            maker = self._maker(node)
            copied.meta[_REASON] = maker if isinstance(maker, str) else "it has no integer kernel here"

    def _inputs(self, node: Node) -> tuple[Node, ...]:
        return tuple(self.integers[source][0] for source in activation_inputs(node))

    def _call(self, name: str, made: nn.Module, inputs: tuple[Node, ...], origin: Node) -> Node:
        path = f"integer.{name}"
        self.attributes[path] = made
        return self._described(self.graph.create_node("call_module", path, inputs, name=name), origin)

    def _described(self, made: Node, origin: Node) -> Node:
        """Keep where in the user's source a node comes from; its traced value is no longer true."""
        made.meta = {key: origin.meta[key] for key in ("nn_module_stack", "stack_trace") if key in origin.meta}
        return made
