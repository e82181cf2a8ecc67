"""FX surgery: forking, attribute access, inserting modules on edges, the golden printer."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxquant.core.errors import PipelineError
from fxquant.core.ir.spec import Edge

TORCH_FOLDER = str(Path(torch.__file__).parent)


def fork(module: GraphModule) -> GraphModule:
    """Return a copy: another graph with the same node names and meta, and the same parameters."""
    with warnings.catch_warnings():
        # torch's pytree deep-copies its own leaf specs through a deprecated check.
        warnings.simplefilter("ignore", FutureWarning)
        graph = copy.deepcopy(module.graph)
    forked = GraphModule(module, graph)
    forked.eval()
    return forked


def nodes_by_name(graph: Graph) -> dict[str, Node]:
    """Return every node by its name."""
    return {node.name: node for node in graph.nodes}


def resolve(graph: Graph, name: str) -> Node:
    """Return the node called `name`.

    Raises:
        PipelineError: the graph has none.
    """
    found = nodes_by_name(graph).get(name)
    if found is not None:
        return found
    raise PipelineError(f"the graph has no node {name!r}; a fact from another graph was used")


def tensor_at(module: nn.Module, path: str) -> Tensor:
    """Return the parameter, buffer or tensor attribute at a dotted path.

    Raises:
        PipelineError: there is none.
    """
    value: object = module
    for part in path.split("."):
        value = getattr(value, part, None)
    if not isinstance(value, Tensor):
        raise PipelineError(f"the graph module has no tensor at {path!r}")
    return value


def put_tensor(module: GraphModule, path: str, value: Tensor) -> None:
    """Replace the tensor at a path of a graph module, which must not share its containers with another module.

    Args:
        module: for example a fork.
        path: dotted path of a parameter or buffer, which stays one.
        value: the new tensor.
    """
    parents, _, leaf = path.rpartition(".")
    holder = module.get_submodule(parents)
    old = getattr(holder, leaf)
    setattr(holder, leaf, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)


def constant(module: nn.Module, node: object) -> Tensor | None:
    """Return the detached parameter or buffer a node reads, None if it is not such a node."""
    return tensor_at(module, str(node.target)).detach() if isinstance(node, Node) and node.op == "get_attr" else None


def is_constant(node: object) -> bool:
    """Whether a node reads a parameter or buffer."""
    return isinstance(node, Node) and node.op == "get_attr"


def edges_between(producer: Node, consumer: Node) -> list[Edge]:
    """Return the edges from one node to another, one per input position."""
    slots = enumerate(consumer.all_input_nodes)
    return [Edge(producer.name, consumer.name, slot) for slot, node in slots if node is producer]


def consumers(node: Node) -> list[Node]:
    """Return the users of a node in graph order."""
    users = set(node.users)
    return [other for other in node.graph.nodes if other in users]


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register a module at a dotted path, making containers on the way."""
    *parents, leaf = path.split(".")
    holder = root
    for part in parents:
        if not hasattr(holder, part):
            holder.add_module(part, nn.Module())
        holder = getattr(holder, part)
    holder.add_module(leaf, module)


def set_parameter(
    module: GraphModule, consumer: Node, position: int, path: str, value: Tensor, trainable: bool
) -> None:
    """Put a new parameter at `path` and let the consumer read it at an argument position.

    Args:
        module: a fork: what other graph modules hold at that path stays theirs.
        consumer: node with a traced value in its first argument.
        position: argument position, filled up with None before it.
        path: dotted path; what is there in this module is replaced.
        value: the parameter's values.
        trainable: whether the parameter takes gradients.
    """
    *parents, leaf = path.split(".")
    holder = module.get_submodule(".".join(parents))
    if leaf in dict(holder.named_buffers(recurse=False)):
        delattr(holder, leaf)
    setattr(holder, leaf, nn.Parameter(value, requires_grad=trainable))
    with module.graph.inserting_before(consumer):
        node = module.graph.get_attr(path)
    fake = consumer.args[0].meta.get("val") if isinstance(consumer.args[0], Node) else None
    # The op table reads shapes from meta; the graph's fake mode keeps the value itself out of it.
    mode = getattr(fake, "fake_mode", None)
    node.meta["val"] = mode.from_tensor(value, static_shapes=True) if mode is not None else value
    padded = list(consumer.args) + [None] * (position + 1 - len(consumer.args))
    padded[position] = node
    consumer.args = tuple(padded)


