"""List the sites: every weight whose precision is decided, with the precisions it may take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from torch.fx import Graph, Node

from fxquant.core.errors import OptionError
from fxquant.core.facts import Target, Types, matching, site_types
from fxquant.core.ir import (
    REFUSED,
    STORED,
    Choice,
    EdgeGroups,
    Program,
    QuantizedEdges,
    Site,
    Sites,
    WeightFormat,
    rule_of,
    site_name,
    stored_weights,
    tensor_at,
    traced_images,
)
from fxquant.passes.base import Pass


@dataclass(frozen=True)
class FindSites(Pass):
    """Write `Sites`: one per weight tensor that an integer op reads, or that is stored packed for a float op.

    Args:
        target: which widths execute.
        bits: candidate weight formats as in `Settings`; 32 adds "float" as a candidate.
        activation_bits: candidate activation bits.
        pins: pattern (see `core.patterns`) -> the only precision allowed there.
        pin_ends: also pin the first and the last site to 8 bits, the convention of most papers.
        forbid: pattern -> precisions that may not be used there.
        keep_float: names of sites that are stored in float32.

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
    keep_float: Collection[str] = ()
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
            reads = choice.weights_only or choice.activation_bits in self.target.activation_bits
            if not choice.is_float and not (executes and reads):
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
        if self.target.packs:
            alone = tuple(sorted({choice.alone for choice in choices}))
            known = {site.weight: site for site in sites}
            for path, nodes in _stored_readers(program.module.graph, set(readers)).items():
                if path in known:
                    known[path] = replace(known[path], followers=tuple(node.name for node in nodes))
                elif site_name(path) not in self.keep_float:
                    known[path] = _stored(program, path, nodes, alone)
            sites = list(known.values())
            order = {node.name: index for index, node in enumerate(program.module.graph.nodes)}
            sites.sort(key=lambda site: order[site.nodes[0]])
        types = site_types(program.module.graph, sites)
        sites = self._permitted(self._pinned(sites, types), types)
        stored = {name for site in sites for name in (site.nodes if site.stored else site.followers)}
        refusals = {
            node.name: program[QuantizedEdges].float_reasons[node.name]
            for node in program.module.graph.nodes
            if node.name in program[QuantizedEdges].float_reasons and _does_work(node) and node.name not in stored
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
        return [s if s.name not in allowed else replace(s, choices=(_fitting(s, allowed[s.name]),)) for s in sites]

    def _permitted(self, sites: list[Site], types: Types) -> list[Site]:
        forbidden: defaultdict[str, set[Choice]] = defaultdict(set)
        for pattern, choices in self.forbid.items():
            for name in matching(pattern, [site.name for site in sites], types):
                forbidden[name] |= {*choices, *(choice.alone for choice in choices)}
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


def _fitting(site: Site, choice: Choice) -> Choice:
    """Return a pin as the site can have it: a stored weight reads float whatever the pin says.

    Raises:
        OptionError: a pin for weights alone on a layer that runs on integers.
    """
    if choice.weights_only and not site.stored:
        raise OptionError(
            f"layer {site.name!r} runs on integers, so its pin must say at which width it reads them: W4A8"
        )
    return choice.alone if site.stored else choice


def _stored_readers(graph: Graph, sites: Collection[str]) -> dict[str, list[Node]]:
    """Return path -> the float ops that read a weight which nothing else reads, or only the ops of a site."""
    readers: dict[str, dict[Node, None]] = {}
    others: set[str] = set()
    for holder in (node for node in graph.nodes if node.op == "get_attr"):
        for user in holder.users:
            if holder in stored_weights(user):
                readers.setdefault(str(holder.target), {})[user] = None
            elif holder.target not in sites:
                others.add(str(holder.target))
    return {path: list(nodes) for path, nodes in readers.items() if path not in others}


def _stored(program: Program, path: str, nodes: list[Node], choices: tuple[Choice, ...]) -> Site:
    weight, name = tensor_at(program.module, path), site_name(path)
    return Site(
        name=name,
        kind=STORED[nodes[0].target],
        weight=path,
        nodes=tuple(node.name for node in nodes),
        weight_count=weight.numel(),
        channels=int(weight.shape[0]),
        bias_count=0,
        macs=0,
        input_tie=f"{name} in float",
        choices=choices,
    )


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
