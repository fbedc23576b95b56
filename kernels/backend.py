"""All that the kernels offer, as one module: the names and signatures of ``forgetless.reference``."""

from .backward import project_outer
from .lowrank import matmul_lowrank, outer, project
from .plans import PLANS, linear_lowrank

__all__ = ["PLANS", "linear_lowrank", "matmul_lowrank", "outer", "project", "project_outer"]
