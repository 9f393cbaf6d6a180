#!/usr/bin/env bash
# Everything that needs a CUDA device: the tests, then the measurements into bench/results.
# Arguments choose steps by their names; a step that fails does not stop those after it.
# PYTHON names an interpreter with the dependencies; by default that of `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
chosen=("$@")
known=() failed=()

step() {
    local name=$1
    shift
    known+=("$name")
    if ((${#chosen[@]})) && [[ " ${chosen[*]} " != *" $name "* ]]; then
        return
    fi
    echo "== $name: $*"
    "$@" || failed+=("$name")
}

# Where the two hottest kernels spend their time, by the profiler that comes with CUDA.
profile() {
    ncu --clock-control none --section SpeedOfLight --section MemoryWorkloadAnalysis \
        --section Occupancy --section WarpStateStats --section SchedulerStats \
        --kernel-name 'regex:_deformable_attention|_local_attention' \
        --log-file bench/results/kernels-cuda-ncu.txt "$python" -m bench.kernels --once
}

report() {
    "$python" -m bench.report > bench/results/README.md
}

step tests "$python" -m pytest -m gpu
step kernels "$python" -m bench.kernels
step profile profile
step graphs "$python" -m bench.graphs
for dtype in bfloat16 float16 float32; do
    step "engine-$dtype" "$python" -m bench.engine --device cuda --dtype "$dtype" \
        --batches 1 8 32 64 --rounds 3 --seconds 1
done
step growth "$python" -m bench.growth --device cuda --dtype bfloat16 \
    --batches 1 2 4 8 16 32 64 128 256
step detector "$python" -m bench.detector --device cuda --dtype bfloat16
step server "$python" -m bench.server --device cuda --max-batch 64 --concurrency 1 64 \
    --fractions 0.8 --rounds 3 --seconds 6
step report report

for name in "${chosen[@]}"; do
    if [[ " ${known[*]} " != *" $name "* ]]; then
        echo "no such step: $name; there are ${known[*]}" >&2
        failed+=("$name")
    fi
done
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
