# ruff: noqa: F401
"""The public names. ``forgetless`` takes them from here when the first of them is asked for."""

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
from .penalties import Decay, Laplace, LossDeviation, NullSpace, OutputDeviation, SourceDeviation, WeightDeviation
from .retain import retain
from .switch import disabled, fuse_penalty, scaled
