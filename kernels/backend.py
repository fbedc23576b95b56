"""All that the kernels offer, as one module: the names and signatures of ``forgetless.reference``.

Arguments, results and dtypes are its own too, but for float64, which the kernels do not take. A launcher asserts what
it builds on (shapes, dtypes, one device); what users pass has been checked by ``fl.ops.lowrank_linear``, with errors
that name the argument.

Safe to capture in a CUDA graph, on any stream: a launcher never waits for the card and reads nothing back from it.
What it decides (plan, tile, strips) follows from sizes, dtypes and strides alone; the dropout's seed is read by the
kernel, so a replay after the generator moved on drops anew; memory comes from torch's caching allocator
(``tl_utils.empty``), which a capture gives a pool of its own; the tickets and flags of the plan ``once`` are cleared
by a recorded memset before each launch, so that a replay starts as the first run did. Only compiling is out of place
there: run the layer once before capturing, as torch asks of every graph.

Two runs give the same bits: no float is ever added atomically, and partial sums are added in the order of rows. How
rows are cut into strips depends on sizes and tiles, never on the card or on what it does beside. Offsets are 64 bits
wide. Byte counts of every kernel are in closed form in ``bench/traffic.py`` and asserted in ``tests/test_bytes.py``.
"""

from .backward import project_outer
from .lowrank import matmul_lowrank, outer, project
from .plans import PLANS, linear_lowrank

__all__ = ["PLANS", "linear_lowrank", "matmul_lowrank", "outer", "project", "project_outer"]
