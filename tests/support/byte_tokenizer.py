"""A tokenizer with one token per byte."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


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
