"""``forgetless doctor``: all is well here, and whatever is broken makes it fail and say what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from forgetless.cli import checks, doctor, launched
from forgetless.cli import main as cli
from forgetless.ops import autograd as ops
from forgetless.ops import blas, reference
from forgetless.ops import dispatch as plans

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(ops._kernels is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """Few sizes, and no plan table of the user's."""
    monkeypatch.setenv("FORGETLESS_TUNE", str(tmp_path / "plans.json"))
    monkeypatch.delenv("FORGETLESS_PLAN", raising=False)
    monkeypatch.setattr(launched, "SIZES", ((18, 20, 24, 5), (0, 4, 8, 2)))
    monkeypatch.setattr(checks, "SMALL", ((17, 20, 18, 3, 0.1),))
    monkeypatch.setattr(launched, "CHECKS", checks.SMALL)
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
    assert report["ok"] and lines[-1] == f"{len(report['checks'])} checks in {report['seconds']} s: all hold"
    assert len(lines) == len(report["checks"]) + 1 and all(line.startswith("ok ") for line in lines[:-1])
    assert report["machine"]["packages"]["torch"] in next(
        c["detail"] for c in report["checks"] if c["name"] == "versions"
    )
    names = " ".join(finding["name"] for finding in report["checks"])
    for wanted in (*checks.FUNCTIONS, *checks.FUSED, "guard pages", "masks", "descriptors", "plan table", "memory"):
        assert wanted in names


