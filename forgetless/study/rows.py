"""Rows of examples as people keep them: JSONL, JSON, CSV, Parquet and folders of the datasets package.

A row is one of: ``messages`` (chat, with ``tools`` if there are any); ``prompt`` and ``completion``, two strings or two
lists of messages; ``instruction``, ``input`` and ``output`` (Alpaca); ``conversations`` (ShareGPT); ``text``. Other
keys are passed over.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .texts import DataError, Example

#: What a row may be, by the keys that it must have.
KINDS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"), ("text",))
WANTED = '"messages", "prompt" and "completion", "instruction" and "output", "conversations", or "text"'
ROLES = ("system", "developer", "user", "assistant", "tool")
#: ShareGPT's names of the roles.
SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool", "chatgpt": "assistant"}


def read_rows(path: str | Path) -> list[Example]:
    """The examples of a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, or of a folder of the datasets package.

    Raises:
        DataError: the first fault: file, line or row, and what is wrong.
    """
    path = Path(path)
    reader: Callable[[Path], Iterator[tuple[str, Any]]] = _folder if path.is_dir() else READERS[path.suffix]
    examples = []
    for where, row in reader(path):
        try:
            examples.append(example_of(row))
        except DataError as error:
            raise DataError(f"{path}{where}: {error}") from None
    if not examples:
        raise DataError(f"{path}: the file is empty")
    return examples


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def decoded(path: Path) -> str:
    """The text of a UTF-8 file."""
    raw = read_bytes(path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise DataError(f"{path}:{line}: not UTF-8: byte {raw[error.start]:#04x} at column {column}") from None


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(decoded(path).split("\n"), start=1):
        if line.strip():
            yield f":{number}", _json(line, f"{path}:{number}")


def _json_file(path: Path) -> Iterator[tuple[str, Any]]:
    text = decoded(path)
    if not text.strip():
        return
    rows = _json(text, str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path}: wanted a list of rows, this is {_json_type(rows)}")
    yield from ((f", row {number}", row) for number, row in enumerate(rows, start=1))


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{where}: not JSON: {error.msg} at {line}column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    rows = csv.DictReader(io.StringIO(decoded(path), newline=""), strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise DataError(f"{path}:{rows.line_num}: the row has another number of fields than the header")
            yield f":{rows.line_num}", row
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: not CSV: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    read_bytes(path)  # says what is wrong with the file itself
    return _dataset(path, lambda datasets: datasets.Dataset.from_parquet(str(path)))


def _folder(path: Path) -> Iterator[tuple[str, Any]]:
    return _dataset(path, lambda datasets: datasets.load_from_disk(str(path)))


def _dataset(path: Path, load: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
    """The rows that the datasets package reads; of several splits the one named train."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{path}: needs the datasets package: pip install datasets") from None
    try:
        rows = load(datasets)
    except Exception as error:  # of pyarrow, of the file system, of the format
        raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    if isinstance(rows, dict):
        if "train" not in rows:
            raise DataError(f'{path}: wanted a split named "train", splits here: {", ".join(rows)}')
        rows = rows["train"]
    for number, row in enumerate(rows, start=1):
        yield f", row {number}", row


#: How to read a file, by its suffix.
READERS = {".jsonl": _jsonl, ".json": _json_file, ".csv": _csv, ".parquet": _parquet}


# Rows -----------------------------------------------------------------------------------------------


