"""Frontiers: points per seed, readings between them, paired comparisons at equal learning, the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forgetless.cli.main import main
from forgetless.study import frontier
from forgetless.study.frontier import Point, against, at_share, combined, frontiers, reading, summary
from forgetless.study.options import BadInput

TASKS = ("one", "two")


def row(label: str, seed: int, learnt: float, kept: float, task: float, **more: Any) -> dict[str, Any]:
    return {
        "label": label,
        "seed": seed,
        "stopped": "finished",
        "learnt": {"one": learnt / 2, "two": learnt / 2},
        "forgotten": {"news": kept - 0.01, "code": kept + 0.01, "one": task},
        "forgotten_mean": kept,
        "settings": {"name": "lora", "rank": 4, "alpha": 8.0, "penalties": [], "lr": 1e-3, **more},
        "seconds": 60.0,
        "seconds_per_step": 1.0,
        "extra_forwards": 4 if more else 0,
        "stages": [],
    }


def results(tasks: tuple[str, str] = TASKS) -> dict[str, Any]:
    rows = []
    for seed, shift in ((0, 0.0), (1, 0.02), (2, -0.02)):
        rows.append(row("LoRA", seed, 2.0, 0.4 + shift, 1.0 + shift))
        rows.append(row("LoRA+scaled=0.8", seed, 1.9, 0.2 + shift, 0.5 + shift, scaled=0.8))
        rows.append(row("LoRA+scaled=0.6", seed, 1.7, 0.1 + shift, 0.2 + shift, scaled=0.6))
        rows.append(row("LoRA+retain=0.3", seed, 1.9, 0.05 + shift / 2, 0.06 + shift / 2, retain=0.3))
    domains = [{"name": t, "role": "task", "title": t} for t in tasks]
    domains += [{"name": t, "role": "kept", "title": t} for t in ("news", "code")]
    return {
        "kind": "forgetless.compare",
        "schema": 1,
        "domains": domains,
        "base": {"losses": {"news": 3.0, "code": 2.0, "one": 4.0, "two": 3.0}},
        "rows": rows,
        "complete": True,
        "model": {"name": "tiny", "parameters": 10},
        "options": {
            "steps": 3,
            "batch_size": 2,
            "dtype": "float32",
            "source": ["news"],
            "seeds": [0, 1, 2],
            "targets": "all-linear",
            "keep": [],
        },
        "machine": {"processor": "a CPU", "threads": 1, "device": "cpu"},
        "versions": {"torch": "2", "transformers": "5"},
        "command": "forgetless compare --out x",
        "commits": ["abcdef0123"],
    }


def test_a_reading_is_the_least_at_as_much_learning() -> None:
    points = [Point("a", 0.5, 0.0, 0.1), Point("b", 1.0, 0.2, 0.3), Point("c", 1.1, 0.1, 0.9)]
    assert reading(points, 1.0, "kept") == pytest.approx(0.0 + 0.1 * 0.5 / 0.6), "between a and c, below b"
    assert reading(points, 1.0, "task") == 0.3
    assert reading(points, 0.75, "task") == pytest.approx(0.2)
    assert reading(points, 0.4, "kept") == 0.0 and reading(points, 1.2, "kept") is None


def test_families_are_read_at_shares_of_loras_learning() -> None:
    table = at_share(frontiers(results()), 0.9)
    assert set(table) == {"lora", "lora+scaled", "lora+retain"}
    assert table["lora"]["kept"]["mean"] == pytest.approx(0.4) and table["lora"]["kept"]["n"] == 3
    assert table["lora+scaled"]["kept"]["mean"] == pytest.approx(0.15), "halfway between its two strengths"
    assert table["lora+retain"]["task"]["mean"] == pytest.approx(0.06)
    assert at_share(frontiers(results()), 0.98)["lora+retain"]["kept"] is None


def test_comparisons_are_paired_over_seeds() -> None:
    result = against(frontiers(results()), "lora+retain", "lora+scaled", 0.95, "kept")
    assert result is not None and result["seeds"] == 3
    assert result["difference"]["mean"] == pytest.approx(-0.15) and result["ratio"] == pytest.approx(0.25)
    assert result["difference"]["high"] < 0
    about = summary(results())["0.95"]
    assert about["free"] == {"kept": "lora+scaled", "task": "lora+scaled"}
    assert about["families"]["lora+retain"]["task"]["lora"]["ratio"] == pytest.approx(0.06)


def test_results_of_one_sequence_are_one() -> None:
    first, second, other = results(), results(), results(("one", "three"))
    second["command"] += " --seeds 4"
    other["base"]["losses"]["three"] = 1.0
    second["rows"] = [*second["rows"][:2], row("LoRA+kl=1", 0, 1.9, 0.1, 0.2, kl=1.0)]
    both = combined([first, second, other])
    assert [len(one["rows"]) for one in both] == [13, 12] and len(first["rows"]) == 12
    assert both[0]["lines"] == ["forgetless compare", "forgetless compare --seeds 4"]
    second["base"]["losses"]["news"] = 3.1
    with pytest.raises(BadInput, match="two comparisons of one, two start from different losses"):
        combined([first, second])
    without = results()
    without["rows"] = without["rows"][1:2]
    with pytest.raises(BadInput, match="wants rows of plain LoRA"):
        frontiers(without)


def test_the_page_says_what_to_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, page = tmp_path / "forgetting-a.json", tmp_path / "forgetting.md"
    data.write_text(json.dumps(results()))
    assert main(["frontier", str(data), "--markdown", str(page)]) == 0
    text = page.read_text()
    assert "ratio 0.25" in text and "Use LoRA + retain" in text and str(tmp_path) not in text
    assert "none is shown" not in text and "does as well" not in text

    level = results()
    level["rows"] += [row("LoRA+kl=1", seed, 2.0, 0.05, 0.2, kl=1.0) for seed in range(3)]
    for each in level["rows"]:
        if each["label"].startswith("LoRA+scaled") and each["seed"] == 0:
            each["forgotten"] = {name: 0.0 for name in each["forgotten"]}  # as well as ours, with one seed of three
    data.write_text(json.dumps(level))
    assert main(["frontier", str(data), "--markdown", str(page)]) == 0
    text = page.read_text()
    assert "none is shown with 3 seeds" in text and "LoRA + KL does as well on kept text" in text
    assert (tmp_path / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    assert main(["frontier", str(tmp_path / "none.json"), "--markdown", str(page)]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert frontier.SHARES == (0.9, 0.95, 0.98)
