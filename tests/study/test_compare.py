"""The comparison end to end on a tiny model: rows, files, resume, Ctrl-C, NaN. One run is shared by most tests."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_study import tiny_model, write_model, write_texts

import forgetless as fl
from forgetless.cli import commands
from forgetless.cli.console import Ui
from forgetless.cli.main import main
from forgetless.study import compare as module
from forgetless.study import results as book
from forgetless.study.compare import CompareOptions
from forgetless.study.evaluate import FACTS, facts
from forgetless.study.session import checksum, prepare, take_tokens
from forgetless.study.tables import main_table, settings_table
from forgetless.study.train import Step, trainable

METHODS = ("lora", "clora:k=8", "curlora:lr=0.1", "lalora", "lora+source")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"model": write_model(folder / "model"), **write_texts(folder)}


def command(inputs: dict[str, Path], out: Path, *more: str, methods: tuple[str, ...] = ("lora",)) -> list[str]:
    words = ["compare", "--model", str(inputs["model"]), "--out", str(out), "--dtype", "float32"]
    words += ["--task", str(inputs["upper"]), "--task", str(inputs["swap"])]
    words += ["--keep", str(inputs["prose"]), "--keep", str(inputs["sums"]), "--rank", "4", "--lr", "2e-2"]
    words += ["--steps", "6", "--batch-size", "8", "--max-length", "32", "--eval-tokens", "200", "--device", "cpu"]
    for method in methods:
        words += ["--method", method]
    return [*words, *more]


@pytest.fixture(scope="module")
def finished(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "all"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "facts", lambda model, tokenizer: facts(model, tokenizer, FACTS[:2]))
        assert main(command(inputs, out, "--keep", "facts", methods=METHODS)) == 0
    return out


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} in JSON"))


def test_results_hold_everything(finished: Path) -> None:
    found = read(finished)
    assert found["kind"] == "forgetless.compare" and found["schema"] == 1
    assert found["complete"] is True and found["stopped"] is None
    assert found["command"].startswith("forgetless compare --model")
    assert found["options"]["steps"] == 6 and "out" not in found["options"]
    assert found["model"]["parameters"] == sum(p.numel() for p in tiny_model().parameters())
    assert found["versions"]["torch"] and found["machine"]["device"] == "cpu"
    assert [(d["name"], d["role"]) for d in found["domains"]] == [
        ("upper", "task"), ("swap", "task"), ("prose", "kept"), ("sums", "kept"),
    ]  # fmt: skip
    assert set(found["base"]["losses"]) == {"upper", "swap", "prose", "sums"} and found["base"]["facts"][1] == 2
    labels = ["LoRA", "CLoRA:k=8", "CURLoRA:lr=0.1", "LaLoRA", "LoRA+source"]
    assert [(r["label"], r["seed"]) for r in found["rows"]] == [(label, 0) for label in labels]
    for row in found["rows"]:
        assert row["stopped"] == "finished"
        assert [t["task"] for t in row["tasks"]] == [s["after"] for s in row["stages"]] == ["upper", "swap"]
        assert all(len(t["loss"]) == len(t["penalty"]) == len(t["grad_norm"]) == 6 for t in row["tasks"])
        assert row["trainable"] > 0 and row["seconds_per_step"] > 0 and row["peak_mib"] > 0 and row["drift"] > 0
        assert len(row["stages"][-1]["drift_layers"]) == 14
        assert "samples" not in row["stages"][0] and set(row["stages"][-1]["samples"]) == {"upper", "swap"}
        asked = [[{**s, "answer": ""} for s in of["samples"]["upper"]] for of in (found["base"], row["stages"][-1])]
        assert asked[0] == asked[1] and len(asked[0]) == 2, "the same prompts before and after"
        assert ("calibrate_seconds" in row) == (row["label"] in ("LaLoRA", "LoRA+source"))


def test_learnt_and_forgotten_follow_from_the_losses(finished: Path) -> None:
    found = read(finished)
    base = found["base"]["losses"]
    for row in found["rows"]:
        first, last = (stage["losses"] for stage in row["stages"])
        assert row["learnt"] == pytest.approx(
            {"upper": base["upper"] - first["upper"], "swap": base["swap"] - last["swap"]}
        )
        assert row["forgotten"] == pytest.approx(
            {
                "prose": last["prose"] - base["prose"],
                "sums": last["sums"] - base["sums"],
                "upper": last["upper"] - first["upper"],
            }
        )
        kept = (row["forgotten"]["prose"] + row["forgotten"]["sums"]) / 2
        assert row["forgotten_mean"] == pytest.approx(kept)
    lora, clora = found["rows"][:2]
    assert lora["learnt"]["upper"] > 0.1, "a tiny LoRA learns"
    assert lora["tasks"][0]["loss"][0] == pytest.approx(clora["tasks"][0]["loss"][0]), "from the same base"


def test_the_table_has_a_row_for_the_base_and_each_method(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read(finished)
    table = main_table(found)
    assert [row[0] for row in table.rows] == ["base", *(dict.fromkeys(r["label"] for r in found["rows"]))]
    assert table.columns == [
        "method", "upper learned", "swap learned", "upper at the end", "prose", "sums", "facts",
        "forgetting", "drift", "trainable", "s/step", "peak MiB",
    ]  # fmt: skip
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert "±" not in table.rows[1][1]
    assert main(["report", str(finished)]) == 0
    shown = capsys.readouterr().out
    for row in table.rows:
        assert row[0] in shown
    assert "k 8" in settings_table(found).rows[1][2]


def test_the_report_is_one_file(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert (finished / "compare.png").read_bytes().startswith(b"\x89PNG")
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(links) == 3 and all(link.startswith("data:image/png;base64,iVBOR") for link in links)
    assert "http" not in re.sub(r'src="[^"]*"', "", page) and "<script" not in page
    assert (
        "Answers before and after" in page
        and "Losses are mean negative log-likelihoods" in page
        and "forgetless compare --model" in page
    )
    assert page.count("LoRA+source") >= 2


def test_the_report_is_made_again_from_results_alone(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes((finished / "results.json").read_bytes())
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text() == (finished / "report.html").read_text()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the rows that are run, not reused, from now on."""
    ran: list[str] = []
    run_row = module.run_row

    def spy(session: Any, plan: Any, seed: int, row: Any, ui: Any) -> None:
        ran.append(f"{plan.label}/{seed}")
        run_row(session, plan, seed, row, ui)

    monkeypatch.setattr(module, "run_row", spy)
    return ran


