"""Which layers of a model are meant by ``targets``."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Iterable

from torch import nn

from .layers import tensor_parallel as shards
from .layers.frozen import is_plain, runs_as_linear
from .layers.linear import AdaptedLinear
from .layers.quantized import KINDS, kind_of
from .layers.stack import stacks
from .names import bare_modules, checked
from .ops.check import FLOATS

ALL_LINEAR = "all-linear"

#: Classes of modules that FSDP2 and FSDP1 have cut.
_SHARDED = {"FSDPModule", "FullyShardedDataParallel"}

# Names that heads go by in models that have no get_output_embeddings of their own.
_HEADS = {"lm_head", "embed_out", "score", "classifier", "head"}


def supported(module: nn.Module) -> bool:
    """nn.Linear and its subclasses that compute the same, transformers' Conv1D, known packed layers."""
    if _read_by_parent(module):
        return False
    return is_plain(module) or kind_of(module) is not None or runs_as_linear(module)


def _read_by_parent(module: nn.Module) -> bool:
    return type(module).__name__ == "NonDynamicallyQuantizableLinear"


def refusal(module: nn.Module) -> str | None:
    """Why a layer that looks linear cannot be adapted, and what to do; None for any other layer."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if supported(module) or isinstance(module, AdaptedLinear) or not all(isinstance(n, int) for n in sizes):
        return None
    if _read_by_parent(module):
        return "MultiheadAttention reads its weight without calling it"
    if any(True for _ in module.children()):
        return None  # a wrapper, such as PEFT's: what it wraps is looked at by itself
    if isinstance(module, nn.Linear) and module.weight.is_floating_point():
        return "it gives something else than x Wᵀ + b, or stores more than weight and bias"
    return "how it packs its weight is not known; fl.packed.register(cls, unpack, dtype) says so"


def find_layers(
    model: nn.Module, targets: str | Iterable[str], exclude: str | Iterable[str] = ()
) -> dict[str, nn.Module]:
    """Name -> layer of every layer that ``targets`` names and ``exclude`` does not, in the model's order.

    Args:
        targets: a list of names or name suffixes ("q_proj", "mlp.up_proj"); a regular expression that must match the
            whole name, or all of it after a dot; or "all-linear": every supported layer but the output head.
        exclude: names, name suffixes or a regular expression, matched in the same way: layers, or modules with all
            that is in them.

    Raises:
        ValueError: nothing matches (near names are listed), nothing is left, or a match cannot be adapted.
    """
    if _SHARDED & {cls.__name__ for module in checked(model).modules() for cls in type(module).__mro__}:
        raise ValueError("model is sharded by FSDP already: adapt it first, then fully_shard")
    modules = {name: module for name, module in bare_modules(model).items() if name}
    experts = stacks(model)
    modules |= experts
    linear = {name: module for name, module in modules.items() if name in experts or supported(module)}
    first = {id(module): name for name, module in reversed(linear.items())}  # a shared layer goes by its first name
    if isinstance(targets, str) and targets == ALL_LINEAR:
        heads = heads_of(model)
        chosen = {
            name
            for name, module in modules.items()
            if first.get(id(module), name) == name and not is_head(name, module, heads)
        }
        if not chosen & linear.keys():
            left = _listed([modules[name] for name in modules if name in chosen])
            raise ValueError(
                f"targets is 'all-linear', but {type(model).__name__} has no nn.Linear or Conv1D layer{left}"
            )
    else:
        chosen = _matched("targets", targets, modules, linear)
        if not chosen:
            raise ValueError("targets is empty, wants layer names, a regular expression or 'all-linear'")
    left_out = excluded(model, exclude)
    chosen -= left_out
    told = _listed([modules[name] for name in modules if name in chosen])
    if told:
        warnings.warn(f"targets{told}", stacklevel=3)
    unwanted = {id(modules[name]) for name in left_out}  # a shared layer by any of its names
    names = {first[id(linear[name])] for name in chosen & linear.keys() if id(linear[name]) not in unwanted}
    if not names:
        raise ValueError("exclude names every layer that targets names: nothing is left to adapt")
    return ready({name: module for name, module in linear.items() if name in names})


def _matched(
    title: str, given: str | Iterable[str], modules: dict[str, nn.Module], wants: dict[str, nn.Module]
) -> set[str]:
    """Names of the modules that a regular expression or a list of suffixes names; each must name one of ``wants``."""
    if not isinstance(given, Iterable):
        raise ValueError(f"{title} is {given!r}, wants a list of names or a regular expression")
    patterns = [given] if isinstance(given, str) else list(given)
    matched: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"{title} holds {pattern!r}, wants strings")
        expression = pattern if isinstance(given, str) else re.escape(pattern)
        try:
            re.compile(expression)  # alone: an error's position is then one in the pattern
            matcher = re.compile(rf"(?:.*\.)?(?:{expression})")
        except re.error as error:
            raise ValueError(f"{title} is {pattern!r}, not a valid regular expression: {error}") from None
        hits = {name for name in modules if matcher.fullmatch(name)}
        if not hits & wants.keys():
            raise ValueError(_nothing(title, pattern, hits, modules, wants))
        matched |= hits
    return matched


def excluded(model: nn.Module, exclude: str | Iterable[str]) -> set[str]:
    """Names of the modules that ``exclude`` of ``find_layers`` names, and of all that is in them."""
    modules: dict[str, nn.Module] = {**dict(model.named_modules(remove_duplicate=False)), **stacks(model)}
    names = _matched("exclude", exclude, modules, modules)
    below = tuple(f"{name}." for name in names)
    return {name for name in modules if name in names or name.startswith(below)}


def ready(layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers, if each can be adapted as it is now.

    Raises:
        ValueError: one cannot: says what must be done first.
    """
    for name, module in layers.items():
        kind = kind_of(module)
        reason = (shards.refusal(module) or _no_arithmetic(module)) if kind is None else kind.wants(module)
        if reason is not None:
            title = "" if kind is None else f" ({kind.title})"
            raise ValueError(f"targets: {name} cannot be adapted{title}: {reason}")
    return layers


