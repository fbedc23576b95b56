"""The README's code runs and its figures are those of the committed JSON."""

import re
from pathlib import Path

import torch
from torch import nn

import forgetless as fl

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.S)


class Toy(nn.Module):
    """A model whose call has a ``.loss``, like a Hugging Face model's."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(300, 40), nn.Linear(40, 300)

    def forward(self, x):
        y = self.v_proj(torch.tanh(self.q_proj(x)))
        return type("Output", (), {"loss": (y - x).square().mean()})


def test_ten_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Toy()
    batches = [{"x": torch.randn(4, 300)} for _ in range(2)]
    # the README's example adapts before there is an optimiser to show: give it one that finds the adapters
    source = python_blocks()[0].replace(
        "for batch in batches:",
        "optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])\nfor batch in batches:",
    )
    exec(source, {"model": model, "batches": batches, "torch": torch})  # noqa: S102
    assert type(model.q_proj) is nn.Linear
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_the_fifth_method_needs_nothing_but_its_registration(tmp_path, monkeypatch):
    monkeypatch.setattr(fl.methods.base, "METHODS", dict(fl.methods.METHODS))
    space: dict = {"__name__": "readme"}
    exec(python_blocks()[1], space)  # noqa: S102
    torch.manual_seed(0)
    model = Toy()
    x = torch.randn(3, 300)
    before = model(x).loss
    fl.adapt(model, space["VeRA"](rank=8))
    assert torch.allclose(model(x).loss, before)
    (model(x).loss + fl.penalty(model)).backward()
    assert sum(p.grad is not None for p in model.parameters()) == 4
    with torch.no_grad():
        for layer in fl.adapters(model).values():
            layer.adapter.b.normal_()
    after = model(x).loss
    fl.save(model, tmp_path)
    torch.manual_seed(0)
    again = fl.load(Toy(), tmp_path)
    assert torch.allclose(again(x).loss, after)
    fl.merge(model)
    assert torch.allclose(model(x).loss, after, rtol=1e-4)


def test_every_page_of_the_docs_is_linked_and_every_link_leads_somewhere():
    links = {link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)]+)\)", README)}
    assert not [link for link in links if not (ROOT / link).exists()]
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert pages <= links, f"link these from README.md: {sorted(pages - links)}"