def example_of(row: Any) -> Example:
    """The example in one row.

    Raises:
        DataError: what is wrong with the row.
    """
    if not isinstance(row, dict):
        raise DataError(f"a row is an object, this is {_json_type(row)}")
    # datasets and CSV give every row every column: one that is empty is not there
    row = {key: value for key, value in row.items() if value is not None or len(row) == 1}
    kinds = [kind for kind in KINDS if any(key in row for key in kind)]
    if len(kinds) > 1:  # such as messages beside the prompt they begin with
        kinds = [kind for kind in kinds if all(key in row for key in kind)] or kinds[:1]
    if not kinds:
        raise DataError(f"wanted {WANTED}; keys here: {', '.join(map(repr, row)) or 'none'}")
    if len(kinds) > 1:
        both = " and ".join(f'"{kind[0]}"' for kind in kinds)
        raise DataError(f"a row is {WANTED}; this has {both}")
    kind = kinds[0]
    for key in kind:
        if key not in row:
            raise DataError(f'"{key}" is missing')
    tools = row.get("tools") or []
    if isinstance(tools, str):
        tools = _json(tools, '"tools"')
    if kind == ("messages",):
        return chat(messages_of(row["messages"], "messages"), tools)
    if kind == ("conversations",):
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        return chat(system + messages_of(row["conversations"], "conversations"), tools)
    if kind == ("prompt", "completion") and isinstance(row["prompt"], list):
        answer = row["completion"]
        answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        return chat(messages_of(row["prompt"], "prompt") + messages_of(answer, "completion"), tools)
    for key in kind:
        _check_text(row[key], key)
    last = row[kind[-1]]
    if not last.strip():
        raise DataError(f'"{kind[-1]}" is empty')
    if kind == ("text",):
        return Example("", last)
    first = row[kind[0]]
    if kind[0] == "instruction" and row.get("input"):
        _check_text(row["input"], "input")
        first = f"{first}\n\n{row['input']}"
    return Example(first, last)


def messages_of(value: Any, key: str) -> list[dict[str, Any]]:
    """Messages with "role" and "content", from those or from ShareGPT's "from" and "value"."""
    if not isinstance(value, list) or not value:
        raise DataError(f'"{key}" is {"empty" if value == [] else _json_type(value)}, wanted a list of messages')
    result = []
    for number, message in enumerate(value, start=1):
        where = f'message {number} of "{key}"'
        if not isinstance(message, dict):
            raise DataError(f"{where} is {_json_type(message)}, wanted an object")
        message = {name: part for name, part in message.items() if part is not None}
        role = message.pop("role", None) or message.pop("from", None)
        role = SHAREGPT.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise DataError(f"{where} has role {role!r}, wanted one of {', '.join(ROLES)}")
        content = message.pop("content", None)
        content = message.pop("value", None) if content is None else content
        if isinstance(content, list):
            content = "".join(_part(part, where) for part in content)
        if content is None and "tool_calls" in message:
            content = ""
        if content is None:
            raise DataError(f"{where} has no content")
        _check_text(content, where)
        result.append({"role": role, "content": content, **message})
    return result


def _part(part: Any, where: str) -> str:
    """The text of one part of a content that is a list."""
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise DataError(f"{where} has a part that is not text")
    return str(part["text"])


def chat(messages: list[dict[str, Any]], tools: Any) -> Example:
    """A conversation: what the assistant says is to be learnt, the rest is the prompt."""
    last = messages[-1]
    if last["role"] != "assistant":
        raise DataError(f'the last message is of "{last["role"]}", wanted "assistant", which is to be learnt')
    if len(messages) == 1:
        raise DataError("the conversation is one message: nothing goes before it")
    if not last["content"].strip() and not last.get("tool_calls"):
        raise DataError("the last message is empty")
    prompt = "\n\n".join(message["content"] for message in messages[:-1])
    completion = last["content"] or json.dumps(last["tool_calls"], ensure_ascii=False)
    return Example(prompt, completion, json.dumps({"messages": messages, "tools": tools or None}, ensure_ascii=False))


def _check_text(value: Any, key: str) -> None:
    title = key if " " in key else f'"{key}"'
    if not isinstance(value, str):
        raise DataError(f"{title} is {_json_type(value)}, wanted a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{title} holds half a surrogate pair, which is no character") from None


def _json_type(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value), "a number")


def passages(path: Path, cut: Callable[[str], Iterable[str]]) -> list[Example]:
    """A text file as the passages that ``cut`` makes of it."""
    text = decoded(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return [Example("", passage) for passage in cut(text)]
