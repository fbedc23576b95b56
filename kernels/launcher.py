"""Launches that cost the host little: all that a launch needs besides its operands is worked out once and kept.

Triton's own call looks at every argument each time, some ten microseconds a launch, and a launcher takes as long again
to choose a tile and a grid. Here both happen on the first call: ``prepared`` keeps what they give under a key, and
later calls are one look-up and the compiled kernel's own launch.

The key is complete by construction. A function that prepares a launch is given the key's parts and never a tensor, so
grid, tile and every constant follow from it; and what Triton specialises on is in it: dtype and alignment of each
tensor, each integer, the device, the driver, the knobs. Rows are in it too, for the grid, but no kernel is specialised
on their number: one compiled kernel serves every count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from . import tiles
from .tl_utils import TESTED, VERSION, launching

#: Launches kept; when there are more all are forgotten, and the next calls prepare theirs again.
MOST = 8192
#: Whether compiled kernels are launched as below; where not, every launch is Triton's own call.
KNOWN = VERSION <= TESTED[1]
#: Whether kernels take penalties' rows: Triton 3.6 compiles no tuple that holds None.
TAKES_ROWS = VERSION > (3, 6)
#: Whether kernels run in Triton's interpreter, which compiles nothing.
INTERPRETED = bool(knobs.runtime.interpret)
#: Knobs of the compiler that Triton's own call looks at each time; not every version has them all.
KNOBS = [name for name in ("instrumentation_mode", "fpsan_homomorphic_casts") if hasattr(knobs.compilation, name)]
#: Whether stages of the compiler can be replaced, by what no key can tell.
HAS_STAGES_HOOK = hasattr(knobs.runtime, "add_stages_inspection_hook")

_launches: dict[Any, Launch | None] = {}
_MISSING: Any = object()


class Facts(NamedTuple):
    """What a launch may depend on of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    alignment: int  # of its first byte: the address modulo 16
    device: torch.device


class Launch:
    """A kernel with its grid and all its arguments but the operands, which come first in its signature.

    Attributes:
        kernel: a function of ``triton.jit``.
        grid: programs along each axis.
        blocks: the block shapes of the descriptors among the operands, in a launcher's own order.
        beside: what the launcher that prepares it keeps with it: a function of the same key.
        named: all other arguments and options, by name.
    """

    __slots__ = ("beside", "blocks", "compiled", "grid", "kernel", "named", "rest")

    def __init__(self, kernel: Any, grid: Sequence[int], blocks: Sequence[list[int]] = (), **named: Any):
        self.kernel, self.blocks, self.named = kernel, blocks, named
        self.grid = (*grid, 1, 1)[:3]
        self.beside: Any = None
        self.compiled: CompiledKernel | None = None
        self.rest: tuple[Any, ...] = ()

    def __call__(self, like: Tensor, scratch: int, *operands: Any) -> None:
        """Launch on the current stream of the device of ``like``.

        Args:
            like: a tensor on the device to launch on.
            scratch: the addresses, joined by OR, of the operands that the key does not have.
            operands: tensors, descriptors and floats, the kernel's first arguments.

        Raises:
            LaunchError: it does not compile or cannot be launched.
        """
        compiled = self.compiled
        if compiled is None or scratch % 16 or self.kernel.pre_run_hooks:
            return self._by_jit(like, operands)
        if HAS_STAGES_HOOK and knobs.runtime.add_stages_inspection_hook is not None:
            return self._by_jit(like, operands)
        active = driver.active
        device = active.get_current_device()
        if like.get_device() not in (device, -1):
            with torch.cuda.device_of(like):
                return self(like, scratch, *operands)
        stream = active.get_current_stream(device)
        enter, leave, metadata = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, None
        if _calls_nothing(enter) and _calls_nothing(leave):  # the launcher would make a dictionary for two empty loops
            enter = leave = None
        else:
            metadata = compiled.launch_metadata(self.grid, stream, *operands, *self.rest)
        try:
            compiled.run(
                *self.grid, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave,
                *operands, *self.rest,
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - what a driver raises; the block itself would cost a microsecond
            with launching(compiled.name, like):
                raise error

    def _by_jit(self, like: Tensor, operands: Sequence[Any]) -> None:
        """Triton's own call; what it compiled is kept, if the operands are as the key says."""
        with launching(str(getattr(self.kernel, "__name__", "a kernel")), like):
            compiled = self.kernel[self.grid](*operands, **self.named, **_options())
            if KNOWN and self.compiled is None and isinstance(compiled, CompiledKernel):
                self.rest = tuple(self.named[name] for name in self.kernel.arg_names[len(operands) :])
                self.compiled = compiled


def _options() -> dict[str, Any]:
    """What a kernel is compiled with besides: products fused with sums, unless the environment says otherwise.

    So it is if nothing is said, but Triton 3.9 warns of it, and of another default to come.
    """
    return {} if INTERPRETED else {"enable_fp_fusion": knobs.language.default_fp_fusion}


def _calls_nothing(hook: Any) -> bool:
    """Whether a hook of launches is none, or a chain of none."""
    return hook is None or not getattr(hook, "calls", True)


def prepared(prepare: Callable[..., Any], tensors: Sequence[Tensor | None], *values: Any) -> Any:
    """``prepare(*Facts of the tensors, *values)``, kept from the second call on.

    Args:
        prepare: makes the launch from ``Facts`` (None for None) and values alone; or None, if there is none to make.
        tensors: every tensor among the operands, and its results, but the scratch that the launch asks for.
        values: hashable.

    Raises:
        LaunchError: ``prepare`` raised.
    """
    facts = [None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16, t.device) for t in tensors]
    key = (prepare, *facts, values, tiles.forced_tiles(), *_surroundings())
    launch = _launches.get(key, _MISSING)
    if launch is _MISSING:
        like = next(t for t in tensors if t is not None)
        with launching(prepare.__name__.strip("_"), like):
            launch = prepare(*[None if fact is None else Facts(*fact) for fact in facts], *values)
        if not INTERPRETED:
            if len(_launches) >= MOST:
                _launches.clear()
            _launches[key] = launch
    return launch


def _surroundings() -> tuple[Any, ...]:
    """What Triton's own call looks at besides its arguments."""
    if INTERPRETED:
        return ()
    return driver.active, knobs.runtime.debug, *[getattr(knobs.compilation, name) for name in KNOBS]
