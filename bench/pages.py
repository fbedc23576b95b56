"""What docs/benchmarks.md says of each benchmark, from its JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .cases import rows_of
from .harness import middle_of, number
from .lowrank import text_rows
from .texts import GOAL, MIB, by_dropout, how_taken, markdown


def lowrank_page(results: dict[str, Any]) -> str:
    peaks = results["peaks"]
    roofs = ", ".join(f"{v:.3g} TFLOP/s {k.removeprefix('tflops_')}" for k, v in peaks.items() if k != "gbs_copy")
    text = (
        "Forward and backward of one layer, the gradient of its input included. *overhead*: (this − frozen) / "
        "(rival − frozen), the rival being PEFT with its defaults, or the authors' CURLoRA. TFLOP/s and GB/s count "
        "what the layer cannot do without, the same for every provider; *of peak* is the time at the machine's own "
        f"measured peaks ({roofs}; copies at {peaks['gbs_copy']:.3g} GB/s) over the time taken.\n"
    )
    text += f"\n{_how_overhead(results)}\n" + _floor(results)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        key = tuple(row[k] for k in ("models", "projection", "M", "N", "K", "R", "dtype", "dropout", "method"))
        groups.setdefault(key, []).append(row)
    columns = ["provider", "fwd ms", "bwd ms", "both ms", "±", "× frozen", "× rival", "overhead", "peak MiB"]
    columns += ["saved MiB", "TFLOP/s", "GB/s", "of peak"]
    for (models, projection, M, N, K, R, dtype, dropout, method), rows in groups.items():
        title = f"{models} {projection}, M={M} N={N} K={K} R={R}, {dtype}, {method}"
        title += f", dropout {dropout:g}" if method == "lora" else ""
        text += f"\n**{title}**\n\n" + markdown(columns, text_rows(rows))
    return text


def _how_overhead(results: dict[str, Any]) -> str:
    if not any("overhead_share_of_medians" in row["both"] for row in results["rows"]):
        return "The overhead is that of the medians."
    return (
        "The overhead is taken within every round, and is the median over rounds, ± the median absolute deviation; the "
        "JSON has that of the medians too. Rounds in which the rival was not slower than the frozen layer say nothing "
        "and are left out; - where they are half of all."
    )


def unresolved(rows: list[dict[str, Any]]) -> set[str]:
    """Cases of one layer, as the summary names them, where PEFT's overhead cannot be told from the spread."""
    both: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["method"] == "lora" and not row["graph"]:
            name = f"{row['case']} M={row['M']} R={row['R']} {row['dtype']} dropout {row['dropout']:g}"
            both.setdefault(name, {})[row["provider"]] = row["both"]
    return {name for name, group in both.items() if "PEFT" in group and _lost(group["PEFT"], group["frozen"])}


def _lost(theirs: dict[str, Any], floor: dict[str, Any]) -> bool:
    """Whether a difference is smaller than its spread over the rounds; of results without rounds, than the times'."""
    if "each" not in theirs:
        return theirs["median"] - floor["median"] < max(theirs["spread"], floor["spread"])
    middle, spread = middle_of([a - b for a, b in zip(theirs["each"], floor["each"], strict=True)])
    return middle < spread


def _floor(results: dict[str, Any]) -> str:
    """What the products alone say about the goal."""
    lost = unresolved(results["rows"])
    found = results["summary"].get("floor_share", {})
    shares = {name: s for name, s in found.items() if s is not None and name not in lost}
    if not shares:
        return ""
    over = [f"{name.removesuffix(' dropout 0')} ({number(s)})" for name, s in shares.items() if s > GOAL]
    return (
        "\n*products alone*: the eight matrix products of the layer's forward and backward by straight calls, in the "
        "layer's dtype, scale folded into a factor beforehand; no autograd (for which even the frozen layer pays), no "
        "module, no checks. Whoever makes these products on this BLAS takes as long, but for noise (a row that is "
        "faster here shows how much) and another order of them. So where their own overhead is above 1/3 of PEFT's, "
        "the goal of 1/3 is out of reach of BLAS calls there, by these figures: "
        f"{len(over)} of {len(shares)} cases here{': ' + '; '.join(over) if over else ''}. Cases in which PEFT's own "
        "overhead is within the spread are not counted.\n"
    )


