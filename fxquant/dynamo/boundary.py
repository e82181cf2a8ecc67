"""Turns a graph of torch.compile back into a module that exports and quantizes like any other.

Dynamo lifts every parameter and buffer to an input, makes sizes further inputs, and writes the batch size into reshapes
where it takes it for fixed. Here weights are separated from inputs and get the names of the user's modules again.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Collection, Sequence
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxquant.core.errors import CaptureError, first_line
from fxquant.core.ir import fork
from fxquant.core.run import dependents, placeholders

_ARGUMENT = re.compile(r"L(\['[^']*'\]|\[\d+\])+")
"""Where Dynamo read a value from, if that is an argument of the compiled function, or an item of one."""
_MEMBER = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")
_SUBSCRIPT = re.compile(r"\['?([^']*?)'?\]")

_DROPOUT_AT = 2
"""Position of `train` in the dropouts that torch implements in C++."""


class DynamoGraph:
    """One graph of torch.compile.

    Args:
        graph: as Dynamo made it; it is not changed.
        examples: the values it was traced with, in the order of its placeholders.
    """

    def __init__(self, graph: GraphModule, examples: Sequence[object]) -> None:
        self.graph = graph
        self._at = {node: position for position, node in enumerate(placeholders(graph.graph))}
        self._paths: dict[Node, str] = {}
        self._names: dict[Node, str] = {}
        self._numbers: list[Node] = []
        for node, value in zip(self._at, examples, strict=True):
            if not isinstance(value, Tensor) or _is_number(node, value):
                self._numbers.append(node)
                continue
            source = _source(node)
            if isinstance(value, nn.Parameter) or not _ARGUMENT.fullmatch(source):
                self._paths[node] = _named(node, _MEMBER.findall(source), self._paths.values())
            else:
                self._names[node] = _named(node, ["_".join(_SUBSCRIPT.findall(source))], self._names.values())
        self._sizes = {node: place for node in self._numbers if (place := self._size_of(node)) is not None}
        self._numbers = [node for node in self._numbers if node not in self._sizes]
        #: why this graph cannot be quantized, None if it can
        self.refusal = _training(graph) or (None if self._names else "it reads no tensor that could hold images")

    def inputs(self, arguments: Sequence[object]) -> tuple[Tensor, ...]:
        """Return the graph's arguments that are its inputs."""
        return tuple(t for node in self._names if isinstance(t := arguments[self._at[node]], Tensor))

    def weights(self, arguments: Sequence[object]) -> dict[str, Tensor]:
        """Return the graph's arguments that modules hold, by their names there."""
        found = {path: arguments[self._at[node]] for node, path in self._paths.items()}
        return {path: tensor for path, tensor in found.items() if isinstance(tensor, Tensor)}

    def numbers(self, arguments: Sequence[object]) -> tuple[float, ...]:
        """Return the graph's arguments that are numbers, sizes of its inputs left out."""
        return tuple(_number(arguments[self._at[node]]) for node in self._numbers)

    def bind(self, arguments: Sequence[object]) -> GraphModule:
        """Return the graph as a module that holds these weights and numbers, takes the inputs and returns a tuple."""
        made, env = Graph(), dict[Node, Any]()
        for node, name in self._names.items():
            env[node] = made.placeholder(name)
            env[node].meta = {}
        for node, path in self._paths.items():
            env[node] = made.get_attr(path)
        for node, (tensor, axis) in self._sizes.items():
            env[node] = made.call_method("size", (env[tensor], axis))
        numbers = dict(zip(self._numbers, self.numbers(arguments), strict=True))
        for node in self.graph.graph.nodes:
            if node.target == "item" and node.args[0] in numbers:
                env[node] = numbers[node.args[0]]
            elif node in numbers:
                env[node] = numbers[node]
            elif node.op != "placeholder":
                env[node] = made.node_copy(node, env.__getitem__)
        held: dict[str, object] = dict(self.weights(arguments))
        for node in made.nodes:
            if node.op == "call_module":
                held[str(node.target)] = self.graph.get_submodule(str(node.target))
            elif node.op == "get_attr" and str(node.target) not in held:
                held[str(node.target)] = _attribute(self.graph, str(node.target))
        made.eliminate_dead_code()
        return GraphModule(held, made, "DynamoGraph")

    def _size_of(self, number: Node) -> tuple[Node, int] | None:
        """Return the input, and its axis, whose size a number is."""
        expression = str(number.meta.get("example_value"))
        for node in self._names:
            shape = getattr(node.meta.get("example_value"), "shape", ())
            for axis, size in enumerate(shape):
                if not isinstance(size, int) and str(size) == expression:
                    return node, axis
        return None


