"""Which plan runs, in what order it is asked for, and what happens when one fails."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from forgetless import compat, files
from forgetless.ops import dispatch, first_use, plans, table
from forgetless.ops.autograd import lowrank_linear
from forgetless.ops.bodies import draw_seed

tl_utils = pytest.importorskip("forgetless_kernels.tl_utils")

pytestmark = [
    pytest.mark.skipif(dispatch.kernels is None, reason="Triton is not installed"),
    pytest.mark.usefixtures("no_plans"),
]

CPU = torch.device("cpu")


def wanted(**fields):
    return plans.Problem(
        **{"gpu": "cpu", "sweep": "forward", "M": 16, "layers": ((8, 4),), "K": 8, "dtype": "float32", **fields}
    )


def routes():
    of = [dispatch.route_of(plans.Choice(plan, ""), wanted()) for plan in ("split", "hybrid")]
    return [dataclasses.replace(of[0], unchecked=True), of[1], dispatch.BLAS]


def results(value=1.0):
    return lambda: [torch.full((4, 4), value)]


def by(fused, alone=False):
    """What is run: ``fused`` by the kernels, ones by blas, and by hybrid if that is ``alone``."""
    return lambda route: results()() if route.plan in ("blas", "hybrid" if alone else "") else fused()


def timed(*seconds):
    return lambda runs, device: list(seconds)


TILED = '{"format": 1, "gpus": {"a": {"k": {"plan": "split", "tile": {"BLOCK_M": -1}}}}}'


def layer(M=5, N=24, K=20, R=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(M, K), (N, K), (R, K), (N, R)]
    return [torch.randn(*s, generator=generator).to(dtype).requires_grad_(True) for s in shapes]


def test_tokens_go_in_powers_of_two():
    assert [plans.bucket(M) for M in (0, 1, 16, 17, 4096, 4097, 10**7)] == [16, 16, 16, 32, 4096, 8192, 65536]


def test_an_unknown_problem_gets_the_default():
    assert plans.choose(plans.Problem("some card", "forward", 128, ((8, 4),), 8, "bfloat16")).plan == "split"


@pytest.mark.parametrize("plan", table.PLANS)
def test_the_environment_wins(plan, monkeypatch):
    plans.store({"cpu": {wanted().key: {"plan": "full"}}})
    monkeypatch.setenv("FORGETLESS_PLAN", plan)
    assert plans.choose(wanted()) == plans.Choice(plan, "FORGETLESS_PLAN asks for it")


@pytest.mark.parametrize("text", ["fast", "split,full", "split,sometimes"])
def test_a_wrong_environment_is_refused(text, monkeypatch):
    monkeypatch.setenv("FORGETLESS_PLAN", text)
    with pytest.raises(ValueError, match="FORGETLESS_PLAN is .* wants one of blas, hybrid, split, full, once"):
        plans.choose(wanted())


def test_a_measured_tile_is_used(monkeypatch):
    seen = []
    plain = dispatch.kernels.matmul_lowrank

    def looking(*arguments, **rest):
        from forgetless_kernels import tiles

        seen.append(tiles.tile_for("matmul_lowrank", CPU, 4, 16)["BLOCK_M"])
        return plain(*arguments, **rest)

    x, weight, down, up = layer()
    key = plans.problem_of(CPU, "forward", 5, ((24, 4),), 20, torch.float32).key
    plans.store({"cpu": {key: {"plan": "split", "tile": {"BLOCK_M": 16}}}})
    monkeypatch.setattr(dispatch.kernels, "matmul_lowrank", looking)
    truth = lowrank_linear(x, weight, down, up)
    with dispatch.backend("triton"):
        y = lowrank_linear(x, weight, down, up)
    assert seen == [16]
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-4)


def test_the_measured_table_beats_the_first_use():
    first_use.first_use(routes(), by(results()), CPU, seconds=timed(1.0, 3.0, 2.0))
    plans.store({"cpu": {wanted().key: {"plan": "once"}}})
    assert plans.choose(wanted()).plan == "once"
    assert plans.choose(wanted(gpu="another card")).plan == "split"


@pytest.mark.parametrize(
    "split, hybrid, blas, plan", [(1.0, 3.0, 2.0, "split"), (2.0, 3.0, 1.0, "blas"), (3.0, 2.0, 5.0, "hybrid")]
)
def test_the_first_use_keeps_the_fastest(split, hybrid, blas, plan):
    assert plans.undecided(wanted())
    chosen = first_use.first_use(routes(), by(results()), CPU, seconds=timed(split, hybrid, blas))
    choice = plans.choose(wanted())
    assert choice.plan == plan and not plans.undecided(wanted())
    assert chosen.plan == plan and not chosen.unchecked
    assert f"{blas / min(split, hybrid):.2f}x the speed of blas" in choice.reason


@pytest.mark.parametrize("fused", [results(1.5), results(float("nan")), lambda: [torch.ones(4, 5)]])
def test_a_plan_that_disagrees_is_dropped_with_one_warning(fused):
    with pytest.warns(UserWarning, match="'split' dropped for forward M16 N8 K8 R4 float32 on cpu: result 0"):
        chosen = first_use.first_use(routes(), by(fused, alone=True), CPU, seconds=timed(2.0, 1.0))
    assert chosen == dispatch.BLAS
    assert plans.choose(wanted()).plan == "blas"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plans.drop(wanted(), "split", "again")


def test_rounding_is_no_disagreement():
    exact = torch.randn(64, 64, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        eps = torch.finfo(dtype).eps
        near = (exact * (1 + eps / 2)).to(dtype)
        assert first_use.disagreement([near], [exact.to(dtype)]) is None
        assert first_use.disagreement([(exact * 1.5).to(dtype)], [exact.to(dtype)])
    assert first_use.disagreement([torch.empty(0, 3)], [torch.empty(0, 3)]) is None


def broken(x, *_, **__):
    with tl_utils.launching("a kernel", x):
        raise RuntimeError("out of resource: shared memory")


def test_a_kernel_that_fails_gives_way_with_the_same_numbers(monkeypatch):
    x, weight, down, up = layer()
    truth = lowrank_linear(x, weight, down, up)
    dtruth = torch.autograd.grad(truth.square().sum(), [x, down, up])
    monkeypatch.setattr(dispatch.kernels, "matmul_lowrank", broken)
    monkeypatch.setattr(dispatch.kernels, "project_outer", broken)
    with dispatch.backend("triton"):
        with pytest.warns(UserWarning, match="dropped for forward .* out of resource"):
            y = lowrank_linear(x, weight, down, up)
        with pytest.warns(UserWarning, match="dropped for backward"):
            grads = torch.autograd.grad(y.square().sum(), [x, down, up])
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # one warning each, not one a call
            again = lowrank_linear(x, weight, down, up)
        path, reason = dispatch.explain_path(CPU, torch.float32, 24, 20, 4)
    assert torch.equal(y, truth) and torch.equal(again, truth)
    assert all(torch.equal(a, b) for a, b in zip(grads, dtruth, strict=True))
    assert path in ("split", "blas") and reason


def test_strict_makes_a_fallback_an_error(monkeypatch):
    monkeypatch.setenv("FORGETLESS_PLAN", "split,strict")
    monkeypatch.setattr(dispatch.kernels, "matmul_lowrank", broken)
    with dispatch.backend("triton"), pytest.raises(RuntimeError, match="shared memory"):
        lowrank_linear(*layer())
    with pytest.raises(RuntimeError, match="disagrees with blas"):
        first_use.first_use(routes(), by(results(1.5)), CPU)


def test_running_out_of_memory_is_not_hidden(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(dispatch.kernels, "matmul_lowrank", full)
    with dispatch.backend("triton"), pytest.raises(torch.OutOfMemoryError):
        lowrank_linear(*layer())


@pytest.mark.parametrize("plan", table.PLANS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_every_plan_computes_the_layer(plan, p, monkeypatch):
    monkeypatch.setenv("FORGETLESS_PLAN", f"{plan},strict")
    tensors = layer()
    seed = draw_seed(CPU)
    found = []
    for backend in ("reference", "triton"):
        with dispatch.backend(backend):
            y = lowrank_linear(*tensors, scale=1.5, dropout=p, seed=seed)
            found.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    for ours, truth in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", table.PLANS)
def test_two_runs_give_the_same_bits(plan, monkeypatch):
    monkeypatch.setenv("FORGETLESS_PLAN", f"{plan},strict")
    tensors = layer(M=70, dtype=torch.bfloat16)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        with dispatch.backend("triton"):
            y = lowrank_linear(*tensors, dropout=0.2)
            runs.append([y, *torch.autograd.grad(y.float().square().sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 9, "gpus": {}}',
        '{"format": 1, "gpus": {"a": {"k": {"plan": "magic"}}}}',
        "\x00",
        TILED,
    ],
)
def test_a_broken_table_is_ignored_with_one_warning(text, tmp_path):
    (tmp_path / "plans.json").write_text(text)
    with pytest.warns(UserWarning, match="ignoring the tuning table"):
        assert plans.choose(wanted()).plan == "split"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plans.choose(wanted())


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    rows = {"cpu": {wanted().key: {"plan": "full"}}}
    plans.store(rows)

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        plans.store({"cpu": {wanted().key: {"plan": "once"}}})
    monkeypatch.undo()
    assert json.loads((tmp_path / "plans.json").read_text())["gpus"] == rows
    assert [path.name for path in tmp_path.iterdir()] == ["plans.json"]


# ------------------------------------------------------------------------------------- first use


def test_siblings_and_dropout_are_problems_of_their_own():
    like, down = torch.zeros(16, 8), torch.zeros(4, 8)
    keys = set()
    for ups in ([torch.zeros(8, 4)], [torch.zeros(8, 4), torch.zeros(6, 4)], [torch.zeros(8, 4), torch.zeros(6, 2)]):
        for dropout in (False, True):
            keys.add(dispatch.choose_route("forward", like, ups, down, dropout, dispatch.kernels).problem.key)
    texts = ("N8 K8 R4 float32", "N8+6 K8 R4 float32", "N8+6 K8 R4+2 float32")
    assert keys == {f"forward M16 {text}{end}" for text in texts for end in ("", " dropout")}


def test_little_memory_is_enough():
    """Beside results, which are of the layer's own size, only chunks of a fixed one."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and not t._is_view():
                    self.seen = max(self.seen, t.numel())
            return out

    a = torch.ones(5000, 1000, dtype=torch.bfloat16)
    with Largest() as largest:
        assert first_use.disagreement([a], [a]) is None
    assert 0 < largest.seen <= 2 * first_use.CHUNK


