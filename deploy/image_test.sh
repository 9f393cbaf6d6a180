#!/usr/bin/env bash
# Builds the image, `cpu` or `cuda`, and takes it through its life as an orchestrator would: start,
# ready, one answer, SIGTERM, exit 0; the one for CUDA on the CPU, and what its kernels need is tried
# as far as that goes without a GPU. Needs root and Debian's apt, no container engine and no image
# registry: the base is made with debootstrap, the build and the run are buildah's.
#
# Usage: image_test.sh [cpu|cuda]
set -euo pipefail
cd "$(dirname "$0")/.."

readonly device=${1:-cpu}
readonly suite=bookworm
readonly packages=python3,python3-venv,ca-certificates
readonly cache=${XDG_CACHE_HOME:-$HOME/.cache}/dat-serve
readonly base_archive=$cache/base-$suite.tar.gz
readonly ready_within_s=90
readonly stopped_within_s=60 # the default drain grace is 30 s

export BUILDAH_ISOLATION=chroot

say() { printf 'image-test: %s\n' "$*"; }
fail() {
    say "FAILED: $*" >&2
    exit 1
}

install_tools() {
    command -v buildah >/dev/null && command -v debootstrap >/dev/null && return
    say "installing buildah and debootstrap"
    { apt-get update && apt-get install --yes --no-install-recommends buildah debootstrap; } \
        >"$work/apt.log" 2>&1 \
        || fail "buildah and debootstrap are missing and apt cannot install them: $(tail -n 3 "$work/apt.log")"
}

make_base() {
    local mirror
    mirror=$(apt-get indextargets --format "\$(RELEASE) \$(SITE)" 'Created-By: Packages' \
        | awk -v suite=$suite '$1 == suite && !found++ { print $2 }')
    [[ -n $mirror ]] || fail "apt has no source for Debian $suite to make the base image from"
    timeout 900 debootstrap --variant=minbase --include=$packages $suite "$work/base" "$mirror" \
        >"$work/debootstrap.log" 2>&1 \
        || fail "debootstrap: $(tail -n 3 "$work/debootstrap.log")"
    mkdir -p "$cache"
    # Moved into place when whole, so that an interrupted run leaves no half archive behind.
    tar --create --gzip --numeric-owner --one-file-system --directory "$work/base" \
        --exclude './var/cache/apt/*' --exclude './var/lib/apt/lists/*' \
        --file "$base_archive.$$" .
    mv "$base_archive.$$" "$base_archive"
    rm -rf --one-file-system "$work/base"
}

cleanup() {
    local status=$?
    trap - EXIT
    if [[ -n ${run_pid:-} && -d /proc/$run_pid ]]; then
        kill -KILL "$(server_process)" || true
        wait "$run_pid" || true
    fi
    if [[ -d $work/store ]]; then
        "${store[@]}" rm --all >/dev/null || true
        "${store[@]}" rmi --all --force >/dev/null || true
    fi
    rm -rf --one-file-system "$work"
    exit "$status"
}

# The server's process: below buildah and the copies of itself that it starts.
server_process() {
    local pid=$run_pid child
    while [[ $(cat "/proc/$pid/comm" 2>/dev/null) == *buildah* ]]; do
        child=$(pgrep --parent "$pid" --oldest) || break
        pid=$child
    done
    echo "$pid"
}

[[ $device == cpu || $device == cuda ]] || fail "there is no image for $device: cpu or cuda"
[[ $EUID -eq 0 ]] || fail "must run as root (debootstrap and buildah's chroot isolation need it)"
for tool in python3 curl pgrep; do
    command -v $tool >/dev/null || fail "$tool is missing"
done
work=$(mktemp --directory)
readonly work
# A store of our own: nothing of it mixes with, or stays among, the machine's images. vfs needs no
# support from the kernel, so it also works inside a container.
store=(buildah --root "$work/store" --runroot "$work/run"
    --storage-driver "${STORAGE_DRIVER:-vfs}")
readonly store
trap cleanup EXIT
trap 'exit 130' INT TERM
install_tools

if [[ ! -f $base_archive ]]; then
    say "making the Debian $suite base (kept at $base_archive; delete it to renew)"
    make_base
fi
scratch=$("${store[@]}" from scratch)
"${store[@]}" add --quiet "$scratch" "$base_archive" / >/dev/null
"${store[@]}" commit --quiet --rm "$scratch" dat-serve-base >/dev/null

