"""The report: what it says first follows from the rows; what it explains is shown; what it prints can be pasted."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import forgetless as fl
from forgetless.cli.arguments import parser
from forgetless.study import palette, recipes
from forgetless.study.page import comparing, reading
from forgetless.study.plans import parse_method
from forgetless.study.plots import panels
from forgetless.study.report import html_page
from forgetless.study.results import by_label
from forgetless.study.tables import main_table
from forgetless.study.verdict import drift_sentence, recommended, verdict

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "compare-smollm2.json"
if not RESULTS.exists():
    pytest.skip("outside of a source checkout", allow_module_level=True)
OPTIONS = {"model": "smollm2", "targets": "all-linear", "batch_size": 6, "accumulate": 1}


@pytest.fixture
def results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def set_row(results: dict[str, Any], label: str, learned: float, forgotten: float, seed: int = 0) -> None:
    """Give one row these figures; another seed is a copy of the first."""
    row = next(r for r in results["rows"] if r["label"] == label)
    if row["seed"] != seed:
        row = json.loads(json.dumps(row)) | {"seed": seed}
        results["rows"].append(row)
    row["learnt"], row["forgotten_mean"] = dict.fromkeys(row["learnt"], learned / len(row["learnt"])), forgotten


# ------------------------------------------------------------------------------------------- the verdict


def test_the_method_that_forgot_least_is_named_if_it_learned_enough(results: dict[str, Any]) -> None:
    set_row(results, "LoRA", 2.0, 0.3)
    set_row(results, "CLoRA", 1.89, 0.01)  # forgot least, learned too little
    set_row(results, "CURLoRA", 1.91, 0.2)
    set_row(results, "LaLoRA", 2.2, 0.1)
    assert recommended(results) == "LaLoRA"
    assert verdict(results)[0].startswith("**Try LaLoRA first.**") and "one seed" in verdict(results)[0]
    set_row(results, "LaLoRA", 2.2, 0.31)
    assert recommended(results) == "CURLoRA"
    set_row(results, "CURLoRA", 1.91, 0.32)
    assert recommended(results) == "LoRA"


@pytest.mark.parametrize(
    "forgotten, said", [((0.1, 0.11, 0.12), "**Use LaLoRA.**"), ((0.1, 0.2, 0.4), "**No clear winner.**")]
)
def test_seeds_decide_whether_a_winner_is_named(
    results: dict[str, Any], forgotten: tuple[float, ...], said: str
) -> None:
    results["options"]["seeds"] = [0, 1, 2]
    for seed, value in enumerate(forgotten):
        for label, rises in (("LoRA", 0.3), ("LaLoRA", value), ("CLoRA", 0.5), ("CURLoRA", 0.6)):
            set_row(results, label, 2.0, rises, seed)
    assert verdict(results)[0].startswith(said)


def test_a_method_that_diverged_is_not_recommended(results: dict[str, Any]) -> None:
    best = recommended(results)
    next(r for r in results["rows"] if r["label"] == best)["stopped"] = "diverged"
    assert recommended(results) not in (best, None)
    for row in results["rows"]:
        row["stopped"] = "diverged"
    assert recommended(results) is None and verdict(results) == ["**No method has finished.**"]


def test_too_few_runs_have_no_correlation(results: dict[str, Any]) -> None:
    assert len(results["rows"]) == 4 and drift_sentence(results) == "" and "correlate" not in html_page(results)


# ---------------------------------------------------------------------------------------------- the page


def test_the_page_begins_with_the_verdict_and_fits_a_telephone(results: dict[str, Any]) -> None:
    page = html_page(results)
    assert '<meta name="viewport" content="width=device-width' in page
    assert page.index('class="verdict"') < page.index("<table") < page.index("<img")
    assert "@media (max-width: 700px)" in page
    assert page.count("data-label=") == page.count("<td"), "a narrow screen shows no head of a table"


def test_the_best_of_every_column_is_marked(results: dict[str, Any]) -> None:
    table = main_table(results)
    best = {table.columns[j]: table.rows[i][0] for i, j in sorted(table.best)}
    lowest = min(results["rows"], key=lambda row: row["forgotten_mean"])["label"]
    assert best["forgetting"] == lowest and best["news"] == "LaLoRA" and "drift" not in best and "trainable" not in best
    assert table.markdown().count("**") == 2 * len(table.best) == 2 * html_page(results).count('<td class="best"')
    results["rows"] = results["rows"][:1]
    assert not main_table(results).best, "one method is not the best of anything"


def test_only_what_is_shown_is_explained(results: dict[str, Any]) -> None:
    columns = " ".join(main_table(results).columns)
    words = re.findall(r"\*\*(.+?)\*\*", reading(results))
    assert {"learned", "at the end", "news", "python", "facts", "drift"} <= set(words)
    assert all(word in columns for word in words)
    assert "seed" not in reading(results), "no intervals with one seed"
    text = comparing(results)
    assert (
        "tuned" not in text
        and "consolidate" not in text
        and "equal learning" not in text.lower()
        and "Chaudhry" in text
    )
    assert [panel.caption for panel in panels(results) if "hollow" in panel.caption or "dotted" in panel.caption] == []
    del results["base"]["facts"]
    assert "facts" not in reading(results)


def test_answers_are_shown_where_the_results_have_them(results: dict[str, Any]) -> None:
    assert "Answers before and after" not in html_page(results)
    sample = {"prompt": "<Hund>", "expected": "dog", "answer": "cat"}
    results["base"]["samples"] = {"django-de": [sample]}
    for row in results["rows"]:
        row["stages"][-1]["samples"] = {"django-de": [{**sample, "answer": f"of {row['label']}"}]}
    page = html_page(results)
    assert "&lt;Hund&gt;" in page and all(f"of {row['label']}" in page for row in results["rows"])


# ------------------------------------------------------------------------------------------ the settings

SPECS = (
    "lora",
    "clora",
    "clora:k=512,basis=hadamard,weight=0.5",
    "curlora:rank=4",
    "lalora:weight=3e4,at_zero=balanced",
    "source",
    "lora+source=0.1+decay:source.covariance=full,rank=4",
    "clora+weight-deviation=2",
)


@pytest.mark.parametrize("text", SPECS)
def test_settings_can_be_pasted(text: str) -> None:
    """Python and the command line make the method of the row again, whatever their own defaults are."""
    plan = parse_method(text, lr=2e-3)
    row = {"label": plan.label, "settings": json.loads(json.dumps(plan.settings))}
    again = parse_method(recipes.spec(row["settings"]), lr=1.0)
    assert again.method == plan.method and again.lr == plan.lr
    assert eval(recipes.constructor(plan.method), {"fl": fl}) == plan.method  # noqa: S307
    line = recipes.command(row, OPTIONS)
    assert line is not None
    given = vars(parser({}, "0").parse_args(shlex.split(line)[1:]))
    assert given["batch_size"] == 6 and given["model"] == "smollm2"


def test_what_finetune_does_not_do_has_no_command(results: dict[str, Any]) -> None:
    for text in ("full", "full+replay=0.2", "source+consolidate", "lora+scaled=0.5+replay", "clora+self-replay+kl=2"):
        plan = parse_method(text, lr=2e-3)
        row = {"label": plan.label, "settings": plan.settings}
        again = parse_method(recipes.spec(plan.settings), lr=1.0)
        assert (again.method, again.lr, again.extras) == (plan.method, plan.lr, plan.extras)
        assert recipes.command(row, OPTIONS) is None
        assert text.startswith("full") or recipes.extras_of(plan.settings)[0].partition("=")[0] in recipes.python(
            row, OPTIONS
        )
    plan = parse_method("lora+retain=0.3+scaled=0.8", lr=2e-3)
    lines = recipes.python({"label": plan.label, "settings": plan.settings}, OPTIONS)
    assert "fl.retain(model, task_batches, 0.3)" in lines and "fl.consolidate(model, task_batches, scale=0.8)" in lines
    line = shlex.split(str(recipes.command({"label": plan.label, "settings": plan.settings}, OPTIONS)))
    again = parse_method(line[line.index("--method") + 1], lr=1.0)
    assert (again.method, again.lr, again.extras) == (plan.method, plan.lr, plan.extras)
    rows = by_label(results)
    assert all(recipes.command(rows[label][0], results["options"]) for label in rows)
    assert "fl.calibrate" in recipes.python(rows["LaLoRA"][0], OPTIONS)
    assert "fl.calibrate" not in recipes.python(rows["CLoRA"][0], OPTIONS)


# ------------------------------------------------------------------------------------------- the colours


def test_a_colour_belongs_to_a_name_and_not_to_an_order() -> None:
    names = ["LoRA", "CLoRA", "CURLoRA", "LaLoRA", "LoRA+source", "LoRA+decay", "full", "base", "CLoRA+source"]
    assert len({palette.colour(name) for name in names}) == len(names)
    assert palette.colour("CLoRA:k=8") == palette.colour("CLoRA @ 3") == palette.colour("clora")
    assert palette.colour("LoRA+source=0.1") == palette.colour("LoRA+source:covariance=full")
    assert palette.nth(["LoRA", "CLoRA", "CLoRA:k=8", "LoRA", "CLoRA:k=16"]) == {
        "LoRA": 0, "CLoRA": 0, "CLoRA:k=8": 1, "CLoRA:k=16": 2,
    }  # fmt: skip
