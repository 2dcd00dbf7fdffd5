"""Splits another library's network in two after a named module.

The network is traced only through the modules that enclose that one; all others stay calls of the
module itself, so training mode, buffers and keys don't change. The split is possible where the named
module's output is the only tensor that the second half reads from the first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fastokd.errors import UserError

Half = Callable[[nn.Module, Tensor], Tensor]

IN_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


@dataclass(frozen=True)
class Split:
    """Both halves as functions of (owner, input), and what the first uses of its owner.

    ``traced`` are the modules that the split goes through; ``first`` the paths of the modules,
    parameters and buffers that the first half uses.
    """

    halves: tuple[Half, Half]
    traced: frozenset[str]
    first: frozenset[str]


def enclosing(path: str) -> frozenset[str]:
    """The dotted names of the modules that hold ``path``."""
    steps = path.split(".")
    return frozenset(".".join(steps[:count]) for count in range(1, len(steps)))


def split(owner: nn.Module, path: str, what: str) -> Split:
    """Splits the method ``whole`` of ``owner`` after the module ``path``, relative to ``owner``.

    ``what`` names the network in messages. The trace is of the mode that ``owner`` is in.

    Raises:
        UserError: the code around the module can't be traced, the module isn't called exactly
            once, or the second half reads more than its output.
    """
    traced = enclosing(path)
    shown = path.partition(".")[2]
    graph = _trace(owner, traced, what, shown)
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == path]
    if len(calls) != 1:
        raise UserError(
            f"{what} can't be split at {shown!r}, which it calls {len(calls)} times where once is "
            "needed: choose another module, or sharing='network'"
        )
    for node in list(calls[0].users):
        # All branches read this tensor, so none may write to it.
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        if node.op == "call_function" and node.args[0] is calls[0]:
            node.target = IN_PLACE.get(node.target, node.target)
    (image,) = (node for node in graph.nodes if node.op == "placeholder")
    before = _needed(calls[0])
    rest = [node for node in graph.nodes if node not in before]
    crossing = {n for node in rest for n in node.all_input_nodes if n in before} - {calls[0]}
    if crossing:
        names = ", ".join(sorted(node.name for node in crossing))
        raise UserError(
            f"{what} can't be split at {shown!r}: what follows it also reads {names} from before "
            "it, so the graph is no chain there; choose another module, or sharing='network'"
        )
    ordered = [node for node in graph.nodes if node in before and node is not image]
    used = [_used(half) for half in (ordered, rest)]
    shared = sorted(used[0] & used[1]) or _tied(owner, used[0])
    if shared:
        raise UserError(
            f"{what} can't be split at {shown!r}: {', '.join(shared)} is used on both sides; "
            "choose another module, or sharing='network'"
        )
    halves = (_function(ordered, image, calls[0]), _function(rest, calls[0], None))
    return Split(halves, traced, frozenset(used[0]))


def prune(owner: nn.Module, cut: Split, keep_first: bool) -> None:
    """Deletes from ``owner`` what the other half uses. The first half keeps what it uses, the
    second all else."""
    for path in sorted(cut.traced):
        container = owner.get_submodule(path)
        names = [*container._modules, *container._parameters, *container._buffers]
        for name in names:
            inner = f"{path}.{name}"
            if inner not in cut.traced and (inner in cut.first) != keep_first:
                delattr(container, name)


class _Tracer(fx.Tracer):
    """Traces through the given modules only."""

    traced_func_name = "whole"

    def __init__(self, traced: frozenset[str]) -> None:
        super().__init__()
        self.traced = traced

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.traced


def _trace(owner: nn.Module, traced: frozenset[str], what: str, shown: str) -> fx.Graph:
    tracer = _Tracer(traced)
    try:
        graph = tracer.trace(owner)
    except Exception as error:
        # The network's own code ran on proxies and may raise anything.
        raise UserError(
            f"{what} can't be split at {shown!r}: the code around it can't be followed "
            f"({error}); choose another module, or sharing='network'"
        ) from error
    for node in reversed(graph.nodes):
        # Unused assertions and shapes; an unused module or in-place method may have an effect.
        writes = node.op == "call_module" or str(node.target).endswith("_")
        if (
            not node.users
            and node.op in ("call_function", "call_method", "get_attr")
            and not writes
        ):
            graph.erase_node(node)
    return graph


def _needed(node: fx.Node) -> set[fx.Node]:
    """``node`` and all nodes that it depends on."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo.extend(current.all_input_nodes)
    return seen


def _used(nodes: Iterable[fx.Node]) -> set[str]:
    return {str(node.target) for node in nodes if node.op in ("call_module", "get_attr")}


def _tied(owner: nn.Module, first: set[str]) -> list[str]:
    """Parameters that the first half's modules share with others."""
    sides: tuple[dict[int, str], dict[int, str]] = ({}, {})
    for name, parameter in owner.named_parameters(remove_duplicate=False):
        inside = any(name == path or name.startswith(f"{path}.") for path in first)
        sides[not inside][id(parameter)] = name
    return [name for key, name in sides[0].items() if key in sides[1]]


def _function(nodes: Iterable[fx.Node], source: fx.Node, result: fx.Node | None) -> Half:
    """A half of a graph as a plain function of (owner, input); ``result`` None: the graph's output."""
    graph = fx.Graph()
    copies = {source: graph.placeholder("x")}
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda other: copies[other])
    if result is not None:
        graph.output(copies[result])
    code = graph.python_code("self")
    scope: dict[str, Any] = dict(code.globals)
    exec(code.src, scope)
    function: Half = scope["forward"]
    return function
