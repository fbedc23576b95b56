"""What a kept launch must be, on a driver that compiles for sm_90 and runs nothing: ``python launcher_checks.py NAME``.

In a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime.jit import JITFunction

from forgetless_bench import host
from forgetless_kernels import fused, launcher, sums, tiles, tl_utils

BF16 = torch.bfloat16


class Recording(host.NoCard):
    """Writes down what each launch was given, and the kernels that were compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []
        self.compiled: list[str] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            *given, enter, leave = arguments[:9]
            if not any(getattr(hook, "calls", ()) for hook in (enter, leave)):  # nobody is told anything
                given[6], enter, leave = None, None, None
            self.seen.append((metadata.name, *map(plain, (*given, enter, leave, *arguments[9:]))))

        return launch

    def load_binary(self, name: str, *rest: Any) -> tuple[int, int, int, int, int]:
        self.compiled.append(name)
        return super().load_binary(name, *rest)


def plain(argument: Any) -> Any:
    """A tensor or a descriptor without its address, and what hooks are told: both are made anew for each call."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16, argument.shape, argument.stride()
    if hasattr(argument, "block_shape"):
        return *plain(argument.base), tuple(argument.shape), tuple(argument.strides), tuple(argument.block_shape)
    return argument.get()["name"] if hasattr(argument, "extras") else argument


def calls(M: int, shift: int = 0) -> dict[str, Callable[[], Any]]:
    """Every launcher of the kernels; with a shift, on operands that are not aligned."""

    def on(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.zeros(shape[0], shape[1] + shift, dtype=dtype)[:, shift:]

    K, N, R = 256, 512, 16
    x, dy, weight, h, g = on(M, K), on(M, N), on(N, K), on(M, R), on(M, 2 * R)
    down, up = on(R, K, dtype=torch.float32), on(N, R, dtype=torch.float32)
    seed, bias = torch.zeros(2, dtype=torch.int32), torch.zeros(N, dtype=BF16)
    made: dict[str, Callable[[], Any]] = {
        "project": lambda: fused.project(x, down, 0.5),
        "project dropout": lambda: fused.project(x, down, 0.5, 0.1, seed),
        "outer": lambda: fused.outer(h, x, dtype=torch.float32),
        "sweep": lambda: fused.project_outer(dy, up, h, 0.5, torch.float32),
        "forward": lambda: fused.matmul_lowrank(x, weight, h, up, bias),
        "dx": lambda: fused.dx_and_ddown([dy, dy], [weight, weight], g, [down, down], x),
        "dx dropout": lambda: fused.matmul_lowrank(dy, weight.T, h, down.T, None, 0.1, seed),
        "full": lambda: fused.linear_lowrank(x, weight, down, up, plan="full"),
        "once": lambda: fused.linear_lowrank(x, weight, down, up, plan="once"),
        "mask": lambda: fused.keep_bits(seed, 0.1, M, K),
    }
    return made


def same_arguments(card: Recording) -> None:
    """The kept launch gives the driver what Triton's own call gave it: grid, kernel, every argument in its place."""
    for M, shift in ((512, 0), (33, 0), (512, 1)):
        for name, call in calls(M, shift).items():
            call()
            first, card.seen = card.seen, []
            with no_jit():
                call()
            again, card.seen = card.seen, []
            assert first and again == first, (name, M, shift)


class no_jit:
    """Within the block, Triton's own call is an error."""

    def __enter__(self) -> None:
        self.run = JITFunction.run
        JITFunction.run = lambda *_, **__: (_ for _ in ()).throw(AssertionError("Triton's own call"))  # type: ignore[method-assign]

    def __exit__(self, *error: Any) -> None:
        JITFunction.run = self.run  # type: ignore[method-assign]


def one_kernel_for_all_counts(card: Recording) -> None:
    for M in (1, 2, 3, 15, 16, 17, 33, 64, 100, 255, 512, 1000, 1024, 2047, 4096, 8191, 8192):
        for call in calls(M).values():
            call()
    twice = {name for name in card.compiled if card.compiled.count(name) > 1}
    # with dropout and without; forward, one and two products of dx; full and once; of one layer's ranks and of two
    variants = {
        "_project_kernel": 2, "_matmul_lowrank_descriptor_kernel": 3, "_linear_lowrank_kernel": 2, "_outer_kernel": 2
    }  # fmt: skip
    assert {name: card.compiled.count(name) for name in twice} == variants, card.compiled


