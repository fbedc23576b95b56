"""The comparison as an instrument: rows beyond the methods, sweeps, evaluations on the way, killed and gone on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import tiny_model, tiny_tokenizer, write_model, write_texts

import forgetless as fl
from forgetless.cli import arguments, commands
from forgetless.cli.main import main
from forgetless.study import compare as module
from forgetless.study import metrics, runs
from forgetless.study.data import Example
from forgetless.study.evaluate import Original
from forgetless.study.options import BadInput
from forgetless.study.page import published
from forgetless.study.plans import Full, parse_method
from forgetless.study.session import CompareOptions, check, sweep
from forgetless.study.train import TrainConfig, train
from forgetless.study.verdict import verdicts

TEXTS = ("upper", "swap", "sums")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"model": write_model(folder / "model"), **write_texts(folder)}


def command(inputs: dict[str, Path], out: Path, *more: str) -> list[str]:
    words = ["compare", "--model", str(inputs["model"]), "--out", str(out), "--dtype", "float32", "--device", "cpu"]
    words += ["--tasks", *(str(inputs[name]) for name in TEXTS), "--keep", str(inputs["prose"])]
    words += ["--rank", "4", "--lr", "2e-2", "--batch-size", "4", "--max-length", "32", "--eval-tokens", "100"]
    return [*words, *more]


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


# What can be a row ------------------------------------------------------------------------------------


def test_rows_beyond_the_methods_are_parsed() -> None:
    plan = parse_method("source+consolidate:covariance=full,weight=0.1", lr=2e-3)
    assert plan.method == fl.LoRA(rank=16, alpha=32, penalties=(fl.SourceDeviation(0.1, "full"),))
    assert plan.extras.consolidate and plan.alters and not plan.plain and not plan.full
    assert plan.label == "LoRA+source+consolidate:covariance=full,weight=0.1" and plan.settings["consolidate"] is True
    plan = parse_method("clora+decay:decay.weight=0.2,weight=3,basis=hadamard", lr=2e-3)
    assert plan.method.weight == 3 and plan.method.basis == "hadamard" and plan.method.penalties == (fl.Decay(0.2),)
    full = parse_method("full", lr=2e-3)
    assert full.method == Full() and full.alters and full.lr == pytest.approx(5e-5) and full.settings["name"] == "full"
    assert parse_method("full:lr=1e-4", lr=2e-3).lr == 1e-4
    assert parse_method("lora", lr=1e-3).plain and not parse_method("lora+consolidate", lr=1e-3).plain
    assert parse_method("lora:rslora=true", lr=1e-3).method.rslora is True


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("full+decay", "no adapter, so no penalty"),
        ("lora+consolidate+consolidate", "asked for twice"),
        ("lora+decay+source:weight=1", "'weight' is a field of several parts: name it PART.weight"),
        ("source:covariance=round", "SourceDeviation.covariance is 'round'"),
        ("source:sorce.weight=1", "no field 'sorce.weight'"),
        ("lora:rslora=maybe", "must be true or false, got 'maybe'"),
        ("ful", "unknown method 'ful'; did you mean 'full'"),
        ("full:rank=2", "no field 'rank'"),
    ],
)
def test_nonsense_is_refused_with_a_reason(spec: str, said: str) -> None:
    with pytest.raises(BadInput) as error:
        parse_method(spec, lr=1e-3)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_sweep_varies_the_one_weight_or_lowers_the_rate() -> None:
    specs = ("lora", "clora", "source", "clora+decay")
    plans = sweep([parse_method(spec, lr=2e-3) for spec in specs], (3.0, 0.5))
    assert [plan.label for plan in plans] == [
        "LoRA @ lr 0.001", "CLoRA @ 0.5", "CLoRA @ 3", "LoRA+source @ 0.015", "LoRA+source @ 0.09",
        "CLoRA+decay @ lr 0.001",
    ]  # fmt: skip
    assert plans[1].method.weight == 0.5 and plans[4].method.penalties[0].weight == pytest.approx(0.09)
    assert [plan.family for plan in plans[:2]] == ["LoRA", "CLoRA"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"evals": 0}, "--evals must be at least 1"),
        ({"evals": 3, "steps": 2}, "--evals must be at most --steps, 2, got 3"),
        ({"sweep": (1.0,)}, "--sweep wants different factors other than 1"),
        ({"sweep": (-1.0,)}, "--sweep must be above zero"),
        ({"sweep_methods": ("source",)}, "--sweep-method must be one of --method, got source"),
        ({"sweep_seeds": (4,)}, "--sweep-seed must be one of --seed, got 4"),
        ({"seeds": (1, 1)}, "--seed wants different numbers"),
    ],
)
def test_options_that_make_no_sense_are_refused(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said.replace("(", r"\(")):
        check(CompareOptions(out=tmp_path, **changed))


def test_plural_options_and_presets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "--seeds", "0", "1", "2", "--methods=lora", "clora", "--smoke", "--lr", "1e-3"]
    given = arguments.parser({}, "").options([*words, "--seed", "4"])
    assert given == {
        "command": "compare", "seeds": [0, 1, 2, 4], "methods": ["lora", "clora"], "smoke": True, "lr": 1e-3,
    }  # fmt: skip
    options = commands.compare_options({name: value for name, value in given.items() if name != "command"}, "line")
    assert options.seeds == (0, 1, 2, 4) and options.methods == ("lora", "clora") and options.steps == 2
    assert main(["compare", "--preset", "huge", "--out", str(tmp_path)]) == 2
    assert "--preset must be one of demo, study, study-tools, got 'huge'" in capsys.readouterr().err
    plans = check(CompareOptions(out=tmp_path, **commands.STUDY))
    assert len({plan.label for plan in plans}) == 16 and sum(plan.plain for plan in plans) == 2, "LoRA, at two rates"
    assert commands.PRESETS["demo"] == {}, "the demo is the defaults"


def test_finetune_refuses_what_is_no_adapter(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", "--model", str(inputs["model"]), "--data", str(inputs["upper"]), "--out", str(tmp_path / "a")]
    for method in ("full", "lora+consolidate"):
        assert main([*words, "--method", method]) == 2
        assert "full and all parts but retain, scaled and budget are rows of compare" in capsys.readouterr().err


# Full fine-tuning and drift ---------------------------------------------------------------------------


def test_full_fine_tuning_in_half_precision_loses_no_small_step() -> None:
    """Steps of a hundredth of a bfloat16 digit must add up; float32 training is the truth."""
    examples = [Example(f"{a}{b}:", f" {b}{a}") for a in "xyz" for b in "abcdefgh"]
    config = TrainConfig(steps=6, batch_size=4, lr=1e-4, max_length=32, warmup=0.0)
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model().bfloat16().to(dtype)
        start = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        model.requires_grad_(True)
        result = train(model, tiny_tokenizer(), examples, config)
        assert result.penalty == [0.0] * 6 and result.drift == {} and result.loss[-1] < result.loss[0]
        moved[dtype] = torch.cat([(p.detach().float() - start[n]).flatten() for n, p in model.named_parameters()])
    true, half = moved[torch.float32], moved[torch.bfloat16]
    assert (half @ true) / (half.norm() * true.norm()) > 0.8 and 0.8 < half.norm() / true.norm() < 1.25


def test_drift_of_changed_weights_is_that_of_the_same_update_as_an_adapter() -> None:
    model = tiny_model()
    original = Original(model, "all-linear")
    torch.manual_seed(0)
    fl.adapt(model, fl.LoRA(rank=4))
    with torch.no_grad():
        for layer in fl.adapters(model).values():
            layer.adapter.up.normal_(std=0.1)
    batch = torch.arange(40)[None] + 60
    model(batch)
    wanted = fl.drift(model)
    assert len(wanted) == 14 and min(wanted.values()) > 0
    assert original.drift(fl.adapters(model)) == pytest.approx(wanted, rel=1e-4)
    fl.consolidate(model)
    model(batch)
    assert max(fl.drift(model).values()) == 0, "the fresh adapter has done nothing"
    assert original.drift(fl.adapters(model)) == pytest.approx(wanted, rel=1e-4)
    fl.merge(model)
    with original.watching():
        model(batch)
    assert original.drift({}) == pytest.approx(wanted, rel=1e-4)
    original.restore()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model().parameters(), strict=True))


# The whole instrument, once ---------------------------------------------------------------------------

METHODS = ("lora", "source+consolidate", "full:lr=3e-3")


@pytest.fixture(scope="module")
def finished(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "all"
    sizes = ["--steps", "3", "--evals", "3", "--seeds", "0", "1", "--methods", *METHODS]
    assert main(command(inputs, out, *sizes, "--sweep", "--sweep-factor", "3", "--sweep-seed", "1")) == 0
    return out


def test_every_run_is_there_with_its_curve(finished: Path) -> None:
    found = read(finished)
    labels = ["LoRA", "LoRA+source+consolidate", "full:lr=3e-3"]
    assert [(r["label"], r["seed"]) for r in found["rows"]] == [
        *((label, seed) for seed in (0, 1) for label in labels),
        ("LoRA+source+consolidate @ 0.09", 1),
    ]
    assert len(list((finished / "runs").glob("*.json"))) == 8, "the base and seven runs"
    for row in found["rows"]:
        assert row["stopped"] == "finished" and row["drift"] > 0 and len(row["stages"][-1]["drift_layers"]) == 14
        assert [(p["task"], p["step"]) for p in row["points"]] == [(t, s) for t in TEXTS for s in (1, 2)]
        assert set(row["points"][2]["losses"]) == {"upper", "swap", "prose"}
        assert len(metrics.trajectory(row, found["base"], list(TEXTS), ["prose"])) == 10
        assert ("consolidated" in row) == ("consolidate" in row["label"])
        assert row["continual"]["final"] == pytest.approx(sum(row["final"][t] for t in TEXTS) / 3)
    full = found["rows"][2]
    assert full["trainable"] == found["model"]["parameters"] and sum(full["learnt"].values()) > 0.1
    twice = found["rows"][1]["consolidated"]
    assert [c["after"] for c in twice] == ["upper", "swap"] and all(0 <= c["rounding"] < 1e-3 for c in twice)


def test_the_summary_is_in_the_file_and_on_the_page(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read(finished)
    about = found["summary"]
    assert about["baseline"] == "LoRA" and about["drift_and_forgetting"]["runs"] == 7
    assert [e["label"] for e in about["equal_learning"]] == ["LoRA+source+consolidate", "full:lr=3e-3"]
    assert all(0 < e["share"]["mean"] <= 1 and e["kept"]["difference"]["n"] == 2 for e in about["equal_learning"])
    assert [t["family"] for t in about["tuned"]] == ["LoRA", "LoRA+source+consolidate", "full:lr=3e-3"]
    page = (finished / "report.html").read_text()
    for title in ("The task sequence", "Differences to LoRA", "Against LoRA at equal learning", "over the sweep"):
        assert title in page
    assert main(["report", str(finished)]) == 0
    assert "against LoRA at equal learning" in capsys.readouterr().out


def test_a_page_and_a_small_file_for_the_repository(finished: Path, tmp_path: Path) -> None:
    page, data = tmp_path / "forgetting.md", tmp_path / "forgetting.json"
    assert main(["report", str(finished), "--markdown", str(page), "--json", str(data)]) == 0
    text, small, found = page.read_text(), json.loads(data.read_text()), read(finished)
    assert str(finished) not in text + data.read_text(), "no folder of this machine"
    assert "![" in text and (tmp_path / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("**LoRA+source+consolidate**") == 1 and "forgetting.json" in text
    assert [r["label"] for r in small["rows"]] == [r["label"] for r in found["rows"]]
    assert len(small["drift_layers"]["LoRA"]) == 14
    share, rough = (f["summary"]["equal_learning"][0]["share"]["mean"] for f in (found, small))
    assert rough == pytest.approx(share, rel=1e-3)
    assert all("drift_layers" not in s for r in small["rows"] for s in r["stages"])
    assert published(small) == small, "the small file tells the same"


def interval(low: float, high: float) -> dict[str, Any]:
    return {"mean": (low + high) / 2, "low": low, "high": high, "n": 3}


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.3, -0.1, "forgets the kept texts less than LoRA at equal learning (-0.200 (-0.300 to -0.100) nats"),
        (0.1, 0.3, "forgets the kept texts more than LoRA"),
        (-0.1, 0.3, "no difference to LoRA is shown on the kept texts"),
    ],
)
def test_verdicts_claim_only_what_the_intervals_show(low: float, high: float, said: str) -> None:
    part = {"difference": interval(low, high), "ratio": None}
    equal = {"label": "X", "kept": part, "tasks": part, "share": interval(0.3, 0.5), "enough": False}
    paired = {"label": "X", "learnt": interval(-2.0, -1.0)}
    (line,) = verdicts({"baseline": "LoRA", "paired_with_baseline": [paired], "equal_learning": [equal]})
    assert said in line and "it learned less (-1.50" in line and "at 40% of LoRA's learning only" in line


# Killed and gone on -----------------------------------------------------------------------------------

KILLER = """
import os, signal, sys
from forgetless.cli import console
from forgetless.study import compare, runs
from forgetless.cli.main import main
runs.commit = compare.commit = lambda: "a" * 40  # nobody's commit in between may decide a test
kind, *words = sys.argv[1:]
training, told = console.Ui.training, compare.told
from contextlib import contextmanager

