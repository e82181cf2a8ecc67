"""The task-loss oracle: the loss of any set of substitutions, replaying only what they change.

One functional serves scoring, reconstruction and verification: `Phi(S) = E_x loss(f(x), f_S(x))`, where S replaces
some nodes of the graph by other functions of the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from fxquant.core.errors import CaptureError
from fxquant.core.run.footprint import Footprint, storages

Substitution = Mapping[str, Callable[[Tensor], Tensor]]
"""Node name -> function of the node's first input that takes the node's place."""


class Environment(dict[Node, Any]):
    """Values that a replay may read; one that is missing is run again from those that are there.

    Args:
        values: value of each node kept.
        substitution: what was substituted in the run that made them.
        kept: the nodes of which this run and those on top of it keep the value; None for every node.
    """

    def __init__(
        self,
        values: Mapping[Node, Any],
        substitution: Substitution | None = None,
        kept: frozenset[Node] | None = None,
    ) -> None:
        super().__init__(values)
        self.substitution: Substitution = substitution or {}
        self.kept = kept


class GraphReplay:
    """Runs a graph, and re-runs only the nodes downstream of what changed.

    Args:
        module: the graph; its single output is a tensor, or a structure whose first tensor is the answer.
        node_cost: node name -> cost of running it once; unnamed nodes count as free.
    """

    def __init__(self, module: GraphModule, node_cost: Mapping[str, float] | None = None) -> None:
        self.module = module
        self._cost = node_cost or {}
        self.nodes: list[Node] = list(module.graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.by_name = {node.name: node for node in self.nodes}
        # Submodule look-up by path is slow enough to show in small networks.
        self._targets = {n: module.get_submodule(str(n.target)) for n in self.nodes if n.op == "call_module"}
        self._interpreter = Interpreter(module, garbage_collect_values=False)
        #: cost of all nodes run so far, in the unit of `node_cost`, for reports of what was spent
        self.spent = 0.0
        varying: set[Node] = set()
        for node in self.nodes:
            if node.op == "placeholder" or any(source in varying for source in node.all_input_nodes):
                varying.add(node)
        # Inputs and weights exist anyway, and the answer is what a run is for.
        self._always = {node for node in self.nodes if node not in varying or node.op in ("placeholder", "output")}

    def forward(
        self,
        inputs: tuple[Tensor, ...],
        substitution: Substitution | None = None,
        kept: frozenset[Node] | None = None,
    ) -> tuple[Tensor, Environment]:
        """Run the whole graph and return its answer with its intermediate values.

        Args:
            inputs: one tensor per placeholder.
            substitution: what takes the place of which nodes.
            kept: the nodes whose values are kept, for example by `Footprint.within`; None for all. Inputs, weights
                and the answer are always kept.
        """
        environment = Environment(self._inputs(inputs), substitution, kept)
        order = [node for node in self.nodes if node.op != "placeholder"]
        self._sweep(order, environment, {}, environment.substitution, self._retained(kept))
        return self.answer(environment), environment

    def footprint(self, inputs: tuple[Tensor, ...], substitution: Substitution | None = None) -> Footprint:
        """Run the whole graph keeping nothing, and return what its values weigh; counts as nothing spent."""
        values: list[tuple[Node, int]] = []
        live: Environment = Environment(self._inputs(inputs))
        seen: dict[Node, int] = {}
        working, before = 0, self.spent

        def weigh(node: Node) -> None:
            nonlocal working
            fixed = storages({known: value for known, value in live.items() if known in self._always})
            own = {address: size for address, size in storages(live).items() if address not in fixed}
            working = max(working, sum(own.values()))
            value = live[node]
            if isinstance(value, Tensor) and node not in self._always:
                address = value.untyped_storage().data_ptr()
                # A freed address may come again: only what is still alive can be viewed.
                if address in own and all(seen.get(other) != address for other in live):
                    values.append((node, own[address]))
                seen[node] = address

        order = [node for node in self.nodes if node.op != "placeholder"]
        self._sweep(order, live, {}, substitution or {}, self._retained(frozenset()), weigh)
        self.spent = before
        return Footprint(tuple(values), working)

    def replay(
        self,
        base: Environment,
        substitution: Substitution,
        changed: Iterable[str] | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, Environment]:
        """Run only what the substitution changes, the rest read from `base`; the same answer as a whole run.

        Values that `base` did not keep are run again from those it kept, each once, and dropped after their last
        reader: a replay holds at most what is kept and what a plain run holds at one node.

        Args:
            base: environment of an earlier run.
            substitution: every node that is substituted now.
            changed: names of those that differ from the earlier run; None for all of `substitution`.
            keep: also return an environment complete enough for further replays (shares the unchanged values).
        """
        names = set(substitution if changed is None else changed)
        dirty = {self.by_name[name] for name in names}
        start = min((self.position[node] for node in dirty), default=len(self.nodes))
        run: set[Node] = set()
        for node in self.nodes[start:]:
            if node in dirty or any(source in run for source in node.all_input_nodes):
                run.add(node)
        # A missing value that is read has only unchanged ancestors, or it would be among those to run.
        wanted = [source for node in run for source in node.all_input_nodes]
        while wanted:
            source = wanted.pop()
            if source not in run and source not in base:
                run.add(source)
                wanted.extend(source.all_input_nodes)
        now = {name: made for name, made in base.substitution.items() if name not in names}
        now |= {name: made for name, made in substitution.items() if name in names}
        fresh: Environment = Environment({}, now, base.kept)
        order = sorted(run, key=self.position.__getitem__)
        self._sweep(order, fresh, base, now, self._retained(base.kept if keep else frozenset()))
        complete = Environment({**base, **fresh}, now, base.kept) if keep else fresh
        return self.answer(fresh if self.nodes[-1] in fresh else base), complete

    def _inputs(self, inputs: tuple[Tensor, ...]) -> dict[Node, Any]:
        return dict(zip((node for node in self.nodes if node.op == "placeholder"), inputs, strict=False))

    def _retained(self, kept: frozenset[Node] | None) -> Callable[[Node], bool]:
        return lambda node: kept is None or node in kept or node in self._always

    def _sweep(
        self,
        order: list[Node],
        fresh: Environment,
        base: Mapping[Node, Any],
        substitution: Substitution,
        retained: Callable[[Node], bool],
        after: Callable[[Node], None] = lambda _: None,
    ) -> None:
        """Run these nodes into `fresh`; one that is not retained is dropped when the last of its readers has run."""
        lookup = _Layered(fresh, base)
        running = set(order)
        waiting = {node: sum(user in running for user in node.users) for node in order}
        for node in order:
            if node.op == "output":
                fresh[node] = map_arg(node.args, lookup.__getitem__)[0]
            else:
                fresh[node] = self._run(node, lookup, substitution)
            after(node)
            for source in node.all_input_nodes:
                if source in waiting:
                    waiting[source] -= 1
            for known in (*node.all_input_nodes, node):
                if waiting.get(known) == 0 and not retained(known):
                    fresh.pop(known, None)

    def answer(self, environment: Environment) -> Tensor:
        """Return the first tensor of the graph's output."""
        return first_tensor(environment[self.nodes[-1]])

    def _run(self, node: Node, environment: Mapping[Node, Any], substitution: Substitution) -> Any:
        if node.op == "get_attr":
            return self._interpreter.fetch_attr(str(node.target))
        self.spent += self._cost.get(node.name, 0.0)
        args: Any = map_arg(node.args, environment.__getitem__)
        kwargs: Any = map_arg(node.kwargs, environment.__getitem__)
        replacement = substitution.get(node.name)
        if replacement is not None:
            return replacement(args[0])
        if node.op == "call_module":
            return self._targets[node](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


class _Layered(Mapping[Node, Any]):
    """Reads fresh values first, then those of the base run."""

    def __init__(self, fresh: Environment, base: Mapping[Node, Any]) -> None:
        self._fresh, self._base = fresh, base

    def __getitem__(self, node: Node) -> Any:
        return self._fresh[node] if node in self._fresh else self._base[node]

    def __iter__(self) -> Any:
        return iter({**self._base, **self._fresh})

    def __len__(self) -> int:
        return len({**self._base, **self._fresh})


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of a model's output, which may be a tuple, list or dict: the answer losses compare.

    Raises:
        CaptureError: it holds none.
    """
    for value in _flatten(output):
        if isinstance(value, Tensor):
            return value
    raise CaptureError(f"the model returns {type(output).__name__} without a tensor; return a tensor, tuple or dict")


def _flatten(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for member in value.values() for leaf in _flatten(member)]
    if isinstance(value, list | tuple):
        return [leaf for member in value for leaf in _flatten(member)]
    return [value]


def environment_bytes(environment: Mapping[Node, Any]) -> int:
    """Return the bytes held by an environment, views of one storage counted once."""
    return sum(storages({node: value for node, value in environment.items() if isinstance(value, Tensor)}).values())


def model_outputs(module: GraphModule, inputs: tuple[Tensor, ...], batch: int = 64) -> Tensor:
    """Return the answer of a graph over many images, shape (images, ...), run in batches without gradient."""
    count = int(inputs[0].shape[0])
    with torch.no_grad():
        parts = [first_tensor(module(*(t[start : start + batch] for t in inputs))) for start in range(0, count, batch)]
    return torch.cat(parts)
