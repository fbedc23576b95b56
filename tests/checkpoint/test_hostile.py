"""Files made to harm: a clear error, the base model as it was, nothing half written, nothing unpickled."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import stir
from torch import nn

import forgetless as fl
from forgetless.checkpoint.io import CONFIG, OURS, STATE, WEIGHTS

ROUNDS = int(os.environ.get("FORGETLESS_EXAMPLES", "0")) or 150
METHODS = {
    "lora": fl.LoRA(rank=2),
    "clora": fl.CLoRA(rank=2, k=3),
    "curlora": fl.CURLoRA(rank=2),
    "source": fl.LoRA(rank=2, penalties=(fl.SourceDeviation(0.1, 2), fl.Laplace(), fl.LossDeviation(0.1, 2))),
}


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))


def saved(folder: Path, method: Any) -> Path:
    model = fl.adapt(make(), method)
    fl.save(stir(model, 0.1), folder)
    return folder


@pytest.fixture(params=METHODS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return saved(tmp_path / "adapter", METHODS[request.param])


class Untouched:
    """A base model that must be what it was after every attempt to load."""

    def __init__(self) -> None:
        self.model, self.tried, self.refused = make(), 0, 0
        self.before = copy.deepcopy(self.model)

    def load(self, folder: Path) -> str | None:
        """The refusal, or None if it loaded; anything but the promised errors is a failure."""
        self.tried += 1
        said = None
        try:
            fl.load(self.model, folder)
        except (ValueError, FileNotFoundError) as error:
            said = str(error)
            assert said
            self.refused += 1
        else:
            assert all(layer.delta().shape for layer in fl.adapters(self.model).values())
            fl.remove(self.model)
        assert [type(m) for m in self.model.modules()] == [type(m) for m in self.before.modules()]
        for a, b in zip(self.model.parameters(), self.before.parameters(), strict=True):
            assert torch.equal(a, b)
        self.model.requires_grad_(True)
        return said


def test_flipped_bits_anywhere(folder, record_property):
    """In the tensors they are always found; in the JSON beside them they may be harmless."""
    base, draw = Untouched(), random.Random(0)
    for _ in range(ROUNDS):
        file = folder / draw.choice(sorted(os.listdir(folder)))
        whole = file.read_bytes()
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        said = base.load(folder)
        assert said is not None or file.suffix == ".json", file
        file.write_bytes(whole)
    record_property("bits flipped", base.tried)
    record_property("bits flipped, refused", base.refused)
    assert base.refused > ROUNDS // 4 and base.load(folder) is None


def test_files_cut_short_or_with_more_behind(folder, record_property):
    base, draw = Untouched(), random.Random(1)
    for _ in range(ROUNDS // 2):
        file = folder / draw.choice(sorted(set(os.listdir(folder)) - {CONFIG}))
        whole = file.read_bytes()
        cut = whole[: draw.randrange(len(whole) - 2)]
        file.write_bytes(cut if draw.random() < 0.5 else whole + b"x" * draw.randrange(1, 4000))
        assert base.load(folder) is not None, file
        file.write_bytes(whole)
    record_property("files cut short or lengthened", base.tried)
    record_property("files cut short or lengthened, refused", base.refused)
    assert base.load(folder) is None


HEADERS = {
    "longer than the file": struct.pack("<Q", 1 << 62) + b"{}",
    "no header": b"",
    "seven bytes": b"\0" * 7,
    "not JSON": struct.pack("<Q", 4) + b"\xff\xfe{}",
    "deep": struct.pack("<Q", 60000) + b'{"a":' * 12000,
    "a list": struct.pack("<Q", 2) + b"[]",
}
ENTRIES = {
    "behind the end": {"dtype": "F32", "shape": [2, 6], "data_offsets": [0, 1 << 40]},
    "backwards": {"dtype": "F32", "shape": [2, 6], "data_offsets": [48, 0]},
    "negative": {"dtype": "F32", "shape": [2, 6], "data_offsets": [-48, 0]},
    "overflowing shape": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 48]},
    "negative shape": {"dtype": "F32", "shape": [-2, -6], "data_offsets": [0, 48]},
    "shape and size apart": {"dtype": "F32", "shape": [2, 7], "data_offsets": [0, 48]},
    "unknown dtype": {"dtype": "X9", "shape": [2, 6], "data_offsets": [0, 48]},
    "no dtype": {"shape": [2, 6], "data_offsets": [0, 48]},
    "integers": {"dtype": "I32", "shape": [2, 6], "data_offsets": [0, 48]},
    "text": "everything",
}


def raw(header: Any, size: int = 48) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * size


def peft_folder(folder: Path, weights: bytes) -> Path:
    """No hashes to guard it."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    (folder / WEIGHTS).write_bytes(weights)
    return folder


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers(name, tmp_path):
    assert WEIGHTS in (Untouched().load(peft_folder(tmp_path / "a", HEADERS[name])) or "")


