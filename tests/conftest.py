"""Set before torch and Triton are imported: the interpreter without a GPU, one thread per xdist worker."""

import contextlib
import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers with two threads each are several times slower

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _patch_once_a_launch() -> None:
    """Triton's interpreter patches its language again for every function a kernel calls: 40 % of a kernel's time."""
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    class Nothing:
        def restore(self) -> None:
            pass

    def once(fn):
        module = id(fn.__globals__)
        if module in patched:
            return Nothing()
        scope = patch(fn)
        if not patched:  # the launch itself; of the functions it calls, Triton takes back nothing either
            restore = scope.restore

            def end() -> None:
                patched.clear()
                restore()

            scope.restore = end
        patched.add(module)
        return scope

    interpreter._patch_lang = once


with contextlib.suppress(ImportError, AttributeError):  # no Triton, or one that is made otherwise
    _patch_once_a_launch()


@pytest.fixture(autouse=True, scope="module")
def _only_young_garbage() -> None:
    """What is imported stays: later collections skip it (transformers asks for several in every training run)."""
    gc.collect()
    gc.freeze()
