"""Set before torch and Triton are imported: the interpreter without a GPU, one thread per xdist worker."""

import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers with two threads each are several times slower

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="module")
def _only_young_garbage() -> None:
    """What is imported stays: later collections skip it (transformers asks for several in every training run)."""
    gc.collect()
    gc.freeze()
