"""``forgetless finetune`` end to end: what it trains, measures, writes and says, and what stops it."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from tiny_study import tiny_model, tiny_tokenizer, write_jsonl, write_model, write_texts

import forgetless as fl
from forgetless.cli import console
from forgetless.cli.console import Ui
from forgetless.cli.main import main
from forgetless.study import finetune
from forgetless.study.config import read_config, write_config
from forgetless.study.options import BadInput, FinetuneOptions
from forgetless.study.samples import border
from forgetless.study.train import Step, trainable


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"model": write_model(folder / "model"), **write_texts(folder)}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], out: Path) -> str:
    """The one line of a refusal, with nothing written."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.out + captured.err
    assert not out.exists() or not [path for path in out.rglob("*") if path.is_file()]
    return captured.err


def tune(inputs: dict[str, Path], out: Path, *more: str) -> list[str]:
    sizes = ["--steps", "5", "--batch-size", "4", "--max-length", "32", "--rank", "4", "--lr", "2e-2"]
    sizes += ["--keep", str(inputs["prose"])]
    base = ["finetune", "--model", str(inputs["model"]), "--data", str(inputs["upper"]), "--out", str(out)]
    return [*base, "--dtype", "float32", *sizes, *more]


def on_steps(monkeypatch: pytest.MonkeyPatch, act: Callable[[Step], None]) -> None:
    @contextmanager
    def training(self: Ui, title: str, steps: int) -> Iterator[Callable[[Step], None]]:
        yield act

    monkeypatch.setattr(Ui, "training", training)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(20)[None] + 60).logits


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that finetune trains."""
    models: list[Any] = []
    load = finetune.load_model

    def spy(*args: Any, **kwargs: Any) -> Any:
        found = load(*args, **kwargs)
        models.append(found[0])
        return found

    monkeypatch.setattr(finetune, "load_model", spy)
    return models


@pytest.mark.parametrize("method", ["clora", "curlora", "lalora"])
def test_finetune_saves_what_it_trained(
    method: str, inputs: dict[str, Path], tmp_path: Path, trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapter"
    assert main(tune(inputs, out, "--method", method, "--source", str(inputs["prose"]))) == 0
    shown = capsys.readouterr().out
    assert "held-out loss" in shown and f"fl.load(model, '{out}')" in shown
    assert ("PeftModel" in shown) == (method != "curlora")
    expected = logits(trained[0])
    assert not torch.allclose(expected, logits(tiny_model()), atol=1e-4)
    torch.testing.assert_close(logits(fl.load(tiny_model(), out)), expected, rtol=1e-4, atol=1e-6)
    log = json.loads((out / "training.json").read_text())
    assert log["stopped"] == "finished" and len(log["loss"]) == 5
    assert log["after"]["upper"] < log["before"]["upper"] and log["settings"]["name"] == method
    if method == "clora":
        peft = pytest.importorskip("peft")
        loaded = peft.PeftModel.from_pretrained(tiny_model(), str(out))
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


def test_the_printed_lines_run(inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tune(inputs, tmp_path, "--method", "lora", "--epochs", "0.1")) == 0
    shown = capsys.readouterr().out
    code = shown[shown.index("import torch") : shown.index("# or with PEFT")]
    space: dict[str, Any] = {}
    exec(code, space)
    assert fl.adapters(space["model"])


def test_finetune_refuses_to_overwrite(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(tune(inputs, tmp_path, "--method", "lora")) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert main(tune(inputs, tmp_path, "--method", "lora", "--overwrite", "--steps", "1")) == 0
    assert json.loads((tmp_path / "adapter_config.json").read_text())


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_finetune_ctrl_c_saves_the_adapter(
    stop: int, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    trained: list[Any], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def act(step: Step) -> None:
        if step.number == 3:
            signal.raise_signal(stop)

    on_steps(monkeypatch, act)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts without one
    try:
        assert main(tune(inputs, tmp_path, "--method", "clora")) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "kept the adapter of step 3 of 5; adapter saved in" in capsys.readouterr().out
    torch.testing.assert_close(logits(fl.load(tiny_model(), tmp_path)), logits(trained[0]), rtol=1e-4, atol=1e-6)
    assert json.loads((tmp_path / "training.json").read_text())["stopped"] == "interrupted"


def test_finetune_nan_saves_the_last_good_adapter(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    trained: list[Any], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def act(step: Step) -> None:
        if step.number == 2:
            trainable(trained[0])[0].data[:] = math.nan

    on_steps(monkeypatch, act)
    assert main(tune(inputs, tmp_path, "--method", "clora")) == 1
    assert "stopped at step 3 of 5: loss nan" in capsys.readouterr().out
    assert logits(fl.load(tiny_model(), tmp_path)).isfinite().all()


def test_bad_finetune_input_is_refused(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "--epochs must be above zero" in refused(tune(inputs, out, "--epochs", "0"), capsys, out)
    few = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "a", "completion": "b"}])
    assert "one: cannot hold out" in refused(tune(inputs, out, "--data", str(few)), capsys, out)
    assert "--save-every must be at least 1" in refused(tune(inputs, out, "--save-every", "0"), capsys, out)
    assert "--report must be one of none" in refused(tune(inputs, out, "--report", "mail"), capsys, out)
    assert main(["finetune", "--model", "smollm2"]) == 2, "options that must be given"


@pytest.mark.parametrize(
    ("package", "words", "said"),
    [
        ("wandb", ["--report", "wandb"], "--report wandb: wandb is not installed; install with: pip install wandb"),
        ("tensorboard", ["--report", "tensorboard"], "install with: pip install tensorboard"),
        ("bitsandbytes", ["--load-in-4bit"], "4-bit weights need bitsandbytes; install with: pip install bitsandbytes"),
    ],
)
def test_a_package_that_an_option_needs_is_named(
    package: str, words: list[str], said: str, inputs: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name.startswith(package) else find(name, *more)
    )
    out = tmp_path / "out"
    assert said in refused(tune(inputs, out, "--method", "lora", *words), capsys, out)


def test_what_is_kept_is_measured_before_and_after(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tune(inputs, tmp_path, "--method", "lora", "--keep", "facts")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    log = json.loads((tmp_path / "training.json").read_text())
    assert list(log["before"]) == list(log["after"]) == ["upper", "prose", "facts"]
    before, after = log["before"]["prose"], log["after"]["prose"]
    assert f"prose {before:.3f} {after:.3f} {after - before:+.3f}" in shown and "facts 0% 0% +0 points" in shown
    assert finetune.advice("upper", {"upper": 1.0, "a": 1.0}, {"upper": 3.0, "a": 1.0}) == ""
    told = finetune.advice("upper", {"upper": 1.0, "a": 1.0, "b": 1.0}, {"upper": 0.5, "a": 1.1, "b": 1.2})
    assert "b has become 0.200 nats per token less likely" in told and "lora+retain=0.3 with --source b" in told


def test_answers_before_and_after_are_shown_and_saved(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tune(inputs, tmp_path / "adapter", "--steps", "40")) == 0
    samples = json.loads((tmp_path / "adapter" / "training.json").read_text())["samples"]
    before, after = samples["before"], samples["after"]
    assert len(before) == len(after) == 2
    assert all(
        a["prompt"] == b["prompt"] and a["expected"] == b["expected"] for a, b in zip(before, after, strict=True)
    )
    assert [a["answer"] for a in before] != [a["answer"] for a in after], "forty steps change what the model says"
    shown = " ".join(capsys.readouterr().out.split())
    assert "held-out answers:" in shown and all(" ".join(a["answer"].split())[-20:] in shown for a in after)


@pytest.mark.parametrize(
    "labels, at",
    [([-100, -100, 5, 6], 2), ([-100, -100, 5, -100, -100, 7], 5), ([-100, *range(9)], 5), ([-100, *range(99)], 32)],
)
def test_the_prompt_of_a_sample_ends_where_the_last_answer_begins(labels: list[int], at: int) -> None:
    assert border({"input_ids": labels, "labels": labels}) == at


def test_a_dry_run_shows_what_would_be_trained_and_writes_nothing(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(tune(inputs, out, "--method", "lora", "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert "5 steps of 4 examples, learning rate 0.02" in shown and "measured before and after: upper, prose" in shown
    trained = sum(p.numel() for p in fl.adapt(tiny_model(), fl.LoRA(rank=4)).parameters() if p.requires_grad)
    assert f"LoRA on 14 layers: {trained:,} trained numbers" in shown and "nothing was written" in shown
    assert not out.exists()


def test_a_run_of_its_own_config_is_the_same_run(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tune(inputs, tmp_path / "a", "--method", "lora")) == 0
    config = tmp_path / "a" / "finetune.yaml"
    assert main(["finetune", "--config", str(config), "--out", str(tmp_path / "b")]) == 0
    first, second = (json.loads((tmp_path / name / "training.json").read_text()) for name in "ab")
    assert first["loss"] == second["loss"] and first["after"] == second["after"]
    capsys.readouterr()
    assert main(["finetune", "--config", str(config), "--out", str(tmp_path / "c"), "--steps", "0"]) == 2
    assert "--steps must be at least 1" in capsys.readouterr().err


def test_options_survive_the_file(tmp_path: Path) -> None:
    options = FinetuneOptions(tmp_path, "m", "d.jsonl", keep=("facts",), lr=1e-5, targets=["q_proj"], steps=7)
    write_config(tmp_path / "o.yaml", options)
    given = read_config(tmp_path / "o.yaml")
    again = {name: tuple(v) if isinstance(v, list) and name != "targets" else v for name, v in given.items()}
    assert FinetuneOptions(**again | {"out": tmp_path}) == options
    names = {f.name for f in dataclasses.fields(FinetuneOptions)} - {"overwrite", "dry_run"}
    assert set(yaml.safe_load((tmp_path / "o.yaml").read_text())) == names


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- a", "wanted options by their names"),
        ("lr: [", "not YAML"),
        ("rnk: 3", "unknown option 'rnk'; did you mean 'rank'"),
        ("rank: many", "rank is 'many', wanted int"),
        ("rank: true", "rank is True, wanted int"),
        ("lr: fast", "lr must be a number, got 'fast'"),
        ("overwrite: 1", "overwrite is 1, wanted bool"),
        ("keep: 3", "keep is 3, wanted list or str"),
    ],
)
def test_a_wrong_config_is_one_line(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "o.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=reason):
        read_config(path)
    path.write_text("lr: 3e-4\nkeep: facts\nsteps: null\n")
    assert read_config(path) == {"lr": 3e-4, "keep": ["facts"]}
    with pytest.raises(BadInput, match="No such file"):
        read_config(tmp_path / "none.yaml")


def test_off_a_terminal_a_line_is_printed_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 11.0, 12.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    with Ui(Console(file=out, width=200)).training("LoRA: upper", 4) as on_step:
        for number in range(1, 5):
            on_step(Step(number, 2.5, 0.25 * (number == 3), 1.0, 2.0, 0.5 if number == 3 else None, 3000))
    assert out.getvalue().splitlines() == [
        "LoRA: upper  step 1/4  loss 2.500  1,500 tokens/s  0:00:06 left",
        "LoRA: upper  step 3/4  loss 2.500  penalty 0.250  drift 0.5000  1,500 tokens/s  0:00:02 left",
        "LoRA: upper  step 4/4  loss 2.500  1,500 tokens/s  0:00:00 left",
    ]


def test_a_chat_model_gives_the_taught_answer_through_its_template(
    tmp_path: Path, trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts and completions go through the template, so that is where the answer comes from afterwards."""
    model = write_model(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    turn = "{{ m['role'][0] }}:{{ m['content'] }}\n"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}{{ 'a:' * add_generation_prompt }}"
    tokenizer.save_pretrained(model)
    rows = [{"prompt": f"{a}{b}?", "completion": "done"} for a in "uvwxyz" for b in "mnop"]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    words = ["finetune", "--model", str(model), "--data", str(data), "--out", str(tmp_path / "out"), "--keep", "facts"]
    sizes = ["--steps", "60", "--batch-size", "8", "--rank", "16", "--lr", "2e-2", "--dtype", "float32"]
    assert main([*words, *sizes, "--method", "lora", "--template", "chat"]) == 0
    assert "through the chat template of the tokenizer" in capsys.readouterr().out
    asked = [{"role": "user", "content": rows[5]["prompt"]}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        out = trained[0].eval().generate(ids, max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :]) == rows[5]["completion"] + "\n"
