"""The code of README and of every page runs, the links lead somewhere, and the site's navigation is complete."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import forgetless as fl
from forgetless import versions
from forgetless.layers import quantized

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
if not (DOCS / "index.md").exists():
    pytest.skip("outside of a source checkout", allow_module_level=True)
PAGES = {"README.md": ROOT / "README.md", **{path.name: path for path in sorted(DOCS.glob("*.md"))}}
#: A page that refers to this section of index.md uses its model and batches.
SETUP = "(index.md#a-model-and-data)"
#: Page -> a word of the blocks that need more than one plain process, and the test that runs them.
ELSEWHERE = {
    "distributed.md": ("", "tests/support/two_processes.py"),
    "training.md": ("from lightning", "tests/model/test_lightning.py"),
}

Namespace = dict[str, Any]


def text_of(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    """The Python blocks of a page, without those that another test runs."""
    word, _ = ELSEWHERE.get(page, (None, ""))
    return [block for block in code(text_of(page)) if word is None or word not in block]


def code(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.S | re.M)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder to work in; what a page registers is unknown again afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fl.methods.base, "METHODS", dict(fl.methods.METHODS))
    monkeypatch.setattr(quantized, "KINDS", dict(quantized.KINDS))


# ------------------------------------------------------------------- what pages must have done, beyond running


def check_readme(index: int, space: Namespace) -> None:
    if index == 1:
        assert Path("adapter-of-peft", "adapter_config.json").exists()
    if index == 2:
        assert type(space["model"].model.layers[0].self_attn.q_proj) is nn.Linear
        fl.load(space["base_model"](), "adapter")


def check_index(index: int, space: Namespace) -> None:
    if index == 3:  # load and remove leave the base model
        torch.manual_seed(0)
        base, batch = space["LlamaForCausalLM"](space["config"]), space["batches"][0]
        assert torch.equal(space["loaded"](**batch).logits, base(**batch).logits)
    if index == 4:
        assert all(not layer.adapter.up.any() for layer in fl.adapters(space["model"]).values())


def check_peft(index: int, space: Namespace) -> None:
    if index == 1:
        assert any("forgetless_penalties" in key for key in space["model"].state_dict())
        assert fl.penalty(space["model"]) > 0
    if index == 2:
        with pytest.raises(ValueError, match="no adapters"):
            fl.penalty(space["model"])
    if index == 3:
        assert fl.penalty(space["model"]) > 0 and Path("clora", "adapter_config.json").exists()


def check_training(index: int, space: Namespace) -> None:
    """Every block of a loop changes every trained parameter; the last one scales what they do."""
    if "weaker" in space:
        assert not torch.equal(space["reference"], space["weaker"])
        assert {layer.adapter.scale for layer in fl.adapters(space["model"]).values()} == {0.6 * 8 / 4}
        return
    now = [p.detach().clone() for p in space["trained"]]
    before = space.setdefault("_before", [torch.full_like(p, torch.nan) for p in now])
    assert not any(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    space["_before"] = now


def check_quantized(index: int, space: Namespace) -> None:
    if index == 1:
        assert {report.path for report in fl.explain(space["model"]).values()} == {"onto"}
        space["_expected"] = space["model"](**space["batches"][0]).logits
    if index == 2:
        merged = space["model"](**space["batches"][0]).logits
        torch.testing.assert_close(merged, space["_expected"], rtol=1e-4, atol=1e-5)


def check_compile(index: int, space: Namespace) -> None:
    trained = [p for p in space["model"].parameters() if p.requires_grad]
    if index == 1:
        space["_compiled"] = [p.grad.clone() for p in trained]
    if index == 2:
        torch.testing.assert_close(space["_compiled"], [p.grad for p in trained])
    if index == 3:
        mean = torch.autograd.grad(space["model"](space["x"]).square().mean(), trained)
        torch.testing.assert_close([g.mean(0) for g in space["per_sample"].values()], list(mean))


def check_architecture(index: int, space: Namespace) -> None:
    """The method of the page adapts, trains, saves, loads and merges."""
    torch.manual_seed(0)
    model = fl.adapt(nn.Sequential(nn.Linear(30, 20)), space["VeRA"](rank=8))
    base, x = model[0].base, torch.randn(3, 30)
    assert torch.allclose(model(x), base(x))
    (model(x).square().mean() + fl.penalty(model)).backward()
    assert sum(p.grad is not None for p in model.parameters()) == 2
    with torch.no_grad():
        model[0].adapter.b.normal_()
    expected = model(x)
    assert not torch.allclose(expected, base(x))
    fl.save(model, "vera")
    again = nn.Sequential(nn.Linear(30, 20))
    again[0].load_state_dict(base.state_dict())
    torch.testing.assert_close(fl.load(again, "vera")(x), expected)
    torch.testing.assert_close(fl.merge(model)(x), expected, rtol=1e-4, atol=1e-5)


CHECKS: dict[str, Callable[[int, Namespace], None]] = {
    "README.md": check_readme,
    "architecture.md": check_architecture,
    "compile.md": check_compile,
    "index.md": check_index,
    "peft.md": check_peft,
    "quantized.md": check_quantized,
    "training.md": check_training,
}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_block_runs_in_order(page: str, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    if "from peft" in text_of(page):
        pytest.importorskip("peft")
    if page == "compile.md":  # the default backend takes a minute and needs a C++ compiler
        torch._dynamo.reset()
        compiler = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model, **named: compiler(model, backend="aot_eager", **named))
    space: Namespace = {"__name__": "__main__"}
    if SETUP in text_of(page):
        exec(code(text_of("index.md"))[0], space)  # noqa: S102
    for index, block in enumerate(blocks(page)):
        exec(compile(block, f"{page}, block {index}", "exec"), space)  # noqa: S102
        CHECKS.get(page, lambda index, space: None)(index, space)


@pytest.mark.parametrize("page", ELSEWHERE)
def test_blocks_that_do_not_run_here_run_elsewhere(page: str) -> None:
    word, test = ELSEWHERE[page]
    assert [block for block in code(text_of(page)) if word in block]
    assert page in (ROOT / test).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------ links and texts


def anchors(page: str) -> set[str]:
    """Ids of the headings, as the site and GitHub make them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    folder = PAGES[page].parent
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", text_of(page))):
        path, _, anchor = link.partition("#")
        assert (folder / path).exists() if path else anchor, link
        if anchor:
            assert anchor in anchors(Path(path).name if path else page), link


