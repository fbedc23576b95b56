"""A comparison for people: report.html, one file that opens from disk and fits a telephone."""

from __future__ import annotations

import base64
import re
from html import escape
from pathlib import Path
from typing import Any

from ..files import write_atomically
from . import recipes
from .metrics import names
from .page import capital, comparing, reading
from .palette import colour
from .plots import draw, draw_pareto, panels
from .results import by_label
from .tables import domains_table, further_tables, main_table, settings_table
from .verdict import drift_sentence, recommended, sizes, verdict

PICTURE, PARETO, PAGE = "compare.png", "pareto.png", "report.html"

STYLE = """
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 84rem; padding: 1.5rem 1rem 4rem; color: #222; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p, li { max-width: 48rem; } .about { color: #555; margin: .3rem 0 1.2rem; } .warn { color: #a30000; }
.verdict { border-left: 5px solid #0072B2; background: #f3f7fa; padding: .7rem 1rem; }
.verdict p { margin: .4rem 0; max-width: none; } .verdict p:first-child { font-size: 1.1rem; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: .35rem .45rem; text-align: right; border-bottom: 1px solid #e2e2e2; vertical-align: top; }
th { border-bottom: 2px solid #888; vertical-align: bottom; } td { white-space: nowrap; }
th:first-child, td:first-child, table.words td, table.words th { text-align: left; }
table.words td { white-space: normal; overflow-wrap: anywhere; min-width: 5rem; }
td.best { font-weight: 700; background: #e8f3ea; }
i { display: inline-block; width: .8em; height: .8em; margin-right: .5em; border-radius: 2px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: 0; } img { width: 100%; } figcaption { font-size: 14px; color: #555; }
code, pre { font: 13px/1.5 ui-monospace, monospace; } code { background: #f3f3f3; padding: .1em .3em; }
pre { background: #f3f3f3; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere; max-width: 60rem; }
summary { cursor: pointer; margin: .5rem 0; } .sample { border-top: 1px solid #e2e2e2; padding: .5rem 0; }
.sample pre { margin: .2rem 0; } .sample b { display: inline-block; min-width: 7rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; overflow-wrap: anywhere; }
dt { color: #555; } dd { margin: 0; min-width: 0; }
@media (max-width: 700px) {
  tr:first-child, td.none { display: none; }
  table, tr, td { display: block; }
  tr { border: 1px solid #ddd; border-radius: 4px; margin: .6rem 0; padding: .2rem .5rem; }
  td { border: 0; padding: .12rem .3rem; white-space: normal; }
  dl { display: block; } dd { margin-bottom: .4rem; }
  td:first-child { text-align: left; font-weight: 700; }
  td::before { content: attr(data-label); float: left; color: #555; font-weight: 400; padding-right: 1rem; }
  td::after { content: ""; display: block; clear: both; }
  table.words td::before { float: none; }
  td:first-child::before { content: none !important; }
}
"""


