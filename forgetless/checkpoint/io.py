"""Adapters on disk: safetensors and JSON, nothing else.

A folder holds

    adapter_model.safetensors   the adapter's parameters; PEFT's key names for LoRA-shaped methods
    adapter_config.json         PEFT's config for LoRA-shaped methods, so that ``peft.PeftModel`` loads the folder
    forgetless.json             method, penalties, layers, and hashes of what must fit together
    forgetless_state.safetensors   statistics of the penalties (curvature, covariance), if there are any

LoRA-shaped folders written by PEFT itself load too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn

from ..adapter import whole
from ..calibrate import share_statistics
from ..layers.linear import AdaptedLinear, site_of
from ..layers.quantized import weight_mark
from ..methods import LoRA, Method
from ..methods.curlora import CURLoRAAdapter, weight_hash
from ..methods.lora import LoRAAdapter
from ..model import adapt, adapters
from ..targets import find_layers

FORMAT = 1
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
OURS = "forgetless.json"
STATE = "forgetless_state.safetensors"
#: A folder of this name in an adapter's folder holds files that are whole and have yet to be put in place.
_WHOLE = ".saved-"
#: Seconds after which no process can still be at work on a folder of half-written files.
_STALE = 3600
_PEFT_PREFIX = "base_model.model."


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapters of ``model`` into ``folder``, which may exist; the base model is not written.

    Every file is written beside its place and then renamed, so a reader never sees half of one; killed at any moment,
    it leaves the old adapter or the new one for ``fl.load``. Where parameters are sharded over processes (FSDP2), every
    process must call this; the first one writes, and all return when it has.
    Parameters keep their dtype; PEFT loads the folders of LoRA, CLoRA and LaLoRA.

    Args:
        model: an adapted model.
        folder: is made if it is not there; files of an earlier adapter in it are replaced.

    Raises:
        ValueError: the model has no adapters, or they are of several methods.
        OSError: the folder cannot be written.
    """
    found, method = _of_one_method(model)
    tensors: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name, layer in found.items():
        layers[name] = {"in_features": layer.in_features, "out_features": layer.out_features}
        if isinstance(layer.adapter, LoRAAdapter):
            tensors.update(_lora_tensors(name, layer))
        else:
            for key, tensor in _own_tensors(layer).items():
                tensors[f"{name}.{key}"] = whole(tensor)
            for index, factors in enumerate(layer.folded):
                tensors.update(zip(_folded_keys(name, index), factors, strict=True))
        if isinstance(layer.adapter, CURLoRAAdapter):
            layers[name]["weight_sha256"] = layer.adapter.weight_sha256 or weight_hash(weight_mark(layer.base))
        for index, penalty in enumerate(layer.adapter.penalty_states()):
            for key, tensor in penalty.state_dict().items():
                state[f"{name}.{index}.{key}"] = tensor
    weights = _bytes(tensors)
    ours: dict[str, Any] = {
        "format": FORMAT,
        "method": method.to_json(),
        "layers": layers,
        "consolidated": len(next(iter(found.values())).folded),
        "sha256": {WEIGHTS: hashlib.sha256(weights).hexdigest()},
    }
    own = {"peft_type": method.name.upper(), "base_model_name_or_path": _base_name(model)}
    lora = isinstance(next(iter(found.values())).adapter, LoRAAdapter)
    files = {WEIGHTS: weights, CONFIG: _json(_peft_config(model, found, method) if lora else own)}
    if state:
        files[STATE] = _bytes(state)
        ours["sha256"][STATE] = hashlib.sha256(files[STATE]).hexdigest()
    files[OURS] = _json(ours)  # last: it vouches for the others
    _write_once(Path(folder), files, found)


