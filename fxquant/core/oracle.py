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

Substitution = Mapping[str, Callable[[Tensor], Tensor]]
"""Node name -> function of the node's first input that takes the node's place."""

Environment = dict[Node, Any]
"""Value of every node that a replay may still read."""


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

    def forward(
        self, inputs: tuple[Tensor, ...], substitution: Substitution | None = None
    ) -> tuple[Tensor, Environment]:
        """Run the whole graph and return its answer with every intermediate value."""
        environment: Environment = {}
        arguments = iter(inputs)
        for node in self.nodes:
            if node.op == "placeholder":
                environment[node] = next(arguments)
            elif node.op == "output":
                environment[node] = map_arg(node.args, environment.__getitem__)[0]
            else:
                environment[node] = self._run(node, environment, substitution or {})
        return self.answer(environment), environment

    def replay(
        self,
        base: Environment,
        substitution: Substitution,
        changed: Iterable[str] | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, Environment]:
        """Run only what the substitution changes, the rest read from `base`; the same answer as a whole run.

        Args:
            base: environment of an earlier run.
            substitution: every node that is substituted now.
            changed: names of those that differ from the earlier run; None for all of `substitution`.
            keep: also return an environment complete enough for further replays (shares the unchanged values).
        """
        dirty = {self.by_name[name] for name in (substitution if changed is None else changed)}
        start = min((self.position[node] for node in dirty), default=len(self.nodes))
        fresh: Environment = {}
        waiting: dict[Node, int] = {}
        for node in self.nodes[start:]:
            if node not in dirty and not any(source in fresh for source in node.all_input_nodes):
                continue
            lookup = _Layered(fresh, base)
            if node.op == "output":
                fresh[node] = map_arg(node.args, lookup.__getitem__)[0]
                break
            fresh[node] = self._run(node, lookup, substitution)
            waiting[node] = len(node.users)
            if not keep:
                for source in node.all_input_nodes:
                    if source in waiting:
                        waiting[source] -= 1
                        if waiting[source] == 0:
                            # Dropped, yet still known as changed to nobody: all its readers have run.
                            fresh[source] = None
        complete = {**base, **fresh} if keep else fresh
        return self.answer(fresh if self.nodes[-1] in fresh else base), complete

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

    def __init__(self, fresh: Environment, base: Environment) -> None:
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


def environment_bytes(environment: Environment) -> int:
    """Return the bytes held by an environment, views of one storage counted once."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in environment.values()
        if isinstance(value, Tensor)
    }
    return sum(storages.values())


def model_outputs(module: GraphModule, inputs: tuple[Tensor, ...], batch: int = 64) -> Tensor:
    """Return the answer of a graph over many images, shape (images, ...), run in batches without gradient."""
    count = int(inputs[0].shape[0])
    with torch.no_grad():
        parts = [first_tensor(module(*(t[start : start + batch] for t in inputs))) for start in range(0, count, batch)]
    return torch.cat(parts)
