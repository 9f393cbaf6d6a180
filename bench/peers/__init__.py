"""Our server beside other model servers that compute with our engine."""

from bench.harness import LATENCY, RATIO, Row, in_short, table


def tables(result: Row) -> str:
    """The tables of one `peers-*.json`."""
    servers = {
        "server": "{side}",
        "setting": "{setting}",
        "first answer after s": "{start_s:.1f}",
        "memory MB": "{memory:/1e6 .0f}",
    }
    loads = {
        "in flight": "{concurrency}",
        "server": "{side}",
        "requests/s": "{requests_per_s:rate}",
        "requests/s / ours (range)": RATIO,
        "p50 / p90 / p99 ms": LATENCY,
        "server CPU ms / request": "{cpu_ms:.2f}",
        "server CPUs": "{server_cpus:.2f}",
        "client CPUs": "{client_cpus:.2f}",
        "answers": "{answers}",
    }
    rows = [row | {"answers": in_short(row["statuses"])} for row in result["loads"]]
    failed = [f"{one['side']} ({one['setting']}) failed: {one['why']}" for one in result["failed"]]
    return "\n\n".join([table(servers, result["servers"]), table(loads, rows), *failed])
