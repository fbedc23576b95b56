"""Rows of a comparison, by name.

A method is written ``NAME[+PART]...[:FIELD=VALUE,...]``. NAME is a method of the library or ``full`` (every weight is
trained). A PART is a penalty, with its weight if not the default (``+source=0.03``), or one of ``extras.Extras``:
``consolidate``, ``scaled=0.8``, ``budget=0.02``, ``replay=0.15``, ``self-replay=0.15``, ``kl=1``. FIELD is one of the
method's, ``lr``, or one of a penalty's (``covariance=full``; ``source.weight=0.1`` where the method or two penalties
have it). Everything wrong with it is a ``BadInput`` with one line that says so.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from forgetless.methods import METHODS
from forgetless.penalties import PENALTIES, SourceDeviation

from .extras import Extras
from .options import BadInput, near, number

#: Names as the papers write them.
TITLES = {"lora": "LoRA", "clora": "CLoRA", "curlora": "CURLoRA", "lalora": "LaLoRA", "full": "full"}

#: Settings of a method beyond the library's defaults, found on SmolLM2-135M with the built-in tasks.
METHOD_SETTINGS: dict[str, dict[str, float]] = {
    "lora": {"rank": 16, "alpha": 32},
    "clora": {"rank": 16, "alpha": 32, "k": 256, "weight": 1.0},
    "curlora": {"rank": 16},
    "lalora": {"rank": 16, "alpha": 32, "weight": 1e5},
}
#: Learning rate relative to LoRA's. CURLoRA trains an r x r core between frozen factors. One seed, 25 steps of
#: django-de: at 2e-3 it learns 0.81 nats, at 5e-3 0.97 and forgets three times as much, at 1e-2 it diverges.
LR_FACTOR = {"curlora": 1.5, "full": 0.025}
#: Short for LoRA with the penalty that this project recommends.
ALIASES = {"source": "lora+source"}
#: What a sweep varies where there is no penalty, the first that is asked for; else the learning rate.
STRENGTHS = ("retain", "kl", "scaled", "budget", "replay", "self_replay")


@dataclass(frozen=True)
class Full:
    """Full fine-tuning: every parameter of the model learns, no adapter is put on."""

    def to_json(self) -> dict[str, Any]:
        """As of a method of the library."""
        return {"name": "full"}


@dataclass(frozen=True)
class Plan:
    """One row of a comparison: a method with its settings and its learning rate.

    ``family`` is the label of the row that a sweep has made this one from.
    """

    label: str
    method: Any
    lr: float
    own_seed: bool = False
    extras: Extras = Extras()
    family: str | None = None

    @property
    def full(self) -> bool:
        """Whether every weight is trained."""
        return isinstance(self.method, Full)

    @property
    def alters(self) -> bool:
        """Whether the base model's own weights are changed."""
        return self.full or self.extras.folds

    @property
    def plain(self) -> bool:
        """Whether this is LoRA and nothing else: what all others are compared with."""
        return self.method.to_json()["name"] == "lora" and not self.method.penalties and self.extras == Extras()

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {**self.method.to_json(), "lr": self.lr, **self.extras.to_json()}

    def seeded(self, seed: int) -> Any:
        """The method with its own draws (bases, rows, columns) made by ``seed``, unless it names one itself."""
        if "seed" in {f.name for f in dataclasses.fields(self.method)} and not self.own_seed:
            return dataclasses.replace(self.method, seed=seed)
        return self.method

    @property
    def weight(self) -> float | None:
        """Of its one penalty; None without one, or with several."""
        own = getattr(self.method, "weight", None)
        extra: tuple[Any, ...] = getattr(self.method, "penalties", ())
        if own is not None:
            return None if extra else own
        return extra[0].weight if len(extra) == 1 else None

    def swept(self, factor: float) -> Plan:
        """The same with its strength times ``factor``: a weight, else a scale or a share, else the learning rate."""
        strength = next((name for name in STRENGTHS if getattr(self.extras, name)), None)
        if strength is not None and (self.weight is None or self.extras.retain):
            value = getattr(self.extras, strength) * factor
            extras = dataclasses.replace(self.extras, **{strength: value})
            return dataclasses.replace(self, label=f"{self.label} @ {value:g}", extras=extras, family=self.label)
        if self.weight is None:
            lr = self.lr * factor
            return dataclasses.replace(self, label=f"{self.label} @ lr {lr:g}", lr=lr, family=self.label)
        weight = self.weight * factor
        if hasattr(self.method, "weight"):
            method = dataclasses.replace(self.method, weight=weight)
        else:
            penalty = dataclasses.replace(self.method.penalties[0], weight=weight)
            method = dataclasses.replace(self.method, penalties=(penalty,))
        return dataclasses.replace(self, label=f"{self.label} @ {weight:g}", method=method, family=self.label)


