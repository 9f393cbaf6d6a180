#!/usr/bin/env bash
# All that needs a CUDA device, in two parts of at most six minutes each; bench/gpu.py has the steps.
#
#   bash bench/gpu.sh prepare         on a machine with a package index: wheels into .whl
#   bash bench/gpu.sh first [STEP…]   on the GPU machine: what is right, then how fast it is
#   bash bench/gpu.sh second [STEP…]  there: the server, compilation, kernels one by one
#
# Python 3.12 with torch 2.11 or later is enough there, with .whl beside the tree and no network.
# In a checkout with an environment (`make test`) nothing needs to be prepared.
# OUT is the folder for results, by default bench/results; DEVICE=cpu rehearses; PYTHON names an
# interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:?prepare, first or second}
shift
python=${PYTHON:-.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3

prepare() {
    local wanted platforms=() tag
    rm -rf .whl
    mkdir .whl
    # What is not tracked travels by name, and is nobody's to commit.
    echo '*' > .whl/.gitignore
    wanted=$("$python" -m deploy.wheels)
    for tag in manylinux_2_{28,27,26,24,17,12,5} manylinux{2014,2010,1}; do
        platforms+=(--platform "${tag}_x86_64")
    done
    # shellcheck disable=SC2086  # one requirement a word
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp --abi cp312 --abi abi3 --abi none "${platforms[@]}" --dest .whl $wanted
    git describe --always --abbrev=12 --exclude='*' --dirty > .whl/commit
    local files
    files=$(git ls-files --cached --others --exclude-standard -z | xargs -0 du -cb | tail -1 | cut -f1)
    echo "travels: $(((files + $(du -sb .whl | cut -f1)) >> 10)) KiB, of which .whl $(du -sk .whl | cut -f1)"
}

# What the wheels hold, into a folder of its own that replaces nothing of the interpreter's.
install() {
    local site=${TMPDIR:-/tmp}/dat-serve-$UID
    if [[ ! -d .whl ]]; then
        echo "$python has no dat-serve, and there are no wheels: bash bench/gpu.sh prepare" >&2
        exit 1
    fi
    rm -rf "$site"
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" .whl/*.whl
    # The server asks for its own version.
    mkdir "$site/dat_serve-0.dist-info"
    printf 'Metadata-Version: 2.1\nName: dat-serve\nVersion: 0\n' \
        > "$site/dat_serve-0.dist-info/METADATA"
    export PYTHONPATH=$site BENCH_COMMIT
    BENCH_COMMIT=$(< .whl/commit)
}

if [[ $part == prepare ]]; then
    prepare
    exit
fi
if ! "$python" -c 'import importlib.metadata; importlib.metadata.version("dat-serve")' 2> /dev/null; then
    install
fi
exec "$python" -m bench.gpu "$part" "$@"
