"""What bfloat16 is worth on this CPU, told at the start.

Some CPUs multiply bfloat16 several times as fast as float32 (AMX), some twice (AVX512-BF16), some
only emulate it, which takes three times as long, and for the others oneDNN does not compute it.
A network gains less than its products do, so blocks of one are tried.
"""

from collections.abc import Callable
from functools import cache
from time import thread_time

import structlog
import torch
from torch import nn

from model.config import VARIANTS
from model.dat import Block
from model.fused import Stream, has_bfloat16
from model.packing import pack_layers

log = structlog.get_logger(__name__)

# Multiply-adds of an image, below which a network gains nothing: its products are too small.
LEAST_WORK = 500_000_000
_ROUNDS = 4
_WORTH_TELLING = 1.15


def advise(dtype: torch.dtype, work: int) -> None:
    """Tell in the log, once, if another precision computes faster on this CPU.

    To be called in a thread that computes alone; takes about 0.1 s the first time.

    Args:
        dtype: that the server computes in.
        work: multiply-adds of an image.
    """
    if work >= LEAST_WORK:
        _advise_once(dtype)


@cache
def _advise_once(dtype: torch.dtype) -> None:
    if dtype == torch.float32 and (times := speedup()) >= _WORTH_TELLING:
        log.info(
            "bfloat16 is faster",
            times=round(times, 1),
            how="set DAT_ENGINE__DTYPE=bfloat16; logits then move by up to 0.25",
        )
    elif dtype == torch.bfloat16 and (times := speedup()) < 1:
        log.warning(
            "bfloat16 is slow",
            times=round(times, 1),
            reason="this CPU has no instructions for it; set DAT_ENGINE__DTYPE=float32",
        )


@cache
def speedup() -> float:
    """How many times as fast as in float32 blocks of DAT-T compute in bfloat16; 0: not worth a try.

    By the CPU time of the calling thread, so that neighbours count little.
    """
    if not has_bfloat16():
        return 0.0
    exact, half = (_blocks(dtype) for dtype in (torch.float32, torch.bfloat16))
    with torch.inference_mode():
        rounds = [(_timed(exact), _timed(half)) for _ in range(_ROUNDS)][1:]
    return min(slow for slow, _ in rounds) / min(fast for _, fast in rounds)


def _blocks(dtype: torch.dtype) -> Callable[[], object]:
    """A forward pass of one block of windows and one that is deformable, for one image."""
    config, stage = VARIANTS["dat_tiny_224"], 2
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        blocks = nn.ModuleList(Block(config, stage, kind) for kind in "LD").eval()
        size = config.map_size(stage)
        tokens = torch.randn(1, *size, config.stages[stage].dim).to(dtype)
        for name, parameter in blocks.named_parameters():
            if not name.endswith("relative_position_bias_table"):
                parameter.data = parameter.data.to(dtype)
        pack_layers(blocks, size)

    def run() -> Stream:
        stream = Stream(tokens)
        for block in blocks:
            stream, *_ = block(stream)
        return stream

    return run


def _timed(run: Callable[[], object]) -> float:
    began = thread_time()
    run()
    return thread_time() - began
