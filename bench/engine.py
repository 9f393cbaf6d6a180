"""Time the engine of the service against the eager baseline, side by side.

Both take the same pixels and return probabilities, with the same weights and threads, in float32
on a CPU, each in a process as it would be run (`bench.rival`). Rounds alternate between the
two, so that a machine that slows down slows both; the ratio is taken per round. A large matrix
product is timed in the same rounds: nothing that multiplies matrices is faster.
"""

from collections.abc import Callable, Mapping
from functools import partial
from statistics import mean, median

import numpy as np
import torch
from numpy.typing import NDArray

from bench.baseline import CONFIGS, create_baseline
from bench.harness import RATIO, Row, alternate, options, publish, ratio, table
from bench.memory import ALL_KEPT
from bench.open_engine import OpenEngine
from bench.rival import Pixels, Rival, Run, Timed
from bench.weights import recipe_checkpoint, recipe_state
from model import VARIANTS, load_model
from model.cost import flops
from model.normalise import Normalise
from service import process
from service.engine.device import Device
from service.engine.items import ClassificationInput, Wanted
from service.memory import keep_freed

PRODUCT_SIDE = 4096  # of both matrices


def open_engine(name: str, device: str, threads: int, *, dtype: str, max_batch: int) -> Run:
    """Load the engine as the service does, with `explain` as an option of its runs."""
    network = load_model(recipe_checkpoint(name), name)
    engine = OpenEngine(network, Device(device, threads), dtype, max_batch=max_batch)
    keep_freed()

    def run(pixels: Pixels, *, explain: bool = False) -> NDArray[np.float32]:
        outputs = engine.run(
            [ClassificationInput(image, Wanted(points=explain)) for image in pixels]
        )
        return np.stack([output.scores[np.argsort(output.classes)] for output in outputs])

    return run


def open_baseline(name: str, threads: int) -> Run:
    """Load the baseline."""
    torch.set_num_threads(threads)
    model = create_baseline(name)
    # Its geometry is in its state too.
    model.load_state_dict(model.state_dict() | recipe_state(name))
    normalise = Normalise()

    def run(pixels: Pixels) -> NDArray[np.float32]:
        with torch.inference_mode():
            images = normalise(torch.from_numpy(pixels)).contiguous()
            scores: NDArray[np.float32] = model(images).softmax(-1).numpy()
        return scores

    return run


def open_product(threads: int, dtype: str = "float32") -> Run:
    """A product of two square matrices in place of a classifier."""
    torch.set_num_threads(threads)
    left, right = torch.rand(2, PRODUCT_SIDE, PRODUCT_SIDE).to(getattr(torch, dtype))

    def run(_: Pixels) -> NDArray[np.float32]:
        with torch.inference_mode():
            corner: NDArray[np.float32] = (left @ right)[:1, :1].float().numpy()
        return corner

    return run


def open_rivals(name: str, threads: int, max_batch: int) -> dict[str, Rival]:
    """Load the sides of the comparison, each in its process.

    `keeping` is the baseline in a process that keeps the memory that it frees.
    """
    baseline = partial(open_baseline, name, threads)
    engine = partial(open_engine, name, "cpu", threads, dtype="float32", max_batch=max_batch)
    return {
        "baseline": Rival(baseline, name),
        "keeping": Rival(baseline, name, ALL_KEPT),
        "engine": Rival(engine, name, process.ENVIRONMENT),
        "product": Rival(partial(open_product, threads), name),
    }


def compare(
    name: str, rivals: Mapping[str, Rival], batch: int, *, rounds: int, seconds: float
) -> Row:
    """Time all on one batch in alternating rounds, after one round that is thrown away."""
    sides: dict[str, Callable[[], Timed]] = {
        side: partial(rival.time, batch, seconds) for side, rival in rivals.items()
    }
    sides["explained"] = partial(rivals["engine"].time, batch, seconds, explain=True)
    timed = alternate(sides, rounds, unmeasured=1)
    means = {side: [mean(one.durations) for one in of_side] for side, of_side in timed.items()}
    engine, product = means["engine"], means["product"]
    # Of multiply-adds alike.
    work = batch * flops(VARIANTS[name]) / PRODUCT_SIDE**3
    of_product = [work * seconds for seconds in product]
    return {
        "batch": batch,
        **{
            side: {"images_per_s": median(batch / seconds for seconds in means[side])}
            for side in ("baseline", "keeping", "engine")
        },
        **ratio(means["baseline"], engine),
        "ratio_to_keeping": ratio(means["keeping"], engine)["ratio"],
        "product_gflops": 2e-9 * PRODUCT_SIDE**3 / median(product),
        "share_of_product_rate": ratio(of_product, engine)["ratio"],
        "explained_over_plain_time": ratio(means["explained"], engine)["ratio"],
        "max_abs_difference": largest_difference(timed["baseline"], timed["engine"]),
    }


def largest_difference(ones: list[Timed], others: list[Timed]) -> float:
    """Between the probabilities of two sides."""
    return float(np.abs(ones[0].scores - others[0].scores).max())


def tables(result: Row) -> str:
    """The table of one `engine-*.json`."""
    columns = {
        "batch": "{batch}",
        "baseline img/s": "{baseline[images_per_s]:.1f}",
        "engine img/s": "{engine[images_per_s]:.1f}",
        "engine / baseline (range)": RATIO,
        "engine / baseline that keeps its memory": "{ratio_to_keeping:.2f}",
        "share of a matrix product's rate": "{share_of_product_rate:.0%}",
        "time with points / without": "{explained_over_plain_time:.3f}",
    }
    return table(columns, result["batches"])


def main() -> None:
    """Time the models of the command line, one after another."""
    chosen = options(
        "bench.engine",
        __doc__,
        {"models": CONFIGS},
        models=list(CONFIGS),
        batches=[1, 2, 4, 8],
        rounds=7,
        seconds=2.0,
        threads=None,
    )
    for name in chosen.models:
        rivals = open_rivals(name, chosen.threads, max(chosen.batches))
        rows = [
            compare(name, rivals, batch, rounds=chosen.rounds, seconds=chosen.seconds)
            for batch in chosen.batches
        ]
        for rival in rivals.values():
            rival.close()
        publish(f"engine-{name}-cpu-float32", tables, chosen, batches=rows)


if __name__ == "__main__":
    main()