def sweep_page(results: dict[str, Any]) -> str:
    text = (
        "One layer without dropout, forward and backward, by rank and by tokens: times the frozen layer, in brackets "
        "the overhead, taken as above.\n"
    )
    for sweep in results["sweeps"]:
        by, found = sweep["by"], rows_of(sweep, results["rows"])
        for dtype in dict.fromkeys(row["dtype"] for row in found):
            rows = [row for row in found if row["dtype"] == dtype]
            values = sorted({row[by] for row in rows})
            first = rows[0]
            fixed = f"R={first['R']}" if by == "M" else f"M={first['M']}"
            text += f"\n**{first['models']} {first['projection']}, {fixed} N={first['N']} K={first['K']}, {dtype}**\n\n"
            cells = {(row["provider"], row[by]): _point(row["both"]) for row in rows}
            frozen = {row[by]: f"{row['both']['median'] * 1e3:.3g} ms" for row in rows if row["provider"] == "frozen"}
            lines = [["frozen", *(frozen[value] for value in values)]]
            for name in dict.fromkeys(row["provider"] for row in rows if row["provider"] != "frozen"):
                lines.append([name, *(cells.get((name, value), "-") for value in values)])
            text += markdown(["provider", *(f"{by}={value}" for value in values)], lines)
    return text


def _point(both: dict[str, Any]) -> str:
    return f"{number(both['times_frozen'])} ({number(both['overhead_share'])})"


def step_page(results: dict[str, Any]) -> str:
    batch = "×".join(map(str, results["batch"]))
    rows = [
        [
            name,
            number(row["median"], 3),
            number(row["spread"], 3),
            number(row["times_frozen"]),
            number(row.get("tflops"), 3),
            number(row.get("share_of_peak")),
        ]
        for name, row in results["seconds"].items()
    ]
    text = f"{results['model']}, {batch} tokens, forward and backward. TFLOP/s of the frozen layers' own products.\n\n"
    text += markdown(["provider", "seconds", "±", "× frozen", "TFLOP/s", "of peak"], rows)
    return text + (
        f"\nOur overhead / PEFT's: {by_dropout(results)} ({how_taken(results)}).\n"
        if results["overhead_over_peft"]
        else ""
    )


def penalty_page(results: dict[str, Any]) -> str:
    rows = [
        [
            name,
            number(row["median"] * 1e3),
            number(row["spread"] * 1e3),
            f"{100 * row['share_of_step']:.1f} %",
            number(row.get("times_authors"), 1) if name.startswith("NullSpace") else "-",
            number(row["bytes_held"] / MIB, 1) if "bytes_held" in row else "-",
        ]
        for name, row in results["seconds"].items()
    ]
    columns = ["value and gradient", "ms", "±", "of a step", "× faster than the authors' loop", "held MiB"]
    return f"{results['model']}.\n\n" + markdown(columns, rows)


def memory_page(results: dict[str, Any]) -> str:
    def mib(value: int | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value / MIB:.{digits}f}"

    rows = [
        [name, *(mib(row[key]) for key in ("saved_bytes", "peak_bytes", "peak_rss"))]
        for name, row in results["step"].items()
    ]
    batch = "×".join(map(str, results["batch"]))
    text = (
        f"{results['model']}, {batch} tokens. Saved: distinct storages packed for the backward pass, weights left out. "
        "Peak: of torch's allocator, above what was held before the step; RSS: of a fresh process, likewise.\n\n"
    )
    text += markdown(["whole step", "saved MiB", "peak MiB", "peak RSS MiB"], rows) + "\n"
    rows = [
        [
            row["case"],
            f"{row['method']}, dropout {row['dropout']:g}",
            row["provider"],
            mib(row["saved_bytes"], 3),
            number(row["saved_over_rival"]),
            mib(row["peak_bytes"], 3),
        ]
        for row in results["layers"]
    ]
    return text + markdown(["layer", "method", "provider", "saved MiB", "/ rival's", "peak MiB"], rows)


def qlora_page(results: dict[str, Any]) -> str:
    rows = [
        [
            title,
            *(f"{row[key] / MIB:.1f}" for key in ("weight_bytes", "saved_bytes", "peak_bytes")),
            number(row["seconds_per_step"], 2),
            " ".join(number(loss) for loss in row["losses"]),
        ]
        for title, row in results["rows"].items()
    ]
    batch = "×".join(map(str, results["batch"]))
    return (
        f"{results['model']}, {batch} tokens of {results['task']} at most, AdamW. Weights: of the frozen linear "
        "layers, scales included. Saved: for the backward pass. Peak: of forward and backward, above what was held.\n\n"
    ) + markdown(["base", "weights MiB", "saved MiB", "peak MiB", "s/step", "loss of each step"], rows)


def dispatch_page(results: dict[str, Any]) -> str:
    rows = [
        [name, number(row["median"] * 1e6, 1), number(row["spread"] * 1e6, 1), number(row["times_bare"])]
        for name, row in results["seconds"].items()
    ]
    return "Forward and backward of one tiny layer, one thread.\n\n" + markdown(["provider", "µs", "±", "× bare"], rows)


PAGES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "step": ("One training step", step_page),
    "lowrank": ("One layer", lowrank_page),
    "sweep": ("One layer, by rank and by tokens", sweep_page),
    "penalty": ("Penalties", penalty_page),
    "memory": ("Memory", memory_page),
    "qlora": ("QLoRA", qlora_page),
    "dispatch": ("Dispatch", dispatch_page),
}