def html_text(text: str) -> str:
    """A paragraph with Markdown's bold and code, as HTML."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(text, quote=False), flags=re.S)
    return "<p>" + re.sub("`(.+?)`", r"<code>\1</code>", text) + "</p>"


def html_page(results: dict[str, Any]) -> str:
    """The whole report; it refers to no other file."""
    model, tables = results["model"], further_tables(results)
    title = f"What {escape(model['name'])} learned and forgot"
    body = "\n".join(
        filter(
            None,
            [
                f"<h1>{title}</h1>",
                f'<p class="about">{escape(about(results))}</p>',
                _unfinished(results),
                f'<div class="verdict">{"".join(map(html_text, verdict(results)))}</div>',
                "<h2>Every method</h2>",
                main_table(results).html(swatch=_swatch),
                html_text(reading(results)),
                _pictures(results),
                _samples(results),
                _settings(results),
                *(f"<h2>{escape(capital(name))}</h2>{table.html(swatch=_swatch)}" for name, table in tables),
                html_text(comparing(results)) if tables else "",
                html_text(text) if (text := drift_sentence(results)) else "",
                "<h2>Texts</h2>",
                domains_table(results).html(words=True),
                "<h2>Where and with what</h2>",
                _origin(results),
                "<p>The same run again:</p>",
                f"<pre>{escape(results['command'])}</pre>",
            ],
        )
    )
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{title}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def about(results: dict[str, Any]) -> str:
    """What was run, in a line."""
    options, tasks = results["options"], names(results)[0]
    count = len(by_label(results))
    return (
        f"{len(tasks)} task{'s one after the other' if len(tasks) > 1 else ''}, {options['steps']} steps each of "
        f"{options['batch_size']} examples; {count} method{'s' if count != 1 else ''}; {sizes(results)}"
    )


def _unfinished(results: dict[str, Any]) -> str:
    if results["complete"]:
        return ""
    label = results.get("unfinished", {}).get("label")
    during = f" during {escape(label)}" if label else ""
    return f'<p class="warn">This run was stopped{during}: rows are missing.</p>'


def _swatch(label: str) -> str:
    return colour(label.removesuffix(" (diverged)").removesuffix(" *"))


def _pictures(results: dict[str, Any]) -> str:
    figures = []
    for panel in panels(results):
        data = f"data:image/png;base64,{base64.b64encode(panel.png).decode()}"
        figures.append(
            f'<figure><img alt="{escape(panel.alt)}" src="{data}">'
            f"<figcaption>{escape(panel.caption)}</figcaption></figure>"
        )
    return f'<h2>In pictures</h2><div class="panels">{"".join(figures)}</div>' if figures else ""


def _samples(results: dict[str, Any]) -> str:
    """What the base and each method answer to a few held-out prompts; empty in results without samples."""
    asked = results["base"].get("samples", {})
    parts = []
    for name, samples in asked.items():
        for number, sample in enumerate(samples):
            answers = [("prompt", sample["prompt"]), ("expected", sample["expected"]), ("before", sample["answer"])]
            for label, rows in by_label(results).items():
                last = rows[0]["stages"][-1] if rows[0]["stages"] else {}
                if name in last.get("samples", {}):
                    answers.append((label, last["samples"][name][number]["answer"]))
            lines = "".join(f"<b>{escape(who)}</b><pre>{escape(text.strip())}</pre>" for who, text in answers)
            parts.append(f'<div class="sample">{escape(name)}<br>{lines}</div>')
    if not parts:
        return ""
    return (
        f"<h2>Answers before and after</h2><p>Held out, greedy decoding, at the end of all tasks.</p>{''.join(parts)}"
    )


def _settings(results: dict[str, Any]) -> str:
    """The settings of each method to paste; the recommended one is open."""
    best, parts = recommended(results), []
    for label, rows in by_label(results).items():
        code = recipes.python(rows[0], results["options"])
        line = recipes.command(rows[0], results["options"])
        texts = [code, *([line] if line else [])]
        parts.append(
            f"<details{' open' if label == best else ''}><summary>{escape(label)}</summary>"
            + "".join(f"<pre>{escape(text)}</pre>" for text in texts)
            + "</details>"
        )
    if not parts:
        return ""
    table = settings_table(results).html(words=True)
    return f"<h2>Settings</h2>{''.join(parts)}<details><summary>As a table</summary>{table}</details>"


def _origin(results: dict[str, Any]) -> str:
    """The model, the machine and the versions."""
    model, machine = results["model"], results["machine"]
    facts = {
        "model": f"{model['name']}, {model['parameters']:,} parameters, {model['dtype']}",
        "model source": f"{model['source']} (sha256 {model['sha256'] or 'not known'})",
        "machine": f"{machine['processor']}, {machine['cores']} cores, {machine['device']}",
        "threads": str(machine["threads"]),
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "commit": results["commit"] or "not in a git checkout",
        "run at": results["created"],
    }
    return "<dl>" + "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in facts.items()) + "</dl>"


def write_report(folder: Path, results: dict[str, Any]) -> list[Path]:
    """compare.png, pareto.png and report.html in ``folder``, from results alone."""
    pareto = draw_pareto(results)
    write_atomically(folder / PICTURE, draw(results))
    if pareto is not None:
        write_atomically(folder / PARETO, pareto)
    write_atomically(folder / PAGE, html_page(results))
    return [folder / name for name in (PICTURE, *([PARETO] if pareto else []), PAGE)]
