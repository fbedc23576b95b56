"""forgetless: low-rank adapters that do not forget, fused into the frozen layer they sit on.

import forgetless as fl
fl.adapt(model, fl.CLoRA(rank=16, alpha=32, k=256), targets=["q_proj", "v_proj"])
loss = model(**batch).loss + fl.penalty(model)
"""

from . import methods, ops, penalties, training
from .budget import fit_budget
from .calibrate import calibrate
from .checkpoint.io import export_lora, load, save
from .consolidate import consolidate
from .folding import merge
from .layers import quantized as packed
from .methods import CLoRA, CURLoRA, LaLoRA, LoRA
from .model import adapt, adapters, drift, explain, penalty, record_drift, remove
from .peft.swap import swap_in, swap_out
from .penalties import Decay, Laplace, NullSpace, OutputDeviation, SourceDeviation, WeightDeviation
from .retain import retain
from .switch import disabled, fuse_penalty, scaled

__version__ = "0.1.0"

__all__ = [
    "CLoRA",
    "CURLoRA",
    "Decay",
    "LaLoRA",
    "Laplace",
    "LoRA",
    "NullSpace",
    "OutputDeviation",
    "SourceDeviation",
    "WeightDeviation",
    "adapt",
    "adapters",
    "calibrate",
    "consolidate",
    "disabled",
    "drift",
    "explain",
    "export_lora",
    "fit_budget",
    "fuse_penalty",
    "load",
    "merge",
    "methods",
    "ops",
    "packed",
    "penalties",
    "penalty",
    "record_drift",
    "remove",
    "retain",
    "save",
    "scaled",
    "swap_in",
    "swap_out",
    "training",
]