@contextmanager
def deadly(self, title, steps):
    def on_step(step):
        if kind == "inside" and title.startswith("CLoRA") and "swap" in title and step.number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    yield on_step

def last_words(row):
    if kind == "between" and row["label"] == "LoRA":
        os.kill(os.getpid(), signal.SIGKILL)
    return told(row)

console.Ui.training, compare.told = deadly, last_words
sys.exit(main(words))
"""


def essence(results: dict[str, Any]) -> Any:
    """Everything that must not depend on when and in how many pieces it was run."""
    times = {"seconds", "seconds_per_step", "peak_mib", "calibrate_seconds", "created", "command"}

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cut(v) for k, v in value.items() if k not in times}
        return [cut(v) for v in value] if isinstance(value, list) else value

    return cut(results)


@pytest.fixture(scope="module")
def undisturbed(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "write_report", lambda folder, found: [])
        same_commit(patch)
        assert main(killed_words(inputs, out)) == 0
    return read(out)


def same_commit(patch: pytest.MonkeyPatch) -> None:
    """Nobody's commit in between may decide a test."""
    for where in (runs, module):
        patch.setattr(where, "commit", lambda: "a" * 40)


def killed_words(inputs: dict[str, Path], out: Path) -> list[str]:
    return command(inputs, out, "--steps", "3", "--evals", "2", "--methods", "lora", "clora:k=8", "lora+consolidate")


