"""Pictures of the committed results, into docs/images: ``python -m bench plots``, then ``python -m bench tables``."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from .cases import rows_of
from .harness import RESULTS
from .tables import PAGE
from .texts import MIB, read, where

#: Okabe and Ito's palette: told apart by colour-blind readers, and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F", "#F0E442")


def new(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finished(figure: Figure, axes: list[Any], results: dict[str, Any]) -> Figure:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(where(results), fontsize=7, color="#555555")
    return figure


def overhead(results: dict[str, Any]) -> Figure:
    """Bars: overhead over the frozen layer, by shape and provider; one panel per dtype and dropout."""
    rows = [r for r in results["rows"] if r["method"] == "lora" and not r["graph"] and r["provider"] != "frozen"]
    first = {r["case"]: (r["M"], r["R"]) for r in reversed(rows)}
    rows = [r for r in rows if (r["M"], r["R"]) == first[r["case"]]]  # the grid, not the sweeps
    panels = sorted({(r["dtype"], r["dropout"]) for r in rows})
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    figure = new(11, 2.6 * max(1, len(panels)))
    axes = list(figure.subplots(max(1, len(panels)), 1, squeeze=False)[:, 0])
    for axis, (dtype, dropout) in zip(axes, panels, strict=False):
        here = [r for r in rows if (r["dtype"], r["dropout"]) == (dtype, dropout)]
        cases = list(dict.fromkeys(r["case"] for r in here))
        width = 0.8 / len(providers)
        for i, provider in enumerate(providers):
            mine = {r["case"]: 100 * (r["both"]["times_frozen"] - 1) for r in here if r["provider"] == provider}
            where_ = [j + (i - (len(providers) - 1) / 2) * width for j, case in enumerate(cases) if case in mine]
            axis.bar(
                where_,
                [mine[case] for case in cases if case in mine],
                0.92 * width,
                color=COLOURS[i % len(COLOURS)],
                label=provider,
            )
        names = {r["case"]: f"{r['models'].split(',')[0]} {r['projection']}\n{r['N']}×{r['K']}" for r in here}
        axis.set_xticks(range(len(cases)), [names[case] for case in cases], fontsize=8)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_ylabel("% over frozen")
        axis.set_title(f"{dtype}, dropout {dropout:g}", fontsize=10)
    if rows:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, ncols=4, loc="outside upper center", fontsize=8)
    return finished(figure, axes, results)


def roofline(results: dict[str, Any]) -> Figure:
    """Scatter: TFLOP/s against FLOPs per byte, under the machine's measured roofs."""
    peaks = results["peaks"]
    rows = [r for r in results["rows"] if not r["graph"] and r["method"] == "lora"]
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    dtypes = [k.removeprefix("tflops_") for k in peaks if k != "gbs_copy"]
    figure = new(6.4 * max(1, len(dtypes)), 4.4)
    axes = list(figure.subplots(1, max(1, len(dtypes)), squeeze=False)[0])
    for axis, dtype in zip(axes, dtypes, strict=False):
        here = [r for r in rows if r["dtype"] == dtype]
        for i, provider in enumerate(providers):
            points = [(r["both"]["intensity"], r["both"]["tflops"]) for r in here if r["provider"] == provider]
            if points:
                axis.scatter(*zip(*points, strict=True), s=16, color=COLOURS[i % len(COLOURS)], label=provider)
        top, slope = peaks[f"tflops_{dtype}"], peaks["gbs_copy"] * 1e-3
        knee = top / slope
        right = max([knee, *(r["both"]["intensity"] for r in here)]) * 2
        axis.plot([knee / 100, knee, right], [top / 100, top, top], color="black", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte needed", ylabel="TFLOP/s", title=dtype)
    if rows:
        axes[0].legend(frameon=False, fontsize=7)
    return finished(figure, axes, results)


def memory(results: dict[str, Any]) -> Figure:
    """Bars: what a whole step keeps for its backward pass, and its peak."""
    names = list(results["step"])
    figure = new(9, 0.4 * len(names) + 1.2)
    axis = figure.subplots()
    for i, (key, label) in enumerate((("saved_bytes", "saved for backward"), ("peak_bytes", "allocator's peak"))):
        values = [results["step"][name][key] / MIB for name in names]
        axis.barh([j + (i - 0.5) * 0.38 for j in range(len(names))], values, 0.36, color=COLOURS[i], label=label)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("MiB")
    axis.legend(frameon=False, fontsize=8)
    return finished(figure, [axis], results)


def step(results: dict[str, Any]) -> Figure:
    """Bars: one training step over the frozen model."""
    names = [name for name in results["seconds"] if name != "frozen"]
    floor = results["seconds"]["frozen"]["median"]
    figure = new(9, 0.3 * len(names) + 1.2)
    axis = figure.subplots()
    values = [100 * (results["seconds"][name]["times_frozen"] - 1) for name in names]
    errors = [100 * results["seconds"][name]["spread"] / floor for name in names]
    colours = [COLOURS[0] if name.startswith("forgetless") else COLOURS[1] for name in names]
    axis.barh(range(len(names)), values, 0.7, xerr=errors, color=colours)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("% over the frozen model's step")
    return finished(figure, [axis], results)


def sweep(results: dict[str, Any]) -> Figure:
    """Lines: times the frozen layer, by rank and by tokens; a row of panels per dtype, a line per provider."""
    names = {"R": "rank", "M": "tokens"}
    rows = [r for r in results["rows"] if not r["graph"] and r["provider"] != "frozen"]
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows)) or [""]
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    sweeps = results["sweeps"]
    figure = new(9, 2.9 * len(dtypes) + 0.4)
    axes = figure.subplots(len(dtypes), len(sweeps), squeeze=False)
    for i, dtype in enumerate(dtypes):
        for axis, one in zip(axes[i], sweeps, strict=True):
            here = [r for r in rows_of(one, rows) if r["dtype"] == dtype]
            for j, provider in enumerate(providers):
                points = sorted((r[one["by"]], r["both"]["times_frozen"]) for r in here if r["provider"] == provider)
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=COLOURS[j], label=provider)
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set_xscale("log", base=2)
            axis.set_xticks(one["values"], [str(value) for value in one["values"]], fontsize=8)
            axis.set_ylabel("× frozen")
            shape = f"{here[0]['models'].split(',')[0]} {here[0]['projection']}, " if here else ""
            axis.set_title(f"by {names[one['by']]}: {shape}{dtype}", fontsize=9)
    if rows:
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, ncols=4, loc="outside upper center", fontsize=8)
    return finished(figure, list(axes.flat), results)


PLOTS = {"lowrank": (overhead, roofline), "sweep": (sweep,), "memory": (memory,), "step": (step,)}


def save(figure: Figure, target: Path) -> None:
    """A small PNG: lines and bars need no more than 64 colours."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(64).save(target, optimize=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="forgetless bench plots", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=PAGE.parent / "images")
    options = parser.parse_args(arguments)
    written = []
    for bench, draws in PLOTS.items():
        for path in sorted(options.results.glob(f"{bench}-*.json")):
            for draw in draws:
                target = options.out / f"bench-{path.stem}-{draw.__name__}.png"
                save(draw(read(path)), target)
                written.append(target.name)
    print(f"written: {', '.join(written) or 'nothing: there are no results yet'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
