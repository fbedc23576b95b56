"""Adapters on disk: round trips, PEFT's folders, damage, interrupted saves."""

from __future__ import annotations

import builtins
import copy
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import stir, tiny_gpt2, tiny_llama, token_batch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import forgetless as fl
from forgetless.checkpoint.io import CONFIG, OURS, STATE, WEIGHTS
from forgetless.methods import METHODS

TARGETS = ["q_proj", "v_proj", "down_proj"]
EVERY = {
    "lora": fl.LoRA(rank=4, alpha=6.0, dropout=0.1),
    "rslora": fl.LoRA(rank=4, alpha=6.0, rslora=True),
    "clora": fl.CLoRA(rank=4, k=5, weight=0.5, basis="hadamard", seed=3),
    "curlora": fl.CURLoRA(rank=4, alpha=0.5, smoothing=0.0, seed=3),
    "lalora": fl.LaLoRA(rank=4, weight=10.0, fisher="batch", prior_precision=0.1),
    "source": fl.LoRA(rank=4, penalties=(fl.SourceDeviation(0.1, "full"), fl.Decay(0.2), fl.WeightDeviation(0.3))),
    "curlora + laplace": fl.CURLoRA(rank=4, penalties=(fl.Laplace(), fl.SourceDeviation(), fl.OutputDeviation(0.1))),
}


def adapted(method: Any = EVERY["lora"], make: Callable[[], Any] = tiny_llama, targets: Any = TARGETS) -> Any:
    return stir(fl.adapt(make(), method, targets), 0.1)


def logits(model: Any) -> Tensor:
    return model.eval()(**token_batch()).logits


