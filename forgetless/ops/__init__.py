"""The functional op: a frozen linear layer plus a low-rank update, on three backends."""

from .autograd import backend, explain_path, lowrank_linear

__all__ = ["backend", "explain_path", "lowrank_linear"]
