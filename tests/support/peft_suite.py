"""Run PEFT's own tests with every LoRA layer swapped in: a pytest plugin.

    git clone --branch v0.21.2 https://github.com/huggingface/peft    # the installed version's tag
    cd peft && pip install diffusers datasets                         # imported by its tests
    export PYTHONPATH=/path/to/forgetless:/path/to/forgetless/tests
    for swap in 1 0; do
        FORGETLESS_SWAP=$swap FORGETLESS_SWAP_OUT=$swap.json pytest -p peft_suite --no-cov tests/test_custom_models.py
    done
    python -m peft_suite 1.json 0.json                                # bench/results/peft-suite.json

Whatever makes a model with LoRA layers swaps it in: ``get_peft_model``, ``PeftModel.from_pretrained`` and
``inject_adapter_in_model``. Tests that are parametrised with the configuration of another tuner are deselected.
``FORGETLESS_SWAP=0`` leaves everything as it is, for the outcomes to compare with. The last line says how many forward
passes of LoRA layers ran on our op, so that a pass with nothing swapped in is seen. ``FORGETLESS_SWAP_OUT`` names a
file for the outcome of every test.

``FORGETLESS_CONFIG`` names one of ``fl.peft``'s configurations instead, for PEFT's plain cases on it: CLoRAConfig and
LaLoRAConfig stand where the tests have LoraConfig, CURLoRAConfig (of rank 2, layers there are narrow) where they have
GloraConfig, which has the same cases but for layers that are no linear ones.
"""

import json
import os
import re
import sys
from collections import Counter
from dataclasses import make_dataclass
from pathlib import Path

import peft
from peft.tuners.lora.layer import LoraLayer

import forgetless as fl
from forgetless.peft import routes, swap

ROUTES: Counter[str] = Counter()
REASONS: Counter[str] = Counter()  # of forward passes that were PEFT's own
OUTCOMES: dict[str, tuple[str, str]] = {}  # test -> outcome, reason
CONFIG = os.environ.get("FORGETLESS_CONFIG", "")
SWAP = not CONFIG and os.environ.get("FORGETLESS_SWAP", "1") != "0"
PLAIN = re.compile(r"Vanilla MLP \d+ (GLoRA|LoRA)-|Embedding \+ transformers Conv1D \d LoRA-")


def swapped(model):
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        fl.swap_in(model)
    return model


def counted(route):
    def wrapper(self, x):
        found = route(self, x)
        layer, keys = self.layer, self.keys()
        alone = layer.disable_adapters or layer.merged_adapters or not keys
        way = "onto" if found and found[1] else "op" if found else "base" if alone else "peft"
        ROUTES[way] += 1
        if way == "peft":
            reason = next(filter(None, (routes.adapter_reason(layer, key) for key in keys)), "this call, or its dtype")
            REASONS[re.sub(r"'.*?'", "..", reason)] += 1
        return found

    return wrapper


def replace_config():
    ours = getattr(fl.peft, CONFIG)
    if CONFIG == "CURLoRAConfig":
        ours = make_dataclass("CURLoRAConfig", [("r", int, 2)], bases=(ours,))
    setattr(peft, "GloraConfig" if CONFIG == "CURLoRAConfig" else "LoraConfig", ours)
    return ours


def pytest_configure(config):
    if CONFIG:
        config.ours = replace_config()
    if not SWAP:
        return
    swap._Taker.route = counted(swap._Taker.route)
    make, inject, load = peft.get_peft_model, peft.inject_adapter_in_model, peft.PeftModel.from_pretrained.__func__
    peft.get_peft_model = lambda *args, **kwargs: swapped(make(*args, **kwargs))
    peft.inject_adapter_in_model = lambda *args, **kwargs: swapped(inject(*args, **kwargs))
    peft.PeftModel.from_pretrained = classmethod(lambda cls, *args, **kwargs: swapped(load(cls, *args, **kwargs)))


def of_lora(item):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("config_cls", peft.LoraConfig) is peft.LoraConfig


def of_ours(item, ours):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("config_cls") is ours and PLAIN.search(item.name)


def pytest_collection_modifyitems(config, items):
    chosen = [item for item in items if (of_ours(item, config.ours) if CONFIG else of_lora(item))]
    config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
    items[:] = chosen


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        reason = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = str(report.longrepr) if crash is None else crash.message
        outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        OUTCOMES[report.nodeid] = outcome, " ".join(reason.split())


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"forward passes of swapped-in layers: {dict(ROUTES)}")
    if out := os.environ.get("FORGETLESS_SWAP_OUT"):
        from argparse import Namespace

        from bench.harness import start

        head = {**start("peft-suite", Namespace(device="cpu", smoke=False), []), "command": "python -m peft_suite"}
        data = {"swap": SWAP, "head": head, "outcomes": OUTCOMES}
        data |= {"routes": dict(ROUTES), "reasons": dict(REASONS.most_common())}
        Path(out).write_text(json.dumps(data), encoding="utf-8")


def reasons(outcomes, chosen):
    """How many tests had that outcome, by the first sentence of the reason."""
    sentence = re.compile(r"(?<=\w)\. |(?<=\.)\s|\s\+ where ")
    texts = [sentence.split(reason)[0] for outcome, reason in outcomes.values() if outcome == chosen]
    return dict(Counter(texts).most_common())


def rows(ours, theirs):
    """What bench/results/peft-suite.json has as rows, from the outcomes with and without swap-in."""
    from bench.harness import row

    if (ours["swap"], theirs["swap"]) != (True, False):
        raise SystemExit("give the outcomes with swap-in first, those of FORGETLESS_SWAP=0 second")
    result = []
    for name in sorted({test.partition("::")[0] for test in ours["outcomes"]}):
        for key, run in (("swapped in", ours), ("PEFT", theirs)):
            counts = Counter(v[0] for test, v in run["outcomes"].items() if test.startswith(f"{name}::"))
            result += [row(name, key, "tests", outcome, count, "tests") for outcome, count in counts.items()]
    for name in sorted({*ours["outcomes"], *theirs["outcomes"]}):
        first, second = (run["outcomes"].get(name, ["missing"])[0] for run in (ours, theirs))
        if first != second:
            result += [
                row(name, "swapped in", "differ", first, 1, "tests"),
                row(name, "PEFT", "differ", second, 1, "tests"),
            ]
        if first == "failed":
            result.append(row(name, "swapped in", "failed tests", "failed", 1, "tests"))
    for outcome in ("skipped", "failed"):
        for reason, count in reasons(ours["outcomes"], outcome).items():
            result.append(row(reason, "swapped in", "reasons", outcome, count, "tests"))
    result += [row(way, "swapped in", "forward passes", "passes", n, "passes") for way, n in ours["routes"].items()]
    return result + [row(why, "PEFT", "forward passes", "passes", n, "passes") for why, n in ours["reasons"].items()]


if __name__ == "__main__":
    from bench.harness import RESULTS, write_json

    ours, theirs = (json.loads(Path(path).read_text()) for path in sys.argv[1:3])
    write_json(RESULTS / "peft-suite.json", {**ours["head"], "rows": rows(ours, theirs)})
