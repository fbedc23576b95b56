"""Penalties: what is added to the loss so that the model does not forget. One file a family; see ``base``."""

from .base import PENALTIES, Penalty, PenaltyState, register
from .decay import Decay
from .deviation import OutputDeviation, SourceDeviation, WeightDeviation
from .laplace import Laplace
from .loss_deviation import LossDeviation
from .nullspace import NullSpace

__all__ = [
    "PENALTIES",
    "Decay",
    "Laplace",
    "LossDeviation",
    "NullSpace",
    "OutputDeviation",
    "Penalty",
    "PenaltyState",
    "SourceDeviation",
    "WeightDeviation",
    "register",
]
