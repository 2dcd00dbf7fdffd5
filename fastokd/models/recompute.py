"""Activation checkpointing: a part of a student keeps its input alone, and its backward runs it again.

``torch.utils.checkpoint`` (non-reentrant) recomputes. What a forward changes (running statistics, counts)
must not change twice, and what an engine puts into the layers for one forward (casts of weights, masks)
is gone when the backward runs. So a part's tensors as they were before its forward are kept, and lie in
its modules while it is recomputed. They are small; activations are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# A module's own tables: its attributes that hold parameters, buffers and given masks.
TABLES = ("_parameters", "_buffers")
MASKS = ("mask_BD", "mask_B")


def recomputed(
    run: Callable[..., Any], modules: Sequence[nn.Module], *args: Any, draws: bool = False
) -> Any:
    """``run(*args)``, whose activations are recomputed in the backward.

    Args:
        modules: all that ``run`` calls. A module that keeps tensors elsewhere has a method
            ``as_now()``: it returns a function that makes a context in which they are those of now.
        draws: ``run`` may draw random numbers, which are then drawn again: the host reads and sets
            the generator's state.
    """
    if not torch.is_grad_enabled():
        return run(*args)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _as_before(modules)

    # To stop early torch raises an exception, which keeps what our ops computed until the step ends.
    return checkpoint(
        run,
        *args,
        use_reentrant=False,
        preserve_rng_state=draws,
        context_fn=contexts,
        early_stop=False,
    )


def _as_before(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """A context in which the modules have the tensors that they have now."""
    tables = [
        (
            vars(module),
            name,
            _copied(vars(module)[name]) if name == "_buffers" else dict(vars(module)[name]),
        )
        for module in modules
        for name in TABLES
        if vars(module)[name]
    ]
    masks = [
        (vars(module), name, vars(module)[name])
        for module in modules
        for name in MASKS
        if vars(module).get(name) is not None
    ]
    found: list[Any] = [getattr(module, "as_now", None) for module in modules]
    others = [as_now() for as_now in found if as_now is not None]

    @contextmanager
    def context() -> Iterator[None]:
        with ExitStack() as stack:
            for other in others:
                stack.enter_context(other())
            places = [*tables, *masks]
            now = [place[name] for place, name, _ in places]
            for place, name, before in places:
                place[name] = before
            try:
                yield
            finally:
                for (place, name, _), value in zip(places, now, strict=True):
                    place[name] = value

    return context()


@torch.no_grad()
def _copied(buffers: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value is None else value.clone() for name, value in buffers.items()}


class Recomputed:
    """The ``forward`` of a module of another library, recomputed."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **named: Any) -> Any:
        module = self.module

        def run(*args: Any) -> Any:
            return type(module).forward(module, *args, **named)

        if not module.training:
            return run(*args)
        draws = not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
        return recomputed(run, list(module.modules()), *args, draws=draws)


def blocks_of(net: nn.Module, kept: str) -> list[nn.Module]:
    """The blocks of another library's network: the outermost modules within plain containers that have
    modules of their own. ``kept``: a module that must not be in one, whose input is read."""
    inside = set(net.get_submodule(kept).modules())

    def found(parent: nn.Module) -> Iterator[nn.Module]:
        listed = type(parent) in (nn.Sequential, nn.ModuleList)
        for child in parent.children():
            plain = type(child) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
            if listed and not plain and list(child.children()) and not inside & {*child.modules()}:
                yield child
            else:
                yield from found(child)

    return list(dict.fromkeys(found(net)))