say "building"
mounts=()
while read -r path; do
    mounts+=(--volume "$path:$path:ro")
done < <(python3 deploy/pip_sources.py "$work/pip.conf")
started=$SECONDS
# The docker format carries HEALTHCHECK, which the OCI format drops.
timeout 1800 "${store[@]}" bud --format docker --pull=never \
    --build-arg BASE_IMAGE=localhost/dat-serve-base --build-arg "DEVICE=$device" --secret "id=pip_conf,src=$work/pip.conf" \
    ${mounts[@]+"${mounts[@]}"} --tag dat-serve . >"$work/build.log" 2>&1 \
    || fail "the build: $(tail -n 20 "$work/build.log")"
size=$("${store[@]}" images --format '{{.Size}}' localhost/dat-serve)
base_size=$("${store[@]}" images --format '{{.Size}}' localhost/dat-serve-base)
say "built in $((SECONDS - started)) s, $size of which the base is $base_size"

from_image() { "${store[@]}" inspect --type image --format "$1" localhost/dat-serve; }
mapfile -t command < <(from_image '{{range .Docker.Config.Cmd}}{{println .}}{{end}}' | sed '/^$/d')
mapfile -t healthcheck < <(
    from_image '{{range .Docker.Config.Healthcheck.Test}}{{println .}}{{end}}' | sed '/^$/d'
)
[[ ${healthcheck[0]} == CMD ]] || fail "HEALTHCHECK is not in exec form: ${healthcheck[*]}"

# chroot isolation shares the machine's network, so the ports are whichever are free.
read -r http_port grpc_port metrics_port < <(python3 -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in sockets))')
container=$("${store[@]}" from --pull=never localhost/dat-serve)
# As in the compose file: nothing on /tmp can be executed, but what is compiled can.
readonly compiled=$work/compiled
install --directory --owner "$(from_image '{{.Docker.Config.User}}' | cut --delimiter : --fields 1)" \
    "$compiled"
# shellcheck disable=SC2054 # commas between the options of a mount
in_container=("${store[@]}" run
    --mount type=tmpfs,destination=/tmp,tmpfs-mode=1777,noexec,nosuid,nodev
    --volume "$compiled:/tmp/cache" --env "DAT_SERVER__HTTP_PORT=$http_port"
    --env "DAT_SERVER__GRPC_PORT=$grpc_port" --env "DAT_SERVER__METRICS_PORT=$metrics_port")
show_log() { sed 's/^/    /' "$work/server.log" | tail -n 20 >&2; }


# Starts the server with what else `buildah run` is to be told.
start() {
    say "starting: ${command[*]} $*"
    "${in_container[@]}" "$@" "$container" -- "${command[@]}" >"$work/server.log" 2>&1 &
    run_pid=$!
    started=$SECONDS
    until curl --silent --fail --max-time 2 --output /dev/null "http://127.0.0.1:$http_port/health/ready"; do
        [[ -d /proc/$run_pid ]] || { show_log; fail "the server ended before it was ready"; }
        ((SECONDS - started < ready_within_s)) || { show_log; fail "not ready within $ready_within_s s"; }
        sleep 0.5
    done
    say "ready after $((SECONDS - started)) s"
}

