"""What every kernel needs: one dot, one rounding, one dropout mask, one tile order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from triton.runtime import driver

#: The lowest and the highest version of Triton that the kernels were tested with.
TESTED = (3, 6), (3, 9)
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
TESTED_TEXT = "tested with Triton {}.{} to {}.{}".format(*TESTED[0], *TESTED[1])
if VERSION < TESTED[0]:
    raise ImportError(f"Triton {triton.__version__} is too old for the kernels; {TESTED_TEXT}", name="triton")

# The interpreter keeps bfloat16 as raw uint16: products and roundings of it have to be spelt out.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))

# The hash of ``forgetless.ops.reference``: same constants, same arithmetic shifts.
MIX_1 = tl.constexpr(0x7FEB352D)
MIX_2 = tl.constexpr(0x846CA68B - (1 << 32))
PAIRS = tl.constexpr(0x9E3779B9 - (1 << 32))
LEVELS = 1 << 15
LOW_BITS = tl.constexpr(LEVELS - 1)

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def dot_precision(dtype: torch.dtype) -> str:
    """The input precision of float32 dots: exact, unless torch itself may use TF32, however it was told to."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


#: Ranks that a program takes at most.
MOST_BLOCK = 128


def pad_rank(R: int, most: int = MOST_BLOCK) -> int:
    """The rank as a block size: tensor cores want 16 at least, registers ``most`` at most"""
    return min(most, max(16, triton.next_power_of_2(R)))