@pytest.mark.parametrize("name", ENTRIES)
def test_hostile_tensors(name, tmp_path):
    key = "base_model.model.0.lora_A.weight"
    assert WEIGHTS in (Untouched().load(peft_folder(tmp_path / "a", raw({key: ENTRIES[name]}))) or "")


PATHS = ["../../0", "/etc/passwd", "..\\..\\0", "\0", "0" * 100_000, "", ".", "0.base", "\ud800"]


@pytest.mark.parametrize("name", PATHS, ids=[str(i) for i in range(len(PATHS))])
def test_names_that_are_paths(name, tmp_path):
    """A tensor's or a layer's name is looked up in the model and is never a path."""
    entry = {"dtype": "F32", "shape": [2, 6], "data_offsets": [0, 48]}
    key = f"base_model.model.{name}.lora_A.weight"
    assert Untouched().load(peft_folder(tmp_path / "a", raw({key: entry}))) is not None
    ours = saved(tmp_path / "b", METHODS["lora"])
    data = json.loads((ours / OURS).read_text())
    data["layers"][name] = data["layers"].pop("0")
    (ours / OURS).write_text(json.dumps(data))
    assert Untouched().load(ours) is not None
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def numbers(value: Any, path: tuple[Any, ...] = ()) -> Any:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers(item, (*path, index))
    elif isinstance(value, (int, float)):
        yield path


def replaced(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    data = copy.deepcopy(data)
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return data


HUGE = [10**9, 10**12, 10**30, 1e300, -1, -(10**30), 0, 0.5, float("nan"), float("inf"), True, "1", [[]] * 3]


@pytest.mark.parametrize("file", [OURS, CONFIG])
def test_huge_and_odd_numbers(file, folder, record_property):
    """None of them makes us allocate what it says."""
    if file == CONFIG:
        (folder / OURS).unlink()
        if json.loads((folder / CONFIG).read_text())["peft_type"] != "LORA":
            pytest.skip("no folder of PEFT's")
    base, data = Untouched(), json.loads((folder / file).read_text())
    for path in list(numbers(data)):
        for value in HUGE:
            (folder / file).write_text(json.dumps(replaced(data, path, value)))
            base.load(folder)
    record_property("numbers replaced", base.tried)
    record_property("numbers replaced, refused", base.refused)
    assert base.refused


TEXTS = {
    "deep": "[" * 100_000,
    "deep objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "a number of 10,000 digits": '{"format": ' + "9" * 10_000 + "}",
    "not UTF-8": b"\xff\xfe\x00",
    "a string": '"adapter"',
    "nothing": "",
}


@pytest.mark.parametrize("file", [OURS, CONFIG])
@pytest.mark.parametrize("name", TEXTS)
def test_hostile_json(name, file, tmp_path):
    folder = saved(tmp_path / "a", METHODS["lora"])
    if file == CONFIG:
        (folder / OURS).unlink()
    text = TEXTS[name]
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert file in (Untouched().load(folder) or "")


# -------------------------------------------------------------------------- what lies in the folder