@pytest.mark.parametrize("where", [0, 4999])
@pytest.mark.parametrize("value, words", [(3.0, "differs"), (float("inf"), "NaN or Inf")])
def test_every_chunk_is_compared(where, value, words):
    a, b = torch.ones(5000, 1000), torch.ones(5000, 1000)
    a[where, 999] = value
    assert words in first_use.disagreement([a], [b])


def test_a_lack_of_memory_decides_nothing_and_is_not_tried_for_ever():
    calls = []

    def full(route):
        calls.append(route)
        raise torch.OutOfMemoryError("no memory")

    for index in range(first_use.TRIES):
        assert plans.undecided(wanted())
        assert first_use.first_use(routes(), full, CPU).plan == "split"
        assert len(calls) == index + 1
    assert not plans.undecided(wanted()) and not plans._failed
    assert plans.choose(wanted()) == plans.Choice("split", "not measured: no memory was left for it")


def test_a_job_chooses_once(monkeypatch):
    """The first measurement that is finished counts for all processes; a plan that is wrong here stays out."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(compat, "_store", lambda: store)
    assert first_use.first_use(routes(), by(results()), CPU, seconds=timed(2.0, 1.0, 3.0)).plan == "hybrid"
    plans.forget()  # another process, whose card says otherwise

    def never(runs, device):
        raise AssertionError("measured again")

    assert first_use.first_use(routes(), by(results()), CPU, seconds=never).plan == "hybrid"
    assert "another process of the job" in plans.choose(wanted()).reason
    plans.forget()
    wrong = [r for r in routes() if r.plan != "hybrid"]
    with pytest.warns(UserWarning, match="'hybrid' dropped"):
        route = first_use.first_use(routes(), lambda r: results(1.5 if r.plan == "hybrid" else 1.0)(), CPU, never)
    assert route.plan == "blas" and len(wrong) == 2
    plans.forget()
    late = compat.agree(first_use._name(wanted(M=32)), "blas")  # while this one measures
    monkeypatch.setattr(compat, "agreed", lambda key: None)
    of_32 = [dataclasses.replace(r, problem=wanted(M=32)) for r in routes()]
    assert first_use.first_use(of_32, by(results()), CPU, seconds=timed(1.0, 2.0, 3.0)).plan == late == "blas"


def test_two_processes_that_measure_at_once_choose_alike(tmp_path):
    """Their clocks disagree, and neither has finished when the other begins."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    support, root = Path(__file__).parents[1] / "support", Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(support / "one_choice.py")]
    started = [
        subprocess.Popen([*command, rank, str(tmp_path / "job")], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    for process in started:
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr[-2000:]


def test_calls_are_queued_on_a_card(monkeypatch):
    """As a step runs them: one wait for many calls."""
    events = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            events.append("mark")

        def synchronize(self):
            events.append("wait")

        def elapsed_time(self, other):
            return 8.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    times = first_use.time_queued([lambda: events.append("call")], torch.device("cuda"), rounds=1, warmup=0)
    assert events == ["mark", *["call"] * first_use.CALLS, "mark", "wait"]
    assert times == [8e-3 / first_use.CALLS]


# ------------------------------------------------------------------------------------------ tune


@pytest.fixture
def tune():
    return pytest.importorskip("forgetless.cli.tune")


def test_tune_measures_stores_and_resumes(tune, tmp_path, capsys):
    assert tune.main(["--toy", "--dtype", "float32"]) == 0
    rows = json.loads((tmp_path / "plans.json").read_text())["gpus"]["cpu"]
    assert set(rows) == {f"{sweep} M32 N48 K40 R4 float32" for sweep in ("forward", "backward")}
    for row in rows.values():
        assert set(row["ms"]) == set(table.PLANS) and row["plan"] == min(row["ms"], key=row["ms"].get)
    capsys.readouterr()
    assert tune.main(["--toy", "--dtype", "float32"]) == 0
    assert "2 problems, 2 measured before" in capsys.readouterr().out
    assert (
        "measured on this card" in plans.choose(plans.Problem("cpu", "forward", 32, ((48, 4),), 40, "float32")).reason
    )


def test_tune_leaves_out_a_candidate_that_is_wrong(tune, tmp_path, monkeypatch, capsys):
    plain = dispatch.kernels.linear_lowrank

    def wrong(*arguments, plan="split", **rest):
        y, h = plain(*arguments, **rest)
        return (y + (plan == "full"), h)

    monkeypatch.setattr(dispatch.kernels, "linear_lowrank", wrong)
    assert tune.main(["--toy", "--dtype", "float32"]) == 0
    row = json.loads((tmp_path / "plans.json").read_text())["gpus"]["cpu"]["forward M32 N48 K40 R4 float32"]
    assert "full" not in row["ms"] and "full: left out: result 0 differs" in capsys.readouterr().out


def test_tune_interrupted_keeps_what_it_has(tune, tmp_path, monkeypatch, capsys):
    plain, calls = tune.measure, []

    def interrupted(*arguments, **rest):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments, **rest)

    monkeypatch.setattr(tune, "measure", interrupted)
    assert tune.main(["--toy", "--dtype", "float32"]) == 130
    assert len(json.loads((tmp_path / "plans.json").read_text())["gpus"]["cpu"]) == 1
    assert tune.main(["--toy", "--dtype", "float32"]) == 0
    assert len(calls) == 3


@pytest.mark.parametrize("arguments", [["--shape", "4096"], ["--shape", "0x4"], ["--rank", "0"]])
def test_tune_refuses_nonsense(tune, arguments, capsys):
    assert tune.main(["--toy", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: --shape")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_without_a_gpu_says_so(tune, capsys):
    assert tune.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("dropout", [False, True])
def test_tune_measures_siblings(tune, dropout, tmp_path):
    arguments = ["--toy", "--dtype", "float32", "--shape", "24+8x40", *["--dropout"] * dropout]
    assert tune.main(arguments) == 0
    rows = json.loads((tmp_path / "plans.json").read_text())["gpus"]["cpu"]
    end = " dropout" * dropout
    assert set(rows) == {f"{sweep} M32 N24+8 K40 R4 float32{end}" for sweep in ("forward", "backward")}
    assert all(set(row["ms"]) == {"blas", "hybrid", "split"} for row in rows.values())


def test_a_tile_reaches_the_rows_that_the_card_has(monkeypatch):
    from forgetless_kernels import tiles

    def stages(arch):
        monkeypatch.setattr(tiles, "arch_of", lambda device: arch)
        with dispatch.tile_forced((("num_stages", 2),), CPU):
            forced = {name for name, _ in tiles.forced_tiles()}
            return forced, tiles.has_row("matmul_lowrank_descriptor", CPU)

    plain = {"matmul_lowrank", "matmul_lowrank_t"}
    assert stages(80) == (plain, False)
    assert stages(90) == (plain | {f"{name}_descriptor" for name in plain}, True)