def test_several_seeds_show_their_spread(inputs: dict[str, Path], tmp_path: Path) -> None:
    assert main(command(inputs, tmp_path, "--steps", "2", "--seed", "0", "--seed", "1")) == 0
    found = read(tmp_path)
    first, second = (row["tasks"][0]["loss"] for row in found["rows"])
    assert first != second
    row = main_table(found).rows[1]
    learnt = [-r["learnt"]["upper"] for r in found["rows"]]
    half = 12.7062 * abs(learnt[0] - learnt[1]) / 2  # t of one degree of freedom times the standard error
    assert f"{sum(learnt) / 2:+.2f} ±{half:.2f}" in row[1]
    assert (tmp_path / "compare.png").exists() and settings_table(found).rows[0][1] == "0, 1"


def test_finished_rows_are_reused(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "write_report", lambda folder, found: [])  # the drawing would be most of it
    ran = counted(monkeypatch)
    small = ("--steps", "2")
    assert main(command(inputs, tmp_path, *small)) == 0
    before = read(tmp_path)
    assert main(command(inputs, tmp_path, *small)) == 0
    assert ran == ["LoRA/0"] and read(tmp_path)["rows"] == before["rows"]
    assert main(command(inputs, tmp_path, *small, methods=("lora", "clora"))) == 0
    assert ran == ["LoRA/0", "CLoRA/0"], "a new method runs alone"
    assert main(command(inputs, tmp_path, "--steps", "3")) == 0
    assert ran[2:] == ["LoRA/0"], "another setting is another row"
    assert len(read(tmp_path)["rows"][0]["tasks"][0]["loss"]) == 3
    for path in (tmp_path / "runs").glob("lora-seed0-*.json"):
        path.write_text(path.read_text()[:-40])  # cut off
    assert main(command(inputs, tmp_path, *small)) == 0
    assert ran[3:] == ["LoRA/0"], "a damaged row is run again"
    assert main(command(inputs, tmp_path, *small, "--fresh")) == 0
    assert ran[4:] == ["LoRA/0"]


def on_steps(monkeypatch: pytest.MonkeyPatch, act: Callable[[str, Step], None]) -> None:
    """Have ``act(title, step)`` called after every training step."""

    @contextmanager
    def training(self: Ui, title: str, steps: int) -> Iterator[Callable[[Step], None]]:
        yield lambda step: act(title, step)

    monkeypatch.setattr(Ui, "training", training)