def what_differs_is_another_launch(card: Recording) -> None:
    """Alignment, strides, dtypes, a forced tile and a knob: each has a launch and a kernel of its own."""
    x, down = torch.zeros(65, 256, dtype=BF16), torch.zeros(16, 256)
    wide = torch.zeros(65, 257, dtype=BF16)
    fused.project(x, down)
    kinds: list[Callable[[], Any]] = [
        lambda: fused.project(wide[:, 1:], down),
        lambda: fused.project(x, down.to(BF16)),
        lambda: fused.project(x, torch.zeros(256, 16).T),
        lambda: fused.project(x.view(torch.float16), down),
    ]
    for kind in kinds:
        count = len(card.compiled)
        kind()
        assert len(card.compiled) == count + 1
    with tiles.forced("project", BLOCK_M=32):
        fused.project(x, down)
    assert len(card.compiled) == 1 + len(kinds) + 1
    before, knobs.runtime.debug = knobs.runtime.debug, True
    fused.project(x, down)
    knobs.runtime.debug = before
    assert len(card.compiled) == 1 + len(kinds) + 2
    with no_jit():
        fused.project(x, down)
        fused.project(x, down, 0.25)  # a run-time value
        fused.project(torch.zeros(65, 256, dtype=BF16), down)


def scratch_that_is_not_aligned(card: Recording) -> None:
    """Goes Triton's own way, to a kernel that does not count on it."""
    g, x = torch.zeros(4096, 16, dtype=BF16), torch.zeros(4096, 256, dtype=BF16)
    fused.outer(g, x)
    launch = next(iter(launcher._launches.values()))
    assert launch is not None
    operands = [torch.zeros(8, dtype=BF16)[1:]] * 3
    launch(x, 4, *operands, torch.zeros(9)[1:], torch.zeros(8, dtype=torch.int32), None, ())
    assert card.compiled.count("_outer_kernel") == 2


def versions_that_are_not_known(card: Recording) -> None:
    x, down = torch.zeros(65, 256, dtype=BF16), torch.zeros(16, 256)
    launcher.KNOWN = False
    for _ in range(3):
        fused.project(x, down)
    assert len(card.seen) == 3 and all(
        launch is None or launch.compiled is None for launch in launcher._launches.values()
    )


def failures(card: Recording) -> None:
    """What the driver raises is a LaunchError at the first launch and at later ones."""
    x, down = torch.zeros(65, 256, dtype=BF16), torch.zeros(16, 256)

    def broken(source: Any, metadata: Any) -> Any:
        def launch(*arguments: Any) -> None:
            raise RuntimeError("no such card")

        return launch

    fused.project(x, down)
    for launch in launcher._launches.values():
        assert launch is not None and launch.compiled is not None
        launch.compiled._run = broken(None, None)
    card.launcher_cls = broken  # type: ignore[method-assign]
    for rows in (65, 65, 70):
        try:
            fused.project(torch.zeros(rows, 256, dtype=BF16), down)
        except tl_utils.LaunchError as error:
            assert "RuntimeError: no such card" in str(error) and isinstance(error.__cause__, RuntimeError)
        else:
            raise AssertionError(rows)


def hooks(card: Recording) -> None:
    """Of launches, and of stages of the compiler: both are heeded after a launch is kept."""
    x, down, met = torch.zeros(65, 256, dtype=BF16), torch.zeros(16, 256), []
    fused.project(x, down)
    launch = next(iter(launcher._launches.values()))
    assert launch is not None
    launch.kernel.add_pre_run_hook(lambda *_, **__: met.append("before"))
    fused.project(x, down)
    assert met == ["before"] and len(card.seen) == 2
    launch.kernel.pre_run_hooks.clear()
    if launcher.HAS_STAGES_HOOK:
        knobs.runtime.add_stages_inspection_hook = lambda *_: ("key", "hash")
        fused.project(x, down)
        assert card.compiled == ["_project_kernel"] * 2  # Triton's own call saw it
        knobs.runtime.add_stages_inspection_hook = None
    with no_jit():
        fused.project(x, down)
    assert met == ["before"] and card.seen[-1] == card.seen[0]
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        hook.add(met.append)
        with no_jit():
            fused.project(x, down)
        assert card.seen[-1] != card.seen[0] and "_project_kernel" in card.seen[-1][1:]  # metadata
        hook.remove(met.append)


def little_is_kept(card: Recording) -> None:
    launcher.MOST = 8
    down = torch.zeros(16, 256)
    for rows in range(1, 40):
        fused.project(torch.zeros(rows, 256, dtype=BF16), down)
    assert 0 < len(launcher._launches) <= 8 and card.compiled == ["_project_kernel"]


def streams(card: Recording) -> None:
    """Each has counters of its own."""
    x = torch.zeros(1, dtype=BF16)
    first = tl_utils.tickets(5, x)
    assert tl_utils.tickets(3, x) is first and not first.any()
    card.get_current_stream = lambda device: 7  # type: ignore[method-assign]
    other = tl_utils.tickets(5, x)
    assert other is not first and tl_utils.tickets(10000, x).numel() == 10000 and tl_utils.tickets(1, x) is not other


CHECKS = {
    check.__name__: check
    for check in (
        same_arguments, one_kernel_for_all_counts, what_differs_is_another_launch, scratch_that_is_not_aligned,
        versions_that_are_not_known, failures, hooks, little_is_kept, streams,
    )
}  # fmt: skip


def main(name: str) -> None:
    sums.sweep_pays = lambda *sizes: True
    with host.no_card(Recording()) as card:
        CHECKS[name](card)


if __name__ == "__main__":
    main(sys.argv[1])
    print(f"Triton {triton.__version__}")