@pytest.mark.parametrize("kind", ["between", "inside"])
def test_a_killed_comparison_goes_on_to_the_same_result(
    kind: str, inputs: dict[str, Path], tmp_path: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = killed_words(inputs, tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", KILLER, kind, *words], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [r["label"] for r in read(tmp_path)["rows"]] == ["LoRA"] and read(tmp_path)["complete"] is False
    same_commit(monkeypatch)
    ran: list[str] = []
    run_row = module.run_row
    monkeypatch.setattr(module, "run_row", lambda s, plan, *more: ran.append(plan.label) or run_row(s, plan, *more))
    monkeypatch.setattr(commands, "write_report", lambda folder, found: [])
    assert main(words) == 0
    assert ran == ["CLoRA:k=8", "LoRA+consolidate"], "that run alone is made again"
    assert essence(read(tmp_path)) == essence(undisturbed)
    assert not list(tmp_path.rglob(".*")), "nothing half-written is left"


def test_other_settings_are_put_aside_and_other_code_is_not_mixed_in(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "write_report", lambda folder, found: [])
    monkeypatch.setattr(runs, "commit", lambda: "a" * 40)
    ran: list[int] = []
    run_row = module.run_row
    monkeypatch.setattr(module, "run_row", lambda s, p, *more: ran.append(s.options.steps) or run_row(s, p, *more))
    words = command(inputs, tmp_path, "--methods", "lora")
    assert main([*words, "--steps", "1"]) == 0
    first = (tmp_path / "results.json").read_text()
    capsys.readouterr()
    assert main([*words, "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "was made with other settings: put aside as results." in said
    assert "1 runs in" in said and "have other settings: they stay there, unused" in said
    assert [p.read_text() for p in tmp_path.glob("results.2*.json")] == [first]
    monkeypatch.setattr(runs, "commit", lambda: "b" * 40)
    assert main([*words, "--steps", "2", "--any-commit"]) == 0 and ran == [1, 2]
    capsys.readouterr()
    assert main([*words, "--steps", "2"]) == 0 and ran == [1, 2, 2]
    assert "have these settings but another commit: made again, unless you give --any-commit" in capsys.readouterr().out


def test_the_time_that_is_left() -> None:
    assert module.lasting(60.0) == "60 s" and module.lasting(400.0) == "7 min"
    assert module.lasting(3 * 3600 + 61) == "3 h 02 min"