def free_batch(module: GraphModule, inputs: Sequence[Tensor], images: Sequence[Tensor]) -> GraphModule:
    """Return the module with the batch size in its reshapes read from the first input, where Dynamo wrote a number.

    Args:
        module: from `DynamoGraph.bind`.
        inputs: what it was traced with, images along axis 0.
        images: more inputs, to check with: the module is run on two batches and one image, and where a size was
            replaced, the answers are compared with those for one batch at a time.

    Raises:
        CaptureError: the module gives other answers for another number of images, or does not run on it.
    """
    batch = int(inputs[0].shape[0])
    freed = fork(module)
    made = freed.graph
    first, *others = placeholders(made)
    with made.inserting_after([first, *others][-1]):
        size = made.call_method("size", (first, 0))
    varies = dependents(made.nodes, [first, *others])
    for node in made.nodes:
        reshapes = node.target in ("view", "reshape", torch.reshape) and node in varies
        spreads = node.target in ("expand", "repeat") and node not in varies
        if reshapes or spreads:
            node.args = (node.args[0], *_with_size(node.args[1:], batch, size))
    replaced = bool(size.users)
    if not replaced:
        made.erase_node(size)
    freed.recompile()
    _check_free(module, freed, batch, images, replaced)
    return freed


def _with_size(shape: Sequence[object], batch: int, size: Node) -> list[object]:
    """Return arguments of a reshape with the leading batch size replaced."""
    first, *rest = shape
    if isinstance(first, tuple | list):
        return [type(first)(_with_size(first, batch, size)), *rest]
    return [size if type(first) is int and first == batch else first, *rest]


def _check_free(fixed: GraphModule, freed: GraphModule, batch: int, images: Sequence[Tensor], replaced: bool) -> None:
    # A size that equals the batch by chance shows at another number of images: two batches and one.
    rows = torch.arange(2 * batch + 1) % int(images[0].shape[0])
    try:
        with torch.no_grad():
            whole = [t for t in freed(*(t[rows] for t in images)) if isinstance(t, Tensor)]
            parts = [fixed(*(t[rows[k : k + batch]] for t in images)) for k in (0, batch)]
    except Exception as error:
        raise CaptureError(_fixed_batch(batch, first_line(error))) from error
    for position, tensor in enumerate(whole):
        expected = torch.cat([[t for t in part if isinstance(t, Tensor)][position] for part in parts])
        if tensor.shape[:1] != rows.shape or tensor.shape[1:] != expected.shape[1:]:
            raise CaptureError(_fixed_batch(batch, f"output {position} has shape {tuple(tensor.shape)}"))
        if replaced and not torch.allclose(tensor[:-1].float(), expected.float(), rtol=1e-3, atol=1e-4):
            raise CaptureError(_fixed_batch(batch, f"output {position} of an image changes with the images beside it"))


def _fixed_batch(batch: int, found: str) -> str:
    return (
        f"the graph is made for {batch} images and does not serve {2 * batch + 1} ({found}); "
        "give torch.compile dynamic=True and a first batch of at least two images"
    )


def caller_arguments() -> tuple[str, ...] | None:
    """Return the parameters of the compiled function whose graph runs now, None for a graph behind a graph break.

    Call it within a call of the graph. The first graph is run by the frame of the compiled function, which torch's
    wrapper calls; a graph behind a break is run by a further frame in between.
    """
    frame, own = sys._getframe(1), list[CodeType]()
    while frame.f_code.co_name != "compile_wrapper":
        module = str(frame.f_globals.get("__name__"))
        # Frames of this package lie between the graph and this question.
        if module.partition(".")[0] != "torch" and module.rpartition(".")[0] != __package__:
            own.append(frame.f_code)
        if frame.f_back is None:
            return None
        frame = frame.f_back
    if len(own) > 1:
        return None
    return own[0].co_varnames[: own[0].co_argcount] if own else ()


def _is_number(node: Node, value: Tensor) -> bool:
    """Whether a tensor holds a number of the user's, which may be another at the next call."""
    return value.dim() == 0 and bool(node.users) and all(user.target == "item" for user in node.users)


def _number(value: object) -> float:
    number = value.item() if isinstance(value, Tensor) else value
    assert isinstance(number, int | float)
    return number


def _source(node: Node) -> str:
    """Return the Python expression that Dynamo reads a placeholder's value with."""
    name = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", node.name)
    # A property today, a method in torch 2.11.
    return str(name() if callable(name) else name)


def _named(node: Node, parts: Sequence[str], taken: Collection[str]) -> str:
    """Return a path of these parts, or the placeholder's name, which is unique, if the path is empty or taken."""
    path = ".".join(re.sub(r"\W", "_", part) for part in parts)
    return path if path and path not in taken else node.name


def _attribute(module: nn.Module, path: str) -> object:
    value: object = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _training(graph: GraphModule) -> str | None:
    """Return why the graph counts as training: an op in training mode; None if there is none."""
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is F.scaled_dot_product_attention:
            drops = float(node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)) > 0
        else:
            drops = _argument(node, "training") is True
        if drops:
            return f"{node.name} ({getattr(node.target, '__name__', node.target)}) runs in training mode"
    return None


def _argument(node: Node, name: str) -> object:
    target = node.target
    assert callable(target)
    try:
        return inspect.signature(target).bind(*node.args, **node.kwargs).arguments.get(name)
    except (TypeError, ValueError):
        # Functions in C++ have no signature.
        named = getattr(target, "__name__", "")
        return node.args[_DROPOUT_AT] if "dropout" in named and len(node.args) > _DROPOUT_AT else None