def export_lora(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapters as a plain LoRA checkpoint, whatever their method: PEFT loads it, and ``fl.load`` as fl.LoRA.

    CURLoRA's C U R is the LoRA with lora_B = C U and lora_A = R, exact but for the rounding of C U to the adapter's
    dtype; it takes r (N + K) numbers a layer instead of r^2, and its rank r is then free to learn. Penalties and what
    they measured are not in it. Under FSDP2 every process must call this, as ``fl.save``.

    Args:
        model: an adapted model.
        folder: as of ``fl.save``.

    Raises:
        ValueError: the model has no adapters, or they are of several methods; the folder holds a checkpoint of
            ``fl.save``, which this one would not fit.
        OSError: the folder cannot be written.
    """
    found, method = _of_one_method(model)
    if _newest(Path(folder), OURS).exists():
        raise ValueError(f"folder {folder} holds a checkpoint of fl.save ({OURS}); export into another one")
    tensors = {key: tensor for name, layer in found.items() for key, tensor in _lora_tensors(name, layer).items()}
    files = {WEIGHTS: _bytes(tensors), CONFIG: _json(_peft_config(model, found, method))}
    _write_once(Path(folder), files, found)


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Adapt ``model`` as the folder says and fill in the saved parameters; returns the model, adapters trainable.

    Args:
        model: the base model, without adapters.
        folder: written by ``fl.save``, or a LoRA checkpoint written by PEFT.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or does not fit this model: names the file, the layer, what it got and what it
            wants. The model is then as it was.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder with a saved adapter")
    about = _newest(folder, OURS)
    ours = _read_json(about) if about.exists() else None
    if ours is None:
        return _load_peft(model, folder)
    if ours.get("format") != FORMAT:
        raise ValueError(f"{folder / OURS}: format {ours.get('format')!r}, this version reads {FORMAT}")
    digests, layers = ours.get("sha256"), ours.get("layers")
    if not (
        isinstance(layers, dict)
        and layers
        and all(isinstance(facts, dict) for facts in layers.values())
        and isinstance(digests, dict)
        and isinstance(digests.get(WEIGHTS), str)
        and isinstance(ours.get("method"), dict)
    ):
        raise ValueError(f"{folder / OURS}: damaged, wants method, layers and sha256")
    count = ours.get("consolidated", 0)
    if type(count) is not int or count < 0:
        raise ValueError(f"{folder / OURS}: consolidated is {count!r}, wants a count")
    method = Method.from_json(ours["method"])
    tensors = _read_tensors(_newest(folder, WEIGHTS), digests.get(WEIGHTS))
    state = _read_tensors(_newest(folder, STATE), digests[STATE]) if STATE in digests else {}
    if count > max([len(tensors), *(size for t in tensors.values() for size in t.shape)]):
        raise ValueError(f"{folder / OURS}: consolidated is {count}, more than {WEIGHTS} holds")
    linear = _find(model, layers, folder)
    for name, facts in layers.items():
        site = site_of(name, linear[name])
        if (facts.get("out_features"), facts.get("in_features")) != tuple(site.weight.shape):
            raise ValueError(
                f"{folder}: {name} was (out {facts.get('out_features')}, in {facts.get('in_features')}), "
                f"this model's is {tuple(site.weight.shape)}"
            )
        if "weight_sha256" in facts and weight_hash(weight_mark(linear[name])) != facts["weight_sha256"]:
            raise ValueError(
                f"{folder}: the weight of {name} is not the one this {method.name} adapter was made on; "
                "load it onto the same base model, in the same dtype"
            )
    try:
        adapt(model, method, list(layers))
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, MemoryError, RuntimeError, TypeError) as error:  # a number beyond all bounds
        raise ValueError(f"{folder / OURS}: no adapter can be made of {method}: {error}") from None
    try:
        folded = {name: _take_folded(tensors, layer, count) for name, layer in adapters(model).items()}
        filled = _fill(model, tensors, state)
        for target, tensor in filled:
            target.copy_(tensor)
        for name, layer in adapters(model).items():
            if isinstance(layer.adapter, CURLoRAAdapter):
                layer.adapter.gather(site_of(layer.name, layer.base, values=True).weight)
                layer.adapter.weight_sha256 = layers[name].get("weight_sha256")
            for factors in folded[name]:
                layer.fold(factors)
        share_statistics(model)
    except Exception:
        from ..model import remove

        remove(model)
        raise
    return model


def _find(model: nn.Module, names: Any, folder: Path) -> dict[str, nn.Module]:
    present = dict(model.named_modules())
    for name in names:
        if name not in present:
            raise ValueError(f"{folder}: the adapter has a layer {name}, this {type(model).__name__} has none")
    found = find_layers(model, list(names))
    return {name: found[name] for name in names}


def _own_tensors(layer: AdaptedLinear) -> dict[str, Tensor]:
    return {key: value for key, value in layer.adapter.state_dict().items() if not key.startswith("penalties.")}


def _folded_keys(name: str, index: int) -> tuple[str, str]:
    return f"{name}.folded.{index}.down", f"{name}.folded.{index}.up"


def _take_folded(tensors: dict[str, Tensor], layer: AdaptedLinear, count: int) -> list[tuple[Tensor, Tensor]]:
    """The factors of ``count`` consolidated tasks, taken out of ``tensors``, checked against the layer."""
    N, K = layer.out_features, layer.in_features
    device = layer.weight.device
    if not isinstance(layer.adapter, LoRAAdapter):
        found = []
        for index in range(count):
            keys = _folded_keys(layer.name, index)
            R = layer.adapter.factors()[0].shape[0]
            like = dict(zip(keys, (torch.empty(R, K), torch.empty(N, R)), strict=True))
            found.append(tuple(tensor.to(device) for _, tensor in _take(tensors, like, WEIGHTS)))
        return found  # type: ignore[return-value]
    R = layer.adapter.down.shape[0]
    a, b = _peft_keys(layer.name).values()
    like = {a: torch.empty((1 + count) * R, K), b: torch.empty(N, (1 + count) * R)}
    (_, down), (_, up) = _take(tensors, like, WEIGHTS)
    downs, ups = down.split(R), [part.contiguous() for part in up.split(R, dim=1)]
    tensors[a], tensors[b] = downs[0], ups[0]
    return [(d.to(device), u.to(device)) for d, u in zip(downs[1:], ups[1:], strict=True)]


def _of_one_method(model: nn.Module) -> tuple[dict[str, AdaptedLinear], Method]:
    found = adapters(model)
    if not found:
        raise ValueError("model has no adapters; call fl.adapt(model, method) first")
    method = next(iter(found.values())).method
    if any(layer.method != method for layer in found.values()):
        raise ValueError("model holds adapters of several methods; save wants one")
    return found, method


def _base_name(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _lora_tensors(name: str, layer: AdaptedLinear) -> dict[str, Tensor]:
    """lora_A and lora_B; consolidated tasks follow as further ranks: on the original base PEFT computes the whole."""
    factors = [tuple(factor.detach() for factor in layer.adapter.factors()), *layer.folded]
    downs, ups = zip(*((down.cpu(), up.cpu()) for down, up in factors), strict=True)
    return dict(zip(_peft_keys(name).values(), (torch.cat(downs), torch.cat(ups, dim=1)), strict=True))


def _write_once(folder: Path, files: dict[str, bytes], found: dict[str, AdaptedLinear]) -> None:
    """Write them; where parameters are sharded, in the first process alone, and all return when that is done."""
    sharded = any(hasattr(p, "full_tensor") for layer in found.values() for p in layer.parameters())
    try:
        if not sharded or torch.distributed.get_rank() == 0:
            _write(folder, files)
    finally:
        if sharded:
            torch.distributed.barrier()


def _peft_keys(name: str) -> dict[str, str]:
    return {"down": f"{_PEFT_PREFIX}{name}.lora_A.weight", "up": f"{_PEFT_PREFIX}{name}.lora_B.weight"}


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor], state: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs (tensor in the model, tensor from disk), all checked before any is copied."""
    pairs = []
    tensors, state = dict(tensors), dict(state)
    for name, layer in adapters(model).items():
        if isinstance(layer.adapter, LoRAAdapter):
            wanted = {key: getattr(layer.adapter, factor).data for factor, key in _peft_keys(name).items()}
        else:
            wanted = {f"{name}.{key}": tensor for key, tensor in _own_tensors(layer).items()}
        pairs += _take(tensors, wanted, WEIGHTS)
        for index, penalty in enumerate(layer.adapter.penalty_states()):
            wanted = {f"{name}.{index}.{key}": tensor for key, tensor in penalty.state_dict().items()}
            pairs += _take(state, wanted, STATE)
    for file, left in ((WEIGHTS, tensors), (STATE, state)):
        if left:
            raise ValueError(f"{file} holds {min(left)}, which this model has no place for")
    return pairs


def _take(tensors: dict[str, Tensor], wanted: dict[str, Tensor], file: str) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for key, target in wanted.items():
        if key not in tensors:
            raise ValueError(f"{file} lacks {key}")
        tensor = tensors.pop(key)
        if tensor.shape != target.shape:
            raise ValueError(f"{file}: {key} has shape {tuple(tensor.shape)}, wants {tuple(target.shape)}")
        if tensor.is_floating_point() != target.is_floating_point():
            raise ValueError(f"{file}: {key} has dtype {tensor.dtype}, wants {target.dtype}")
        pairs.append((target, tensor))
    return pairs


# ------------------------------------------------------------------------------------------ PEFT


def _peft_config(model: nn.Module, found: dict[str, AdaptedLinear], method: Method) -> dict[str, Any]:
    first = next(iter(found.values()))
    rank = first.adapter.factors()[0].shape[0] * (1 + len(first.folded))
    exact = isinstance(first.adapter, LoRAAdapter) and not first.folded  # PEFT divides by the rank as the method does
    rslora = exact and bool(getattr(method, "rslora", False))
    alpha = getattr(method, "alpha", None) if exact else None
    if alpha is None:
        alpha = first.adapter.scale * rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": _base_name(model),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": first.adapter.dropout,
        "use_rslora": rslora,
        "fan_in_fan_out": first.transposed,
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": _short_targets(model, found),
    }


