"""The leaderboard's command on a tiny model with made-up data: every figure, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import tiny_model, tiny_tokenizer, write_model

from forgetless.study.data import Collator
from forgetless_bench import leaderboard
from forgetless_bench.cli import main


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    made = {"model": write_model(folder / "model")}
    sums = [
        {"query": f"{a} plus {b}", "response": f"{a}+{b}. The answer is: {a + b}"} for a in range(4) for b in range(4)
    ]
    wiki = [{"text": f"abc {n} def " * 4} for n in range(70)]
    for name, rows in (("train", sums), ("test", sums[:3]), ("wiki", wiki)):
        made[name] = folder / f"{name}.jsonl"
        made[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def command(files: dict[str, Path], out: Path, *more: str) -> list[str]:
    words = [
        "leaderboard",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--steps",
        "2",
        "--rank",
        "2",
        "--max-length",
        "64",
    ]
    return [
        *words,
        *(word for name, path in files.items() for word in (f"--{name}", str(path))),
        "--out",
        str(out),
        *more,
    ]


def test_every_method_has_every_figure(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "leaderboard.json"
    assert main(command(files, out, "--method", "lora", "lora+retain=0.3", "clora:k=8")) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["metric"] for row in rows] == 3 * ["accuracy", "forgetting", "memory", "time"]
    assert len({row["provider"] for row in rows}) == 3
    values = {(row["provider"], row["metric"]): row["value"] for row in rows}
    assert all(0 <= values[p, "accuracy"] <= 1 and values[p, "time"] > 0 for p, _ in values)
    assert values["LoRA", "forgetting"] != 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is.The answer is: 16", "16"),
        ("The answer is: $1,234.50", "1234.50"),
        ("The answer is 3. No: the answer is -4.", "-4"),
        ("nothing", None),
    ],
)
def test_answers_are_numbers(text: str, number: str | None) -> None:
    assert leaderboard.parse_answer(text) == number


def test_the_loss_is_that_of_the_next_token() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    rows = leaderboard.tokens(["abcd", "xy"], tokenizer, 64)
    ids = [torch.tensor([row["input_ids"]]) for row in rows]
    single = [model(input_ids=row, labels=row).loss.item() for row in ids]
    counts = [row.shape[1] - 1 for row in ids]
    expected = sum(n * value for n, value in zip(counts, single, strict=True)) / sum(counts)
    assert leaderboard.nll(model, rows, Collator(tokenizer), 2).loss == pytest.approx(expected, rel=1e-4)


def test_a_right_answer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model()
    tokenizer = tiny_tokenizer()
    texts = iter(["The answer is: 3", "The answer is: 4"])
    monkeypatch.setattr(type(tokenizer), "batch_decode", lambda *_, **__: [next(texts)])
    test = [{"query": "1 plus 2", "response": "The answer is: 3"}] * 2
    assert leaderboard.accuracy(model, tokenizer, test, 1, 64) == 0.5


def test_bad_input_is_one_line(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": "a", "response": "b"}\n{"query": "a"}\n')
    for more, said in (
        (["--train", str(bad)], "bad.jsonl:2: wants the text response"),
        (["--wiki", str(tmp_path / "none")], "cannot read"),
        (["--method", "lore"], "unknown method 'lore'"),
        (["--method", "lora+kl"], "the leaderboard runs adapters"),
        (["--steps", "0"], "--steps is 0, wants 1 or more"),
    ):
        assert main(command(files, tmp_path / "out.json", *more)) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert not (tmp_path / "out.json").exists()
