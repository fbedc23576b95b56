"""One low-rank layer, forward and backward, against every other way of computing it.

    python -m bench lowrank [--shapes smollm2.q llama3.q] [--dtypes bfloat16 float32] [--dropout 0 0.1]
    python -m bench lowrank --sweep

The frozen layer with the gradient of its input is the floor: an ideal adapter costs 1.00x of it. Backward is that of
the input and of the adapter. FLOPs and bytes are those the layer cannot do without, the same for all providers, so that
TFLOP/s and GB/s compare like with like; "of peak" is the time a machine at its measured peaks would need, over the time
taken. "overhead" is ours over the rival's, both above the floor: taken within every round, the median over the rounds.
"products alone" makes the layer's matrix products and nothing else. ``--sweep`` is a run of its own: ranks 8 to 128 and
512 to 16384 tokens (on a CPU to 4096) of one shape each, without dropout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import forgetless as fl

from . import baselines
from .bytes import peak_bytes, saved_bytes
from .cases import METHODS, Case, fitting, grid, sweeps, swept
from .harness import compiler_missing, finish, graphed, interleave, number, parser, peaks, shares, short, start, table
from .shapes import CPU, GPU, SHAPES, work

PHASES = ("forward", "backward", "both")
#: Keys of a row's phases -> those of harness.shares.
SHARES = {
    "overhead_share": "share",
    "overhead_share_spread": "spread",
    "overhead_share_rounds": "rounds",
    "overhead_share_of_medians": "of_medians",
}
PRODUCTS = "products alone"
SCALE = 2.0
COLUMNS = (
    "provider",
    "fwd ms",
    "bwd ms",
    "both ms",
    "+-",
    "x frozen",
    "x PEFT",
    "overhead",
    "peak MiB",
    "saved MiB",
    "TFLOP/s",
    "GB/s",
    "of peak",
)


class Layer:
    """One provider on one input; ``forward`` and ``backward`` are timed, what they leave behind is dropped.

    ``baselines.Products`` has the same three calls, and neither a module nor memory of its own to speak of.
    """

    def __init__(self, module: nn.Module, x: Tensor, dy: Tensor, around: Callable[[], Any] | None = None):
        self.module, self.x, self.dy = module, x.detach().requires_grad_(True), dy
        self.wanted = [self.x, *(p for p in module.parameters() if p.requires_grad)]
        self.around = around
        self.y: Tensor | None = None

    def forward(self) -> None:
        if self.around is None:
            self.y = self.module(self.x)
            return
        with self.around():
            self.y = self.module(self.x)

    def backward(self) -> tuple[Tensor, ...]:
        if self.around is None:
            grads = torch.autograd.grad(self.y, self.wanted, self.dy)
        else:
            with self.around():
                grads = torch.autograd.grad(self.y, self.wanted, self.dy)
        self.y = None
        return grads

    def both(self) -> tuple[Tensor, ...]:
        self.forward()
        return self.backward()


def plans(device: torch.device, case: Case) -> dict[str, str]:
    """Our other plans on this device: name of the row -> name of the backend."""
    shape = SHAPES[case.shape]
    if device.type != "cuda" or fl.ops.explain_path(device, case.dtype, shape.N, shape.K, case.R)[0] == "blas":
        return {}
    return {"forgetless, blas": "blas"}


def layers(case: Case, device: torch.device, compiled: bool) -> tuple[dict[str, Layer | baselines.Products], nn.Linear]:
    shape = SHAPES[case.shape]
    base = baselines.frozen_linear(shape.N, shape.K, False, case.dtype, device)
    x = torch.randn(case.M, shape.K, device=device).to(case.dtype)
    dy = torch.randn(case.M, shape.N, device=device).to(case.dtype)
    if case.method == "curlora":
        modules = baselines.curlora_layers(base, case.R)
    else:
        down, up = baselines.random_factors(base, case.R)
        modules = baselines.lora_layers(base, down, up, SCALE, case.dropout, compiled)
    made: dict[str, Layer | baselines.Products] = {name: Layer(module, x, dy) for name, module in modules.items()}
    for name, backend in plans(device, case).items():
        module = modules["forgetless"]
        made[name] = Layer(module, x, dy, lambda backend=backend: fl.ops.backend(backend))
    if case.method == "lora" and case.dropout == 0.0:
        made[PRODUCTS] = baselines.Products(base, down, up, SCALE, x, dy)
    return made, base


def measure(
    case: Case, device: torch.device, roofs: dict[str, float], rounds: int, seconds: float | None, compiled: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of one case, and what could not be run."""
    made, base = layers(case, device, compiled)
    notes: list[str] = []
    for name in list(made):
        try:
            made[name].both()
        except Exception as error:  # one peer's failure is a missing row, with its reason, not a missing table
            if name in ("frozen", "forgetless"):
                raise
            notes.append(f"{case.title()}: no {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            del made[name]
    runs: dict[str, Any] = {name: (layer.forward, layer.backward) for name, layer in made.items()}
    times = interleave(runs, rounds, 2, None, device, seconds)
    rows = []
    for name, layer in made.items():
        rows.append({"provider": name, "graph": False, **_phases(times[name])})
        if isinstance(layer, baselines.Products):
            continue
        if name != "torch.compile":
            rows[-1]["saved_bytes"] = saved_bytes(lambda layer=layer: layer.module(layer.x), [layer.module, base])
        rows[-1]["peak_bytes"] = peak_bytes(layer.both, device)
    if device.type == "cuda":
        rows += _graph_rows(case, made, rounds, seconds, device, notes)
    shape = SHAPES[case.shape]
    for row in rows:
        row.update(models=shape.models, projection=shape.projection, N=shape.N, K=shape.K, case=case.shape)
        row.update(M=case.M, R=case.R, dtype=short(case.dtype), dropout=case.dropout, method=case.method)
        kind = "frozen" if row["provider"] == "frozen" else case.method
        for phase, (flops, size) in work(shape, case.M, case.R, case.dtype, kind).items():
            if phase in row:
                _rates(row[phase], flops, size, roofs, short(case.dtype))
    _ratios(rows)
    return rows, notes


def _phases(times: dict[str, Any]) -> dict[str, Any]:
    whole = {key: value for key, value in times.items() if key != "parts"}
    return {"forward": times["parts"][0], "backward": times["parts"][1], "both": whole}


def _graph_rows(
    case: Case,
    made: dict[str, Layer | baselines.Products],
    rounds: int,
    seconds: float | None,
    device: torch.device,
    notes: list[str],
) -> list[dict[str, Any]]:
    """Forward and backward as one CUDA graph each: the same work without the host."""
    runs = {}
    for name, layer in made.items():
        try:
            runs[name] = graphed(layer.both)
        except Exception as error:  # a library that cannot be captured says so in its own words
            notes.append(f"{case.title()}: no graph of {name}: {str(error).splitlines()[0]}")
            torch.cuda.synchronize()
    times = interleave(runs, rounds, 2, None, device, seconds)
    return [{"provider": name, "graph": True, "both": found} for name, found in times.items()]


def _rates(phase: dict[str, Any], flops: float, size: float, roofs: dict[str, float], dtype: str) -> None:
    t = phase["median"]
    roof = max(flops / (roofs[f"tflops_{dtype}"] * 1e12), size / (roofs["gbs_copy"] * 1e9))
    phase.update(tflops=flops / t * 1e-12, gbs=size / t * 1e-9, share_of_peak=roof / t, intensity=flops / size)


def rival(method: str, providers: Sequence[str]) -> str | None:
    """Whom ``x PEFT`` and ``overhead`` refer to."""
    wanted = ("PEFT", "PEFT's formula") if method == "lora" else ("authors' CURLoRA",)
    return next((name for name in wanted if name in providers), None)


def _ratios(rows: list[dict[str, Any]]) -> None:
    for graph in (False, True):
        group = {row["provider"]: row for row in rows if row["graph"] == graph}
        other = rival(rows[0]["method"], list(group))
        for row in group.values():
            for phase in PHASES:
                if phase not in row:
                    continue
                mine, floor = row[phase], group["frozen"][phase]
                mine["times_frozen"] = mine["median"] / floor["median"]
                mine.update(dict.fromkeys(("times_peft", *SHARES)))
                if other is not None:
                    theirs = group[other][phase]
                    found = shares(mine, theirs, floor)
                    mine["times_peft"] = mine["median"] / theirs["median"]
                    mine.update({key: found[part] for key, part in SHARES.items()})


def overhead(phase: dict[str, Any]) -> str:
    """The share with its spread over the rounds; results from before it was taken by rounds have none."""
    spread = phase.get("overhead_share_spread")
    return number(phase["overhead_share"]) + (f" ±{number(spread)}" if spread else "")


def text_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    found = []
    for row in rows:
        both = row["both"]
        name = row["provider"] + (", graph" if row["graph"] else "")
        cells = [name]
        cells += [number(row[p]["median"] * 1e3, 3) if p in row else "-" for p in ("forward", "backward")]
        cells += [number(both["median"] * 1e3, 3), number(both["spread"] * 1e3, 3)]
        cells += [number(both[key]) for key in ("times_frozen", "times_peft")] + [overhead(both)]
        cells += [number(row[key] / 2**20) if key in row else "-" for key in ("peak_bytes", "saved_bytes")]
        cells += [number(both["tflops"], 3), number(both["gbs"], 1), number(both["share_of_peak"])]
        found.append(cells)
    return found


def main(arguments: list[str] | None = None, deadline: float | None = None) -> dict[str, Any]:
    """Run from the command line; ``deadline`` (``time.monotonic``) leaves the remaining cases out."""
    made = parser(__doc__, "lowrank", 9)
    cuda = torch.cuda.is_available()
    made.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=list(GPU if cuda else CPU))
    made.add_argument("--tokens", nargs="+", type=int, default=[8192] if cuda else [512])
    made.add_argument("--ranks", nargs="+", type=int, default=[16])
    made.add_argument("--dtypes", nargs="+", default=["bfloat16"] if cuda else ["bfloat16", "float32"])
    made.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    made.add_argument("--sweep", action="store_true", help="instead: a shape by rank, one by tokens; own file")
    made.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = made.parse_args(arguments)
    if options.smoke:
        options.shapes, options.tokens, options.ranks = ["tiny"], [8], [4]
        options.dtypes, options.rounds = options.dtypes[:1], 2
    device = torch.device(options.device)
    torch.manual_seed(0)
    result = start("lowrank", options, arguments)
    missing = "torch.compile: left out" if options.smoke or options.no_compile else compiler_missing(device)
    if missing:
        result["notes"].append(missing)
    if options.sweep:
        result["benchmark"], result["sweeps"] = "sweep", sweeps(options, device, result["notes"])
        chosen = [case for sweep in result["sweeps"] for case in swept(sweep, options.dtypes)]
    else:
        chosen = grid(options)
    chosen = fitting(chosen, device, result["notes"])
    dtypes = list(dict.fromkeys(case.dtype for case in chosen))
    result["peaks"] = peaks(device, dtypes, options.smoke)
    print("measured peaks: " + ", ".join(f"{key} {value:.3g}" for key, value in result["peaks"].items()))
    result["rows"] = []
    left = 0
    for case in chosen:
        if deadline is not None and time.monotonic() > deadline:
            left += 1
            continue
        rows, notes = measure(case, device, result["peaks"], options.rounds, options.seconds, not missing)
        result["rows"] += rows
        result["notes"] += notes
        columns = [c if case.method == "lora" else c.replace("PEFT", "authors'") for c in COLUMNS]
        print(f"\n{case.title()}\n" + table(columns, text_rows(rows)), flush=True)
        torch._dynamo.reset()
    if left:
        result["notes"].append(f"{left} cases left out: out of time")
    result["summary"] = summarise(result["rows"])
    return finish(result, options)


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By case: our share of the rival's overhead, and that of the products alone (LoRA); time and bytes against the
    authors' (CURLoRA)."""
    ours_by_case = ("overhead_share", "overhead_share_spread", "overhead_share_of_medians")
    found: dict[str, Any] = {key: {} for key in (*ours_by_case, "floor_share", "curlora_speedup", "curlora_saved")}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if not row["graph"]:
            key = tuple(row[k] for k in ("case", "M", "R", "dtype", "dropout", "method"))
            groups.setdefault(key, {})[row["provider"]] = row
    for (case, M, R, dtype, dropout, method), group in groups.items():
        name = f"{case} M={M} R={R} {dtype} dropout {dropout:g}"
        other = rival(method, list(group))
        if other is None:
            continue
        ours, theirs = group["forgetless"], group[other]
        if method == "lora":
            for key in ours_by_case:
                found[key][name] = ours["both"][key]
            if PRODUCTS in group:
                found["floor_share"][name] = group[PRODUCTS]["both"]["overhead_share"]
        else:
            found["curlora_speedup"][name] = theirs["both"]["median"] / ours["both"]["median"]
            found["curlora_saved"][name] = ours["saved_bytes"] / theirs["saved_bytes"]
    return found


if __name__ == "__main__":
    main()