def _short_targets(model: nn.Module, found: dict[str, AdaptedLinear]) -> list[str]:
    """The last parts of the names where they mean the same layers, else the full names."""
    last = {name.rpartition(".")[2] for name in found}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last) if meant == set(found) else sorted(found)


def _load_peft(model: nn.Module, folder: Path) -> nn.Module:
    """A LoRA checkpoint that PEFT wrote."""
    config = _read_json(_newest(folder, CONFIG))
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}, wants 'LORA'")
    refused = {
        "use_dora": "DoRA",
        "modules_to_save": "modules_to_save",
        "rank_pattern": "per-layer ranks",
        "alpha_pattern": "per-layer alphas",
        "lora_bias": "a bias in lora_B",
        "layer_replication": "replicated layers",
        "trainable_token_indices": "trained tokens",
    }
    for key, what in refused.items():
        if config.get(key):
            raise ValueError(f"{folder / CONFIG}: the checkpoint has {what} ({key}), which forgetless does not load")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"):
        raise ValueError(
            f"{folder / CONFIG}: init_lora_weights is {start!r}, which changes the base weights as well; "
            "convert the checkpoint to plain LoRA with PEFT first"
        )
    tensors = _read_tensors(_newest(folder, WEIGHTS), None)
    names = []
    for key in tensors:
        name = key.removeprefix(_PEFT_PREFIX)
        for suffix in (".lora_A.weight", ".lora_B.weight"):
            if name.endswith(suffix):
                names.append(name.removesuffix(suffix))
                break
        else:
            raise ValueError(f"{folder / WEIGHTS}: {key} is not a LoRA factor of a linear layer")
    names = list(dict.fromkeys(names))
    if not names:
        raise ValueError(f"{folder / WEIGHTS}: holds no tensors")
    _find(model, names, folder)
    method = LoRA(
        rank=config.get("r"),  # type: ignore[arg-type]
        alpha=config.get("lora_alpha"),  # type: ignore[arg-type]
        dropout=config.get("lora_dropout") or 0.0,
        rslora=bool(config.get("use_rslora")),
    )
    adapt(model, method, names)
    try:
        for target, tensor in _fill(model, tensors, {}):
            target.copy_(tensor)
    except Exception:
        from ..model import remove

        remove(model)
        raise
    return model