def failing_load(folder: Path, message: str, error: type[Exception] = ValueError, make: Any = tiny_llama) -> None:
    """fl.load fails with this message and leaves the model as it was."""
    model = make()
    twin = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        fl.load(model, folder)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in twin.named_modules()]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved adapter with statistics."""
    model = adapted(EVERY["curlora + laplace"])
    fl.calibrate(model, [token_batch()])
    fl.save(model, tmp_path / "adapter")
    return tmp_path / "adapter"


# -------------------------------------------------------------------------------------- round trip


def test_every_method_makes_the_round_trip_below():
    assert {"lora", "clora", "curlora", "lalora"} <= {method.name for method in EVERY.values()} <= set(METHODS)


@pytest.mark.parametrize("make, targets", [(tiny_llama, TARGETS), (tiny_gpt2, "all-linear")], ids=["llama", "gpt2"])
@pytest.mark.parametrize("name", EVERY)
def test_saved_and_loaded_it_is_the_same(name, make, targets, tmp_path):
    """Function, method, parameters, statistics, penalty and what trains."""
    model = adapted(EVERY[name], make, targets)
    if any(state.statistics for layer in fl.adapters(model).values() for state in layer.adapter.penalty_states()):
        fl.calibrate(model, [token_batch()])
        stir(model, 0.1, seed=2)
    fl.save(model, tmp_path)
    again = make()
    assert fl.load(again, str(tmp_path)) is again
    assert torch.equal(logits(again), logits(model))
    assert {layer.method for layer in fl.adapters(again).values()} == {EVERY[name]}
    assert list(fl.adapters(again)) == list(fl.adapters(model))
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert torch.equal(fl.penalty(again), fl.penalty(model))


def test_the_folder_holds_what_it_says(folder):
    assert sorted(os.listdir(folder)) == sorted([WEIGHTS, CONFIG, OURS, STATE])
    ours = json.loads((folder / OURS).read_text())
    assert ours["method"]["name"] == "curlora" and len(ours["layers"]) == 6
    stored = load_file(folder / WEIGHTS)
    assert {key.rpartition(".")[2] for key in stored} == {"core", "rows", "columns"}  # neither C nor R


def test_saving_over_an_adapter_replaces_it_and_its_statistics(folder):
    model = adapted(EVERY["lora"])
    fl.save(model, folder)
    assert sorted(os.listdir(folder)) == sorted([WEIGHTS, CONFIG, OURS])
    assert torch.equal(logits(fl.load(tiny_llama(), folder)), logits(model))


def test_save_makes_the_folders_and_leaves_other_files_alone(tmp_path):
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "notes.txt").write_text("mine")
    fl.save(adapted(), deep)
    fl.save(adapted(), deep / "c" / "d")
    assert (deep / "notes.txt").read_text() == "mine"
    assert logits(fl.load(tiny_llama(), deep / "c" / "d")) is not None


def test_a_half_precision_model_keeps_float32_parameters(tmp_path):
    def make() -> Any:
        return tiny_llama().bfloat16()

    model = adapted(EVERY["lora"], make)
    fl.save(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
    assert torch.equal(logits(fl.load(make(), tmp_path)), logits(model))


def test_what_cannot_be_saved_is_said(tmp_path):
    with pytest.raises(ValueError, match="model has no adapters"):
        fl.save(tiny_llama(), tmp_path)
    model = adapted()
    model.model.layers[0].self_attn.q_proj.method = fl.LoRA(rank=4)
    with pytest.raises(ValueError, match="several methods"):
        fl.save(model, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        fl.save(adapted(), tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


def test_an_adapted_model_takes_no_second_adapter(folder):
    model = adapted()
    with pytest.raises(ValueError, match="adapted already"):
        fl.load(model, folder)
    assert {layer.method for layer in fl.adapters(model).values()} == {EVERY["lora"]}


# -------------------------------------------------------------------------------------------- PEFT


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft")


@pytest.mark.parametrize(
    "make, targets", [(tiny_llama, TARGETS), (tiny_gpt2, ["c_attn", "c_fc"])], ids=["llama", "gpt2"]
)
@pytest.mark.parametrize("name", ["lora", "rslora", "clora", "lalora"])
@pytest.mark.filterwarnings("ignore:Laplace has no statistics")
def test_peft_loads_ours(name, make, targets, tmp_path, peft):
    model = adapted(EVERY[name], make, targets)
    fl.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path))
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    assert sum("lora_A" in n for n, _ in theirs.named_parameters()) == len(fl.adapters(model))


def test_peft_loads_ours_where_names_are_no_suffixes(tmp_path, peft):
    """One layer of two that share their last name."""
    model = adapted(targets=["model.layers.1.self_attn.q_proj"])
    fl.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make, targets", [(tiny_llama, TARGETS), (tiny_gpt2, ["c_attn", "c_fc"])], ids=["llama", "gpt2"]
)
@pytest.mark.parametrize("name", ["rslora", "clora", "curlora", "curlora + laplace"])
@pytest.mark.filterwarnings("ignore:Laplace has no statistics", "ignore:SourceDeviation has no statistics")
def test_whatever_the_method_it_exports_as_lora(name, make, targets, tmp_path, peft):
    model = adapted(EVERY[name], make, targets)
    with torch.no_grad():
        for layer in fl.adapters(model).values():  # CURLoRA's C and R are small here
            layer.adapter.core.mul_(100) if "curlora" in name else None
    before = logits(model)
    fl.export_lora(model, tmp_path)
    assert (before - logits(make())).abs().max() > 1e-3
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path))
    torch.testing.assert_close(logits(theirs), before, rtol=1e-5, atol=1e-5)
    back = fl.load(make(), tmp_path)
    torch.testing.assert_close(logits(back), before, rtol=1e-5, atol=1e-5)
    assert all(isinstance(layer.method, fl.LoRA) for layer in fl.adapters(back).values())
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_an_export_does_not_go_into_a_saved_folder(tmp_path):
    model = adapted(EVERY["curlora"])
    fl.save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds a checkpoint of fl.save"):
        fl.export_lora(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="model has no adapters"):
        fl.export_lora(tiny_llama(), tmp_path / "other")


def theirs_saved(peft: Any, folder: Path, make: Any = tiny_llama, targets: Any = TARGETS, **options: Any) -> Any:
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": "CAUSAL_LM", **options}
    )
    model = stir(peft.get_peft_model(make(), config), 0.1)
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "make, targets", [(tiny_llama, TARGETS), (tiny_gpt2, ["c_attn", "c_fc"])], ids=["llama", "gpt2"]
)
def test_we_load_peft_s(make, targets, rslora, tmp_path, peft):
    conv = {"fan_in_fan_out": True} if make is tiny_gpt2 else {}
    theirs = theirs_saved(peft, tmp_path, make, targets, use_rslora=rslora, lora_dropout=0.1, **conv)
    ours = fl.load(make(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    (method,) = {layer.method for layer in fl.adapters(ours).values()}
    assert method == fl.LoRA(rank=4, alpha=6, dropout=0.1, rslora=rslora)


def test_there_and_back_again(tmp_path, peft):
    theirs = theirs_saved(peft, tmp_path / "theirs")
    fl.save(fl.load(tiny_llama(), tmp_path / "theirs"), tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours"))
    torch.testing.assert_close(logits(back), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_dora": True}, "DoRA"),
        ({"alora_invocation_tokens": [4, 5]}, "activated LoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "per-layer ranks"),
        ({"alpha_pattern": {"q_proj": 2}}, "per-layer alphas"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights.*'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights.*'olora'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [(0, 1), (0, 2)]}, "layer_replication"),
    ],
    ids=str,
)
def test_what_of_peft_s_is_not_plain_lora_is_refused(options, message, tmp_path, peft):
    """Some of them rewrite the base weights, so that loading the factors alone would be silently wrong."""
    targets = ["c_attn"] if "bias" in options or "lora_bias" in options else TARGETS
    make = tiny_gpt2 if targets == ["c_attn"] else tiny_llama
    theirs_saved(peft, tmp_path, make, targets, **options)
    failing_load(tmp_path, message, make=make)


def test_other_peft_methods_are_refused(tmp_path, peft):
    peft.get_peft_model(
        tiny_llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    ).save_pretrained(str(tmp_path))
    failing_load(tmp_path, "peft_type is 'IA3', wants 'LORA'")


def test_curlora_s_folder_is_no_lora_folder(folder):
    (folder / OURS).unlink()
    failing_load(folder, "peft_type is 'CURLORA', wants 'LORA'")


# ------------------------------------------------------------------------------------ another base


def test_curlora_refuses_another_base(folder):
    def nudged() -> Any:
        model = tiny_llama()
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight[0, 0] += 1e-6
        return model

    failing_load(folder, "weight of model.layers.1.self_attn.v_proj is not the one .* made on", make=nudged)
    failing_load(folder, "is not the one", make=lambda: tiny_llama().bfloat16())


def test_curlora_of_a_merged_base_is_refused(folder, tmp_path):
    model = fl.merge(fl.load(tiny_llama(), folder))
    with pytest.raises(ValueError, match="is not the one"):
        fl.load(model, folder)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tiny_llama(layers=1), "has a layer model.layers.1.mlp.down_proj, this LlamaForCausalLM has none"),
        (lambda: tiny_llama(intermediate_size=32), r"down_proj was \(out 16, in 24\), this model's is \(16, 32\)"),
        (tiny_gpt2, "has a layer model.layers.0.mlp.down_proj, this GPT2LMHeadModel has none"),
    ],
    ids=["fewer layers", "other sizes", "other model"],
)
def test_a_model_it_does_not_fit_is_refused(make, message, folder, tmp_path):
    failing_load(folder, message, make=make)
    fl.save(adapted(), tmp_path / "lora")
    failing_load(tmp_path / "lora", message, make=make)


def test_a_layer_of_another_kind_is_refused(tmp_path):
    class Odd(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def make(kind: type = nn.Linear) -> nn.Module:
        return nn.Sequential(kind(6, 6))

    fl.save(fl.adapt(make(), fl.LoRA(rank=2), "all-linear"), tmp_path)
    failing_load(tmp_path, "'0' matches 0, a .*Odd; only nn.Linear", make=lambda: make(Odd))


# ------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("file", [WEIGHTS, STATE])
@pytest.mark.parametrize("where", [0.0, 0.01, 0.5, 0.999])
def test_a_flipped_bit_is_found(file, where, folder):
    data = bytearray((folder / file).read_bytes())
    data[int(where * len(data))] ^= 1
    (folder / file).write_bytes(data)
    failing_load(folder, f"{file}: damaged.*SHA-256")


@pytest.mark.parametrize("file", [WEIGHTS, STATE, OURS])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_found(file, part, folder):
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: int(part * len(data))])
    failing_load(folder, f"{file}: (damaged|not valid JSON)")


@pytest.mark.parametrize("file", [WEIGHTS, STATE])
def test_a_missing_file_is_named(file, folder):
    (folder / file).unlink()
    failing_load(folder, f"{file} is missing", FileNotFoundError)


def test_a_missing_folder_or_an_empty_one_is_named(tmp_path):
    failing_load(tmp_path / "nowhere", "nowhere is not a folder with a saved adapter", FileNotFoundError)
    failing_load(tmp_path, f"{CONFIG} is missing; is .* a folder with a saved adapter", FileNotFoundError)


def test_weights_of_another_save_are_found(folder, tmp_path):
    fl.save(stir(fl.load(tiny_llama(), folder), seed=9), tmp_path / "other")
    (folder / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    failing_load(folder, "of another save")


@pytest.mark.parametrize("part", [0.0, 0.5, 0.999])
def test_a_truncated_peft_file_is_found(part, tmp_path, peft):
    theirs_saved(peft, tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[: int(part * len(data))])
    failing_load(tmp_path, f"{WEIGHTS}: not a readable safetensors file")


def without(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: t for k, t in tensors.items() if k != key}


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: without(t, KEY.format("B")), "lacks .*q_proj.lora_B"),
        (lambda t: {**t, KEY.format("A"): torch.zeros(4, 15)}, r"lora_A.weight has shape \(4, 15\), wants \(4, 16\)"),
        (lambda t: {**t, KEY.format("A"): torch.zeros(4, 16).int()}, "lora_A.weight has dtype torch.int32, wants"),
        (
            lambda t: {**t, "base_model.model.lm_head.weight": torch.zeros(2)},
            "lm_head.weight is a weight of the base model",
        ),
        (lambda t: {**t, KEY.replace("q_proj", "z_proj").format("A"): torch.zeros(4, 16)}, "z_proj.*has none"),
        (lambda t: {}, "holds no tensors"),
    ],
    ids=["missing", "shape", "dtype", "stray", "unknown layer", "empty"],
)
def test_a_peft_file_that_does_not_fit_is_refused(change, message, tmp_path, peft):
    theirs_saved(peft, tmp_path)
    save_file(change(load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS)
    failing_load(tmp_path, message)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": None}, "LoRA.rank is None"),
        ({"r": 3}, r"has shape \(4, 16\), wants \(3, 16\)"),
        ({"lora_alpha": "many"}, "LoRA.alpha is 'many'"),
        ({"lora_dropout": 2.0}, "LoRA.dropout is 2.0"),
        ({"peft_type": None}, "peft_type is None, wants 'LORA'"),
    ],
    ids=str,
)
def test_a_peft_config_that_does_not_fit_is_refused(change, message, tmp_path, peft):
    theirs_saved(peft, tmp_path)
    config = {**json.loads((tmp_path / CONFIG).read_text()), **change}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    failing_load(tmp_path, message)


def edits(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Every way to replace or drop one value inside a JSON document, by its path."""
    for wrong in (None, [], {}, "odd", -1, [1], {"a": 1}):
        yield path, wrong
    if isinstance(value, dict):
        for key in list(value)[:3] if path == ("layers",) else list(value):
            yield from edits(value[key], (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from edits(item, (*path, i))


def test_a_wrong_value_anywhere_in_our_json_is_an_error_or_harmless(folder):
    """Never anything but ValueError or FileNotFoundError, and never a half-adapted model."""
    text = (folder / OURS).read_text()
    model, want = tiny_llama(), logits(fl.load(tiny_llama(), folder))
    kinds = [(n, type(m)) for n, m in model.named_modules()]
    for path, wrong in edits(json.loads(text)):
        data: Any = json.loads(text)
        at = data
        for key in path[:-1]:
            at = at[key]
        if path:
            at[path[-1]] = wrong
        else:
            data = wrong
        (folder / OURS).write_text(json.dumps(data))
        try:
            fl.load(model, folder)
        except (ValueError, FileNotFoundError):
            pass
        except Exception as error:
            pytest.fail(f"{path} = {wrong!r}: {error!r}")
        else:
            # the seed and smoothing of the draw matter no more once rows and columns are stored
            assert torch.equal(logits(model), want) or path[:1] == ("method",), (path, wrong)
            fl.remove(model)
        assert [(n, type(m)) for n, m in model.named_modules()] == kinds, (path, wrong)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"a": ' * 3000, "\x00"], ids=repr)
def test_broken_json_is_named(text, folder):
    (folder / OURS).write_text(text)
    failing_load(folder, f"{OURS}: ")
    (folder / OURS).unlink()
    (folder / CONFIG).write_text(text)
    failing_load(folder, f"{CONFIG}: ")


def test_a_newer_format_is_refused(folder):
    data = json.loads((folder / OURS).read_text())
    (folder / OURS).write_text(json.dumps({**data, "format": 99}))
    failing_load(folder, "format 99, this version reads 1")


# -------------------------------------------------------------------------------- interrupted saves


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
@pytest.mark.parametrize("function", ["replace", "open", "fsync"])
def test_a_failing_save_leaves_the_old_adapter_whole(function, nth, error, folder, monkeypatch):
    """Whichever file it fails at; the folder loads as before and nothing else lies in it."""
    want = logits(fl.load(tiny_llama(), folder))
    listing = sorted(os.listdir(folder))
    model = stir(fl.load(tiny_llama(), folder), seed=9)
    home = builtins if function == "open" else os
    real, calls = getattr(home, function), 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += "wb" in args if function == "open" else 1
        if calls == nth and (function != "open" or "wb" in args):
            raise error("full")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(home, function, failing)
        with pytest.raises(error, match="full"):
            fl.save(model, folder)
    assert sorted(os.listdir(folder)) == listing
    assert torch.equal(logits(fl.load(tiny_llama(), folder)), want)
    fl.save(model, folder)
    assert torch.equal(logits(fl.load(tiny_llama(), folder)), logits(model))


def test_a_failing_first_save_leaves_no_half_adapter(tmp_path, monkeypatch):
    real, calls = os.replace, 0

    def failing(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError("full")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="full"):
            fl.save(adapted(), tmp_path)
    assert not os.listdir(tmp_path)


def killed_while_saving(folder: Path, nth: int) -> None:
    """A fork of this process saves another adapter and is killed before its ``nth`` file is put in place."""
    model = stir(fl.load(tiny_llama(), folder), seed=9)
    child = os.fork()
    if not child:
        real, left = os.replace, [nth]

        def deadly(*arguments: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*arguments)

        os.replace = deadly
        try:
            fl.save(model, folder)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("nth", [0, 1, 2])
def test_a_killed_save_is_finished_by_whoever_comes_next(nth, folder):
    """Its files were whole: they are read where they lie, and the next save puts them in place."""
    want = logits(stir(fl.load(tiny_llama(), folder), seed=9))
    old = logits(fl.load(tiny_llama(), folder))
    killed_while_saving(folder, nth)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".saved-")]
    model = fl.load(tiny_llama(), folder)
    assert torch.equal(logits(model), want) and not torch.equal(want, old)
    killed_while_saving(folder, 0)  # its first move is one of the earlier save's
    assert torch.equal(logits(fl.load(tiny_llama(), folder)), want)
    fl.save(model, folder)
    assert sorted(os.listdir(folder)) == sorted([CONFIG, OURS, STATE, WEIGHTS])
    assert torch.equal(logits(fl.load(tiny_llama(), folder)), want)


