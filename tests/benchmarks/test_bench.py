"""The benchmarks measure what they say: baselines equal the reference, statistics are right, every command runs."""

from __future__ import annotations

import contextlib
import gc
import json
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import forgetless as fl

pytest.importorskip("transformers")
from forgetless_bench import baselines, cases, cli, dispatch, gpu, harness, lowrank, models, pages, shapes, tables  # noqa: E402
from forgetless_bench.bytes import peak_bytes, peak_rss, saved_bytes  # noqa: E402

CPU = torch.device("cpu")
N, K, R, M, SCALE = 24, 16, 4, 7, 0.75
FILES = ("lowrank", "penalty", "step", "memory", "dispatch")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def layer(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[nn.Linear, Tensor, Tensor]:
    base = baselines.frozen_linear(N, K, bias, dtype, CPU)
    return base, *baselines.random_factors(base, R)


def gradients(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y and every gradient, the factors' under our names whoever's they are."""
    leaf = x.detach().requires_grad_(True)
    y = module(leaf)
    wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, [leaf, *wanted.values()], dy)
    found = {"y": y.detach(), "dx": grads[0]}
    for name, grad in zip(wanted, grads[1:], strict=True):
        found["dup" if "up" in name.split(".") or "lora_B" in name else "ddown"] = grad
    return found


def truth(base: nn.Linear, down: Tensor, up: Tensor, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_(True) for t in (x, down, up)]
    with fl.ops.backend("reference"):
        y = fl.ops.lowrank_linear(leaves[0], base.weight, *leaves[1:], base.bias, SCALE)
        grads = torch.autograd.grad(y, leaves, dy)
    return dict(zip(("y", "dx", "ddown", "dup"), (y.detach(), *grads), strict=True))


# -------------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("bias", [False, True])
def test_every_lora_provider_is_the_reference(bias):
    base, down, up = layer(bias=bias)
    x, dy = torch.randn(M, K, dtype=torch.float64), torch.randn(M, N, dtype=torch.float64)
    want = truth(base, down, up, x, dy)
    layers = baselines.lora_layers(base, down, up, SCALE, 0.0)
    layers["PEFT's formula"] = baselines.PeftFormula(base, down, up, SCALE)
    assert {"eager PyTorch", "Unsloth-style", "LoRAFusion-style", "forgetless"} <= set(layers)
    for name, module in layers.items():
        if name == "frozen":
            continue
        got = gradients(module, x, dy)
        assert got.keys() == want.keys(), name
        for key, value in got.items():
            torch.testing.assert_close(value, want[key], rtol=1e-10, atol=1e-12, msg=f"{name}: {key}")


def test_the_products_alone_are_the_reference_and_nothing_but_products():
    base, down, up = layer(bias=False)
    x, dy = torch.randn(M, K, dtype=torch.float64, requires_grad=True), torch.randn(M, N, dtype=torch.float64)
    want = truth(base, down, up, x, dy)
    made = baselines.Products(base, down, up, SCALE, x, dy)
    made.forward()
    y = made.y
    dx, ddown, dup = made.backward()
    for value, expected in zip((y, dx, ddown, dup * SCALE), want.values(), strict=True):
        assert value.grad_fn is None
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    calls: list[str] = []

    class Listed(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            calls.append(function.overloadpacket.__name__)
            return function(*args, **kwargs or {})

    with Listed():
        made.both()
    assert calls == ["mm", "mm", "addmm_", "mm", "mm", "mm", "addmm_", "t", "mm"]
    with pytest.raises(ValueError, match="base: has a bias"):
        baselines.Products(layer()[0], down, up, SCALE, x, dy)


@pytest.mark.parametrize("name", ["eager PyTorch", "LoRAFusion-style", "PEFT", "PEFT's formula"])
def test_dropout_of_the_baselines_is_the_formula(name):
    p = 0.4
    base, down, up = layer()
    layers = baselines.lora_layers(base, down, up, SCALE, p)
    layers["PEFT's formula"] = baselines.PeftFormula(base, down, up, SCALE, p).train()
    if name not in layers:
        pytest.skip("PEFT is not installed")
    x, dy = torch.randn(M, K, dtype=torch.float64), torch.randn(M, N, dtype=torch.float64)
    torch.manual_seed(3)
    mask = torch.native_dropout(torch.ones_like(x), p, True)[0]  # 0 or 1 / (1 - p)
    torch.manual_seed(3)
    got = gradients(layers[name], x, dy)
    leaves = [t.detach().requires_grad_(True) for t in (x, down, up)]
    y = base(leaves[0]) + SCALE * ((leaves[0] * mask) @ leaves[1].T) @ leaves[2].T
    want = dict(zip(("y", "dx", "ddown", "dup"), (y, *torch.autograd.grad(y, leaves, dy)), strict=True))
    assert 0 < (mask == 0).sum() < mask.numel()
    for key, value in got.items():
        torch.testing.assert_close(value, want[key].detach(), rtol=1e-10, atol=1e-12, msg=key)


def test_every_provider_computes_the_same_in_bfloat16():
    base, down, up = layer(torch.bfloat16)
    down, up = (t.bfloat16().float() for t in (down, up))  # the same numbers in every provider's dtype
    x, dy = torch.randn(M, K).bfloat16(), torch.randn(M, N).bfloat16()
    want = truth(base.double(), down.double(), up.double(), x.double(), dy.double())
    base.bfloat16()
    layers = baselines.lora_layers(base, down, up, SCALE, 0.0)
    errors = {}
    for name, module in layers.items():
        if name != "frozen":
            got = gradients(module, x, dy)
            errors[name] = {key: (got[key].double() - want[key]).abs().max().item() for key in want}
    for name, row in errors.items():
        for key, error in row.items():
            assert error <= 3 * errors["eager PyTorch"][key] + 1e-6, (name, key)


def test_the_authors_curlora_is_ours():
    base, _, _ = layer()
    found = baselines.curlora_layers(base, R)
    x, dy = torch.randn(M, K, dtype=torch.float64), torch.randn(M, N, dtype=torch.float64)
    ours, theirs = (gradients(found[name], x, dy) for name in ("forgetless", "authors' CURLoRA"))
    dense = base.weight + found["forgetless"].delta()
    torch.testing.assert_close(theirs["y"], x @ dense.T + base.bias)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key])


def test_the_authors_clora_loop_is_our_penalty():
    holder = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 40)).double()
    fl.adapt(holder, fl.CLoRA(4, k=9, weight=0.7), ["0", "1"])
    found = list(fl.adapters(holder).values())
    factors, bases = [], []
    for one in found:
        nn.init.normal_(one.adapter.up)
        (state,) = one.adapter.penalty_states()
        factors.append((one.adapter.down, one.adapter.up))
        bases.append((state.input.basis, state.output.basis))
    loop = baselines.CloraAuthors(factors, bases, weight=0.7)
    leaves = [t for pair in factors for t in pair]
    ours, theirs = fl.penalty(holder), loop()
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b)
    drawn = baselines.CloraAuthors.drawn(factors, 9, torch.float64)
    for v, _ in drawn.bases:
        torch.testing.assert_close(v.T @ v, torch.eye(9, dtype=torch.float64), atol=1e-6, rtol=0)
    assert drawn.bytes() == 8 * 9 * 2 * (40 + 24)


def test_the_yardstick_of_dispatch_is_the_reference():
    base, down, up = layer(torch.float32, bias=False)
    x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, N)
    leaves = [t.detach().requires_grad_(True) for t in (down, up)]
    y = dispatch.Bare.apply(x, base.weight, *leaves)
    with fl.ops.backend("reference"):
        want = fl.ops.lowrank_linear(x, base.weight, *leaves)
        torch.testing.assert_close(y, want)
        wanted = torch.autograd.grad(want, [x, *leaves], dy)
    for a, b in zip(torch.autograd.grad(y, [x, *leaves], dy), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_authors_curlora_of_a_whole_model_is_ours():
    base, name = models.smollm2(CPU, smoke=True)
    assert "toy" in name
    inputs, ids = models.batch(base, 1, 4)
    ours, theirs = models.ours(base, fl.CURLoRA(4)), models.authors_curlora(base)
    assert sum(isinstance(m, baselines.CurloraAuthors) for m in theirs.modules()) == 14
    with torch.no_grad():
        a, b = (model(inputs_embeds=inputs).logits for model in (ours, theirs))
    assert torch.equal(a, b)  # U = 0: both are the base model
    shared = {p.data_ptr() for p in base.parameters()}
    assert {p.data_ptr() for p in models.twin(base).parameters()} == shared


# ----------------------------------------------------------------------------------------- shapes


def test_flops_are_those_that_torch_counts():
    shape = shapes.SHAPES["tiny"]
    base, down, up = layer(torch.float32, bias=False)
    assert (shape.N, shape.K) == (N, K)
    module = baselines.Eager(base, down, up, 1.0)
    x = torch.randn(M, K, requires_grad=True)
    for kind, run in (("frozen", base), ("lora", module)):
        counts = shapes.work(shape, M, R, torch.float32, kind)
        with FlopCounterMode(display=False) as counter:
            y = run(x)
        assert counter.get_total_flops() == counts["forward"][0]
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == counts["backward"][0]
        assert counts["both"][0] == counts["forward"][0] + counts["backward"][0]


def test_what_does_not_fit_is_left_out_with_a_note(monkeypatch):
    monkeypatch.setattr(cases, "available_bytes", lambda device: 1 << 20)
    options = types.SimpleNamespace(
        shapes=["tiny", "llama3.up"],
        dtypes=["float32"],
        methods=["lora"],
        dropout=[0.0],
        tokens=[8],
        ranks=[4],
    )
    notes: list[str] = []
    found = cases.fitting(cases.grid(options), CPU, notes)
    assert [case.shape for case in found] == ["tiny"]
    assert len(notes) == 1 and "14336" in notes[0] and "left out" in notes[0]


# ---------------------------------------------------------------------------------------- harness


def test_summary():
    found = harness.summary([4.0, 1.000049, 2.0])
    assert found.pop("each") == [4.0, 1.0, 2.0]
    assert found == {"median": 2.0, "low": 1.000049, "spread": 2.0 - 1.000049, "rounds": 3}


def test_providers_take_turns_and_warm_up_is_not_counted():
    calls: list[str] = []
    runs = {"a": lambda: calls.append("a"), "b": [lambda: calls.append("b1"), lambda: calls.append("b2")]}
    found = harness.interleave(runs, 2, 1, lambda: calls.append("-"))
    turns = "".join(calls).split("-")
    assert not turns.pop(0) and all(sorted(turns[i : i + 2]) == ["a", "b1b2"] for i in (0, 2, 4))
    assert found["a"]["rounds"] == 2 and "parts" not in found["a"]
    assert len(found["b"]["parts"]) == 2
    assert gc.isenabled()


def test_every_round_has_an_order_of_its_own():
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abcd"}
    harness.interleave(runs, 20, 0)
    orders = {"".join(calls[i : i + 4]) for i in range(0, 80, 4)}
    assert len(orders) > 5 and all(sorted(order) == list("abcd") for order in orders)
    harness.interleave(runs, 20, 0)
    assert calls[:80] == calls[80:]


def test_a_time_budget_ends_a_comparison_but_not_before_three_rounds(monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(next(ticks)))
    found = harness.interleave({"a": lambda: None}, 9, 1, seconds=0.5)
    assert found["a"]["rounds"] == harness.FEWEST
    assert harness.interleave({"a": lambda: None}, 9, 1, seconds=1e9)["a"]["rounds"] == 9
    assert found["a"]["median"] == 1.0


def test_garbage_collection_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError):
        harness.interleave({"a": lambda: 1 // 0}, 1)
    assert gc.isenabled()


def test_cuda_times_are_those_between_events(monkeypatch):
    clock = iter([1.0, 4.0, 9.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def elapsed_time(self, other):
            return other.at - self.at  # milliseconds

    ranges = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: ranges.append(name) or contextlib.nullcontext())
    assert harness._cuda_times("ours", [lambda: None, lambda: None]) == [0.003, 0.005]
    assert ranges == ["ours"]


def test_saved_bytes_counts_each_storage_once_and_no_weights():
    x = torch.randn(10, 10, requires_grad=True)
    assert saved_bytes(lambda: (x * x).sum()) == 400
    linear = nn.Linear(10, 10)
    assert saved_bytes(lambda: linear(x), [linear]) == 400
    assert saved_bytes(lambda: linear(x)) == 800
    assert saved_bytes(lambda: x.exp().exp()) == 800  # each keeps its result


def test_counting_leaves_nothing_behind():
    x = torch.randn(10, requires_grad=True)
    kept = []

    def forward():
        kept.append(weakref.ref(y := x.exp()))
        return y.exp()

    assert saved_bytes(forward) == 80
    assert kept[0]() is None


def test_peak_bytes_is_exact():
    def run():
        a = torch.ones(1000)
        b = a + 1
        del a
        return b * 2

    assert peak_bytes(run, CPU) in range(8000, 8200)
    assert peak_bytes(run, CPU) == peak_bytes(run, CPU)


def test_peak_rss_sees_a_large_buffer():
    found = peak_rss(lambda: torch.ones(1 << 24))
    assert found is None or found > 0.9 * (1 << 26)


def test_shares_and_peaks():
    assert harness.share(1.5, 3.0, 1.0) == 0.25
    assert harness.share(1.5, 0.9, 1.0) is None
    # the machine gets slower from round to round: the share of every round is 1/4, that of the medians is not
    floor, slow = [1.0, 2.0, 10.0, 3.0, 30.0], [1, 1, 1, 4, 4]
    ours, theirs = ([f + s * part for f, s in zip(floor, slow, strict=True)] for part in (0.5, 2.0))
    found = harness.shares(*(harness.summary(times) for times in (ours, theirs, floor)))
    assert found == {"share": 0.25, "spread": 0.0, "rounds": 5, "of_medians": (5 - 3) / (11 - 3)}
    # a round in which theirs is below the floor says nothing; half of all and there is no share
    rows = [harness.summary(times) for times in ([1.5, 2.5, 2.0, 9.0], [3.0, 3.0, 4.0, 0.5], [1.0, 2.0, 1.0, 1.0])]
    found = harness.shares(*rows)
    assert found["rounds"] == 3 and found["share"] == pytest.approx(1 / 3)
    assert found["spread"] == pytest.approx(1 / 3 - 1 / 4)
    rows[1] = harness.summary([3.0, 1.0, 4.0, 0.5])
    assert harness.shares(*rows)["share"] is None
    found = harness.peaks(CPU, [torch.float32], smoke=True)
    assert set(found) == {"tflops_float32", "gbs_copy"} and min(found.values()) > 0


def test_files_name_no_folder_and_hold_no_nan(tmp_path):
    assert harness._public(["--smoke", "--out", "somewhere", "--out=x", "--rounds", "3"]) == [
        "--smoke",
        "--rounds",
        "3",
    ]
    path = tmp_path / "new" / "a.json"
    harness.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        harness.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    data = {"each": [1, -2.5e-05, 3.0], "words": ["[\n1,\n2\n]", "b"], "none": [], "deep": [[1, 2], {"a": [None, 1]}]}
    harness.write_json(path, data)
    text = path.read_text()
    assert json.loads(text) == data and '"each": [1, -2.5e-05, 3.0]' in text


# ------------------------------------------------------------------------------------ the commands


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Every benchmark through the command line, at tiny sizes."""
    folder = tmp_path_factory.mktemp("smoke")
    assert cli.main(["all", "--smoke", "--device", "cpu", "--out", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}-cpu.json" for name in FILES)
    return {name: json.loads((folder / f"{name}-cpu.json").read_text()) for name in FILES}


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sweep")
    assert cli.main(["lowrank", "--sweep", "--smoke", "--device", "cpu", "--out", str(folder)]) == 0
    (path,) = folder.iterdir()
    assert path.name == "sweep-cpu.json"
    return json.loads(path.read_text())


def test_results_say_what_ran_and_where(smoke):
    for name, data in smoke.items():
        assert data["benchmark"] == name and data["schema"] == harness.SCHEMA and data["smoke"] is True
        assert data["command"] == f"python -m bench {name} --smoke --device cpu"
        assert set(data["machine"]) >= {"processor", "cores", "threads", "gpu", "packages", "commit", "date"}
        assert isinstance(data["notes"], list)


def test_rows_of_layers(smoke):
    data = smoke["lowrank"]
    providers = {row["provider"] for row in data["rows"]}
    assert {
        "frozen",
        "forgetless",
        "eager PyTorch",
        "Unsloth-style",
        "LoRAFusion-style",
        "products alone",
        "authors' CURLoRA",
    } <= providers
    for row in data["rows"]:
        for phase in lowrank.PHASES:
            found = row[phase]
            assert set(found) >= {"median", "low", "spread", "rounds", "times_frozen", "times_peft", "overhead_share"}
            assert found["tflops"] > 0 and found["gbs"] > 0 and found["share_of_peak"] > 0
        assert row.get("peak_bytes", 0) > 0 or row["provider"] == "products alone"
    frozen = [row for row in data["rows"] if row["provider"] == "frozen"]
    assert all(row["both"]["times_frozen"] == 1.0 and row["saved_bytes"] == 0 for row in frozen)
    assert any("torch.compile" in note for note in data["notes"])
    summary = data["summary"]
    assert len(summary["curlora_speedup"]) == 1 and len(summary["overhead_share"]) == 2
    assert list(summary["floor_share"]) == ["tiny M=8 R=4 bfloat16 dropout 0"]
    assert summary["overhead_share_of_medians"].keys() == summary["overhead_share"].keys()
    rows = {row["provider"]: row["both"] for row in data["rows"] if row["method"] == "lora" and not row["dropout"]}
    rival = lowrank.rival("lora", list(rows))
    for name, both in rows.items():  # what is reported can be had from the rounds in the file
        found = harness.shares(both, rows[rival], rows["frozen"])
        assert (both["overhead_share"], both["overhead_share_spread"]) == (found["share"], found["spread"]), name


def test_the_sweeps_are_a_run_of_their_own(swept):
    assert swept["benchmark"] == "sweep" and swept["command"].startswith("python -m bench lowrank --sweep")
    found = [cases.rows_of(one, swept["rows"]) for one in swept["sweeps"]]
    assert [[(r["M"], r["R"]) for r in rows if r["provider"] == "forgetless"] for rows in found] == [
        [(8, 2), (8, 4)],
        [(8, 4), (4, 4)],
    ]
    assert {r["dropout"] for r in swept["rows"]} == {0.0} and {r["method"] for r in swept["rows"]} == {"lora"}
    options, notes = types.SimpleNamespace(smoke=False, tokens=[512], ranks=[16]), []
    ranks, tokens = cases.sweeps(options, CPU, notes)
    assert [case.R for case in cases.swept(ranks, ["float32"])] == list(shapes.RANKS)
    assert [(case.M, case.R) for case in cases.swept(tokens, ["float32"])] == [(M, 16) for M in (512, 1024, 2048, 4096)]
    assert len(notes) == 1 and "4096" in notes[0]
    many = cases.sweeps(options, torch.device("cuda"), notes)[1]
    assert many["values"] == list(shapes.TOKENS) and len(notes) == 1


def test_rows_of_the_others(smoke):
    penalty, step, memory, found = (smoke[name] for name in ("penalty", "step", "memory", "dispatch"))
    assert set(penalty["clora_speedup"]) == {"orthogonal", "shared", "hadamard"}
    assert penalty["seconds"]["training step, LoRA"]["share_of_step"] == 1.0
    assert {"Laplace", "SourceDeviation, diag", "OutputDeviation"} <= set(penalty["seconds"])
    assert step["seconds"]["frozen"]["times_frozen"] == 1.0
    assert {"forgetless, dropout 0.1", "forgetless CURLoRA", "authors' CURLoRA"} <= set(step["seconds"])
    assert set(step) >= {"model", "batch", "rounds", "seconds", "overhead_over_peft", "overhead_over_peft_of_medians"}
    for p, value in step["overhead_over_peft"].items():
        rows = [step["seconds"][name] for name in (f"forgetless, dropout {p}", f"PEFT, dropout {p}", "frozen")]
        assert value == harness.shares(*rows)["share"]
    assert memory["step"]["forgetless, dropout 0.1"]["saved_bytes"] > memory["step"]["frozen"]["saved_bytes"]
    assert found["seconds"][dispatch.BARE]["times_bare"] == 1.0


def test_curlora_saves_a_fraction_of_what_the_authors_save():
    case = cases.Case("smollm2.q", 64, 16, torch.bfloat16, 0.0, "curlora")
    made, base = lowrank.layers(case, CPU, compiled=False)
    saved = {name: saved_bytes(lambda one=one: one.module(one.x), [one.module, base]) for name, one in made.items()}
    assert saved["forgetless"] <= saved["authors' CURLoRA"] / 4


def test_a_provider_that_fails_is_a_note_and_not_the_end(monkeypatch):
    class Broken(baselines.Eager):
        def forward(self, x):
            raise RuntimeError("not today")

    monkeypatch.setattr(baselines, "UnslothStyle", Broken)
    case = cases.Case("tiny", 8, 4, torch.float32, 0.0, "lora")
    roofs = {"tflops_float32": 1.0, "gbs_copy": 1.0}
    rows, notes = lowrank.measure(case, CPU, roofs, 1, None, False)
    assert "Unsloth-style" not in {row["provider"] for row in rows}
    assert len(notes) == 1 and "not today" in notes[0]


def test_tables_and_plots_from_results(smoke, swept, tmp_path, monkeypatch, capsys):
    results, docs = tmp_path / "results", tmp_path / "docs"
    monkeypatch.setattr(tables, "RESULTS", results)
    monkeypatch.setattr(tables, "PAGE", docs / "benchmarks.md")
    monkeypatch.setattr(tables, "README", tmp_path / "README.md")
    monkeypatch.setattr(tables, "PAGES_TOO", {})
    tables.README.write_text(f"before\n{tables.BEGIN}old{tables.END}after\n")
    assert "Not measured yet" in tables.page() and "Nothing has been measured on a GPU" in tables.page()
    for name, data in smoke.items():
        harness.write_json(results / f"{name}-cpu.json", data)
    with pytest.raises(ValueError, match="smoke run"):
        tables.main([])
    for name, data in {**smoke, "sweep": swept}.items():
        harness.write_json(results / f"{name}-cpu.json", {**data, "smoke": False})
    from forgetless_bench import plots

    assert plots.main(["--results", str(results), "--out", str(docs / "images")]) == 0
    drawn = {path.name for path in (docs / "images").iterdir()}
    assert drawn == {
        "bench-lowrank-cpu-overhead.png",
        "bench-lowrank-cpu-roofline.png",
        "bench-sweep-cpu-sweep.png",
        "bench-memory-cpu-memory.png",
        "bench-step-cpu-step.png",
    }
    assert max(path.stat().st_size for path in (docs / "images").iterdir()) < 80_000
    assert tables.main(["--check"]) == 1
    assert tables.main([]) == 0
    assert tables.main(["--check"]) == 0
    page, readme = tables.PAGE.read_text(), tables.README.read_text()
    told = ("median over rounds", "| products alone |", "| provider | R=2 | R=4 |", "| provider | M=4 | M=8 |")
    for text in (
        "One training step",
        "Unsloth-style",
        "authors' CURLoRA",
        "Dispatch",
        *told,
        *(f"images/{n}" for n in drawn),
    ):
        assert text in page
    assert readme.startswith("before\n") and readme.endswith("after\n") and "One training step" in readme
    tables.PAGE.write_text(page.replace("forgetless", "x", 1))
    assert tables.main(["--check"]) == 1
    assert "benchmarks.md" in capsys.readouterr().err


def test_pages_say_where_the_products_alone_miss_the_goal():
    def row(case: str, provider: str, times: list[float]) -> dict[str, Any]:
        about = {"M": 8, "R": 4, "dtype": "float32", "dropout": 0.0, "method": "lora", "graph": False}
        shape = {"models": "a", "projection": "b", "N": 1, "K": 1}
        both = {**harness.summary(times), "tflops": 1.0, "gbs": 1.0, "share_of_peak": 1.0}
        return {"case": case, "provider": provider, "both": both, **about, **shape}

    rows = []
    drift = (0.0, 3.0, 9.0)  # of the machine, from round to round: more than anything that is measured
    for case, floor, theirs in (("met", 1.2, (2, 2, 2)), ("missed", 1.5, (2, 2, 2)), ("noise", 1.5, (1.1, 0.8, 1.3))):
        times = {"frozen": (1, 1, 1), "PEFT": theirs, "forgetless": (1.6,) * 3, "products alone": (floor,) * 3}
        group = [row(case, n, [t + d for t, d in zip(values, drift, strict=True)]) for n, values in times.items()]
        lowrank._ratios(group)
        rows += group
    results = {"rows": rows, "peaks": {"tflops_float32": 1.0, "gbs_copy": 1.0}, "summary": lowrank.summarise(rows)}
    page, readme = pages.lowrank_page(results), tables.rest_section({"lowrank": results})
    assert "1 of 2 cases here: missed M=8 R=4 float32 (0.50)." in page and "median over rounds" in page
    floor = (
        "| one layer, dropout 0: overhead of its matrix products alone / PEFT's | 0.20 to 0.50, median 0.50 (2 cases), "
    )
    assert floor + "1 left out: PEFT's overhead is within the spread; above 1/3 in 1 |" in readme
    for one in rows:  # as results were before shares were taken by rounds
        for key in {*lowrank.SHARES, "each"} - {"overhead_share"}:
            del one["both"][key]
    del results["summary"]["floor_share"]
    page = pages.lowrank_page(results)
    assert "The overhead is that of the medians." in page and "*products alone*" not in page


def test_the_page_is_that_of_the_committed_results():
    if not (Path(tables.ROOT) / "pyproject.toml").exists():
        pytest.skip("not a source checkout")
    assert tables.PAGE.read_text(encoding="utf-8") == tables.page()
    page = tables.PEFT.read_text(encoding="utf-8")
    assert page == tables.peft_page(page) and "Every test has the same outcome" in page


@pytest.mark.parametrize("arguments, code", [([], 0), (["--help"], 0), (["fast"], 2), (["lowrank", "--ranks", "x"], 2)])
def test_command_line(arguments, code, capsys):
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    assert ("usage" in out) == (code == 0) and bool(err) == (code == 2)


def test_it_is_a_command_of_forgetless(capsys):
    from forgetless.cli.main import main

    assert main(["bench", "--help"]) == 0
    assert "dispatch" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_gpu_run_says_what_is_missing(capsys):
    assert cli.main(["gpu"]) == 1
    out = capsys.readouterr().out
    assert "missing" in out and "lowrank-<gpu>.json" in out and "python -m bench gpu" in out


def test_the_gpu_run_in_rehearsal(capsys, monkeypatch):
    for bench in (gpu.penalty, gpu.step, gpu.memory):  # those have been run above
        monkeypatch.setattr(bench, "main", lambda arguments, name=bench.__name__: print(f"{name} {arguments}"))
    assert cli.main(["gpu", "--smoke"]) == 0
    out = capsys.readouterr().out
    assert "comparisons with float64: all within" in out and "tiny smoke" in out


def test_nothing_is_timed_after_a_wrong_result(monkeypatch):
    def wrong(*tensors: Any, **options: Any) -> Tensor:
        return 1.01 * right(*tensors, **options)

    right = fl.ops.lowrank_linear
    assert max(gpu.check(CPU).values()) <= 1.0
    monkeypatch.setattr(fl.ops, "lowrank_linear", wrong)
    with pytest.raises(RuntimeError, match="nothing was timed"):
        gpu.check(CPU)


def test_the_best_of_several_tries_counts():
    from forgetless_bench import test_ratios

    values = iter([3.0, 1.2, 1.0])
    assert test_ratios.best(lambda: next(values), 1.0) == 1.2
    assert test_ratios.best(iter([2.0, 1.9, 1.8]).__next__, 1.0) == 1.8
