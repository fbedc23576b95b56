"""What a model knows: the loss on held-out examples, plain facts it still completes, and how far it has moved."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from forgetless.layers.frozen import is_conv1d
from forgetless.layers.linear import AdaptedLinear
from forgetless.layers.trace import DRIFT_TOKENS
from forgetless.switch import evaluating
from forgetless.targets import find_layers

from .data import Collator, padding_id
from .encoding import IGNORED, start_tokens, text_tokens


@dataclass(frozen=True)
class FactProbe:
    """A sentence to be completed, and the word its greedy completion must start with."""

    prompt: str
    answer: str


# Plain facts in words that a small model can complete: chosen so that SmolLM2-135M knows most of them, for
# only what is known can be forgotten.
FACTS: tuple[FactProbe, ...] = (
    FactProbe("The capital of France is", "Paris"),
    FactProbe("The capital of Japan is", "Tokyo"),
    FactProbe("The capital of Italy is", "Rome"),
    FactProbe("The capital of Russia is", "Moscow"),
    FactProbe("Cairo is the capital of", "Egypt"),
    FactProbe("The people of Brazil speak", "Portuguese"),
    FactProbe("The Great Wall of China is located in", "China"),
    FactProbe("The currency of the United Kingdom is the", "pound"),
    FactProbe("The largest ocean on Earth is the", "Pacific"),
    FactProbe("The longest river in Africa is the", "Nile"),
    FactProbe("The largest planet in the Solar System is", "Jupiter"),
    FactProbe("The planet closest to the Sun is", "Mercury"),
    FactProbe("The chemical formula of water is", "H2O"),
    FactProbe("The chemical symbol for gold is", "Au"),
    FactProbe("Water freezes at 0 degrees Celsius and boils at", "100"),
    FactProbe("Plants take in carbon dioxide and release", "oxygen"),
    FactProbe("The number of days in a week is", "7"),
    FactProbe("The square root of 9 is", "3"),
    FactProbe("Two plus two equals", "four"),
    FactProbe("The opposite of hot is", "cold"),
    FactProbe("World War II ended in the year", "1945"),
    FactProbe("The play Romeo and Juliet was written by William", "Shakespeare"),
    FactProbe("The theory of relativity was developed by Albert", "Einstein"),
    FactProbe("The first person to walk on the Moon was Neil", "Armstrong"),
)


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood in nats per label token, how many those are, the share that is the likeliest.

    ``divergence`` is the mean of KL(model || reference) over label tokens, in nats, where there is a reference.
    """

    loss: float
    tokens: int
    accuracy: float = 0.0
    divergence: float | None = None


#: log p of every label token of a text (tokens, vocabulary), batch by batch, as a model gave them; bfloat16.
LogProbs = list[Tensor]


def nll(
    model: torch.nn.Module,
    encoded: Sequence[dict[str, list[int]]],
    collate: Collator,
    batch_size: int = 8,
    reference: LogProbs | None = None,
) -> Score:
    """The mean loss over all label tokens of `encoded` (every token weighs the same, not every row).

    `reference` is what `log_probs` gave for the same rows. The mode (train or eval) of every module is as before
    afterwards.
    """
    total, tokens, right, divergence = 0.0, 0, 0, 0.0
    for i, (logits, labels) in enumerate(predictions(model, encoded, collate, batch_size)):
        losses = F.cross_entropy(logits, labels, reduction="none")
        total += losses.double().sum().item()
        right += int((logits.argmax(-1) == labels).sum())
        tokens += labels.numel()
        if reference is not None:
            own = logits.log_softmax(-1)
            divergence += F.kl_div(reference[i].float(), own, reduction="sum", log_target=True).item()
    if not tokens:
        raise ValueError("nothing to evaluate: no example has a label after its first token")
    return Score(total / tokens, tokens, right / tokens, None if reference is None else divergence / tokens)


def log_probs(
    model: torch.nn.Module, encoded: Sequence[dict[str, list[int]]], collate: Collator, batch_size: int = 8
) -> LogProbs:
    """What `nll` takes as a reference."""
    return [logits.log_softmax(-1).bfloat16() for logits, _ in predictions(model, encoded, collate, batch_size)]


