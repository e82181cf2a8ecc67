"""List the sites: every weight whose precision is decided, with the precisions it may take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch.fx import Node

from fxquant.core.errors import OptionError
from fxquant.core.facts import Target, Types, matching, site_types
from fxquant.core.ir import (
    REFUSED,
    Choice,
    EdgeGroups,
    Program,
    QuantizedEdges,
    Site,
    Sites,
    WeightFormat,
    rule_of,
    site_name,
    tensor_at,
    traced_images,
)
from fxquant.passes.base import Pass


@dataclass(frozen=True)
class FindSites(Pass):
    """Write `Sites`: one per weight tensor that an integer op reads.

    Args:
        target: which widths execute.
        bits: candidate weight formats as in `Settings`; 32 adds "float" as a candidate.
        activation_bits: candidate activation bits.
        pins: pattern (see `core.patterns`) -> the only precision allowed there.
        pin_ends: also pin the first and the last site to 8 bits, the convention of most papers.
        forbid: pattern -> precisions that may not be used there.

    Raises:
        OptionError: a width the target does not execute, a pattern that matches nothing, a pin to a forbidden
            precision, or a site with every precision forbidden.
    """

    target: Target
    bits: tuple[int | str, ...]
    activation_bits: tuple[int, ...]
    pins: Mapping[str, Choice] = field(default_factory=dict)
    pin_ends: bool = False
    forbid: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)
    reads = (QuantizedEdges, EdgeGroups)
    writes = (Sites,)

    def __post_init__(self) -> None:
        formats = [text for text in self.bits if not self._can(WeightFormat.parse(text))]
        widths = sorted(set(self.activation_bits) - set(self.target.activation_bits))
        for label, asked, wrong, known in (
            ("bits", list(self.bits), sorted(formats, key=str), self.target.formats_text),
            ("activation_bits", list(self.activation_bits), widths, str(sorted(self.target.activation_bits))),
        ):
            if wrong or not asked:
                raise OptionError(
                    f"{label}={tuple(asked)}: target {self.target.name!r} does not execute {wrong or 'an empty list'}; "
                    f"it executes {known}"
                )

        for pattern, choice in self.pins.items():
            executes = self.target.executes(choice.weight)
            if not choice.is_float and not (executes and choice.activation_bits in self.target.activation_bits):
                raise OptionError(
                    f"pin {pattern!r}: target {self.target.name!r} does not execute {choice.label}; it executes "
                    f"weights of {self.target.formats_text} bits and activations of "
                    f"{sorted(self.target.activation_bits)} bits"
                )

    def _can(self, weight: WeightFormat) -> bool:
        return weight.is_float or self.target.executes(weight)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with its sites known."""
        readers: defaultdict[str, list[Node]] = defaultdict(list)
        integer = program[QuantizedEdges].integer_nodes
        for node in program.module.graph.nodes:
            rule = rule_of(node)
            if node.name in integer and rule is not None and rule.weight is not None:
                weight = node.args[rule.weight]
                assert isinstance(weight, Node)
                readers[str(weight.target)].append(node)
        choices = sorted({Choice.of(WeightFormat.parse(text), a) for text in self.bits for a in self.activation_bits})
        sites = [_site(program, path, nodes, tuple(choices)) for path, nodes in readers.items()]
        types = site_types(program.module.graph, sites)
        sites = self._permitted(self._pinned(sites, types), types)
        refusals = {
            node.name: program[QuantizedEdges].float_reasons[node.name]
            for node in program.module.graph.nodes
            if node.name in program[QuantizedEdges].float_reasons and _does_work(node)
        }
        return program.with_facts(Sites(tuple(sites), refusals)), 0

    def _pinned(self, sites: list[Site], types: Types) -> list[Site]:
        allowed: dict[str, Choice] = {}
        ends = (sites[0], sites[-1]) if self.pin_ends and sites else ()
        for site in ends:
            allowed[site.name] = Choice(8, max(self.activation_bits))
        for pattern, choice in self.pins.items():
            names = matching(pattern, [site.name for site in sites], types)
            allowed.update(dict.fromkeys(names, choice))
        return [s if s.name not in allowed else replace(s, choices=(allowed[s.name],)) for s in sites]

    def _permitted(self, sites: list[Site], types: Types) -> list[Site]:
        forbidden: defaultdict[str, set[Choice]] = defaultdict(set)
        for pattern, choices in self.forbid.items():
            for name in matching(pattern, [site.name for site in sites], types):
                forbidden[name] |= set(choices)
        for site in sites:
            if not set(site.choices) - forbidden[site.name]:
                asked = ", ".join(choice.label for choice in site.choices)
                raise OptionError(
                    f"forbid leaves site {site.name!r} without a precision: of {asked}, its candidates or its pin, all "
                    "are forbidden; permit one of them, or pin or search another"
                )
        return [replace(s, choices=tuple(c for c in s.choices if c not in forbidden[s.name])) for s in sites]


def _does_work(node: Node) -> bool:
    """Whether leaving the node in float is worth a line in the report: it multiplies, or holds a table."""
    rule = rule_of(node)
    return node.target in REFUSED or (rule is not None and rule.macs is not None)


def _site(program: Program, path: str, nodes: list[Node], choices: tuple[Choice, ...]) -> Site:
    rule = rule_of(nodes[0])
    assert rule is not None
    assert rule.bias is not None
    assert rule.macs is not None
    weight = tensor_at(program.module, path)
    source, groups = nodes[0].args[0], program[EdgeGroups]
    assert isinstance(source, Node)
    group = groups.group_of(source.name)
    assert group is not None
    images = traced_images(program.module.graph)
    bias = nodes[0].args[rule.bias] if len(nodes[0].args) > rule.bias else None
    return Site(
        name=site_name(path),
        kind=rule.kind,
        weight=path,
        nodes=tuple(node.name for node in nodes),
        weight_count=weight.numel(),
        channels=int(weight.shape[rule.channel_axis]),
        bias_count=tensor_at(program.module, str(bias.target)).numel() if isinstance(bias, Node) else 0,
        macs=sum(rule.macs(node) for node in nodes) // images,
        input_tie=groups.bit_ties[group],
        choices=choices,
    )
