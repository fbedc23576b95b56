"""The rows without a penalty: what is asked for, what is mixed in, KL, a scaled or retained task, and their costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import tiny_model, tiny_tokenizer, write_model, write_texts

import forgetless as fl
from forgetless.cli.main import main
from forgetless.study.baselines import KL, drawn, write
from forgetless.study.data import Collator, Example
from forgetless.study.encoding import encode_domain
from forgetless.study.extras import Extras
from forgetless.study.options import BadInput
from forgetless.study.plans import parse_method
from forgetless.study.train import TrainConfig, train

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"model": write_model(folder / "model"), **write_texts(folder)}


PROSE = [Example("", "abc def " * n) for n in range(2, 8)]


def test_parts_of_a_row_are_parsed() -> None:
    plan = parse_method("lora+scaled=0.6+replay+kl=0.5", lr=1e-3)
    assert plan.extras == Extras(scaled=0.6, replay=0.15, kl=0.5) and plan.alters and not plan.plain
    assert plan.settings["scaled"] == 0.6 and "budget" not in plan.settings
    assert not parse_method("lora+replay", lr=1e-3).alters, "nothing is folded"
    retained = parse_method("lora+retain=0.3", lr=1e-3)
    assert retained.method.penalties == (fl.SourceDeviation(0.0, "full"),) and retained.extras.retain == 0.3
    assert parse_method("source+retain:weight=0.01", lr=1e-3).method.penalties == (fl.SourceDeviation(0.01),)
    assert parse_method("full+self-replay=0.3", lr=1e-3).extras.self_replay == 0.3


@pytest.mark.parametrize(
    ("spec", "factor", "label", "extras"),
    [
        ("lora+scaled=0.8", 0.5, "LoRA+scaled=0.8 @ 0.4", Extras(scaled=0.4)),
        ("lora+retain=0.1", 3, "LoRA+retain=0.1 @ 0.3", Extras(retain=0.3)),
        ("lora+kl", 2, "LoRA+kl @ 2", Extras(kl=2.0)),
        ("lora+replay=0.2", 2, "LoRA+replay=0.2 @ 0.4", Extras(replay=0.4)),
    ],
)
def test_a_sweep_varies_their_strength(spec: str, factor: float, label: str, extras: Extras) -> None:
    swept = parse_method(spec, lr=1e-3).swept(factor)
    assert swept.label == label and swept.family == parse_method(spec, lr=1e-3).label
    names = ("retain", "scaled", "budget", "replay", "self_replay", "kl")
    assert [getattr(swept.extras, n) for n in names] == pytest.approx([getattr(extras, n) for n in names])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("lora+scaled=1.5", "scaled is 1.5, wants a number from 0 to 1"),
        ("lora+scaled=0.5+budget", "scaled and budget exclude each other"),
        ("lora+replay=0.6+self-replay=0.5", "replay and self-replay are 1.1 together, wants 0.9 at most"),
        ("lora+kl=-1", "kl is -1, wants a number from 0"),
        ("lora+kl+kl=2", "kl is asked for twice"),
        ("lora+consolidate=2", "consolidate takes no value"),
        ("lora+budget=much", "budget of .* must be a number"),
        ("curlora+retain", "retain wants a method with the factors of LoRA"),
        ("full+scaled", "no adapter, so no penalty"),
        ("lora+scald", "did you mean 'scaled'"),
    ],
)
def test_strange_parts_are_refused(spec: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        parse_method(spec, lr=1e-3)


def test_examples_are_drawn_without_repetition_while_there_are_enough() -> None:
    assert len(set(drawn(PROSE, 6, 0))) == 6 and len(drawn(PROSE, 15, 0)) == 15
    assert drawn(PROSE, 15, 0).count(PROSE[0]) in (2, 3)
    assert drawn(PROSE, 4, 0) == drawn(PROSE, 4, 0) != drawn(PROSE, 4, 1) and len(drawn(PROSE, 0, 0)) == 1


def test_the_model_writes_the_same_texts_with_the_same_seed() -> None:
    model, state = tiny_model(), torch.get_rng_state()
    texts = write(model, TOKENIZER, 4, 6, 0)
    assert texts == write(model, TOKENIZER, 4, 6, 0) != write(model, TOKENIZER, 4, 6, 1)
    assert all(text.completion and not text.prompt for text in texts) and len({t.completion for t in texts}) > 1
    assert torch.equal(state, torch.get_rng_state()), "the run's own draws are as without it"


def moved() -> Any:
    torch.manual_seed(1)
    model = fl.adapt(tiny_model(), fl.LoRA(rank=4))
    for layer in fl.adapters(model).values():
        torch.nn.init.normal_(layer.adapter.up, std=0.1)
    return model


def test_kl_is_that_of_the_model_without_its_adapters() -> None:
    model = moved()
    batches = Collator(TOKENIZER).batches(encode_domain(PROSE, TOKENIZER, 16), 3)
    term = KL(0.5, batches)
    value = term(model)
    batch = batches[0]
    with torch.no_grad():
        tuned = model(**batch).logits.double().log_softmax(-1)[:, :-1]
        with fl.disabled(model):
            base = model(**batch).logits.double().log_softmax(-1)[:, :-1]
    real = batch["labels"][:, 1:] != -100
    expected = 0.5 * (base.exp() * (base - tuned)).sum(-1)[real].mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4) and value.item() > 0
    value.backward()
    assert all(layer.adapter.up.grad.abs().sum() > 0 for layer in fl.adapters(model).values())
    term(model)
    assert term.calls == 2, "the next batch each time"
    fresh = fl.adapt(tiny_model(), fl.LoRA(rank=4))
    assert KL(1.0, batches)(fresh).item() == pytest.approx(0, abs=1e-6)


def test_kl_holds_training_back() -> None:
    batches = Collator(TOKENIZER).batches(encode_domain(PROSE, TOKENIZER, 16), 3)
    examples = [Example(f"{a}{b}:", f" {b}{a}") for a in "xyz" for b in "abcdefgh"]
    ends = []
    for weight in (0.0, 200.0):
        torch.manual_seed(0)
        model = fl.adapt(tiny_model(), fl.LoRA(rank=4))
        config = TrainConfig(steps=10, batch_size=4, lr=2e-2, max_length=32)
        train(model, TOKENIZER, examples, config, extra=KL(weight, batches))
        ends.append(KL(1.0, batches)(model).item())
    assert ends[1] < 0.5 * ends[0]


def test_rows_of_every_part_run_and_count_their_cost(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    specs = ["lora", "lora+retain", "lora+scaled", "lora+budget=0.001", "lora+replay", "lora+self-replay", "lora+kl"]
    words = [
        "compare",
        "--model",
        str(inputs["model"]),
        "--out",
        str(tmp_path),
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    words += ["--tasks", str(inputs["upper"]), str(inputs["swap"]), "--keep", str(inputs["prose"]), "--rank", "4"]
    words += ["--lr", "2e-2", "--batch-size", "4", "--max-length", "32", "--eval-tokens", "100", "--steps", "3"]
    assert main([*words, "--methods", *specs]) == 0
    rows = {row["label"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert len(rows) == len(specs)
    for label, row in rows.items():
        free = label in ("LoRA", "LoRA+scaled", "LoRA+replay")
        assert row["stopped"] == "finished" and (row["extra_forwards"] == 0) == free
        kl = row["stages"][-1]["divergence"]
        assert set(kl) == {"upper", "swap"} and all(value > 0 for value in kl.values())
        folds = label.partition("=")[0] in ("LoRA+retain", "LoRA+scaled", "LoRA+budget")
        assert ("consolidated" in row) == folds
    assert [stage["factor"] for stage in rows["LoRA+scaled"]["stages"]] == [0.8, 0.8]
    assert all(1 / 32 <= stage["factor"] <= 1 for stage in rows["LoRA+budget=0.001"]["stages"])
    assert rows["LoRA+kl"]["extra_forwards"] == 2 * 2 * 3, "two passes a step, in two tasks"
    assert rows["LoRA"]["tasks"][0]["loss"] == rows["LoRA+scaled"]["tasks"][0]["loss"], (
        "the first task is trained alike"
    )
    assert rows["LoRA"]["tasks"][0]["loss"] != rows["LoRA+replay"]["tasks"][0]["loss"]


def test_source_text_is_asked_for(inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "--model", str(inputs["model"]), "--out", str(tmp_path), "--task", str(inputs["upper"])]
    assert main([*words, "--keep", "facts", "--method", "lora+replay"]) == 2
    assert "LoRA+replay: needs source text, and neither --source nor --keep names any" in capsys.readouterr().err


def test_finetune_weakens_what_it_saves(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets: list[float] = []
    monkeypatch.setattr(fl, "fit_budget", lambda model, batches, budget: budgets.append(budget) or 0.25)
    out = tmp_path / "adapter"
    words = ["finetune", "--model", str(inputs["model"]), "--data", str(inputs["upper"]), "--out", str(out)]
    words += ["--keep", str(inputs["prose"]), "--steps", "4", "--lr", "2e-2", "--dtype", "float32", "--batch-size", "4"]
    rises, alphas = {}, {}
    for method in ("lora", "lora+retain=5", "lora+scaled=0.5", "lora+budget=1e-6"):
        line = [*words, "--source", str(inputs["prose"]), "--method", f"{method}:rank=4,alpha=8", "--overwrite"]
        assert main(line) == 0
        log = json.loads((out / "training.json").read_text())
        rises[method] = abs(log["after"]["prose"] - log["before"]["prose"])
        alphas[method] = json.loads((out / "adapter_config.json").read_text())["lora_alpha"]
        part = method.partition("+")[2].partition("=")[0]
        assert {name for name in ("retain", "scaled", "budget") if name in log["settings"]} == {part} - {""}
    assert rises["lora+retain=5"] < 0.5 * rises["lora"] and rises["lora+scaled=0.5"] < 0.8 * rises["lora"]
    assert alphas["lora"] == alphas["lora+retain=5"] == 8 and alphas["lora+scaled=0.5"] == 4
    assert alphas["lora+budget=1e-6"] == 2 and "scaling the update by 0.25" in capsys.readouterr().out
    assert budgets == [1e-6]