def predictions(
    model: torch.nn.Module, encoded: Sequence[dict[str, list[int]]], collate: Collator, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per batch the logits (tokens, vocabulary) in float32 and the labels (tokens,), at label positions only.

    Rows are sorted by length so that little is padded; the head runs only on positions that some row of the batch has
    a label for, where the model can do that (`logits_to_keep`).
    """
    if not encoded:
        raise ValueError("nothing to evaluate: encoded is empty")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, wanted 1 or more")
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    device = next(model.parameters()).device
    rows = sorted(encoded, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(rows), batch_size):
        batch = {k: v.to(device) for k, v in collate(rows[start : start + batch_size]).items()}
        # The logits at position t predict token t + 1.
        labels = batch.pop("labels")[:, 1:]  # (B, T-1)
        if not (labels != IGNORED).any():
            continue
        extra: dict[str, Any] = {}
        if keeps:
            positions = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)  # (P,)
            labels = labels[:, positions]
            extra["logits_to_keep"] = positions
        with evaluating(model), torch.inference_mode():
            logits = model(**batch, use_cache=False, **extra).logits  # (B, P, V) or (B, T, V)
            if not keeps:
                logits = logits[:, :-1]
            expected = labels != IGNORED
            logits = logits[expected].float()
        yield logits, labels[expected]


def facts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: Sequence[FactProbe] = FACTS
) -> tuple[int, int]:
    """(right, asked): a probe is right when the model's greedy continuation starts with the answer.

    The answer must be followed by a word boundary ("80" is not "8"); upper and lower case are the same.
    """
    if not probes:
        return 0, 0
    continuations = complete(model, tokenizer, probes)
    pairs = zip(continuations, probes, strict=True)
    right = [re.match(rf"\s*{re.escape(p.answer)}(?!\w)", text, re.IGNORECASE) for text, p in pairs]
    return len(right) - right.count(None), len(probes)


def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: Sequence[FactProbe]) -> list[str]:
    """The greedy continuation of every probe, one token longer than the longest answer."""
    longest = max(len(text_tokens(" " + probe.answer, tokenizer)) for probe in probes)
    start = start_tokens(tokenizer)
    prompts = [start + text_tokens(probe.prompt, tokenizer) for probe in probes]
    width, pad = max(map(len, prompts)), padding_id(tokenizer)
    device = next(model.parameters()).device
    # Padded on the left, by hand: the tokenizer's own setting stays as the caller has it.
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    config = GenerationConfig(
        max_new_tokens=longest + 1, do_sample=False, num_beams=1, pad_token_id=pad, eos_token_id=tokenizer.eos_token_id
    )
    with evaluating(model), torch.no_grad():
        generate: Any = model.generate
        out = generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in out[:, width:].tolist()]


class Original:
    """Copies of all parameters of a model without adapters.

    ``drift`` is that of ``fl.drift``, mean over tokens of ||delta x|| / ||x||, with the whole change since the start
    as delta: what was folded into the weights, or trained in place, and what the adapters add now.
    """

    def __init__(self, model: nn.Module, targets: str | list[str]) -> None:
        self.parameters = dict(model.named_parameters())
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}
        names = {id(p): name for name, p in self.parameters.items()}
        chosen: dict[str, Any] = find_layers(model, targets)
        #: Layer name -> the layer itself and its first weight.
        self.layers = {n: (m, self.values[names[id(m.weight)]]) for n, m in chosen.items()}
        self.seen: dict[str, Tensor] = {}

    @torch.no_grad()
    def restore(self) -> None:
        """Put the parameters back, frozen and without gradients."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.values[name])
            parameter.grad = None
            parameter.requires_grad_(False)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the inputs of the layers are sampled in every forward pass; the last one counts."""

        def sampling(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
                x = args[0].detach().flatten(0, -2)
                self.seen[name] = x[:: -(-x.shape[0] // DRIFT_TOKENS) or 1].float()

            return hook

        self.seen.clear()
        handles = [layer.register_forward_hook(sampling(name)) for name, (layer, _) in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def drift(self, adapted: dict[str, AdaptedLinear]) -> dict[str, float]:
        """Per layer, from the inputs that adapters or ``watching`` have seen last."""
        result = {}
        for name, (layer, start) in self.layers.items():
            wrapped = adapted.get(name)
            seen = self.seen.get(name) if wrapped is None else None if wrapped.trace is None else wrapped.trace.x
            if seen is None or not len(seen):
                continue
            x = seen.float()
            delta = layer.weight.float() - start.float()
            delta = delta.T if is_conv1d(layer) else delta  # (N, K)
            if wrapped is not None:
                delta = delta + wrapped.delta().float()
            moved = (x @ delta.T).norm(dim=1) / x.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
            result[name] = moved.mean().item()
        return result
