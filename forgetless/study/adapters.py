"""What a folder with an adapter is good for: an answer to a question, a merged model, a LoRA checkpoint for PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

import forgetless as fl

from ..files import folder_atomically
from .config import CONFIG, read_config
from .encoding import NONE
from .models import load_model
from .options import DTYPES, BadInput, check_dtype


def settings(folder: Path | None, **given: Any) -> dict[str, Any]:
    """The options of the run that wrote the folder, and what is given, which wins.

    Raises:
        BadInput: neither names the model, or the dtype is unknown.
    """
    config = folder / CONFIG if folder is not None else None
    known = read_config(config) if config is not None and config.exists() else {}
    known |= {name: value for name, value in given.items() if value is not None}
    if "model" not in known:
        raise BadInput("--model is missing: give it" + (f", {folder} has no {CONFIG} that does" if folder else ""))
    check_dtype(known.setdefault("dtype", "bfloat16"))
    return known


def load_adapted(
    folder: Path | None, known: dict[str, Any], device: str, packed: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that ``settings`` name with the adapter of the folder, and its tokenizer.

    Raises:
        BadInput: either cannot be loaded, or they do not fit.
    """
    four_bit = packed and known.get("load_in_4bit", False)
    if folder is not None and not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    model, tokenizer = load_model(known["model"], DTYPES[known["dtype"]], device, four_bit)
    if folder is not None:
        try:
            fl.load(model, folder)
        except (ValueError, OSError) as error:
            raise BadInput(str(error)) from None
    return model, tokenizer


class Chat:
    """A conversation with a model. Without a chat template each text stands alone.

    Args:
        template: as ``--template`` of finetune.
        tokens: of an answer, at most.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str, tokens: int) -> None:
        self.model, self.tokenizer, self.tokens = model, tokenizer, tokens
        self.templated = template != NONE and bool(tokenizer.chat_template)
        self.messages: list[dict[str, str]] = []

    @torch.no_grad()
    def answer(self, text: str) -> str:
        """The most likely answer, printed as it comes, and returned."""
        if self.templated:
            self.messages.append({"role": "user", "content": text})
            inputs: Any = self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = self.tokenizer(text, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        shown = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        generate: Any = self.model.generate
        output = generate(**inputs, max_new_tokens=self.tokens, do_sample=False, streamer=shown)
        said = str(self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        self.messages.append({"role": "assistant", "content": said})
        return said


def lines(prompt: str) -> Iterator[str]:
    """What is typed, line after line, until the end of the input."""
    while True:
        try:
            text = input(prompt).strip()
        except EOFError:
            return
        if text:
            yield text


def merge(folder: Path, out: Path, known: dict[str, Any], device: str) -> None:
    """Write the model with the adapter merged into its weights, and the tokenizer, as ``from_pretrained`` reads them.

    Raises:
        BadInput: as of ``load_adapted``; ``out`` exists; the adapter cannot be merged.
    """
    _check_new(out)
    model, tokenizer = load_adapted(folder, known, device)
    try:
        fl.merge(model)
        with folder_atomically(out) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from None


def export(folder: Path, out: Path, known: dict[str, Any], device: str) -> None:
    """Write the adapter as a plain LoRA checkpoint, see ``fl.export_lora``.

    Raises:
        BadInput: as of ``load_adapted``; ``out`` exists or cannot be written.
    """
    _check_new(out)
    model, _ = load_adapted(folder, known, device)
    try:
        fl.export_lora(model, out)
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from None


def _check_new(out: Path) -> None:
    if out.exists():
        raise BadInput(f"--out {out} exists already; give another")
