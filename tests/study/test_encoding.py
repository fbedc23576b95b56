"""Examples as token ids and labels: raw, through chat templates, and in windows."""

from __future__ import annotations

from typing import Any

import pytest
from byte_tokenizer import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from forgetless.study.encoding import CHAT, IGNORED, NONE, encode, encode_domain, template_for, windows
from forgetless.study.options import BadInput
from forgetless.study.rows import example_of
from forgetless.study.texts import DataError, Example


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


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


# Chat -------------------------------------------------------------------------------------------------

PLAIN = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}<e>{% endfor %}"
    "{% if tools %}(tools){% endif %}{% if add_generation_prompt %}[a]{% endif %}"
)
#: Leaves out what is between <t> and </t> of answers before the last message, as models that think do.
FORGETFUL = (
    "{% for m in messages %}[{{ m['role'][0] }}]"
    "{{ m['content'].split('</t>')[-1] if not loop.last else m['content'] }}<e>{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
#: Asks for an answer in another way than it writes one.
OTHERWISE = PLAIN.replace("[a]{% endif %}", "[answer]{% endif %}")


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def shown(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """The text, and the same with a dot for every token that is not learnt."""
    ids, labels = row["input_ids"], row["labels"]
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    learnt = "".join("." if label == IGNORED else tokenizer.decode([label]) for label in labels)
    return tokenizer.decode(ids), learnt


def talk(*contents: str, **more: Any) -> Example:
    roles = ("user", "assistant")
    return example_of({"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)], **more})


def test_what_the_assistant_says_is_learnt_with_the_end_of_its_turn() -> None:
    tokenizer = chat_tokenizer(PLAIN)
    text, learnt = shown(encode(talk("ab", "c", "d", "ef"), tokenizer, 64), tokenizer)
    assert text == "[u]ab<e>[a]c<e>[u]d<e>[a]ef<e>"
    assert learnt == "........" + "..." + "c<e>" + "......." + "..." + "ef<e>"
    row = encode(Example("ab", "c"), tokenizer, 64, CHAT)
    assert shown(row, tokenizer) == ("[u]ab<e>[a]c<e>", "..........." + "c<e>")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "ab"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(prompt)["input_ids"]
    assert row["input_ids"][: len(ids)] == ids  # what generation starts from
    assert "(tools)" in shown(encode(talk("a", "b", tools=[{"type": "function"}]), tokenizer, 64), tokenizer)[0]


def test_a_pair_goes_through_the_template_only_if_asked_and_nothing_does_with_none() -> None:
    tokenizer = chat_tokenizer(PLAIN)
    raw = "ab" + "c" + tokenizer.eos_token
    assert shown(encode(Example("ab", "c"), tokenizer, 64), tokenizer)[0] == raw
    assert shown(encode(talk("ab", "c"), tokenizer, 64, NONE), tokenizer)[0] == raw
    assert shown(encode(talk("ab", "c"), byte_tokenizer(), 64, CHAT), tokenizer)[0] == raw
    assert shown(encode(Example("", "abc"), tokenizer, 64, CHAT), tokenizer) == ("abc", "abc")


def test_earlier_answers_are_learnt_only_as_the_template_writes_them_later() -> None:
    tokenizer = chat_tokenizer(FORGETFUL)
    text, learnt = shown(encode(talk("a", "<t>x</t>b", "c", "<t>y</t>d"), tokenizer, 99), tokenizer)
    assert text.endswith("[a]<t>y</t>d<e>") and learnt.strip(".") == "<t>y</t>d<e>"
    tokenizer = chat_tokenizer(OTHERWISE)
    assert shown(encode(talk("a", "b"), tokenizer, 99), tokenizer) == ("[u]a<e>[answer]b</s>", "." * 15 + "b</s>")


def test_too_long_a_conversation_loses_its_beginning_then_the_end_of_the_last_answer() -> None:
    tokenizer = chat_tokenizer(PLAIN)
    whole = encode(talk("ab", "c", "d", "ef"), tokenizer, 99)
    for length in (6, 5, 9, 20):
        row = encode(talk("ab", "c", "d", "ef"), tokenizer, length)
        at = min(length - 1, 5)
        stop = len(whole["labels"]) - 5 + at
        assert row["labels"] == whole["labels"][stop - length : stop]
    assert shown(encode(talk("ab", "cdef"), tokenizer, 3), tokenizer) == ("]cd", ".cd")


def test_a_template_that_refuses_and_a_missing_one_are_named() -> None:
    tokenizer = chat_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="the chat template refuses a conversation: roles must alternate"):
        encode(talk("a", "b"), tokenizer, 9)
    assert template_for("auto", tokenizer) == template_for("chat", tokenizer) == CHAT
    assert template_for("auto", byte_tokenizer()) == template_for("none", tokenizer) == NONE
    with pytest.raises(BadInput, match="has no chat template"):
        template_for("chat", byte_tokenizer())
    with pytest.raises(BadInput, match="--template must be auto, chat or none, got 'x'"):
        template_for("x", tokenizer)
