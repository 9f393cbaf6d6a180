#!/usr/bin/env bash
# Everything that needs a CUDA device, in one go: the tests, then the measurements into bench/results.
# PYTHON names an interpreter with the dependencies; by default that of `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

"$python" -m pytest -m gpu
"$python" -m bench.kernels
"$python" -m bench.graphs
for dtype in bfloat16 float16 float32; do
    "$python" -m bench.engine --device cuda --dtype "$dtype" --batches 1 8 32 64 --rounds 3 --seconds 1
done
"$python" -m bench.growth --device cuda --dtype bfloat16 --batches 1 2 4 8 16 32 64 128 256
"$python" -m bench.detector --device cuda --dtype bfloat16
"$python" -m bench.server --device cuda --max-batch 64 --concurrency 1 64 --fractions 0.8 --rounds 3 --seconds 6
"$python" -m bench.report > bench/results/README.md