def test_without_the_interpreter_the_kernels_run_in_another_process(capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("they run natively")
    monkeypatch.delenv("TRITON_INTERPRET")
    code, report = examined(capsys, "--only", "masks")
    assert code == 0 and [finding["name"] for finding in report["checks"]] == ["masks, interpreter"]
    monkeypatch.setattr(doctor.sys, "executable", "/nowhere/python")
    code, report = examined(capsys, "--only", "masks")
    assert code == 1 and "could not be run in the interpreter" in report["checks"][0]["detail"]


def test_a_process_that_dies_is_a_failure(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_elsewhere", lambda device: True)
    died = doctor.subprocess.CompletedProcess([], -11, stdout="", stderr="")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: died)
    failing(capsys, "guard", "could not be run in the interpreter: exit code -11", "triton")


def test_an_unknown_check_is_refused(capsys):
    assert doctor.main(["--only", "liver"]) == 2
    assert "no check begins with 'liver'" in capsys.readouterr().err


def wrong(function: Any, how: Any) -> Any:
    def altered(*arguments: Any, **options: Any) -> Any:
        found = function(*arguments, **options)
        return (how(found[0]), *found[1:]) if isinstance(found, tuple) else how(found)

    return altered


@pytest.mark.parametrize("name", checks.FUNCTIONS)
@pytest.mark.parametrize(
    "how", [lambda t: t * 1.02, lambda t: t * float("nan"), lambda t: t[:1]], ids=["2 %", "nan", "short"]
)
def test_a_wrong_kernel_is_found(name, how, monkeypatch, capsys):
    monkeypatch.setattr(ops._kernels, name, wrong(getattr(ops._kernels, name), how))
    failing(capsys, f"{name},", "against float64", "FORGETLESS_PLAN=blas")


@pytest.mark.parametrize("name", checks.FUNCTIONS)
def test_a_wrong_blas_is_found(name, monkeypatch, capsys):
    monkeypatch.setattr(blas, name, wrong(getattr(blas, name), lambda t: t + 0.1))
    failing(capsys, "blas launchers", name, "reinstall torch")


def test_a_wrong_gradient_is_found(monkeypatch, capsys):
    plain = ops.blas.gradients

    def gradients(*arguments: Any) -> Any:
        dx, ddown, dups = plain(*arguments)
        return dx, None if ddown is None else -ddown, dups

    monkeypatch.setattr(ops.blas, "gradients", gradients)
    failing(capsys, "op on cpu", "ddown", "FORGETLESS_PLAN=blas")


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("out of resource: shared memory")


def test_a_kernel_that_does_not_compile_is_found(monkeypatch, capsys):
    monkeypatch.setattr(ops._kernels, "linear_lowrank", broken)
    for plan in checks.FUSED:
        failing(capsys, f"plan {plan}", "out of resource: shared memory", "FORGETLESS_PLAN=blas")
    assert "FORGETLESS_PLAN" not in doctor.os.environ


def test_a_fallback_is_a_failure(monkeypatch, capsys):
    """It gives the right numbers by another path than the one that was chosen."""
    monkeypatch.setattr(ops._kernels, "linear_lowrank", broken)
    with ops.backend("triton"):
        failing(capsys, "op on cpu", "plan 'split' dropped", "FORGETLESS_PLAN=blas")


def test_writing_beside_a_result_is_found(monkeypatch, capsys):
    plain = ops._kernels.project

    def project(*arguments: Any, **options: Any) -> Any:
        h = plain(*arguments, **options)
        h.as_strided((1,), (1,), h.storage_offset() + h.numel()).fill_(3.0)
        return h

    monkeypatch.setattr(ops._kernels, "project", project)
    failing(capsys, "guard pages", "project split float32 wrote beside its results", "report")


def test_reading_beside_an_operand_is_found(monkeypatch, capsys):
    plain = ops._kernels.project

    def project(x: Any, *arguments: Any, **options: Any) -> Any:
        return plain(x, *arguments, **options).add_(x.as_strided((1,), (1,), x.storage_offset() - 1))

    monkeypatch.setattr(ops._kernels, "project", project)
    failing(capsys, "guard pages", "project split float32 read beside its operands", "report")


def test_results_that_change_from_run_to_run_are_found(monkeypatch, capsys):
    gen = torch.Generator().manual_seed(0)
    plain = ops.blas.linear_lowrank
    noisy = wrong(plain, lambda y: y + 1e-3 * torch.randn(y.shape, generator=gen).to(y.dtype))
    monkeypatch.setattr(ops.blas, "linear_lowrank", noisy)
    monkeypatch.setitem(ops.BACKENDS, "cpu", blas)
    failing(capsys, "same bits", "y in float32 differs from run to run", "report")


def test_other_masks_are_found(monkeypatch, capsys):
    monkeypatch.setattr(reference, "keep_mask", lambda seed, p, M, K: torch.ones(M, K, dtype=torch.bool))
    failing(capsys, "masks", "drops other elements", "report")


def test_an_adapter_that_does_not_come_back_is_found(monkeypatch, capsys):
    monkeypatch.setattr(checks.fl, "load", lambda model, folder: model)
    failing(capsys, "save", "lora: what was saved and loaded computes something else", "report")


def test_a_full_disk_is_found(monkeypatch, capsys):
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checks.fl, "save", full)
    failing(capsys, "save", "No space left on device", "free space")


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
    monkeypatch.setattr(checks, "requires", lambda name: ["torch>=2.9", "numpy>=99.1", 'x>=1; extra == "dev"'])
    failing(capsys, "versions", "wants 99.1 or later", "pip install -U 'numpy>=99.1'")
    monkeypatch.setattr(checks, "requires", lambda name: ["no-such-package>=1.0"])
    failing(capsys, "versions", "no-such-package is not installed", "pip install 'no-such-package>=1.0'")


def test_too_little_memory_is_found(monkeypatch, capsys):
    monkeypatch.setattr(checks, "available_bytes", lambda device: 1 << 20)
    failing(capsys, "memory", "0.0 GiB free", "end other programs")


def test_a_driver_without_a_device_is_found(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(checks.Path, "exists", lambda self: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    failing(capsys, "devices", "built without CUDA", "install torch with CUDA")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    failing(capsys, "devices", "no device can be used", "nvidia-smi")


def test_an_old_card_is_found(monkeypatch):
    facts = type("Facts", (), {"major": 7, "minor": 5, "name": "T4", "total_memory": 16 << 30})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    with pytest.raises(checks.Trouble, match="T4 is sm_75, the kernels want sm_80"):
        checks.devices()
