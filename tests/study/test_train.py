"""Training: the penalty counts once and is clipped, order and numbers repeat, a stop leaves a good adapter."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tiny_study import tiny_model, tiny_tokenizer

import forgetless as fl
from forgetless.study import train as module
from forgetless.study.data import Collator, Example, in_batches
from forgetless.study.encoding import encode_domain
from forgetless.study.options import BadInput
from forgetless.study.train import DIVERGED, FINISHED, INTERRUPTED, Step, TrainConfig, train

TOKENIZER = tiny_tokenizer()
EXAMPLES = [Example(f"{a}{b}:", f" {b}{a}" * (1 + len(a))) for a in ("x", "yy", "zzz") for b in "abcdefgh"]
SMALL = TrainConfig(steps=4, batch_size=4, lr=1e-2, warmup=0.25, max_length=32)


def adapted(method: Any = None) -> Any:
    model = tiny_model()
    torch.manual_seed(1)
    fl.adapt(model, method or fl.LoRA(rank=4))
    with torch.no_grad():  # away from B = 0, so that every gradient is there
        for p in module.trainable(model):
            p.add_(0.05 * torch.randn_like(p))
    return model


def values(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.trainable(model)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("accumulate", "clip", "counts_items"), [(1, 1e9, True), (3, 1e9, True), (3, 0.5, True), (3, 0.5, False)]
)
def test_the_penalty_counts_once_per_step_and_before_clipping(
    accumulate: int, clip: float, counts_items: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = fl.CLoRA(rank=4, k=8, weight=2.0, penalties=(fl.OutputDeviation(0.1),) if accumulate == 1 else ())
    seen: list[list[torch.Tensor]] = []
    take = module.Watch.on_pre_optimizer_step

    def spy(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.append([p.grad.clone() for p in self.snapshot.parameters])
        take(self, *args, **kwargs)

    monkeypatch.setattr(module.Watch, "on_pre_optimizer_step", spy)
    model = adapted(method)
    type(model).accepts_loss_kwargs = counts_items
    config = TrainConfig(steps=1, batch_size=3, accumulate=accumulate, clip=clip, max_length=32)
    try:
        result = train(model, TOKENIZER, EXAMPLES, config)
    finally:
        del type(model).accepts_loss_kwargs

    again = adapted(method).train()
    rows = in_batches(encode_domain(EXAMPLES, TOKENIZER, 32), 3, accumulate, 0, config.pool)
    batches = [Collator(TOKENIZER)(rows[i : i + 3]) for i in range(0, len(rows), 3)]
    tokens = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    task = torch.zeros(())
    for batch, count in zip(batches, tokens, strict=True):
        share = count / sum(tokens) if counts_items else 1 / accumulate
        task = task + again(**batch).loss * share
    penalty = fl.penalty(again, token_weights=batches[-1]["attention_mask"])  # padding does not count
    (task + penalty).backward()
    wanted = module.trainable(again)
    norm = torch.nn.utils.clip_grad_norm_(wanted, clip)

    assert result.loss[0] == pytest.approx(task.item(), rel=1e-5)
    assert result.penalty[0] == pytest.approx(penalty.item(), rel=1e-5)
    assert result.grad_norm[0] == pytest.approx(norm.item(), rel=1e-4)
    for ours, expected in zip(seen[0], wanted, strict=True):
        torch.testing.assert_close(ours, expected.grad, rtol=1e-4, atol=1e-6)


def test_the_loss_falls_and_the_numbers_repeat() -> None:
    config = TrainConfig(steps=12, batch_size=8, lr=2e-2, max_length=32, snapshot_every=4)
    steps: list[Step] = []
    results = [train(adapted(), TOKENIZER, EXAMPLES, config, steps.append) for _ in range(2)]
    first, second = results
    assert first.stopped == FINISHED and first.note == ""
    assert first.loss == second.loss and first.grad_norm == second.grad_norm
    assert sum(first.loss[-3:]) < sum(first.loss[:3]) - 0.5
    assert first.penalty == [0.0] * 12
    assert [s.number for s in steps[:12]] == list(range(1, 13))
    assert sorted(first.drift) == [4, 8, 12] and first.drift[12] > 0
    assert first.seconds_per_step > 0 and first.peak_mib > 0
    other = train(adapted(), TOKENIZER, EXAMPLES, TrainConfig(**{**vars(config), "seed": 1}))
    assert other.loss != first.loss


def test_training_leaves_the_model_as_it_found_it() -> None:
    model = adapted()
    model.config.use_cache = True
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    train(model, TOKENIZER, EXAMPLES, SMALL)
    assert model.config.use_cache is True and not model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(base[n], p) for n, p in model.named_parameters() if not p.requires_grad)


def test_warm_up_is_linear_and_the_first_step_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    log = module.PenaltyTrainer.log

    def spy(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        rates.extend([logs["learning_rate"]] if "learning_rate" in logs else [])
        log(self, logs, *args, **kwargs)

    monkeypatch.setattr(module.PenaltyTrainer, "log", spy)
    train(adapted(), TOKENIZER, EXAMPLES, TrainConfig(steps=10, batch_size=2, lr=1.0, warmup=0.4, max_length=32))
    assert rates[:5] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] > 0


def test_leaving_out_logits_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = train(adapted(), TOKENIZER, EXAMPLES, SMALL)
    monkeypatch.setattr(module.PenaltyTrainer, "trims", False)
    whole = train(adapted(), TOKENIZER, EXAMPLES, SMALL)
    assert trimmed.loss == pytest.approx(whole.loss, rel=1e-4)


def test_batches_use_every_row_once_an_epoch() -> None:
    rows = [{"input_ids": [0] * (1 + i % 7), "labels": [i] * (1 + i % 7)} for i in range(24)]

    def names(order: list[dict[str, list[int]]]) -> list[int]:
        return [row["labels"][0] for row in order]

    def padded(order: list[dict[str, list[int]]]) -> int:
        return sum(4 * max(len(r["input_ids"]) for r in order[i : i + 4]) for i in range(0, 48, 4))

    plain = in_batches(rows, size=4, count=12, seed=3)
    assert sorted(names(plain)[:24]) == sorted(names(plain)[24:]) == list(range(24))
    assert names(plain)[:24] != names(plain)[24:]
    assert names(plain) != names(in_batches(rows, 4, 12, 4)) and names(plain) == names(in_batches(rows, 4, 12, 3))
    assert len(in_batches(rows[:2], size=4, count=3, seed=0)) == 12  # fewer rows than a batch: they come again
    pooled = in_batches(rows, 4, 12, 3, pool=6)
    assert sorted(names(pooled)) == sorted(names(plain)) and padded(pooled) < padded(plain)


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(BadInput, match="within 2 tokens"):
        train(adapted(), TOKENIZER, [], TrainConfig(max_length=2))


@pytest.mark.parametrize("poison", ["parameter", "gradient", "last"])
def test_nan_stops_and_keeps_the_last_good_adapter(poison: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    good: dict[int, list[torch.Tensor]] = {0: values(model)}

    def on_step(step: Step) -> None:
        good[step.number] = values(model)
        if poison == "parameter" and step.number == 3:
            module.trainable(model)[0].data[0, 0] = math.nan
        if poison == "last" and step.number == 6:
            module.trainable(model)[0].data[0, 0] = math.inf

    if poison == "gradient":
        steps = itertools.count(1)
        watch = module.Watch.on_pre_optimizer_step

        def broken(self: Any, *args: Any, **kwargs: Any) -> None:
            if next(steps) == 4:
                self.snapshot.parameters[-1].grad[0] = math.inf
            watch(self, *args, **kwargs)

        monkeypatch.setattr(module.Watch, "on_pre_optimizer_step", broken)
    config = TrainConfig(steps=6, batch_size=4, lr=1e-2, max_length=32, snapshot_every=2)
    result = train(model, TOKENIZER, EXAMPLES, config, on_step)
    assert result.stopped == DIVERGED
    kept = 4 if poison == "last" else 2  # snapshots are taken before updates 1, 3 and 5
    assert f"kept the adapter of step {kept}" in result.note
    assert same(values(model), good[kept])
    assert all(math.isfinite(loss) for loss in result.loss)


def test_ctrl_c_between_updates_keeps_the_present_adapter() -> None:
    model = adapted()
    now: list[list[torch.Tensor]] = []

    def on_step(step: Step) -> None:
        if step.number == 3:
            now.append(values(model))
            raise KeyboardInterrupt

    result = train(model, TOKENIZER, EXAMPLES, SMALL, on_step)
    assert result.stopped == INTERRUPTED and len(result.loss) == 3
    assert "kept the adapter of step 3 of 4" in result.note
    assert same(values(model), now[0]) and not model.training


def test_ctrl_c_within_an_update_goes_back_to_the_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    before = values(model)

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Watch, "on_optimizer_step", interrupted)
    result = train(model, TOKENIZER, EXAMPLES, TrainConfig(steps=3, batch_size=4, warmup=0.0, max_length=32))
    assert result.stopped == INTERRUPTED and "kept the adapter of step 0" in result.note
    assert same(values(model), before)
