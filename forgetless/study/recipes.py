"""The settings of a row as one can paste them: Python that adapts a model, and the command that trains it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import Any

from forgetless.methods import METHODS
from forgetless.penalties import PENALTIES

from .extras import Extras
from .plans import METHOD_SETTINGS


def changed(thing: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """The fields of a method or penalty that differ from these defaults, its class's own below them."""
    own = {field.name: field.default for field in dataclasses.fields(thing)} | defaults
    values = {name: getattr(thing, name) for name in own if name != "penalties"}
    return {name: value for name, value in values.items() if value != own[name]}


EXTRAS = tuple(field.name for field in dataclasses.fields(Extras))


def method_of(settings: dict[str, Any]) -> Any:
    """The method of a row's settings; None for full fine-tuning."""
    fields = {key: value for key, value in settings.items() if key not in ("lr", *EXTRAS)}
    return None if fields["name"] == "full" else METHODS["lora"].from_json(fields)


def extras_of(settings: dict[str, Any]) -> list[str]:
    """The parts of a row beside its method, as ``--method`` takes them."""
    chosen = {name: settings[name] for name in EXTRAS if settings.get(name)}
    return [name.replace("_", "-") + ("" if value is True else f"={value:g}") for name, value in chosen.items()]


def constructor(thing: Any) -> str:
    """Python that makes a method or penalty again, without most defaults: "fl.CLoRA(rank=16, alpha=32, k=256)"."""
    fields = {k: v for k, v in vars(thing).items() if k in ("rank", "alpha")} | changed(thing, {})
    words = [f"{name}={json.dumps(value) if isinstance(value, str) else repr(value)}" for name, value in fields.items()]
    penalties = [constructor(penalty) for penalty in getattr(thing, "penalties", ())]
    if penalties:
        words.append(f"penalties=({', '.join(penalties)},)")
    return f"fl.{type(thing).__name__}({', '.join(words)})"


def python(row: dict[str, Any], options: dict[str, Any]) -> str:
    """A few lines that adapt a ``model`` as this row did."""
    method = method_of(row["settings"])
    if method is None:
        return f"model.requires_grad_(True)  # every weight is trained, learning rate {row['settings']['lr']:g}"
    lines = ["import forgetless as fl", ""]
    targets = "" if options["targets"] == "all-linear" else f", targets={options['targets']!r}"
    lines.append(f"fl.adapt(model, {constructor(method)}{targets})")
    if "calibrate_seconds" in row:
        lines.append("fl.calibrate(model, batches)  # of text that must be kept")
    lines.append(f"# train on loss + fl.penalty(model), learning rate {row['settings']['lr']:g}")
    settings = row["settings"]
    if settings.get("retain"):
        lines.append(f"fl.retain(model, task_batches, {settings['retain']:g})  # once, when training ends")
    if settings.get("scaled"):
        scale = f"{settings['scaled']:g}"
        lines.append(f"fl.scaled(model, {scale})")
        lines.append(f"# or, before another task: fl.consolidate(model, task_batches, scale={scale})")
    shown = ("retain", "scaled", *(["consolidate"] if settings.get("retain") or settings.get("scaled") else []))
    if extras := [part for part in extras_of(settings) if part.partition("=")[0] not in shown]:
        lines.append(f"# and {', '.join(extras)}: see forgetless compare --help")
    return "\n".join(lines)


def spec(settings: dict[str, Any]) -> str:
    """The row as ``--method`` takes it; ``parse_method`` makes the same method of it, whatever the other options."""
    method = method_of(settings)
    fields = [f"lr={settings['lr']:g}"]
    if method is None:
        return f"{'+'.join(['full', *extras_of(settings)])}:{fields[0]}"
    parts = [method.name]
    fields += [f"{k}={_word(v)}" for k, v in changed(method, METHOD_SETTINGS.get(method.name, {})).items()]
    for penalty in method.penalties:
        parts.append(_short(penalty.name))
        fields += [f"{_short(penalty.name)}.{k}={_word(v)}" for k, v in changed(penalty, {}).items()]
    return f"{'+'.join(parts + extras_of(settings))}:{','.join(fields)}"


def _short(name: str) -> str:
    """The beginning of a penalty's name, where it says which one is meant."""
    word = name.partition("-")[0]
    return word if sum(known.startswith(word) for known in PENALTIES) == 1 else name


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def command(row: dict[str, Any], options: dict[str, Any]) -> str | None:
    """``forgetless finetune`` with the settings of this row; None for what it does not do: full, other parts."""
    others = [part for part in extras_of(row["settings"]) if part.partition("=")[0] not in Extras.AFTERWARDS]
    if row["settings"]["name"] == "full" or others:
        return None
    words = ["forgetless", "finetune", "--model", options["model"], "--data", "YOUR.jsonl"]
    words += ["--method", spec(row["settings"]), "--batch-size", str(options["batch_size"])]
    if options["accumulate"] > 1:
        words += ["--accumulate", str(options["accumulate"])]
    if options["targets"] != "all-linear":
        targets = options["targets"]
        words += ["--targets", *([targets] if isinstance(targets, str) else targets)]
    return shlex.join([*words, "--out", "adapter"])
