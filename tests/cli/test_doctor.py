"""``forgetless doctor``: all is well here, and whatever is broken makes it fail and say what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from forgetless.cli import doctor
from forgetless.cli import main as cli
from forgetless.ops import blas, plans
from forgetless.ops import dispatch as ops

#: The kernels' launchers that the op calls, by the plan that calls them.
LAUNCHERS = {
    "linear_lowrank": ("full", "once"),
    "outer": doctor.FUSED,
    "project": ("hybrid", "split"),
    "project_outer": ("hybrid", "split"),
    "matmul_lowrank": ("split",),
}

pytestmark = pytest.mark.skipif(ops.kernels is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """Few sizes, and no plan table of the user's."""
    monkeypatch.setenv("FORGETLESS_TUNE", str(tmp_path / "plans.json"))
    monkeypatch.delenv("FORGETLESS_PLAN", raising=False)
    monkeypatch.setattr(doctor, "SIZES", ((17, 20, 18, 3, 0.1), (0, 4, 8, 2, 0.1)))
    plans.forget()
    yield
    plans.forget()


def examined(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = doctor.main(["--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def failing(capsys: pytest.CaptureFixture[str], only: str, detail: str, advice: str) -> None:
    """Every check of that name fails, with this detail and this advice."""
    code, report = examined(capsys, "--only", only)
    assert code == 1 and not report["ok"] and report["checks"]
    for finding in report["checks"]:
        assert not finding["ok"] and detail in finding["detail"] and advice in finding["advice"], finding


def test_all_is_well_here(capsys, tmp_path):
    assert cli.main(["doctor", "--out", str(tmp_path / "report.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] and lines[-1] == f"{len(report['checks'])} checks in {report['seconds']} s: all passed"
    assert len(lines) == len(report["checks"]) + 1 and all(line.startswith("ok ") for line in lines[:-1])
    assert report["versions"]["torch"] in next(c["detail"] for c in report["checks"] if c["name"] == "versions")
    names = " ".join(finding["name"] for finding in report["checks"])
    for expected in (*doctor.FUSED, "versions", "devices", "plan table", "path", "op on cpu"):
        assert expected in names


def test_without_the_interpreter_the_kernels_run_in_another_process(capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("they run natively")
    monkeypatch.delenv("TRITON_INTERPRET")
    code, report = examined(capsys, "--only", "plan full")
    assert code == 0 and [finding["name"] for finding in report["checks"]] == ["plan full, interpreter"]
    monkeypatch.setattr(doctor.sys, "executable", "/nowhere/python")
    code, report = examined(capsys, "--only", "plan full")
    assert code == 1 and "could not be run in the interpreter" in report["checks"][0]["detail"]


def test_a_process_that_dies_is_a_failure(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "needs_interpreter", lambda device: True)
    died = doctor.subprocess.CompletedProcess([], -11, stdout="", stderr="")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: died)
    failing(capsys, "plan full", "could not be run in the interpreter: exit code -11", "triton")


def test_an_unknown_check_is_refused(capsys):
    assert doctor.main(["--only", "liver"]) == 2
    assert "no check begins with 'liver'" in capsys.readouterr().err


def wrong(function: Any, how: Any) -> Any:
    def altered(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        return (how(result[0]), *result[1:]) if isinstance(result, tuple) else how(result)

    return altered


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("how", [lambda t: t * 1.02, lambda t: t * float("nan")], ids=["2 %", "nan"])
def test_a_wrong_kernel_is_found(name, how, monkeypatch, capsys):
    monkeypatch.setattr(ops.kernels, name, wrong(getattr(ops.kernels, name), how))
    for plan in LAUNCHERS[name]:
        failing(capsys, f"plan {plan}", "against float64", "FORGETLESS_PLAN=blas")


def test_a_result_of_another_shape_is_found(monkeypatch, capsys):
    monkeypatch.setattr(doctor.fl.ops, "lowrank_linear", wrong(doctor.fl.ops.lowrank_linear, lambda t: t[:1]))
    monkeypatch.setattr(doctor.torch.autograd, "grad", lambda y, leaves, dy: leaves)
    failing(capsys, "op on cpu", "y float32", "FORGETLESS_PLAN=blas")


def test_a_wrong_blas_is_found(monkeypatch, capsys):
    monkeypatch.setattr(blas, "matmul_lowrank", wrong(blas.matmul_lowrank, lambda t: t + 0.1))
    failing(capsys, "op on cpu", "against float64", "FORGETLESS_PLAN=blas")


def test_a_wrong_gradient_is_found(monkeypatch, capsys):
    plain = ops.blas.dx_and_ddown

    def dx_and_ddown(*arguments: Any, **options: Any) -> Any:
        dx, ddown = plain(*arguments, **options)
        return dx, None if ddown is None else -ddown

    monkeypatch.setattr(ops.blas, "dx_and_ddown", dx_and_ddown)
    failing(capsys, "op on cpu", "ddown", "FORGETLESS_PLAN=blas")


def broken(x: Any, *_: Any, **__: Any) -> Any:
    from forgetless_kernels.tl_utils import launching

    with launching("a kernel", x):
        raise RuntimeError("out of resource: shared memory")


def test_a_kernel_that_does_not_compile_is_found(monkeypatch, capsys):
    for name in ("project", "matmul_lowrank", "linear_lowrank"):
        monkeypatch.setattr(ops.kernels, name, broken)
    for plan in doctor.FUSED:
        failing(capsys, f"plan {plan}", "out of resource: shared memory", "FORGETLESS_PLAN=blas")
    assert "FORGETLESS_PLAN" not in doctor.os.environ


def test_a_fallback_is_a_failure(monkeypatch, capsys):
    """It gives the right numbers by another path than the one that was chosen."""
    monkeypatch.setattr(ops.kernels, "matmul_lowrank", broken)
    with ops.backend("triton"):
        failing(capsys, "op on cpu", "plan 'split' dropped", "FORGETLESS_PLAN=blas")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 9, "gpus": {}}'])
def test_a_broken_plan_table_is_found(text, tmp_path, capsys):
    (tmp_path / "plans.json").write_text(text)
    failing(capsys, "plan table", "plans.json cannot be used", "forgetless tune")


def test_a_good_plan_table_is_counted(tmp_path, capsys):
    plans.store({"some card": {"k": {"plan": "split"}}})
    code, report = examined(capsys, "--only", "plan table")
    assert code == 0 and report["checks"][0]["detail"] == "1 rows for some card"


def test_a_wrong_variable_is_found(monkeypatch, capsys):
    monkeypatch.setenv("FORGETLESS_PLAN", "fast")
    failing(capsys, "plan table", "FORGETLESS_PLAN is 'fast'", "unset FORGETLESS_PLAN")


def test_an_old_or_missing_package_is_found(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=2.9", "numpy>=99.1", 'x>=1; extra == "dev"'])
    failing(capsys, "versions", "wants 99.1 or later", "pip install -U 'numpy>=99.1'")
    monkeypatch.setattr(doctor, "requires", lambda name: ["no-such-package>=1.0"])
    failing(capsys, "versions", "no-such-package is not installed", "pip install 'no-such-package>=1.0'")


def test_a_driver_without_a_device_is_found(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(doctor.Path, "exists", lambda self: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    failing(capsys, "devices", "built without CUDA", "install torch with CUDA")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    failing(capsys, "devices", "no device can be used", "nvidia-smi")


def test_an_old_card_is_found(monkeypatch):
    facts = type("Facts", (), {"major": 7, "minor": 5, "name": "T4", "total_memory": 16 << 30})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    with pytest.raises(doctor.Failure, match="T4 sm_75: the kernels need sm_80"):
        doctor.devices()
