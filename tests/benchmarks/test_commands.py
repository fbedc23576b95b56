"""Every command of the bench runs at tiny sizes; tables and pages say what the JSON says."""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import types
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from forgetless_bench import (  # noqa: E402
    against,
    cli,
    dispatch,
    harness,
    layer,
    providers,
    report,
    step,
    tables,
)
from forgetless_bench.shapes import Case  # noqa: E402

CPU = torch.device("cpu")
KINDS = ("layer", "penalty", "step", "memory", "dispatch")
TINY = {"shape": "tiny.q", "M": 8, "R": 4, "dtype": "float32", "dropout": 0.0, "method": "lora"}
CHECKOUT = (harness.ROOT / ".git").exists()


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Every benchmark through the command line, at tiny sizes."""
    folder = tmp_path_factory.mktemp("smoke")
    assert cli.main(["all", "--smoke", "--device", "cpu", "--out", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}-cpu.json" for name in KINDS)
    return {name: json.loads((folder / f"{name}-cpu.json").read_text()) for name in KINDS}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sweep")
    assert cli.main(["layer", "--sweep", "--smoke", "--device", "cpu", "--out", str(folder)]) == 0
    (path,) = folder.iterdir()
    assert path.name == "sweep-cpu.json"
    return json.loads(path.read_text())


def cases_of(results: dict[str, Any], **fields: Any) -> list[str]:
    return [n for n, case in results["cases"].items() if all(case[key] == value for key, value in fields.items())]


# ----------------------------------------------------------------------------------------- results


def test_results_say_what_ran_and_where(smoke):
    for name, data in smoke.items():
        assert data["kind"] == name and data["schema"] == harness.SCHEMA and data["smoke"] is True
        assert data["command"] == f"python -m bench {name} --smoke --device cpu"
        assert set(data["machine"]) == {"system", "processor", "cores", "threads", "device"}
        assert data["versions"]["torch"]
        assert data["rows"] and isinstance(data["notes"], list) and "commit" in data
        for row in data["rows"]:
            assert list(row)[:6] == ["case", "provider", "phase", "metric", "value", "unit"]


def test_rows_of_layers(smoke):
    results = smoke["layer"]
    (lora,) = cases_of(results, method="lora", dropout=0.0)
    (curlora,) = cases_of(results, method="curlora")
    expected = {"frozen", "forgetless", "eager PyTorch", "LoRAFusion-style"}
    if providers.have_peft():
        expected |= {"PEFT", "PEFT, bf16 adapters"}
    for case, names in ((lora, expected), (curlora, {"frozen", "forgetless", "authors' CURLoRA"})):
        for phase in ("forward", "backward", "both"):
            assert {row["provider"] for row in harness.select(results, case=case, phase=phase, metric="time")} == names
        for metric in ("saved", "peak"):
            sizes = {row["provider"]: row["value"] for row in harness.select(results, case=case, metric=metric)}
            assert set(sizes) == names and all(size > 0 or name == "frozen" for name, size in sizes.items())
    assert len(results["cases"]) == 3


def test_the_sweeps_are_a_run_of_their_own(sweep):
    assert sweep["kind"] == "sweep" and sweep["command"].startswith("python -m bench layer --sweep")
    sizes = [(case["shape"], case["M"], case["R"]) for case in sweep["cases"].values()]
    tiny = [("tiny.q", 8, 2), ("tiny.q", 8, 4), ("tiny.k", 4, 4), ("tiny.k", 8, 4)]
    assert sorted(set(sizes)) == sorted(tiny) and {case["dropout"] for case in sweep["cases"].values()} == {0.0}


def test_rows_of_the_others(smoke):
    def names(kind: str, **fields: str) -> set[str]:
        return {row["provider"] for row in harness.select(smoke[kind], **fields)}

    assert {"NullSpace, shared", "Laplace", "authors' CLoRA"} <= names("penalty", phase="penalty", metric="time")
    assert {"forward", "Laplace, kfac"} <= names("penalty", phase="calibrate")
    assert names("penalty", phase="step") == {"training step, LoRA", "step with OutputDeviation"}
    assert {"frozen", "forgetless, dropout 0.1", "forgetless CURLoRA", "authors' CURLoRA"} <= names("step")
    saved = {row["provider"]: row["value"] for row in harness.select(smoke["memory"], phase="step", metric="saved")}
    assert saved["forgetless, dropout 0.1"] > saved["frozen"]
    assert dispatch.BARE in names("dispatch", metric="time")


def test_the_peak_of_a_step_is_taken_in_a_fresh_process():
    options = types.SimpleNamespace(smoke=True, dropout=[0.0], batch=(1, 4))
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        size = fresh.submit(step.probe, "frozen", options).result()
    assert size is None or size >= 0


def test_curlora_saves_a_fraction_of_what_the_authors_save():
    case = {"shape": "smollm2.q", "M": 64, "R": 16, "dtype": "bfloat16", "dropout": 0.0, "method": "curlora"}
    made, _ = layer.make(case)
    saved = {name: one.sizes()["saved"] for name, one in made.items()}
    assert saved["forgetless"] <= saved["authors' CURLoRA"] / 4


def test_a_provider_that_fails_is_a_note_and_not_the_end(monkeypatch):
    class Broken(providers.Eager):
        def forward(self, x):
            raise RuntimeError("not today\nor ever")

    monkeypatch.setattr(providers, "Split", Broken)
    made, notes = layer.make(TINY)
    assert "LoRAFusion-style" not in made and "eager PyTorch" in made
    assert len(notes) == 1 and notes[0].endswith("RuntimeError: not today")
    monkeypatch.setattr(providers, "lora_layer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layer.make(TINY)


# ------------------------------------------------------------------------------------------- a GPU


def test_ours_is_measured_on_other_backends_too():
    """What a GPU run adds: rows of BLAS beside the kernels. On a CPU the backends are named here."""
    assert layer.other_backends(CPU) == ()
    assert layer.other_backends(torch.device("cuda")) == ("blas", "split", "full", "once")
    made, notes = layer.make(TINY, "cpu", backends=("blas", "reference"))
    assert not notes and {"forgetless", "forgetless, blas", "forgetless, reference"} <= set(made)
    grads = {name: made[name].both() for name in ("forgetless", "forgetless, blas", "forgetless, reference")}
    for others in grads.values():
        for a, b in zip(grads["forgetless"], others, strict=True):
            torch.testing.assert_close(a, b)
    results: dict[str, Any] = {"rows": [], "cases": {}, "notes": []}
    layer.measure(Case(**TINY), made, CPU, 2, None, results)
    assert "forgetless, blas" in {row["provider"] for row in results["rows"]}


# ---------------------------------------------------------------------------------- against a commit


@pytest.mark.skipif(not CHECKOUT, reason="not a git checkout")
def test_another_commit_is_measured_in_the_same_run(tmp_path):
    assert cli.main(["layer", "--smoke", "--device", "cpu", "--against", "HEAD", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "layer-cpu.json").read_text())
    other = results["against"][:8]
    assert other == subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=harness.ROOT, text=True)[:8]
    for case in results["cases"]:
        names = {row["provider"] for row in harness.select(results, case=case, phase="both", metric="time")}
        assert {"frozen", f"frozen @ {other}", "forgetless", f"forgetless @ {other}"} <= names
        saved = {row["provider"]: row["value"] for row in harness.select(results, case=case, metric="saved")}
        assert saved["frozen"] == 0 and saved[f"forgetless @ {other}"] > 0


@pytest.mark.skipif(not CHECKOUT, reason="not a git checkout")
def test_a_step_of_another_commit(tmp_path):
    words = ["--smoke", "--device", "cpu", "--methods", "lora", "--dropout", "0", "--against", "HEAD"]
    assert cli.main(["step", *words, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "step-cpu.json").read_text())
    names = {row["provider"] for row in harness.select(results, metric="time")}
    assert {"frozen", "forgetless, dropout 0", f"forgetless, dropout 0 @ {results['against'][:8]}"} <= names
    assert not any(name.startswith("PEFT") and "@" in name for name in names)


@pytest.mark.skipif(not CHECKOUT, reason="not a git checkout")
def test_a_worker_runs_the_library_of_its_checkout(tmp_path):
    old, links = tmp_path / "old", tmp_path / "links"
    against.extract(against.resolve("HEAD"), old)
    (old / "forgetless" / "methods" / "lora.py").write_text("raise ImportError('the old one')")
    links.mkdir()
    with pytest.raises(RuntimeError, match="ImportError: the old one"):
        against.Worker(old, links)


def test_an_unknown_commit_is_refused_in_one_line(capsys):
    assert cli.main(["layer", "--smoke", "--against", "no-such-commit"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --against: 'no-such-commit' is not a commit")


def test_a_worker_answers_with_its_error():
    requests = [["make", "layer", {"case": TINY, "device": "cpu"}], ["times", "forgetless"], ["times", "x"]]
    replies = io.StringIO()
    against.serve([json.dumps(one) for one in requests], replies)
    made, times, error = map(json.loads, replies.getvalue().splitlines())
    assert "frozen" in made["result"][0] and made["result"][1] == []
    assert len(times["result"]) == 2 and min(times["result"]) > 0 and error["error"] == "KeyError: 'x'"


# ------------------------------------------------------------------------------------ tables and pages


@pytest.fixture
def house(tmp_path, monkeypatch) -> Path:
    """A folder with marks in README.md, and results there."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}old{report.END}after\n")
    return tmp_path


