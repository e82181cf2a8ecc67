"""`activation`: bytes of the activations of one sample that are live at once, at the worst moment of the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Graph, Node

from fxquant.core.facts import CostTable, Target
from fxquant.core.ir import FLOAT_BITS, EdgeGroups, Program, ScaleRule, Sites, rule_of, sample_elements
from fxquant.passes.cost.registry import COSTS

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Buffer:
    """Memory of one value, from the node that makes it to its last reader.

    Args:
        elements: for one sample.
        float_bytes: bytes of one element where it is not quantized.
        born: position of the node that makes it; 0 for the network's inputs.
        last_read: group of the quantizer in front of the readers, None for float readers -> position of the last.
    """

    elements: int
    float_bytes: int
    born: int
    last_read: dict[str | None, int]


@COSTS.register("activation")
def activation(program: Program, target: Target) -> CostTable:
    """Return the peak `max over moments of the sum of bytes(live buffer)`, one row per moment that can be the worst.

    A value is held as its quantized readers take it, in the width the target stores; in float32 as well where others
    read it in float. Nothing is added for a kernel's scratch memory. A value that several sites read is
    split evenly between them, so the cost is exact for plans in which they agree; it has the widest activation where
    no site reads it. A site in float reads float32.
    """
    sites, groups = program[Sites], program[EdgeGroups]
    found = list(buffers(program.module.graph, groups))
    moments = len(program.module.graph.nodes)
    ties = [site.input_tie for site in sites.sites for _ in site.choices]
    readers = Counter(site.input_tie for site in sites.sites)
    widths = [bits for c in sites.candidates if (bits := c.choice.activation_bits) != FLOAT_BITS]
    widest = max(widths, default=max(target.activation_bits))
    values, constants = np.zeros((moments, len(sites.candidates))), np.zeros(moments)
    whole = np.zeros(moments)
    for buffer in found:
        whole[buffer.born : max(buffer.last_read.values()) + 1] += buffer.elements * buffer.float_bytes
        for group, last in buffer.last_read.items():
            live = slice(buffer.born, last + 1)
            tie = None if group is None else groups.bit_ties[group]
            if tie is None:
                constants[live] += buffer.elements * buffer.float_bytes
            elif tie not in readers:
                constants[live] += stored_bytes(buffer.elements, widest, target)
            else:
                for column in (k for k, read in enumerate(ties) if read == tie):
                    bits = sites.candidates[column].choice.activation_bits
                    values[live, column] += stored_bytes(buffer.elements, bits, target) / readers[tie]
    starts = np.cumsum([0, *(len(site.choices) for site in sites.sites)])[:-1]
    values, constants = worst_rows(values, constants, starts)
    return CostTable(sites.candidates, values, 0.0, float(whole.max()), "bytes", constants)


def stored_bytes(elements: int, bits: int, target: Target) -> int:
    """Return the bytes of a packed value, `ceil(elements x stored bits / 8)`; 32 bits are float."""
    return ceil(elements * target.activation_storage(bits) / 8) if bits != FLOAT_BITS else 4 * elements


def buffers(graph: Graph, groups: EdgeGroups) -> Iterator[Buffer]:
    """Yield the memory of every value that depends on an input; views and clips of what nothing else reads share it."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    behind = {(edge.producer, edge.consumer): group for group, edges in groups.edges.items() for edge in edges}
    owner: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            owner[node] = node
        elif node.op != "output" and any(source in owner for source in node.all_input_nodes):
            shared = _shared(node)
            owner[node] = owner.get(shared, node) if shared is not None else node
    for root in dict.fromkeys(owner.values()):
        elements, float_bytes = sample_elements(root)
        born = 0 if root.op == "placeholder" else position[root]
        last: dict[str | None, int] = {}
        for member in (node for node, held_by in owner.items() if held_by is root):
            for user in member.users:
                if owner.get(user) is not root and _reads(user):
                    group = behind.get((member.name, user.name))
                    last[group] = max(last.get(group, 0), position[user])
        yield Buffer(elements, float_bytes, born, last or {None: position[root]})


def _shared(node: Node) -> Node | None:
    """Return the node whose memory this one's value is, None if it has its own."""
    sources = node.all_input_nodes
    if isinstance(sources[0].meta.get("val"), tuple | list):
        return sources[0]
    rule = rule_of(node)
    if rule is None:
        return None
    clips = rule.scale is ScaleRule.ABSORB and len(sources[0].users) == 1
    return sources[0] if rule.is_view or clips else None


def _reads(user: Node) -> bool:
    """Whether a node needs the values: all but those that ask for sizes."""
    value = user.meta.get("val")
    return user.op == "output" or isinstance(value, Tensor | tuple | list)


def worst_rows(values: FloatArray, constants: FloatArray, starts: NDArray[np.intp]) -> tuple[FloatArray, FloatArray]:
    """Return the rows that are the largest for some plan, and at least one.

    Row a makes row b needless where `a - b >= 0` for every plan, that is
    `constant_a - constant_b + sum over sites of min over choices (values_a - values_b) >= 0`.

    Args:
        values: shape (rows, n), grouped by site.
        constants: shape (rows,).
        starts: first column of each site, ascending.
    """
    rows = np.unique(np.column_stack([constants, values]), axis=0)

    def reach(each: FloatArray, extreme: np.ufunc) -> FloatArray:
        sums = extreme.reduceat(each[:, 1:], starts, axis=1).sum(axis=1) if len(starts) else 0.0
        return np.asarray(each[:, 0] + sums)

    kept: list[FloatArray] = []
    # What can be largest comes first, for it outdoes most of the others.
    for row in rows[np.argsort(-reach(rows, np.maximum), kind="stable")]:
        if not kept or (reach(np.array(kept) - row, np.minimum) < 0).all():
            kept.append(row)
    # A row kept early may be needless because of one kept later.
    for row in list(kept):
        others = [other for other in kept if other is not row]
        if others and (reach(np.array(others) - row, np.minimum) >= 0).any():
            kept = others
    found = np.array(kept)
    return found[:, 1:], found[:, 0]