classify() {
    local samples=(demo/samples/*.jpg) answer
    answer=$(curl --silent --show-error --fail-with-body --max-time 30 \
        --header 'Content-Type: image/jpeg' --data-binary "@${samples[0]}" \
        "http://127.0.0.1:$http_port/v1/classify?top_k=3") \
        || { show_log; fail "${samples[0]} was not classified: $answer"; }
    [[ $answer == *'"status":"ok"'* ]] || fail "${samples[0]} was not classified: $answer"
    say "${samples[0]}: $answer"
}

stop() {
    kill -TERM "$server_pid"
    started=$SECONDS
    while [[ -d /proc/$server_pid ]]; do
        ((SECONDS - started < stopped_within_s)) || { show_log; fail "alive $stopped_within_s s after SIGTERM"; }
        sleep 0.2
    done
    status=0
    wait "$run_pid" || status=$?
    run_pid=
    [[ $status -eq 0 ]] || { show_log; fail "exit status $status after SIGTERM, not 0"; }
    say "exit 0, $((SECONDS - started)) s after SIGTERM"
}

start --env DAT_ENGINE__DEVICE=cpu
server_pid=$(server_process)
uid=$(awk '$1 == "Uid:" { print $2 }' "/proc/$server_pid/status")
[[ $uid != 0 ]] || fail "the server runs as root"
say "process $server_pid runs as uid $uid"

while read -r path; do
    curl --silent --fail --max-time 5 --output /dev/null "http://127.0.0.1:$http_port$path" \
        || fail "the probe of $path fails"
done < <(sed -n 's/^ *path: //p' deploy/kubernetes/base/deployment.yaml)
curl --silent --fail --max-time 5 --output /dev/null "http://127.0.0.1:$metrics_port/metrics" \
    || fail "there are no metrics"
say "Kubernetes' probes and the metrics answer"

healthy() { timeout 30 "${in_container[@]}" "$container" -- "${healthcheck[@]:1}" >/dev/null 2>&1; }
healthy || fail "the health check says no to a ready server"
say "health check passes"
classify

root=$("${store[@]}" mount "$container")
written=$(cd "$root" && find . -xdev -path ./tmp -prune -o -uid "$uid" -print)
[[ -z $written ]] || fail "written outside of /tmp, so a read-only root would break it: $written"
say "nothing written outside of /tmp"
[[ $(stat --format %u "$root/tmp/cache") == "$uid" ]] \
    || fail "a new volume on /tmp/cache would not belong to the server"

stop
! healthy || fail "the health check says yes to a stopped server"
say "health check fails once stopped"

if [[ $device == cpu ]]; then
    [[ ! -e $root/usr/bin/gcc ]] || fail "the image for the CPU carries a C compiler"
    say "passed"
    exit
fi

start --env DAT_ENGINE__DEVICE=auto
server_pid=$(server_process)
classify
stop

status=0
timeout 60 "${in_container[@]}" --env DAT_ENGINE__DEVICE=cuda "$container" -- "${command[@]}" \
    >"$work/server.log" 2>&1 || status=$?
[[ $status -ne 0 && $status -ne 124 ]] || { show_log; fail "on CUDA without a GPU: exit status $status"; }
grep --quiet 'sees no GPU' "$work/server.log" || { show_log; fail "on CUDA without a GPU: no word of why"; }
say "on CUDA without a GPU: exit status $status, $(grep 'sees no GPU' "$work/server.log" | tail -n 1)"

# What Triton does before the first kernel: it compiles its launcher in a temporary folder and loads
# it from its cache. The driver's library, which it links, is an empty one here; lazily bound, its
# functions are not missed until they are called.
launcher() {
    timeout 120 "${in_container[@]}" "$@" --env LD_LIBRARY_PATH=/tmp/cache/driver \
        --env TRITON_LIBCUDA_PATH=/tmp/cache/driver "$container" -- \
        python -c 'import os, sys; sys.setdlopenflags(os.RTLD_LAZY)
from triton.backends.nvidia.driver import CudaUtils; CudaUtils()' >"$work/launcher.log" 2>&1
}
"${in_container[@]}" "$container" -- sh -c 'mkdir /tmp/cache/driver && gcc -shared -x c /dev/null \
    -Wl,-soname,libcuda.so.1 -o /tmp/cache/driver/libcuda.so.1' || fail "the C compiler does not work"
launcher || fail "Triton cannot build its launcher: $(tail -n 3 "$work/launcher.log")"
[[ -n $(find "$compiled/triton" -name 'cuda_utils*.so') ]] || fail "the launcher is not in the cache"
if launcher --env TRITON_CACHE_DIR=/tmp/triton || ! grep --quiet 'failed to map segment' "$work/launcher.log"; then
    fail "the launcher is not refused from /tmp, so this has shown nothing"
fi
say "Triton's launcher is built, kept and loaded from the cache, and would not be from /tmp"

install --mode 644 tests/model/kernels/sm_90.py "$work/sm_90.py"
kernels=$(timeout 300 "${in_container[@]}" --volume "$work/sm_90.py:/sm_90.py:ro" "$container" -- \
    python /sm_90.py) || fail "the kernels do not compile"
say "kernels compiled for sm_90 in the image: $(grep --only-matching '"kernel"' <<<"$kernels" | wc --lines)"
say "passed"