def test_tables_from_results(smoke, sweep, house, capsys):
    assert "Not measured yet" in report.benchmarks_page() and "Nothing has been measured on a GPU" in report.HEAD + (
        report.benchmarks_page()
    )
    for name, data in smoke.items():
        harness.write_json(house / "results" / f"{name}-cpu.json", data)
    assert cli.main(["report"]) == 2, "results of a smoke run are refused"
    assert "smoke run" in capsys.readouterr().err
    for name, data in {**smoke, "sweep": sweep}.items():
        harness.write_json(house / "results" / f"{name}-cpu.json", {**data, "smoke": False})
    assert cli.main(["report", "--check"]) == 1
    assert cli.main(["report"]) == 0
    assert cli.main(["report", "--check"]) == 0
    page, readme = (house / "docs" / "benchmarks.md").read_text(), (house / "README.md").read_text()
    texts = ("LoRAFusion-style", "authors' CURLoRA", "Dispatch", "| R=2 |", "M=4")
    assert [text for text in texts if text.replace("| R=2 |", "R=2") not in page] == []
    assert readme.startswith("before\n") and readme.endswith("after\n") and "time, dropout 0.1" in readme
    (house / "docs" / "benchmarks.md").write_text(page.replace("forgetless", "x", 1))
    assert cli.main(["report", "--check"]) == 1
    assert "benchmarks.md" in capsys.readouterr().err


