"""Run PEFT's own tests with every LoRA layer swapped in: a pytest plugin.

    git clone --branch v0.21.2 https://github.com/huggingface/peft    # the installed version's tag
    cd peft && pip install diffusers datasets                         # imported by its tests
    PYTHONPATH=/path/to/forgetless/tests pytest -p peft_suite --no-cov tests/test_custom_models.py

Whatever makes a model with LoRA layers swaps it in: ``get_peft_model``, ``PeftModel.from_pretrained`` and
``inject_adapter_in_model``. Tests that are parametrised with the configuration of another tuner are deselected.
``FORGETLESS_SWAP=0`` leaves everything as it is, for the counts to compare with. The last line says how many forward
passes of LoRA layers ran on our op, so that a pass with nothing swapped in is seen.
"""

import os
from collections import Counter

import peft
from peft.tuners.lora.layer import LoraLayer

import forgetless as fl
from forgetless import swap

ROUTES: Counter[str] = Counter()


def swapped(model):
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        fl.swap_in(model)
    return model


def counted(route):
    def wrapper(self, x):
        found = route(self, x)
        ROUTES["peft" if found is None else "onto" if found[1] else "op"] += 1
        return found

    return wrapper


def pytest_configure(config):
    if os.environ.get("FORGETLESS_SWAP", "1") == "0":
        return
    swap._Taker.route = counted(swap._Taker.route)
    make, inject, load = peft.get_peft_model, peft.inject_adapter_in_model, peft.PeftModel.from_pretrained.__func__
    peft.get_peft_model = lambda *args, **kwargs: swapped(make(*args, **kwargs))
    peft.inject_adapter_in_model = lambda *args, **kwargs: swapped(inject(*args, **kwargs))
    peft.PeftModel.from_pretrained = classmethod(lambda cls, *args, **kwargs: swapped(load(cls, *args, **kwargs)))


def of_lora(item):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("config_cls", peft.LoraConfig) is peft.LoraConfig


def pytest_collection_modifyitems(config, items):
    others = [item for item in items if not of_lora(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if of_lora(item)]


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"forward passes of swapped-in layers: {dict(ROUTES)}")
