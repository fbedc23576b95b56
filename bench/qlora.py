"""QLoRA: PEFT's LoRA on a base in bitsandbytes' NF4, as it is and swapped in, and the same on the bfloat16 base.

    python -m bench qlora [--steps 8] [--batch 4 96]

Real training of SmolLM2-135M on one task, with AdamW, the same batches for all: the loss of every step, seconds per
step (interleaved; the median leaves the first step out), bytes of the linear layers' weights, what is saved for the
backward pass, and the peak of a step. Needs bitsandbytes, which runs NF4 on a CPU as well.
"""

from __future__ import annotations

import importlib.util
import itertools
from functools import partial
from typing import Any

import torch
from torch import nn

import forgetless as fl

from . import providers as peers
from .bytes import peak_bytes, saved_bytes
from .harness import BadInput, Results, begin, finish, interleave, row, size_rows, time_row
from .providers import have_peft

TASK = "django-de"


def quantized(base: nn.Module) -> Any:
    """A twin of the base with every linear layer but the head in NF4."""
    import bitsandbytes as bnb

    model = peers.twin(base)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
            sizes = layer.in_features, layer.out_features, layer.bias is not None
            packed = bnb.nn.Linear4bit(*sizes, layer.weight.dtype, False, "nf4")
            packed.weight = bnb.nn.Params4bit(layer.weight.data, False, quant_type="nf4", compress_statistics=False)
            packed.bias = layer.bias
            model.set_submodule(name, packed.to(layer.weight.device))
    model.is_loaded_in_4bit = True  # what PEFT asks
    return model


def weight_bytes(model: nn.Module) -> int:
    """Of the frozen layers that are adapted, the scales of a packed weight included."""
    weights: list[Any] = [m.weight for name, m in model.named_modules() if name.endswith("base_layer")]
    scales = [getattr(getattr(weight, "quant_state", None), "absmax", None) for weight in weights]
    return sum(t.numel() * t.element_size() for t in (*weights, *scales) if t is not None)


def texts(base: Any, smoke: bool, steps: int, batch: tuple[int, int], device: torch.device) -> list[dict]:
    """Batches of the task; of random tokens where the model is a toy."""
    if smoke:
        ids = torch.randint(0, base.config.vocab_size, (steps, *batch), device=device)
        return [{"input_ids": part, "labels": part} for part in ids]
    from forgetless.study.data import Collator, load_domain
    from forgetless.study.encoding import encode
    from forgetless.study.models import load_model

    tokenizer = load_model(device=device)[1]
    rows = [encode(example, tokenizer, batch[1]) for example in load_domain(TASK).train[: steps * batch[0]]]
    return [{k: v.to(device) for k, v in part.items()} for part in Collator(tokenizer).batches(rows, batch[0])]


class Training:
    """One base being trained: a call is a step on the next batch."""

    def __init__(self, model: Any, batches: list[dict]):
        self.model, self.batches = model, iter(batches)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
        self.losses: list[float] = []

    def __call__(self) -> None:
        loss = self.model(**next(self.batches)).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())


def backward(model: Any, batch: Any) -> None:
    model(**batch).loss.backward()


def main(arguments: list[str] | None = None) -> Results:
    tiny = {"steps": 2, "batch": (2, 8)}
    options, device, results = begin(__doc__, "qlora", arguments, 1, tiny, steps=8, batch=(4, 96))
    if not have_peft() or importlib.util.find_spec("bitsandbytes") is None:
        raise BadInput("qlora needs PEFT and bitsandbytes: pip install peft bitsandbytes")
    base, name = peers.smollm2(device, options.smoke)
    batches = texts(base, options.smoke, options.steps, options.batch, device)
    tokens = "×".join(map(str, options.batch))
    case = f"{name}, all linear layers but the head, rank {peers.RANK}, {tokens} tokens of {TASK} at most, AdamW"
    runs: dict[str, Training] = {}
    for kind, way in itertools.product(("bfloat16", "NF4"), ("PEFT", "swapped in")):
        title = f"{kind} base, {way}"
        frozen = quantized(base) if kind == "NF4" else base
        torch.manual_seed(0)  # equal draws every time
        model = peers.peft_model(frozen, 0.0)
        if way == "swapped in":
            fl.swap_in(model)
        sizes = {
            "weights": weight_bytes(model),
            "saved": saved_bytes(partial(model, **batches[0]), [model, base]),
            "peak": peak_bytes(partial(backward, model, batches[0]), device),
        }
        results["rows"] += size_rows(case, title, "step", sizes)
        model.zero_grad(set_to_none=True)
        runs[title] = Training(model, batches)
    for title, (times,) in interleave(runs, len(batches), 0, device).items():
        results["rows"] += [time_row(case, title, "step 1", times[:1]), time_row(case, title, "step", times[1:])]
        losses = enumerate(runs[title].losses, start=1)
        results["rows"] += [row(case, title, f"step {i}", "loss", loss, "nats") for i, loss in losses]
    return finish(results, options)
