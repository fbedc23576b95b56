"""The functional op: a frozen linear layer plus a low-rank update, on three backends."""

from .autograd import lowrank_linear
from .dispatch import backend, explain_path

__all__ = ["backend", "explain_path", "lowrank_linear"]
