"""Which layers of a model are meant by ``targets``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn

from .layers import AdaptedLinear, is_conv1d

ALL_LINEAR = "all-linear"

# Names that heads go by in models that have no get_output_embeddings of their own.
_HEADS = {"lm_head", "embed_out", "score", "classifier", "head"}


def supported(module: nn.Module) -> bool:
    """nn.Linear and transformers' Conv1D. By exact type: a subclass may compute something else."""
    return type(module) is nn.Linear or is_conv1d(module)


def find_layers(model: nn.Module, targets: str | Iterable[str]) -> dict[str, nn.Module]:
    """Name -> layer of every layer that ``targets`` names, in the model's order.

    Args:
        targets: a list of names or name suffixes ("q_proj", "mlp.up_proj"); a regular expression that must match the
            whole name, or all of it after a dot; or "all-linear": every supported layer but the output head.

    Raises:
        ValueError: nothing matches (near names are listed), or a match cannot be adapted.
    """
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    linear = {name: module for name, module in modules.items() if supported(module)}
    first = {id(module): name for name, module in reversed(linear.items())}  # a shared layer goes by its first name
    if isinstance(targets, str) and targets == ALL_LINEAR:
        heads = _heads(model)
        found = {
            name: module
            for name, module in linear.items()
            if first[id(module)] == name
            and id(module) not in heads
            and (heads or name.rpartition(".")[2] not in _HEADS)
        }
        if not found:
            raise ValueError(f"targets is 'all-linear', but {type(model).__name__} has no nn.Linear or Conv1D layer")
        return found
    found_names: set[str] = set()
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise ValueError("targets is empty, wants layer names, a regular expression or 'all-linear'")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"targets holds {pattern!r}, wants strings")
        expression = pattern if isinstance(targets, str) else re.escape(pattern)
        try:
            matcher = re.compile(rf"(?:.*\.)?(?:{expression})")
        except re.error as error:
            raise ValueError(f"targets is {pattern!r}, not a valid regular expression: {error}") from None
        hits = {name for name in modules if matcher.fullmatch(name)}
        if not hits & linear.keys():
            raise ValueError(_nothing(pattern, hits, modules, linear))
        found_names |= {first[id(linear[name])] for name in hits & linear.keys()}
    return {name: module for name, module in linear.items() if name in found_names}


def _heads(model: nn.Module) -> set[int]:
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        head = None
    return set() if head is None else {id(head)}


def _nothing(pattern: str, hits: set[str], modules: dict[str, nn.Module], linear: dict[str, nn.Module]) -> str:
    if hits:
        name = min(hits)
        kind = type(modules[name])
        if kind is AdaptedLinear:
            return f"targets: {name} is adapted already; fl.merge or fl.remove the adapters first"
        return (
            f"targets: {pattern!r} matches {name}, a {kind.__module__}.{kind.__qualname__}; "
            "only nn.Linear and transformers' Conv1D can be adapted"
        )
    last = sorted({name.rpartition(".")[2] for name in linear})
    near = difflib.get_close_matches(pattern.rpartition(".")[2], last, n=5, cutoff=0.4) or last[:10]
    return f"targets: nothing is named {pattern!r}; near names: {', '.join(near) or 'none, no linear layer at all'}"
