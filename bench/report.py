"""Print every result file as Markdown: `python -m bench.report`.

The tables of `NAME-….json` are made by the module `bench.NAME`.
"""

import json
from importlib import import_module

from bench.harness import RESULTS


def main() -> None:
    """Print the tables of all result files, each with its machine and its command."""
    print("# Results\n\nMade by `python -m bench.report`; see `bench/README.md`.")
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        machine = result["machine"]
        tables = import_module(f"bench.{path.stem.partition('-')[0]}").tables(result)
        print(f"\n## {path.stem}\n\n`{machine['command']}`\n")
        print(
            f"{machine['cpu']}, {machine['cores']} cores, GPU: {machine['gpu']}, "
            f"torch {machine['torch']}, {machine['threads']} threads, {machine['date']}, "
            f"commit {machine['commit']}\n\n{tables}"
        )


if __name__ == "__main__":
    main()