@pytest.mark.parametrize("file", [OURS, WEIGHTS])
@pytest.mark.parametrize("what", ["folder", "pipe", "link to nowhere", "link to itself"])
def test_something_else_in_a_file_s_place(what, file, tmp_path):
    folder = saved(tmp_path / "a", METHODS["lora"])
    (folder / file).unlink()
    if what == "folder":
        (folder / file).mkdir()
    elif what == "pipe":
        os.mkfifo(folder / file)
    else:
        (folder / file).symlink_to(folder / file if what == "link to itself" else tmp_path / "nowhere")
    said = Untouched().load(folder)
    assert said is not None or "link" in what  # without forgetless.json it is a folder of PEFT's


def test_links_are_followed_for_reading_and_replaced_by_saving(tmp_path):
    """A hub's cache is made of links; what they point to is not ours to write."""
    real = saved(tmp_path / "real", METHODS["lora"])
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in os.listdir(real):
        (linked / file).symlink_to(real / file)
    assert Untouched().load(linked) is None
    before = {file: (real / file).read_bytes() for file in os.listdir(real)}
    saved(linked, METHODS["clora"])
    assert {file: (real / file).read_bytes() for file in os.listdir(real)} == before
    assert not any((linked / file).is_symlink() for file in os.listdir(linked))


# ---------------------------------------------------------------------------------- saving in need


def listing(folder: Path) -> dict[str, bytes]:
    return {file: (folder / file).read_bytes() for file in sorted(os.listdir(folder))}


@pytest.mark.parametrize("limit", [0, 100, 700, 1500])
def test_a_disk_that_fills_up(limit, tmp_path):
    """A real limit of the system on the size of files: the old adapter stays whole."""
    resource = pytest.importorskip("resource")
    folder = saved(tmp_path / "a", METHODS["lora"])
    before = listing(folder)
    model = stir(fl.adapt(make(), METHODS["source"]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError):
            fl.save(model, folder)
        with pytest.raises(OSError):
            fl.save(model, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert listing(folder) == before and Untouched().load(folder) is None
    assert not (tmp_path / "new").exists() or not os.listdir(tmp_path / "new")


def test_a_folder_that_cannot_be_written(tmp_path):
    folder = saved(tmp_path / "a", METHODS["lora"])
    before = listing(folder)
    folder.chmod(0o555)
    try:
        if os.access(folder, os.W_OK):  # root may write anywhere but in the kernel's own folders
            with pytest.raises(OSError):
                fl.save(fl.adapt(make(), METHODS["lora"]), Path("/proc") / "adapter")
        else:
            with pytest.raises(OSError):
                fl.save(fl.adapt(make(), METHODS["clora"]), folder)
    finally:
        folder.chmod(0o755)
    assert listing(folder) == before


# ---------------------------------------------------------------------------------------- no pickle


def test_nothing_is_ever_unpickled(tmp_path):
    """Watched by the interpreter's own audit: no class looked up by pickle, no file opened but the adapter's."""
    folder = saved(tmp_path / "a", METHODS["curlora"])
    for bait in ("adapter_model.bin", "pytorch_model.bin", "forgetless_state.pt", "adapter_model.pkl"):
        (folder / bait).write_bytes(b"cos\nsystem\n(S'exit 9'\ntR.")
    code = f"""
        import sys
        import torch
        from torch import nn
        import forgetless as fl

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        opened = []

        def watch(event, arguments):
            if event.startswith("pickle."):
                raise RuntimeError(event)
            if event == "open" and isinstance(arguments[0], str) and {str(folder)!r} in arguments[0]:
                opened.append(arguments[0])

        sys.addaudithook(watch)
        fl.load(model, {str(folder)!r})
        fl.save(model, {str(tmp_path / "b")!r})
        assert opened and not [name for name in opened if not name.endswith((".json", ".safetensors"))], opened
        print("watched")
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "watched", done.stderr


def test_statistics_are_guarded_like_the_weights(tmp_path):
    folder = saved(tmp_path / "a", METHODS["source"])
    assert (folder / STATE).exists()
    shutil.copyfile(folder / WEIGHTS, folder / STATE)
    assert STATE in (Untouched().load(folder) or "")