def parse_method(
    spec: str,
    *,
    lr: float,
    rank: int | None = None,
    alpha: float | None = None,
    weight: float | None = None,
    lr_is_default: bool = True,
) -> Plan:
    """A plan from ``NAME[+PART]...[:FIELD=VALUE,...]``. Fields win over the common settings."""
    head, _, tail = spec.partition(":")
    name, *extras = head.lower().split("+")
    if name in ALIASES:
        name, *more = ALIASES[name].split("+")
        extras = more + extras
    if name not in METHODS and name != "full":
        raise BadInput(f"unknown method {name!r};{near(name, [*METHODS, *ALIASES, 'full'])}")
    cls: Any = METHODS.get(name, Full)
    fields = {f.name: f.default for f in dataclasses.fields(cls) if f.name != "penalties"}
    chosen = _extras([part for part in extras if part.partition("=")[0] in Extras.DEFAULTS], spec)
    penalties = [_penalty(part, spec) for part in extras if part.partition("=")[0] not in Extras.DEFAULTS]
    if name == "full" and (penalties or dataclasses.replace(chosen, replay=0.0, self_replay=0.0) != Extras()):
        raise BadInput(f"method {spec!r}: full fine-tuning has no adapter, so no penalty and nothing to consolidate")
    if penalties and "penalties" not in {f.name for f in dataclasses.fields(cls)}:
        raise BadInput(f"method {spec!r}: {TITLES.get(name, name)} takes no extra penalty")
    expected: dict[str, Any] = {k: v for k, v in METHOD_SETTINGS.get(name, {}).items() if k in fields}
    common = {"rank": rank, "alpha": alpha, "weight": weight}
    expected |= {k: v for k, v in common.items() if v is not None and k in fields}
    if rank is not None and alpha is None and "alpha" in METHOD_SETTINGS.get(name, {}):
        expected["alpha"] = 2 * rank
    rate = lr * (LR_FACTOR.get(name, 1.0) if lr_is_default else 1.0)
    changed: dict[int, dict[str, Any]] = {}
    for item in filter(None, tail.split(",")):
        field, equals, value = item.partition("=")
        if equals and field == "lr":
            rate = float(number(value, f"method {spec!r}: lr"))
        elif equals and field in fields:
            expected[field] = _value(value, fields[field], f"{field} of {spec!r}")
        else:
            which, inner = _owner(field, penalties) if equals else (None, field)
            if which is None:
                theirs = [f.name for p in penalties for f in dataclasses.fields(p)]
                several = f"{field!r} is a field of several parts: name it PART.{field}"
                what = (
                    several if field in theirs else f"no field {field!r}" if equals else f"{item!r} is not FIELD=VALUE"
                )
                raise BadInput(f"method {spec!r}: {what};{near(field, {*fields, *theirs, 'lr'})}")
            default = next(f.default for f in dataclasses.fields(penalties[which]) if f.name == inner)
            changed.setdefault(which, {})[inner] = _value(value, default, f"{field} of {spec!r}")
    if expected.get("rank", 1) < 1:
        raise BadInput(f"rank must be at least 1, got {expected['rank']}")
    if not rate > 0:
        raise BadInput(f"lr must be positive, got {rate}")
    try:
        for which, values in changed.items():
            penalties[which] = dataclasses.replace(penalties[which], **values)
        if penalties:
            expected["penalties"] = tuple(penalties)
        method = cls(**expected)
    except (TypeError, ValueError) as error:
        raise BadInput(f"method {spec!r}: {error}") from None
    label = "+".join([TITLES.get(name, name), *extras]) + (f":{tail}" if tail else "")
    if chosen.retain:
        method = _measuring(method, spec)
    return Plan(label, method, rate, "seed" in expected, chosen)


def _measuring(method: Any, spec: str) -> Any:
    """The method with statistics of kept text, which ``fl.retain`` reads."""
    if not getattr(method, "adapts_experts", False):  # which is where it has the factors of LoRA
        raise BadInput(f"method {spec!r}: retain wants a method with the factors of LoRA")
    if any(isinstance(penalty, SourceDeviation) for penalty in method.all_penalties()):
        return method
    return dataclasses.replace(method, penalties=(*method.penalties, SourceDeviation(0.0, "full")))


def _extras(parts: list[str], spec: str) -> Extras:
    values: dict[str, Any] = {}
    for part in parts:
        name, equals, text = part.partition("=")
        field = name.replace("-", "_")
        if field in values:
            raise BadInput(f"method {spec!r}: {name} is asked for twice")
        if equals and name == "consolidate":
            raise BadInput(f"method {spec!r}: consolidate takes no value")
        values[field] = number(text, f"{name} of {spec!r}") if equals else Extras.DEFAULTS[name]
    try:
        return Extras(**values)
    except ValueError as error:
        raise BadInput(f"method {spec!r}: {error}") from None


def _value(text: str, default: Any, what: str) -> Any:
    """A field's value: words where its default is a word (whole numbers too), true or false, else a number."""
    if isinstance(default, str):
        return int(text) if text.isdecimal() else text
    if isinstance(default, bool):
        if text.lower() not in ("true", "false", "1", "0"):
            raise BadInput(f"{what} must be true or false, got {text!r}")
        return text.lower() in ("true", "1")
    return number(text, what)


def _owner(field: str, penalties: list[Any]) -> tuple[int | None, str]:
    """Which penalty a field belongs to: the one that is named before a dot, or the only one that has it."""
    name, dot, inner = field.rpartition(".")
    result = [
        i
        for i, penalty in enumerate(penalties)
        if inner in {f.name for f in dataclasses.fields(penalty)} and (not dot or penalty.name.startswith(name))
    ]
    return (result[0] if len(result) == 1 else None), inner


def _penalty(text: str, spec: str) -> Any:
    name, _, value = text.partition("=")
    matches = [known for known in PENALTIES if known.startswith(name)]
    if not name or len(matches) != 1:
        short = {known.partition("-")[0] for known in PENALTIES} | set(Extras.DEFAULTS)
        raise BadInput(f"method {spec!r}: unknown penalty {name!r};{near(name, short)}")
    cls = PENALTIES[matches[0]]
    try:
        return cls(weight=number(value, f"weight of {text!r}")) if value else cls()
    except ValueError as error:
        raise BadInput(f"method {spec!r}: {error}") from None
