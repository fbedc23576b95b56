"""What the tests of the kernels share."""

from meter import meter

__all__ = ["meter"]