def made_up(providers_of: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Results of as many LoRA cases as there are lists of rounds."""
    count = len(next(iter(providers_of.values())))
    cases = [Case("tiny.q", M, 4, "float32", 0.0, "lora") for M in range(8, 8 + count)]
    rows = [
        harness.time_row(case.name, provider, "both", rounds[index])
        for index, case in enumerate(cases)
        for provider, rounds in providers_of.items()
    ]
    return {"kind": "layer", "cases": {case.name: case.about() for case in cases}, "rows": rows, "notes": []}


def test_tables_say_what_the_rows_say_and_where_we_lose():
    drift = [0.0, 3.0, 9.0]  # of the machine from round to round: more than anything that is measured
    times = {"frozen": [1, 1], "forgetless": [1.5, 1.6], "eager PyTorch": [1.4, 1.7], "PEFT": [2, 2]}
    results = made_up({name: [[v + d for d in drift] for v in values] for name, values in times.items()})
    text = tables.layer_text(results)
    assert "| forgetless | 1.12 (0.50) | 1.15 (0.60) |" in text, "medians 4.5 / 4 and 4.6 / 4, shares within rounds"
    assert "Faster than forgetless at dropout 0, of 2 cases: eager PyTorch 1, PEFT 0." in text
    results["rows"] += [{**row, "provider": "x"} for row in results["rows"] if row["provider"] == "PEFT"]
    noise = made_up({"frozen": [[1, 1, 1]], "forgetless": [[1.5, 1.5, 1.5]], "PEFT": [[1.1, 0.8, 1.3]]})
    assert f"| forgetless | 1.50 ({tables.NONE}) |" in tables.layer_text(noise), "PEFT's overhead is noise there"


def test_the_readme_has_medians_over_the_cases():
    times = {"frozen": [[1.0]] * 4, "forgetless": [[1.1], [1.2], [1.4], [1.5]], "PEFT": [[2.0]] * 4}
    results = {**made_up(times), "machine": {}, "versions": {}, "commit": None, "created": "2026-01-01"}
    assert statistics.median([1.1, 1.2, 1.4, 1.5]) == pytest.approx(1.3)
    assert "| forgetless | 1.30 (1.10–1.50) |" in report.layer_section(results)


def test_the_committed_pages_are_those_of_the_committed_results():
    if not (harness.ROOT / "pyproject.toml").exists():
        pytest.skip("not a source checkout")
    stale = [path.name for path, (text, fresh) in report.pages().items() if text != fresh]
    assert stale == [], "run: python -m bench report"


# ------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    "arguments",
    [["fast"], ["layer", "--ranks", "x"], ["layer", "--quick"], ["step", "more"], ["all", "--quick"], ["gpu", "-x"],
     ["report", "x"], ["targets", "--archs", "x"], ["static", "--arch"], ["all", "--out", "x.json"]],
)  # fmt: skip
def test_wrong_arguments_are_refused_in_one_line(arguments, capsys):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--help"], ["layer", "--help"], ["targets", "--help"]])
def test_help(arguments, capsys):
    assert cli.main(arguments) == 0
    assert "usage" in capsys.readouterr().out


def test_it_is_a_command_of_forgetless(capsys):
    from forgetless.cli.main import main

    assert main(["bench", "--help"]) == 0
    assert "dispatch" in capsys.readouterr().out


def test_static_is_written_with_the_schema(tmp_path, capsys):
    path = tmp_path / "static.json"
    assert cli.main(["static", "--no-compile", "--out", str(path)]) == 0
    results = harness.read(path)
    assert {row["provider"] for row in results["rows"]} == {f"sm_{arch}" for arch in (80, 86, 89, 90, 100, 120)}
    assert "forgetless once" in report.static_text(results, path)


@pytest.mark.skipif(not (harness.ROOT / "pyproject.toml").exists(), reason="not a source checkout")
def test_microbenchmarks_write_rows_of_our_schema(tmp_path):
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "micro.json"
    words = ["--benchmark-only", f"--benchmark-json={path}", "--benchmark-max-time=0.01", "--benchmark-min-rounds=3"]
    run = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", *words, "-k", "outer"]
    shapes = ["--shapes", "24x16,32x48", "--tokens", "16", "--rank", "4", "--dtype", "float32"]
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}  # workers time nothing
    done = subprocess.run([*run, *shapes], cwd=harness.ROOT, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = harness.read(path)["rows"]
    native = "Triton" if torch.cuda.is_available() else "interpreter"
    expected = {
        (f"{shape} M=16 R=4 float32 lora dropout 0", f"{kernel}, {backend}")
        for shape in ("24x16", "32x48")
        for kernel in ("outer", "project_outer")
        for backend in ("BLAS", native)
    }
    assert {(row["case"], row["provider"]) for row in rows} == expected
    assert all(row["phase"] == "kernel" and row["unit"] == "s" and 0 < row["low"] <= row["value"] for row in rows)
    assert json.loads(path.read_text())["benchmarks"][0]["extra_info"]["phase"] == "kernel"
    done = subprocess.run([*run, "--shapes", "no-such"], cwd=harness.ROOT, capture_output=True, text=True, env=alone)
    assert done.returncode and "'no-such' is neither NxK nor one of smollm2.q" in done.stderr


def test_qlora_trains_on_both_bases(tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    assert cli.main(["qlora", "--smoke", "--device", "cpu", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "qlora-cpu.json").read_text())
    losses = tables.nested(harness.select(results, metric="loss"), "provider", "phase")
    assert len(losses) == 4 and all(len(values) == 2 for values in losses.values())
    assert "NF4 base, swapped in" in tables.qlora_text(results)
