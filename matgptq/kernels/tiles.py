"""Which kernel and tile a problem is computed with: data in, data out, no GPU needed.

``choose(problem)`` is pure and total over what ``can_implement`` accepts. The rules are in `stream` (linear.cu and
few.cu), `hopper` and `many`; their thresholds name their GPU and date.
"""

import math
from dataclasses import dataclass, replace

from . import hopper, many, stream
from .hopper import HopperConfig
from .many import ManyConfig
from .problem import Problem as Problem
from .problem import can_implement as can_implement
from .stream import Config


@dataclass(frozen=True)
class Gate:
    """gate.cu, after a kernel whose tile is not gated; it has nothing to choose."""

    threads: int = 256
    tokens: int = 16
    cluster: int = 1


@dataclass(frozen=True)
class Norm:
    """norm.cu, after a kernel that does not share the norm with the next; it has nothing to choose."""

    threads: int = 512
    tokens: int = 1
    cluster: int = 1


AnyConfig = Config | HopperConfig | ManyConfig


def gate_follows(problem: Problem, config: AnyConfig) -> bool:
    """Whether a gated problem's tile computes its layer, so that `Gate` is to follow."""
    return problem.gated and not config.gated


def norm_follows(problem: Problem) -> bool:
    """Whether the norm after a call is `Norm`'s work."""
    return problem.summed and not problem.shares_norm


def kernels(problem: Problem, config: AnyConfig) -> tuple["AnyConfig | Gate | Norm", ...]:
    """What is launched for a problem, in order."""
    gate = (Gate(),) if gate_follows(problem, config) else ()
    norm = (Norm(),) if norm_follows(problem) else ()
    return config, *gate, *norm


def defines(problem: Problem, config: AnyConfig | Gate | Norm) -> dict[str, str]:
    """The macros that a kernel is compiled with; KERNEL names its source."""
    number = {"FORMAT": "Half" if problem.dtype == "float16" else "BFloat"}
    if isinstance(config, Gate | Norm):
        return {"KERNEL": type(config).__name__.lower(), **number}
    of_problem = {
        **number,
        "BITS": str(problem.bits),
        "ROUND": str(int(problem.rounds)),
        "SHIFT": str(problem.shift),
        "GROUP_SIZE": str(max(problem.group_size, 0)),
    }
    if isinstance(config, HopperConfig):
        return {"KERNEL": "hopper", **of_problem, **hopper.defines(problem, config)}
    if isinstance(config, ManyConfig):
        return {"KERNEL": "many", **of_problem, **many.defines(config)}
    return {"KERNEL": "few" if config.few else "linear", **of_problem, **stream.defines(problem, config)}


def architecture(problem: Problem, config: AnyConfig | Gate | Norm) -> str:
    """What a kernel is compiled for."""
    return f"sm_{problem.sm}a" if isinstance(config, HopperConfig) else f"sm_{problem.sm}"


def supports(config: AnyConfig, problem: Problem) -> bool:
    """Whether a tile fits the problem and its GPU."""
    if isinstance(config, HopperConfig):
        return hopper.supports(config, problem)
    if isinstance(config, ManyConfig):
        return many.supports(config, problem)
    return stream.supports(config, problem)


def choose(problem: Problem) -> AnyConfig:
    """The tile, and with it the kernel, for a problem; raises ValueError for one that ``can_implement`` refuses.

    A gated problem may get a tile that is not: one for its ``layer``, which `Gate` follows.
    """
    able, reason = can_implement(problem)
    if not able:
        raise ValueError(reason)
    layer = problem.layer
    config = hopper.choose(layer) or stream.few_choice(layer) or _many_or_linear(layer)
    if problem.gated:
        config = gated_choice(problem, config) or config
    return config


def gated_choice(problem: Problem, config: AnyConfig) -> AnyConfig | None:
    """A tile of the layer's as one with row tiles of both layers: where it has but one, half as many warps share its k.

    None for many.cu, where it does not fit, or where so few more blocks than SMs would take longer than `Gate`: of 10
    shapes on an H200 (2026-11-23, bfloat16, 2 to 8 bits, M 1 to 8) 9728 x 2560, 12288 x 4096 and 17408 x 5120, 8 bits.
    """
    if isinstance(config, ManyConfig):
        return None
    config = replace(config, gated=True)
    if isinstance(config, HopperConfig):
        return config if supports(config, problem) else None
    if config.warps_n * config.row_tiles % 2:
        config = replace(config, warps_n=2 * config.warps_n, warps_k=config.warps_k // 2)
        if not config.warps_k:
            return None
        config = stream.with_chunk(problem, config)
        waves = stream.grid(problem, config)[2] / 132
        if not config.few and waves > 1 and math.ceil(waves) > 1.25 * waves:
            return None
    return config if stream.fits(config, problem) else None


def _many_or_linear(problem: Problem) -> Config | ManyConfig:
    config = stream.linear_choice(problem)
    return (many.choose(problem, config.rows, config.tokens) if problem.sm != 90 else None) or config