def test_the_navigation_names_pages_that_exist_and_every_page_we_write() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r": ([\w-]+\.md)$", config, flags=re.M))
    assert named <= PAGES.keys()
    assert {page for page in PAGES if code(text_of(page))} - {"README.md"} <= named


@pytest.mark.parametrize(
    "page, package",
    [
        ("quantized.md", "bitsandbytes"),
        ("quantized.md", "torchao"),
        ("quantized.md", "transformers"),
        ("training.md", "lightning"),
        ("training.md", "transformers"),
        ("peft.md", "peft"),
    ],
)
def test_tested_versions_are_those_of_the_list(page: str, package: str) -> None:
    low, high = (".".join(map(str, version)) for version in versions.TESTED[package])
    text = text_of(page)
    assert high in text
    if package == "peft":
        assert f"PEFT {low} to {high}" in text


def test_every_environment_variable_is_documented() -> None:
    files = [path for folder in ("forgetless", "kernels", "bench", "tests") for path in (ROOT / folder).rglob("*.py")]
    pattern = re.compile(r"environ(?:\.get\(|\[)\"(FORGETLESS_\w+)")
    read = {name for path in files for name in pattern.findall(path.read_text(encoding="utf-8"))}
    assert read == set(re.findall(r"^\| `(FORGETLESS_\w+)`", text_of("commands.md"), flags=re.M))


def test_every_command_that_is_documented_exists() -> None:
    pytest.importorskip("transformers")
    run = [sys.executable, "-m", "forgetless", "--help"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=True)
    commands = re.findall(r"^\| `([a-z]+)` \|", text_of("commands.md"), flags=re.M)
    assert commands and not [name for name in commands if not re.search(rf"\b{name}\b", done.stdout)]


def test_the_pages_stay_small() -> None:
    assert len(text_of("README.md").splitlines()) <= 120
    assert PAGES["api.md"].stat().st_size <= 2000