# ----------------------------------------------------------------------------------------- files


def _bytes(tensors: dict[str, Tensor]) -> bytes:
    plain = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    return serialise(plain, metadata={"format": "pt"})


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """All of them count from the moment when the folder that holds them is renamed: ``_newest`` finds them there."""
    folder.mkdir(parents=True, exist_ok=True)
    _settle(folder)
    scratch = Path(tempfile.mkdtemp(prefix=f".saving-{os.getpid()}-", dir=folder))
    there = folder / scratch.name.replace(".saving-", _WHOLE)
    try:
        for name, data in files.items():
            with open(scratch / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if (folder / name).exists():
                shutil.copyfile(folder / name, scratch / f"{name}.old")
        os.rename(scratch, there)
        try:
            for name in files:
                with suppress(FileNotFoundError):  # another process that saves here has put it in place
                    os.replace(there / name, folder / name)
        except BaseException:  # files of two saves do not fit together: put the old ones back
            os.rename(there, scratch)
            for name in files:
                if (scratch / name).exists():
                    continue
                if (scratch / f"{name}.old").exists():
                    os.replace(scratch / f"{name}.old", folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
            raise
        if STATE not in files:
            (folder / STATE).unlink(missing_ok=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(there, ignore_errors=True)


def _newest(folder: Path, name: str) -> Path:
    """Where the file is: a save that was killed has not put all of its files in place."""
    found: dict[Path, int] = {}
    for path in (*folder.glob(f"{_WHOLE}*/{name}"), folder / name):
        with suppress(OSError):  # moved meanwhile, or a link to nowhere
            found[path] = path.stat().st_mtime_ns
    return max(found, key=lambda path: found[path], default=folder / name)


def _settle(folder: Path) -> None:
    """Put in place what a killed save could not, and throw away what it had not written to its end."""
    for left in folder.glob(".saving-*"):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > _STALE:
                shutil.rmtree(left)
    for left in folder.glob(f"{_WHOLE}*"):
        if left.is_symlink() or not left.is_dir():
            continue
        for name in (WEIGHTS, CONFIG, STATE, OURS):
            if _newest(folder, name) == left / name:
                with suppress(FileNotFoundError):
                    os.replace(left / name, folder / name)
        shutil.rmtree(left, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: wants a file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; is {path.parent} a folder with a saved adapter?") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits too
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a {type(data).__name__}, wants an object")
    return data


def _read_tensors(path: Path, sha256: str | None) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if sha256 is not None:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else None
        got = digest.hexdigest() if digest is not None else hashlib.sha256(path.read_bytes()).hexdigest()
        if got != sha256:
            raise ValueError(f"{path}: damaged, or of another save than {OURS}: SHA-256 {got}, wants {sha256}")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from None