def free_path(module: nn.Module, path: str) -> str:
    """Return `path`, with a number behind it where the module has something there."""
    *parents, leaf = path.split(".")
    holder, free, number = module.get_submodule(".".join(parents)), leaf, 0
    while hasattr(holder, free):
        number += 1
        free = f"{leaf}_{number}"
    return ".".join([*parents, free])


def trace(node: Node) -> Node:
    """Note what a new node computes, as its inputs were traced, and return it."""
    args: Any = map_arg(node.args, lambda source: source.meta["val"])
    kwargs: Any = map_arg(node.kwargs, lambda source: source.meta["val"])
    assert callable(node.target)
    modes = [mode for source in node.all_input_nodes if (mode := getattr(source.meta["val"], "fake_mode", None))]
    # Without the dispatcher some ops ask for a free size as a number, which fixes it in the whole graph.
    with modes[0] if modes else nullcontext(), enable_python_dispatcher() if modes else nullcontext():
        node.meta["val"] = node.target(*args, **kwargs)
    return node


def insert_after(module: GraphModule, producer: Node, name: str, inserted: nn.Module, users: Iterable[Node]) -> Node:
    """Put a module on the edges from `producer` to `users` and return its node, called `name`.

    The node follows the producer directly (the last placeholder if that is one), so that every user comes after it.
    A name that another module has gets a number behind it.
    """
    path, number = name, 0
    while getattr(module, path, inserted) is not inserted:
        number += 1
        path = f"{name}_{number}"
    set_module(module, path, inserted)
    graph = module.graph
    anchor = producer
    while anchor.next.op == "placeholder":
        anchor = anchor.next
    with graph.inserting_after(anchor):
        node = graph.create_node("call_module", path, (producer,), {}, name=name)
    node.meta = {key: producer.meta[key] for key in ("val", "nn_module_stack", "stack_trace") if key in producer.meta}
    for user in users:
        user.replace_input_with(producer, node)
    return node


def erase_dead(module: GraphModule) -> int:
    """Erase nodes that nothing reads, placeholders excepted, and return how many."""
    erased = 0
    for node in reversed(list(module.graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            module.graph.erase_node(node)
            erased += 1
    return erased


def finish(module: GraphModule) -> GraphModule:
    """Check the graph, drop unused submodules and regenerate its code."""
    module.graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def show(module: GraphModule) -> str:
    """Return the graph as text for golden tests: one line per node, `name = op(inputs)`, constants left out."""
    lines = []
    for node in module.graph.nodes:
        if node.op == "get_attr":
            continue
        inputs = ", ".join(n.target if n.op == "get_attr" else n.name for n in node.all_input_nodes)
        target = node.target if isinstance(node.target, str) else str(node.target).removeprefix("aten.")
        kind = type(module.get_submodule(target)).__name__ if node.op == "call_module" else target
        lines.append(f"{node.name} = {kind}({inputs})" if node.op != "output" else f"return {inputs}")
    return "\n".join(lines)


def trace_line(node: Node) -> str:
    """Return the user's source line that made the node, `net.py:12: code`; its target where that is not known."""
    trace = node.meta.get("stack_trace")
    found = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]+)', trace) if isinstance(trace, str) else []
    frames = [(Path(file), number, code) for file, number, code in found if not file.startswith(TORCH_FOLDER)]
    lines = [f"{file.name}:{number}: {code.strip()}" for file, number, code in frames]
    return lines[-1] if lines else str(node.target)
