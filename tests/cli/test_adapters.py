"""What follows a ``forgetless finetune``: chat, merge and export."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from tiny_study import tiny_model, tiny_tokenizer, write_model, write_texts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import forgetless as fl
from forgetless.cli.main import main

#: Learns to answer in capitals what it is asked.
SIZES = ["--steps", "60", "--batch-size", "8", "--rank", "16", "--dtype", "float32", "--max-length", "32"]


@pytest.fixture(scope="module", params=["lora", "curlora"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a finetune."""
    folder = tmp_path_factory.mktemp("trained")
    texts = write_texts(folder)
    words = ["finetune", "--model", str(write_model(folder / "model")), "--data", str(texts["upper"])]
    words += ["--keep", str(texts["prose"]), "--out", str(folder / "out"), "--lr", "2e-2", "--method", request.param]
    assert main([*words, *SIZES]) == 0
    return folder / "out"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(20)[None] + 60).logits


def test_chat_gives_the_model_s_own_answers(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("red tree:\n\nmoon salt:\n"))
    assert main(["chat", str(trained), "--max-tokens", "8"]) == 0
    said = capsys.readouterr().out.splitlines()
    model, tokenizer = fl.load(tiny_model(), trained), tiny_tokenizer()
    for text, line in zip(("red tree:", "moon salt:"), said, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert line == tokenizer.decode(output, skip_special_tokens=True)


def test_a_conversation_goes_through_the_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = write_model(tmp_path / "model"), tiny_tokenizer()
    turn = "{{ m['role'][0] }}:{{ m['content'] }}\n"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}{{ 'a:' * add_generation_prompt }}"
    tokenizer.save_pretrained(model)
    asked: list[str] = []
    generate = type(tiny_model()).generate

    def spy(self: nn.Module, **options: Tensor) -> Tensor:
        asked.append(tokenizer.decode(options["input_ids"][0]))
        return generate(self, **options)

    monkeypatch.setattr(type(tiny_model()), "generate", spy)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert main(["chat", "--model", str(model), "--max-tokens", "2", "--dtype", "float32"]) == 0
    assert asked[0] == "u:one\na:" and asked[1].startswith("u:one\na:") and asked[1].endswith("\nu:two\na:")


def test_merge_writes_a_model_that_needs_nothing_of_ours(trained: Path, tmp_path: Path) -> None:
    assert main(["merge", str(trained), "--out", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected = logits(fl.load(tiny_model(), trained))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(tiny_model()), atol=1e-3)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]


def test_export_is_what_peft_loads(trained: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    assert main(["export", str(trained), "--out", str(tmp_path / "exported")]) == 0
    loaded = peft.PeftModel.from_pretrained(tiny_model(), str(tmp_path / "exported"))
    torch.testing.assert_close(logits(loaded), logits(fl.load(tiny_model(), trained)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chat"], "--model is missing: give it"),
        (["chat", "--model", "{model}", "--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        (["chat", "{empty}"], "has no finetune.yaml that does"),
        (["chat", "{empty}", "--model", "{model}"], "is {empty} a folder with a saved adapter?"),
        (["chat", "nowhere", "--model", "{model}"], "nowhere: no such folder"),
        (["merge", "{empty}", "--model", "{model}"], "--out"),
        (["merge", "{empty}", "--model", "{model}", "--out", "{empty}"], "exists already; give another"),
        (["export", "{empty}", "--model", "{model}", "--out", "{new}", "--dtype", "int8"], "--dtype must be one of"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"model": write_model(tmp_path / "model"), "empty": tmp_path / "empty", "new": tmp_path / "new"}
    places["empty"].mkdir()
    assert main([word.format(**places) for word in words]) == 2
    error = capsys.readouterr().err
    assert said.format(**places) in error and error.startswith("error: ") and error.count("\n") == 1
    assert not places["new"].exists()
