"""Rows of examples in every format, and what is wrong with those that are wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forgetless.study.rows import example_of, read_rows
from forgetless.study.texts import DataError, Example


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(content: str | bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_rows_are_read(written) -> None:
    path = written(
        '\ufeff{"prompt": "p", "completion": " ü", "id": 3}\r\n\n{"text": "plain\\u2028text"}\n   \n'
        '{"prompt": "", "completion": "c"}'
    )
    assert read_rows(path) == [Example("p", " ü"), Example("", "plain\u2028text"), Example("", "c")]


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
        ("{}", '"instruction" and "output", "conversations", or "text"; keys here: none'),
        ('{"messages": []}', '"messages" is empty, wanted a list of messages'),
        ('{"messages": ["hello"]}', 'message 1 of "messages" is a string, wanted an object'),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "message 1 of \"messages\" has role 'bot', wanted one of"),
        ('{"messages": [{"role": "user"}]}', 'message 1 of "messages" has no content'),
        ('{"messages": [{"role": "user", "content": 3}]}', 'message 1 of "messages" is a number, wanted a string'),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "has a part that is not text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', 'the last message is of "user", wanted "assistant"'),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "one message: nothing goes before it"),
        (
            '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]}',
            "last message is empty",
        ),
        ('{"instruction": "a", "input": 3, "output": "b"}', '"input" is a number, wanted a string'),
        ('{"instruction": "a"}', '"output" is missing'),
        ('{"question": "a", "answer": "b"}', "keys here: 'question', 'answer'"),
        ('{"prompt": "a"}', '"completion" is missing'),
        ('{"completion": "a"}', '"prompt" is missing'),
        ('{"text": "a", "prompt": "b", "completion": "c"}', 'or "text"; this has "prompt" and "text"'),
        ('{"text": null}', '"text" is null, wanted a string'),
        ('{"text": 3.5}', '"text" is a number, wanted a string'),
        ('{"prompt": ["a"], "completion": "b"}', 'message 1 of "prompt" is a string, wanted an object'),
        ('{"prompt": 3, "completion": "b"}', '"prompt" is a number, wanted a string'),
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
        read_rows(path)


def test_a_file_without_rows_or_without_being_there_is_an_error(written, tmp_path: Path) -> None:
    for content in ("", "\n \n"):
        with pytest.raises(DataError, match="rows.jsonl: the file is empty"):
            read_rows(written(content))
    with pytest.raises(DataError, match="none.jsonl: no such file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="folder.json: needs the datasets package"):
        read_rows(tmp_path / "folder.json")


QUESTION = [{"role": "system", "content": "be short"}, {"role": "user", "content": "2 + 2?"}]
ANSWER = {"role": "assistant", "content": "4"}
TURNS = [*QUESTION, ANSWER]
SHARED = [{"from": "system", "value": "be short"}, {"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"messages": TURNS, "prompt": "2 + 2?"},
        {"conversations": SHARED},
        {"conversations": SHARED[1:], "system": "be short"},
        {"prompt": QUESTION, "completion": [ANSWER]},
        {"prompt": QUESTION, "completion": "4"},
        {"messages": [*QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "4"}]}]},
    ],
    ids=["messages", "beside", "sharegpt", "system", "lists", "string", "parts"],
)
def test_every_form_of_a_conversation_is_the_same(row: dict[str, Any]) -> None:
    example = example_of(row)
    assert (example.prompt, example.completion) == ("be short\n\n2 + 2?", "4")
    assert json.loads(example.chat) == {"messages": TURNS, "tools": None}


def test_tools_and_their_calls_are_kept() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    tools = [{"type": "function", "function": {"name": "add"}}]
    for given in (tools, json.dumps(tools)):
        data = json.loads(example_of({"messages": [*QUESTION, call], "tools": given}).chat)
        assert data["tools"] == tools
        assert data["messages"][-1] == {**call, "content": ""}


def test_alpaca_puts_the_input_below_the_instruction() -> None:
    assert example_of({"instruction": "add", "input": "2 2", "output": "4"}) == Example("add\n\n2 2", "4")
    assert example_of({"instruction": "add", "input": "", "output": "4"}) == Example("add", "4")


def test_json_and_csv_hold_the_same_rows(written) -> None:
    expected = [Example("a", 'b, "c"\nd'), Example("e", "f")]
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in expected]
    assert read_rows(written(json.dumps(rows), "rows.json")) == expected
    assert read_rows(written('prompt,completion\na,"b, ""c""\nd"\ne,f\n', "rows.csv")) == expected
    for name, text, reason in (
        ("rows.json", '{"text": "a"}', "wanted a list of rows, this is an object"),
        ("rows.json", '[{"text": "a"},\n3]', "row 2: a row is an object, this is a number"),
        ("rows.json", "[\n\n}", "not JSON: Expecting value at line 3, column 1"),
        ("rows.csv", "prompt,completion\na,b,c\n", "rows.csv:2: the row has another number of fields"),
        ("rows.csv", "prompt,completion\na\n", "rows.csv:2: the row has another number of fields"),
        ("rows.csv", 'text\n"a\n', "not CSV"),
    ):
        with pytest.raises(DataError, match=re.escape(reason)):
            read_rows(written(text, name))


def test_parquet_and_folders_need_the_datasets_package_or_are_read_by_it(written, tmp_path, monkeypatch) -> None:
    class Split(list):
        pass

    class Datasets:
        class Dataset:
            @staticmethod
            def from_parquet(path: str) -> Any:
                assert path.endswith("rows.parquet")
                return Split([{"text": "a", "prompt": None}, {"text": "b", "prompt": None}])

        @staticmethod
        def load_from_disk(path: str) -> Any:
            if path.endswith("broken"):
                raise FileNotFoundError("neither a Dataset nor a DatasetDict")
            return {"train": Split([{"messages": TURNS, "text": None}]), "test": Split()}

    path = written(b"PAR1", "rows.parquet")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match="needs the datasets package: pip install datasets"):
        read_rows(path)
    monkeypatch.setitem(__import__("sys").modules, "datasets", Datasets)
    assert read_rows(path) == [Example("", "a"), Example("", "b")]
    assert [example.completion for example in read_rows(tmp_path)] == ["4"]
    (tmp_path / "broken").mkdir()
    with pytest.raises(DataError, match="cannot be read: neither a Dataset"):
        read_rows(tmp_path / "broken")
