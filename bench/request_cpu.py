"""CPU time of a request, thread by thread, in a server that has so many requests in flight.

On a machine with other work on it, CPU time still says what a request costs, where rates do not.
The code of another commit can be measured in the same rounds. Prints a table and writes no result.
"""

from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

from bench.harness import in_turn, options
from bench.load import CLIENTS
from bench.neighbour import checked_out
from bench.running_server import RunningServer, running_server
from bench.tables import Row, table
from bench.weights import recipe_state
from model import VARIANTS
from service.models.load import BUNDLED

SHOWN = ("event loop", "decode", "compute", "log", "other")
# By the beginning of the name of a thread; older commits give them none.
GROUPS = {"decode": "decode", "engine": "compute", "lane": "compute", "log": "log"}


def cpu_s(pid: int) -> dict[str, float]:
    """CPU seconds of the threads of a process so far, by group."""
    seconds = defaultdict[str, float](float)
    for thread in Path(f"/proc/{pid}/task").iterdir():
        name = (thread / "comm").read_text()
        group = next((of for start, of in GROUPS.items() if name.startswith(start)), "other")
        group = "event loop" if thread.name == str(pid) else group
        seconds[group] += int((thread / "schedstat").read_text().split()[0]) / 1e9
    return seconds


def measure(server: RunningServer, protocol: str, in_flight: int, seconds: float) -> Row:
    """Milliseconds of CPU for each request, by group of threads."""
    before = cpu_s(server.pid)
    load = server.load(protocol, concurrency=in_flight, seconds=seconds, warmup=0)
    spent = cpu_s(server.pid)
    return {
        "rate": load["images_per_s"],
        **{group: 1e3 * (spent[group] - before[group]) / load["requests"] for group in SHOWN},
    }


def main() -> None:
    """Print what requests of one model cost, beside it at the commit `before` if one is named."""
    chosen = options(
        "bench.request_cpu",
        __doc__,
        {"model": VARIANTS, "protocols": CLIENTS},
        before="",
        model="dat_nano",
        protocols=list(CLIENTS),
        concurrency=[8, 32],
        rounds=3,
        seconds=6.0,
    )
    name = chosen.model
    checkpoint = None if name in BUNDLED else {"model": recipe_state(name)}
    with ExitStack() as stack:
        sources: dict[str, Path | None] = {}
        if chosen.before:
            sources[chosen.before] = stack.enter_context(checked_out(chosen.before))
        sources["this"] = None
        servers = {
            code: stack.enter_context(running_server(checkpoint, source, DAT_MODEL__NAME=name))
            for code, source in sources.items()
        }
        trials = {
            (protocol, in_flight, code): partial(
                measure, servers[code], protocol, in_flight, chosen.seconds
            )
            for protocol, in_flight, code in product(chosen.protocols, chosen.concurrency, servers)
        }
        for trial in trials.values():
            trial()
        rounds = in_turn(trials, chosen.rounds)
    rows = []
    for protocol, in_flight, code in trials:
        of_rounds = [one[protocol, in_flight, code] for one in rounds]
        row = {key: mean(one[key] for one in of_rounds) for key in ["rate", *SHOWN]}
        said = {"protocol": protocol, "in flight": in_flight, "code": code}
        rows.append(said | row | {"all": sum(row[group] for group in SHOWN)})
    columns = {"protocol": "{protocol}", "in flight": "{in flight}", "code": "{code}"}
    columns |= {"answers/s": "{rate:.0f}", "CPU ms of a request": "**{all:.2f}**"}
    print(table(columns | {group: f"{{{group}:.2f}}" for group in SHOWN}, rows))


if __name__ == "__main__":
    main()
