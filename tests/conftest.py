"""Set before torch and Triton are imported: the interpreter without a GPU, one thread per xdist worker."""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers with two threads each are several times slower

import interpreter  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


with contextlib.suppress(ImportError, AttributeError):  # no Triton, or one that is made otherwise
    interpreter.patch_once_a_launch()
with contextlib.suppress(ImportError):
    interpreter.refuse_what_the_compiler_refuses()


#: Files that run or compile kernels for minutes. Traced, the interpreter is three times slower, and what these files
#: reach of forgetless/ the others reach too.
UNTRACED = {
    "test_kernels",
    "test_bytes",
    "test_targets",
    "test_static",
    "test_doctor",
    "test_commands",
    "test_providers",
    "test_harness",
}


@pytest.fixture(autouse=True, scope="module")
def _only_what_is_wanted(request: pytest.FixtureRequest) -> Iterator[None]:
    """No coverage of files that are there for the kernels; and what is imported stays out of later collections."""
    gc.collect()
    gc.freeze()  # transformers asks for several collections in every training run
    coverage = getattr(sys.modules.get("coverage"), "Coverage", None)
    paused = []
    if request.module.__name__.rpartition(".")[2] in UNTRACED:
        while coverage and (tracing := coverage.current()):  # a worker of xdist has two
            tracing.stop()
            paused.append(tracing)
    yield
    for tracing in reversed(paused):
        tracing.start()


@pytest.fixture
def no_plans(tmp_path, monkeypatch) -> Iterator[None]:
    """No plan is known, none is forced, and none is left behind."""
    from forgetless.ops import plans

    monkeypatch.setenv("FORGETLESS_TUNE", str(tmp_path / "plans.json"))
    monkeypatch.delenv("FORGETLESS_PLAN", raising=False)
    plans.forget()
    yield
    plans.forget()