def _no_arithmetic(module: nn.Module) -> str | None:
    """Why nothing can be computed with the weight of a plain layer; None if it can."""
    dtype = module.weight.dtype
    return (
        None if dtype in FLOATS else f"its weight has dtype {dtype}, wants one of {', '.join(sorted(map(str, FLOATS)))}"
    )


def _listed(modules: Iterable[nn.Module]) -> str:
    """ "; left out: 3 of my.QuantLinear (why), .." of the layers that look linear and cannot be adapted."""
    kinds: Counter[str] = Counter()
    for module in {id(module): module for module in modules}.values():
        why = refusal(module)
        if why is not None:
            kinds[f"{type(module).__module__}.{type(module).__qualname__} ({why})"] += 1
    return "; left out: " + ", ".join(f"{count} of {title}" for title, count in kinds.items()) if kinds else ""


def is_head(name: str, module: nn.Module, heads: set[int]) -> bool:
    """Whether the module of that name is the model's output head, of which ``heads_of`` says what it may."""
    return id(module) in heads if heads else name.rpartition(".")[2] in _HEADS


def heads_of(model: nn.Module) -> set[int]:
    """The id of the output head, where the model knows it."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        head = None
    return set() if head is None else {id(head)}


def _nothing(
    title: str, pattern: str, hits: set[str], modules: dict[str, nn.Module], wants: dict[str, nn.Module]
) -> str:
    if hits:
        name = min(hits)
        kind = type(modules[name])
        if issubclass(kind, AdaptedLinear):
            return f"targets: {name} is adapted already; fl.merge or fl.remove the adapters first"
        packed = ", ".join(dict.fromkeys(known.title for known in KINDS.values()))
        why = refusal(modules[name])
        return (
            f"targets: {pattern!r} matches {name}, a {kind.__module__}.{kind.__qualname__}; only nn.Linear, Conv1D of "
            f"transformers and packed layers that are known ({packed}, torchao) can be adapted"
        ) + (f": {why}" if why else "")
    last = sorted({name.rpartition(".")[2] for name in wants})
    near = difflib.get_close_matches(pattern.rpartition(".")[2], last, n=5, cutoff=0.4) or last[:10]
    return f"{title}: nothing is named {pattern!r}; near names: {', '.join(near) or 'none, no linear layer at all'}"