def test_what_was_put_there_after_a_killed_save_counts(folder, tmp_path):
    """A checkpoint copied over it is newer than what the save had left."""
    want = logits(fl.load(tiny_llama(), folder))
    killed_while_saving(folder, 0)
    fl.save(stir(fl.load(tiny_llama(), folder), seed=5), tmp_path / "other")
    for file in os.listdir(tmp_path / "other"):
        shutil.copyfile(tmp_path / "other" / file, folder / file)
    other = logits(fl.load(tiny_llama(), tmp_path / "other"))
    assert torch.equal(logits(fl.load(tiny_llama(), folder)), other) and not torch.equal(other, want)


def test_a_link_in_the_place_of_a_killed_save_s_folder_is_not_followed_for_moving(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    fl.save(stir(fl.load(tiny_llama(), folder), seed=5), elsewhere)
    before = sorted(os.listdir(elsewhere))
    (folder / ".saved-1-x").symlink_to(elsewhere)
    fl.save(fl.load(tiny_llama(), folder), folder)
    assert sorted(os.listdir(elsewhere)) == before


def test_half_written_files_are_thrown_away_after_an_hour(folder):
    for name, hours in ((".saving-1-old", 1.1), (".saving-1-new", 0.5)):
        (folder / name).mkdir()
        (folder / name / WEIGHTS).write_text("half")
        os.utime(folder / name, times=2 * (time.time() - 3600 * hours,))
    fl.save(fl.load(tiny_llama(), folder), folder)
    assert [path.name for path in folder.glob(".saving-*")] == [".saving-1-new"]