def test_ctrl_c_keeps_what_is_done_and_the_next_run_goes_on(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(inputs, tmp_path, "--steps", "3", methods=("lora", "clora"))

    def act(title: str, step: Step) -> None:
        if title.startswith("CLoRA") and "swap" in title and step.number == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        on_steps(patch, act)
        assert main(words) == 130
    said = capsys.readouterr().err
    assert "interrupted: 1 finished rows" in said and "kept the adapter of step 2 of 3" in said
    found = read(tmp_path)
    assert found["complete"] is False and found["stopped"] == "interrupted"
    assert [r["label"] for r in found["rows"]] == ["LoRA"]
    unfinished = found["unfinished"]
    assert unfinished["label"] == "CLoRA" and len(unfinished["tasks"][1]["loss"]) == 2
    assert "stopped during CLoRA" in (tmp_path / "report.html").read_text()
    loaded = fl.load(tiny_model(), tmp_path / unfinished["adapter"])
    assert any(p.abs().sum() > 0 for p in trainable(loaded))

    ran = counted(monkeypatch)
    assert main(words) == 0
    assert ran == ["CLoRA/0"]
    assert read(tmp_path)["complete"] is True and "unfinished" not in read(tmp_path)


def test_ctrl_c_outside_of_training_keeps_what_is_done(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = module.evaluate

    def interrupted(session: Any, plan: Any) -> dict[str, Any]:
        if plan is not None:
            raise KeyboardInterrupt
        return evaluate(session, plan)

    monkeypatch.setattr(module, "evaluate", interrupted)
    assert main(command(inputs, tmp_path, "--steps", "2")) == 130
    assert "interrupted: 0 finished rows" in capsys.readouterr().err
    assert read(tmp_path)["rows"] == [] and read(tmp_path)["base"]["losses"]


def test_nan_stops_one_row_and_is_said(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapt = fl.adapt
    models: list[Any] = []
    monkeypatch.setattr(fl, "adapt", lambda model, *a, **k: models.append(model) or adapt(model, *a, **k))

    def act(title: str, step: Step) -> None:
        if title.startswith("LoRA") and step.number == 2:
            trainable(models[-1])[0].data[:] = math.nan

    on_steps(monkeypatch, act)
    assert main(command(inputs, tmp_path, "--steps", "4", methods=("lora", "clora"))) == 1
    out = capsys.readouterr().out
    assert "stopped at step 3 of 4" in out and "adapter saved in" in out and "LoRA (diverged)" in out
    lora, clora = read(tmp_path)["rows"]
    assert lora["stopped"] == "diverged" and len(lora["tasks"]) == 1 and clora["stopped"] == "finished"
    fl.load(tiny_model(), tmp_path / lora["adapter"])


def test_one_task_and_no_method_are_enough(inputs: dict[str, Path], tmp_path: Path) -> None:
    words = ["compare", "--model", str(inputs["model"]), "--out", str(tmp_path), "--dtype", "float32", "--smoke"]
    texts = ["--task", str(inputs["upper"]), "--keep", str(inputs["prose"])]
    assert main([*words, *texts, "--method", "base"]) == 0
    assert read(tmp_path)["rows"] == [] and (tmp_path / "report.html").exists()
    assert main([*words, *texts, "--method", "curlora"]) == 0
    found = read(tmp_path)
    assert found["options"]["steps"] == 2 and len(found["rows"]) == 1
    assert set(found["rows"][0]["forgotten"]) == {"prose"}


def test_a_changed_base_is_noticed(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = fl.remove

    def careless(model: Any) -> Any:
        remove(model)
        model.lm_head.weight.data[0, 0] += 1e-3
        return model

    options = CompareOptions(
        out=tmp_path,
        model=str(inputs["model"]),
        tasks=(str(inputs["upper"]),),
        keep=(str(inputs["prose"]),),
        methods=("lora",),
        dtype="float32",
    )
    session = prepare(options)
    assert session.checksum == checksum(tiny_model())
    fl.adapt(session.model, fl.LoRA(rank=2))
    module.put_back(session, session.plans[0])
    fl.adapt(session.model, fl.LoRA(rank=2))
    monkeypatch.setattr(fl, "remove", careless)
    with pytest.raises(RuntimeError, match="changed by LoRA"):
        module.put_back(session, session.plans[0])


def test_tokens_are_taken_up_to_the_budget() -> None:
    rows = [{"input_ids": [0] * 10, "labels": [0] * 10} for _ in range(5)]
    assert len(take_tokens(rows, 25)) == 3 and len(take_tokens(rows, 1)) == 1 and len(take_tokens(rows, 99)) == 5


def test_other_results_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, said in [
        ("{", "is not JSON"),
        ("[]", "not written by forgetless compare"),
        (json.dumps({"kind": book.KIND, "schema": 99}), "schema 99, this version reads 1"),
    ]:
        (tmp_path / "results.json").write_text(text)
        assert main(["report", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
