"""Examples as token ids and labels: through the tokenizer's chat template or as they are, and plain text as windows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .options import BadInput
from .texts import DataError, Example

IGNORED = -100  # the label of a position that no loss is taken on
Encoded = list[dict[str, list[int]]]

#: What goes through the chat template: prompts and completions as well as conversations; conversations; nothing.
CHAT, MESSAGES, NONE = "chat", "messages", "none"


def template_for(asked: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What ``--template`` means for this tokenizer: "auto" is chat where it has a template.

    Raises:
        BadInput: another word, or the tokenizer has no template.
    """
    if asked not in ("auto", CHAT, NONE):
        raise BadInput(f"--template must be auto, {CHAT} or {NONE}, got {asked!r}")
    has = bool(tokenizer.chat_template)
    if asked == CHAT and not has:
        raise BadInput(f"--template {CHAT}: the tokenizer of this model has no chat template")
    return CHAT if asked != NONE and has else NONE


def encode(
    example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int, template: str = MESSAGES
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one example, at most `max_length` tokens; labels are IGNORED on the prompt.

    Prompt and completion are tokenised apart, so the border between them is exact. The completion ends as the chat
    template ends a turn, or with the end-of-sequence token where the tokenizer has one. Of a conversation all that the
    assistant says is learnt. Too long an example loses the beginning of its prompt first, then the end of its
    completion. Plain text is cut at `max_length` (see `windows`).
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}, wanted 2 or more")
    if example.prompt and tokenizer.chat_template and template != NONE and (template == CHAT or example.chat):
        parts = [(text_tokens(text, tokenizer), learnt) for text, learnt in turns(example, tokenizer)]
        ids = [token for tokens, _ in parts for token in tokens]
        labels = [token if learnt else IGNORED for tokens, learnt in parts for token in tokens]
        answer = min(len(parts[-1][0]), max_length - 1)  # the last answer, or its beginning
        stop = len(ids) - len(parts[-1][0]) + answer
        return {"input_ids": ids[max(0, stop - max_length) : stop], "labels": labels[max(0, stop - max_length) : stop]}
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


def turns(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The conversation as the chat template writes it, in pieces, and whether each is learnt; the last one is.

    An earlier answer is learnt where the template writes it as it was when it was given; some templates leave out
    what was thought before it. The piece before an answer ends with the template's generation prompt.

    Raises:
        DataError: the template refuses the conversation.
    """
    if example.chat:
        data = json.loads(example.chat)
    else:
        pair = {"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}
        data = {"messages": list(pair), "tools": None}
    messages, last = data["messages"], len(data["messages"]) - 1

    def written(count: int, generate: bool) -> str:
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generate}
        try:
            return str(tokenizer.apply_chat_template(messages[:count], tools=data["tools"], **options))
        except Exception as error:  # whatever the template raises, in Jinja or in Python
            raise DataError(f"the chat template refuses a conversation: {' '.join(str(error).split())}") from None

    whole, at, pieces = written(last + 1, False), 0, []
    for index in [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]:
        before, after = written(index, True), whole if index == last else written(index + 1, False)
        if whole.startswith(before) and whole.startswith(after) and at <= len(before) < len(after):
            pieces += [(whole[at : len(before)], False), (whole[len(before) : len(after)], True)]
            at = len(after)
        elif index == last:  # the template writes an answer in another way than it asks for one
            return [(before, False), (messages[last]["content"] + (tokenizer.eos_token or ""), True)]
    return pieces


def windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Encoded:
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
        cut.append({"input_ids": before[-1:] + ids[at : at + step], "labels": [IGNORED] + ids[at : at + step]})
    return cut


def encode_domain(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, template: str = MESSAGES
) -> Encoded:
    """Every example encoded; plain texts become as many windows of `max_length` tokens as they need."""
    rows: Encoded = []
    for example in examples:
        if example.prompt:
            rows.append(encode(example, tokenizer, max_length, template))
        else:
            rows += windows(example.completion, tokenizer, max_length)
    return rows


def encode_for_training(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, template: str = MESSAGES
) -> Encoded:
    """Encoded examples that have something to learn within ``max_length`` tokens; refuses an empty rest."""
    encoded = encode_domain(examples, tokenizer, max_length, template)
    encoded = [e for e in encoded if any(label != -100 for label in e["labels"][1:])]
    if not encoded:
        raise BadInput(f"no example has anything to learn within {max_length} tokens")
    return encoded


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[the beginning-of-sequence token] where this tokenizer puts one before a text, else []."""
    ids = tokenizer("")["input_ids"]
    return [int(ids[0])] if ids and ids[0] == tokenizer.bos_token_id else []


def text_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text alone, nothing put before or after it."""
    # verbose=False: a text longer than the model's context is cut here, it needs no warning.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