def empty(shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """Where every launcher gets the memory it writes: outputs and partial sums, nothing else."""
    return like.new_empty(*shape, dtype=dtype)  # sizes one by one: a tuple of them costs a microsecond


_tickets: dict[tuple[torch.device, int], torch.Tensor] = {}


def tickets(count: int, like: torch.Tensor) -> torch.Tensor:  # (count or more,) int32, all zero
    """Counters for ``last_to_come``, which leaves them zero.

    A stream has one set, for its launches run one after the other. A captured graph, which may be replayed on any
    stream, gets its own for each launch.
    """
    if INTERPRET:
        return empty((count,), torch.int32, like).zero_()
    device = driver.active.get_current_device()
    if like.is_cuda and (like.get_device() != device or torch.cuda.is_current_stream_capturing()):
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    key = like.device, driver.active.get_current_stream(device)
    counters = _tickets.get(key)
    if counters is None or len(counters) < count:
        counters = torch.zeros(max(count, 4096), dtype=torch.int32, device=like.device)
        _tickets[key] = counters
    return counters


class LaunchError(RuntimeError):
    """A kernel could not be compiled or launched; ``__cause__`` is what the compiler or the driver raised."""


@contextmanager
def launching(kernel: str, like: torch.Tensor) -> Iterator[None]:
    """Launch on the device of ``like``; what a compiler or a driver raises becomes a LaunchError.

    Raises:
        LaunchError: whatever was raised, but for a lack of memory.
    """
    with torch.cuda.device_of(like):
        try:
            yield
        except (LaunchError, torch.OutOfMemoryError):  # of memory: another path would need more
            raise
        except Exception as error:  # noqa: BLE001 - compilers and drivers raise what they like
            reason = " ".join(str(error).split())[:200]
            if VERSION > TESTED[1]:
                reason += f" (Triton is {triton.__version__}; {TESTED_TEXT})"
            raise LaunchError(f"{kernel}: {type(error).__name__}: {reason}") from error


def dropping(p: float, seed: torch.Tensor | None) -> torch.Tensor | None:
    """The seed if anything is dropped; without it a kernel's dropout is not compiled."""
    if seed is None or p == 0.0:
        return None
    assert seed.dtype == torch.int32 and seed.is_contiguous() and seed.shape == (2,)
    return seed


def threshold_of(p: float) -> int:
    """The 15-bit hash value below which an element is dropped"""
    return round(p * LEVELS)


def parts_of(BLOCK_N: int, dropout: bool, arch: int) -> int:
    """In how many parts a tile's low-rank product is made: with dropout of 32 columns, so that its mask fits

    Without it in two, which spares registers; on sm_90 in one: of a joined accumulator ptxas serializes the wgmma.
    """
    if dropout:
        return max(1, BLOCK_N // 32)
    return 1 if 90 <= arch < 100 else 2


@triton.jit
def widen(x):
    """x in float32"""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x rounded to nearest even in dtype"""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        bits = tl.where(nan, bits | 0x00400000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in dtype; nothing where it is so already"""
    if x.dtype == dtype:
        return x
    return narrow(widen(x), dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in float32"""
    if INTERPRET and a.dtype == tl.bfloat16:
        return tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def mix(v):
    v = (v ^ (v >> 16)) * MIX_1
    v = (v ^ (v >> 15)) * MIX_2
    return v ^ (v >> 16)


@triton.jit
def row_key(seed_ptr, rows):
    """The mask's key of each row, from int32 row numbers"""
    return mix(mix(rows) ^ tl.load(seed_ptr))


@triton.jit
def pair_key(seed_ptr, pairs):
    """The mask's key of each pair of columns, from int32 pair numbers"""
    return mix(mix(pairs ^ PAIRS) ^ tl.load(seed_ptr + 1))


@triton.jit
def drop(x, rows, pairs, threshold):
    """x (A, 2 B) with its dropped elements zero, from (A,) row keys and (B,) pair keys: one hash serves two columns"""
    # x is split, not the hash interleaved: neighbours sit in one thread, so nothing moves and few registers live
    word = mix(rows[:, None] + pairs[None, :])
    even, odd = x.reshape(x.shape[0], x.shape[1] // 2, 2).split()
    even = tl.where((word & LOW_BITS) >= threshold, even, tl.zeros_like(even))
    odd = tl.where(((word >> 16) & LOW_BITS) >= threshold, odd, tl.zeros_like(odd))
    return tl.join(even, odd).reshape(x.shape)


@triton.jit
def last_to_come(ticket_ptr, count):
    """Whether the other programs of ``count`` have come by here already; what they stored before can then be read"""
    tl.debug_barrier()  # every thread's part is written before one thread says so
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(ticket_ptr, 0)  # for the next launch
    return last


@triton.jit
def grouped(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile (m, n) number pid, in groups of GROUP_M rows so that a wave reuses what L2 holds"""
    tiles_m = tl.cdiv(M, BLOCK_M)
    width = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = (pid // width) * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + (pid % width) % rows, (pid % width) // rows


@triton.jit
def lowrank_term(
    h_ptr, rows_m, stride_hm, stride_hr,
    up_ptr, rows_n, stride_un, stride_ur,
    dtype: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """h[rows_m] @ up[rows_n].T (BLOCK_M, BLOCK_N), any rank"""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if R <= 2 * BLOCK_R:
        for r in tl.static_range(0, R, BLOCK_R):
            acc = _lowrank_block(
                acc, r, h_ptr, rows_m, stride_hm, stride_hr, up_ptr, rows_n, stride_un, stride_ur,
                dtype, R, PRECISION, BLOCK_R,
            )  # fmt: skip
    else:  # unrolled, a rank of 200 spilt a kilobyte
        for r in tl.range(0, R, BLOCK_R, num_stages=1):
            acc = _lowrank_block(
                acc, r, h_ptr, rows_m, stride_hm, stride_hr, up_ptr, rows_n, stride_un, stride_ur,
                dtype, R, PRECISION, BLOCK_R,
            )  # fmt: skip
    return acc


@triton.jit
def _lowrank_block(
    acc, r,
    h_ptr, rows_m, stride_hm, stride_hr,
    up_ptr, rows_n, stride_un, stride_ur,
    dtype: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + h[rows_m] @ up[rows_n].T over the ranks from r to r + BLOCK_R"""
    offs_r = r + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    h_ptrs = h_ptr + rows_m[:, None] * stride_hm + offs_r.to(tl.int64)[None, :] * stride_hr
    up_ptrs = up_ptr + rows_n[None, :] * stride_un + offs_r.to(tl.int64)[:, None] * stride_ur
    h = tl.load(h_ptrs, mask=mask_r[None, :], other=0.0)
    up = tl.load(up_ptrs, mask=mask_r[:, None], other=0.0)
    return dot(cast(h, dtype), cast(up, dtype), acc, PRECISION)


@triton.jit
def lowrank_start(
    h_ptr, offs_m, M, stride_hm, stride_hr,
    up_ptr, first_n, N, stride_un, stride_ur,
    seed_ptr, threshold,
    dtype: tl.constexpr, R: tl.constexpr, HAS_DROP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """drop(h @ up.T) for rows offs_m and BLOCK_N columns from first_n on, what a GEMM's accumulator starts from"""
    # One part after the other: at once, the mask of a 128x256 tile spilt 104 bytes on sm_90; in 2 parts it took 255
    # registers, in 4 231, in 8 167, as many as without dropout.
    if PARTS > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left = lowrank_start(
            h_ptr, offs_m, M, stride_hm, stride_hr, up_ptr, first_n, N, stride_un, stride_ur,
            seed_ptr, threshold, dtype, R, HAS_DROP, PRECISION, BLOCK_R, BLOCK_M, HALF, PARTS // 2,
        )  # fmt: skip
        right = lowrank_start(
            h_ptr, offs_m, M, stride_hm, stride_hr, up_ptr, first_n + HALF, N, stride_un, stride_ur,
            seed_ptr, threshold, dtype, R, HAS_DROP, PRECISION, BLOCK_R, BLOCK_M, HALF, PARTS // 2,
        )  # fmt: skip
        return tl.join(left, right).permute(0, 2, 1).reshape(BLOCK_M, BLOCK_N)
    rows_m = (offs_m % M).to(tl.int64)
    rows_n = ((first_n + tl.arange(0, BLOCK_N)) % N).to(tl.int64)
    acc = lowrank_term(
        h_ptr, rows_m, stride_hm, stride_hr, up_ptr, rows_n, stride_un, stride_ur,
        dtype, R, PRECISION, BLOCK_R, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if HAS_DROP:
        pairs = pair_key(seed_ptr, first_n // 2 + tl.arange(0, BLOCK_N // 2))
        acc = drop(acc, row_key(seed_ptr, offs_m), pairs, threshold)
    return acc
