"""The measured section of docs/reliability.md, from bench/results/reliability-cpu.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .texts import markdown, where

Row = list[str]


def verdict(found: dict[str, Any], well: str) -> str:
    """``well`` where nothing failed, else what did."""
    return f"**{found['failed']} failed**: {'; '.join(found['failures'])}" if found["failed"] else well


def drawn(found: dict[str, Any], what: str) -> list[Row]:
    counts = list(found["examples"].values())
    passing, failing = (sum(row[kind] for row in counts) for kind in ("passing", "failing"))
    return [
        [
            f"examples drawn, {what}",
            f"{passing + failing:,} for {len(counts)} properties",
            verdict(found, "all hold"),
        ]
    ]


def properties(found: dict[str, Any]) -> list[Row]:
    return drawn(found, "BLAS and whole models")


def kernels(found: dict[str, Any]) -> list[Row]:
    return drawn(found, "Triton's kernels in its interpreter, any fallback an error")


def files(found: dict[str, Any]) -> list[Row]:
    values = found["values"]
    rows = []
    for name, rest in (
        ("bits flipped", "the others in JSON and harmless"),
        ("files cut short or lengthened", ""),
        ("numbers replaced", "the others allowed values"),
    ):
        tried, refused = values[name], values[f"{name}, refused"]
        said = "all refused" if tried == refused else f"{refused:,} refused, {rest}"
        rows.append([f"{name} in a saved adapter", f"{tried:,}", verdict(found, f"{said}; base model untouched")])
    counted = ("test_flipped_bits_anywhere", "test_files_cut_short_or_with_more_behind", "test_huge_and_odd_numbers")
    others = sum(count for name, count in found["tests"].items() if name not in counted)
    what = "hostile headers, tensors, names, JSON; pipes, links, full disks, watched for pickle: test cases"
    return [*rows, [what, str(others), verdict(found, "all pass")]]


def faults(found: dict[str, Any]) -> list[Row]:
    tests = found["tests"]
    kept = tests["test_blas_takes_over_with_one_warning_and_its_numbers"]
    rows = [
        ["faults put into a kernel's launcher", str(kept), "BLAS took over, one warning a pass, same numbers"],
        ["the same, with fallbacks forbidden", str(tests["test_strict_raises_whatever_failed"]), "that error, raised"],
    ]
    doctor = sum(n for name, n in tests.items() if name.endswith(("_is_found", "_are_found", "_is_a_failure")))
    if doctor:
        rows.append(["faults that `forgetless doctor` must find", str(doctor), "all found, with what to do"])
    return [[what, much, verdict(found, well)] for what, much, well in rows]


def steps(found: dict[str, Any]) -> list[Row]:
    values = found["values"]
    grown = f"{values['bytes more'] / 2**20:+.2f} MiB, {values['handles more']:+d} file handles"
    said = f"{grown}, {values['objects more']:+d} Python objects over the last three quarters"
    return [["adapted steps; now and then a save, a load, an evaluation", f"{values['steps']:,}", verdict(found, said)]]


def killed(command: str) -> Callable[[dict[str, Any]], list[Row]]:
    def rows(found: dict[str, Any]) -> list[Row]:
        what = f"`kill -9` of `forgetless {command}`"
        if found["failed"]:
            return [[what, "", verdict(found, "")]]
        much = f"{found['kills']} ({found['sighted']} right after a write) in {found['runs']} starts"
        said = (
            f"{found['finished']} runs brought to their end, each with the unkilled run's results, bit for bit; "
            f"{found['files_opened']:,} files opened, {found['unreadable']} unreadable"
        )
        return [[what, much, said]]

    return rows


def saves(found: dict[str, Any]) -> list[Row]:
    what = "`kill -9` of a process that saves two adapters over each other"
    if found["failed"]:
        return [[what, "", verdict(found, "")]]
    much = f"{found['kills']} ({found['between_two']} between two renames)"
    said = f"the old adapter ({found['first']}) or the new one ({found['second']}), whole, every time"
    return [[what, much, said]]


def versions(found: dict[str, Any]) -> list[Row]:
    rows = []
    for name in ("oldest", "newest"):
        if name not in found:
            continue
        row = found[name]
        packages = ", ".join(f"{package} {version}" for package, version in sorted(row["packages"].items()))
        much = f"{row['passed']:,} tests, {row['skipped']} skipped"
        rows.append([f"{name} packages: {packages}", much, verdict(row, "all pass")])
    return rows


def doctor(found: dict[str, Any]) -> list[Row]:
    much = f"{found['checks']} checks in {found['seconds']:.0f} s"
    return [["`forgetless doctor`", much, verdict(found, "all hold")]]


TITLES: dict[str, tuple[str, Callable[[dict[str, Any]], list[Row]]]] = {
    "properties": ("Properties", properties),
    "kernels": ("Properties of the kernels", kernels),
    "files": ("Files", files),
    "faults": ("Faults", faults),
    "kills-finetune": ("Kills of finetune", killed("finetune")),
    "kills-compare": ("Kills of compare", killed("compare")),
    "kills-save": ("Kills of fl.save", saves),
    "steps": ("Long runs", steps),
    "versions": ("Versions", versions),
    "doctor": ("Self-test", doctor),
}


def section(results: dict[str, Any]) -> str:
    """One table of everything, and where and when each part was counted."""
    found = results["sections"]
    rows = [row for name, (_, write) in TITLES.items() if name in found for row in write(found[name])]
    text = "\n" + markdown(["what was tried", "how much", "outcome"], rows) + "\n"
    places: dict[str, list[str]] = {}
    for name, (title, _) in TITLES.items():
        if name in found:
            places.setdefault(where(found[name]), []).append(title)
    for place, titles in places.items():
        text += f"- {', '.join(titles)}: {place}\n"
    missing = [title for name, (title, _) in TITLES.items() if name not in found]
    if missing:
        text += f"- Not counted yet: {', '.join(missing)}\n"
    return text + "\n"
