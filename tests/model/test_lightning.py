"""The penalty in Lightning's Trainer; where it is not installed, in a stand-in with the same order of calls."""

from __future__ import annotations

import importlib.util
import pickle
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import tiny_model
from torch import nn

import forgetless as fl

LR = 0.1
ROWS = torch.arange(12 * 10).reshape(12, 10) * 11 % 250


class FakeTrainer:
    """What Lightning does around a training step, in its order."""

    log_every_n_steps, global_step = 1, 0

    def __init__(self, callbacks: list[Any], accumulate_grad_batches: int = 1, gradient_clip_val: float = 0, **_: Any):
        self.callbacks, self.accumulate_grad_batches, self.clip = callbacks, accumulate_grad_batches, gradient_clip_val
        self.logged_metrics: dict[str, Any] = {}

    def fit(self, module: Any, batches: list[Any]) -> None:
        module.log = lambda name, value: self.logged_metrics.update({name: torch.as_tensor(value)})
        self.num_training_batches, (optimiser,) = len(batches), [module.configure_optimizers()]
        for callback in self.callbacks:
            callback.on_fit_start(self, module)
        module.train()
        for index, batch in enumerate(batches):
            self.is_last_batch = index + 1 == len(batches)
            for callback in self.callbacks:
                callback.on_train_batch_start(self, module, batch, index)
            output = module.training_step(batch, index)
            loss = output["loss"] if isinstance(output, dict) else output
            (loss / self.accumulate_grad_batches).backward()
            if (index + 1) % self.accumulate_grad_batches == 0 or self.is_last_batch:
                if self.clip:
                    nn.utils.clip_grad_norm_(module.parameters(), self.clip)
                optimiser.step()
                optimiser.zero_grad()
                self.global_step += 1
            for callback in self.callbacks:
                callback.on_train_batch_end(self, module, output, batch, index)
        for callback in self.callbacks:
            callback.teardown(self, module, "fit")


class FakeModule(nn.Module):
    automatic_optimization = True


@pytest.fixture(params=["stand-in", "lightning"])
def pl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "lightning":
        return pytest.importorskip("lightning.pytorch")
    fake = types.ModuleType("lightning.pytorch")
    fake.Callback, fake.Trainer, fake.LightningModule = type("Callback", (), {}), FakeTrainer, FakeModule
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", fake)
    return fake


def module_of(pl: Any, as_dict: bool = False, by_hand: bool = False, method: Any = None) -> Any:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = tiny_model()
            if method is not False:
                fl.adapt(self.model, method or fl.CLoRA(rank=4, alpha=8, k=8, penalties=(fl.OutputDeviation(0.3),)))
                with torch.no_grad():
                    for layer in fl.adapters(self.model).values():
                        layer.adapter.up.normal_(std=0.1)
            if by_hand:
                self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.model(input_ids=batch, labels=batch).loss
            return {"loss": loss} if as_dict else loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], LR)

    return Module()


def trainer(pl: Any, folder: Path, **options: Any) -> Any:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return pl.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=str(folder), log_every_n_steps=1,
        callbacks=[fl.training.PenaltyCallback()], **quiet, **options,
    )  # fmt: skip


@pytest.mark.parametrize("parts, as_dict", [(1, False), (2, True)])
def test_once_per_step_before_clipping(pl: Any, parts: int, as_dict: bool, tmp_path: Path) -> None:
    """Three batches: with two parts a step of two and a step of the one that is left."""
    batches = list(ROWS.split(4))
    module, twin = module_of(pl, as_dict), module_of(pl, as_dict).train()
    before = module.training_step
    run = trainer(pl, tmp_path, accumulate_grad_batches=parts, gradient_clip_val=0.5)
    run.fit(module, torch.utils.data.DataLoader(ROWS, batch_size=4))
    optimiser = twin.configure_optimizers()
    for step in range(0, 3, parts):
        for batch in batches[step : step + parts]:
            (twin.model(input_ids=batch, labels=batch).loss / parts).backward(retain_graph=True)
        value = fl.penalty(twin)
        value.backward()
        assert nn.utils.clip_grad_norm_(twin.parameters(), 0.5) > 0.5
        optimiser.step()
        optimiser.zero_grad()
    for (name, ours), theirs in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)
    assert run.logged_metrics["penalty"].item() == pytest.approx(value.item(), rel=1e-4)
    assert run.logged_metrics["drift"] > 0
    assert module.training_step == before and "training_step" not in vars(module)


@pytest.mark.parametrize("wrong, said", [({"method": False}, "no adapters"), ({"by_hand": True}, "optimises by hand")])
def test_refused_when_fitting_begins(pl: Any, wrong: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        trainer(pl, tmp_path, accumulate_grad_batches=1).fit(
            module_of(pl, **wrong), torch.utils.data.DataLoader(ROWS, batch_size=4)
        )


def test_a_fit_that_failed_leaves_no_second_penalty(pl: Any, tmp_path: Path) -> None:
    module = module_of(pl)
    own = module.training_step
    run = trainer(pl, tmp_path, accumulate_grad_batches=1)
    callback = next(c for c in run.callbacks if type(c).__name__ == "PenaltyCallback")
    callback.on_fit_start(run, module)
    callback.on_fit_start(run, module)
    assert module.training_step.__wrapped__ == own
    callback.on_exception(run, module, ValueError())
    assert module.training_step == own


def test_the_how_to_runs(pl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", text, flags=re.S) if "from lightning" in code)
    batches = [{"input_ids": rows, "labels": rows} for rows in ROWS.split(4)]
    model = fl.adapt(tiny_model(), fl.CLoRA(rank=4, alpha=8, k=8))
    space: dict[str, Any] = {"torch": torch, "fl": fl, "model": model, "batches": batches}
    exec(block, space)  # noqa: S102
    assert space["trainer"].logged_metrics["penalty"] > 0


def test_it_is_a_callback_and_can_be_pickled(pl: Any) -> None:
    callback = fl.training.PenaltyCallback()
    assert isinstance(callback, pl.Callback) and type(pickle.loads(pickle.dumps(callback))) is type(callback)


def test_without_lightning_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    if importlib.util.find_spec("forgetless"):
        with pytest.raises(ImportError, match=r"pip install 'forgetless\[lightning\]'"):
            fl.training.PenaltyCallback  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        fl.training.Nothing  # noqa: B018
