# The base needs Python 3.11 or newer with venv and nothing else; all stages use the same one, because
# the virtual environment links to its interpreter.
ARG BASE_IMAGE=python:3.11-slim-bookworm
# What the image computes on: cpu, or cuda, which adds torch's build for CUDA and a C compiler.
ARG DEVICE=cpu

FROM ${BASE_IMAGE} AS base-cpu

FROM ${BASE_IMAGE} AS base-cuda
# At the first kernel of a process Triton builds its launcher against the driver of the machine, so
# that this cannot be done here. The launcher is a Python extension, whose headers Debian packages
# apart; the official images of Python have them.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && include=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include", "posix_prefix"))') \
    && if [ ! -e "$include/Python.h" ]; \
        then apt-get install --yes --no-install-recommends libpython3-dev; fi \
    && rm -rf /var/lib/apt/lists/*
# Of the driver the NVIDIA runtime mounts what computes and NVML; which GPUs, the caller says.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM ${BASE_IMAGE} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/venv
WORKDIR /app
ARG DEVICE
# Which build of torch for CUDA: a driver that is too old for it needs another.
ARG CUDA_CONSTRAINTS=constraints-cuda.txt
# An editable install needs of the source only the names of its packages, so empty ones do, and this
# layer, nearly all of the image, is rebuilt only when the dependencies change. The optional secret
# is a pip.conf with the builder's own package index; it never enters a layer.
COPY pyproject.toml constraints*.txt ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    mkdir model service demo \
    && touch README.md model/__init__.py service/__init__.py demo/__init__.py \
    && if [ "$DEVICE" = cuda ]; then set -- --constraint "$CUDA_CONSTRAINTS"; fi \
    && PIP_CONSTRAINT=constraints.txt /opt/venv/bin/pip install --editable . "$@" \
    && if [ "$DEVICE" = cuda ]; then /opt/venv/bin/python -c 'import sys, torch; \
            sys.exit(None if torch.version.cuda else "this build of torch is not for CUDA")'; fi \
    && /opt/venv/bin/pip uninstall --yes pip \
    # C++ headers and torch's own tests, 145 MB that inference does not read
    && rm -rf /opt/venv/lib/python3*/site-packages/torch/include \
             /opt/venv/lib/python3*/site-packages/torch/test

FROM base-${DEVICE}
LABEL org.opencontainers.image.title="dat-serve" \
      org.opencontainers.image.description="Serve DAT vision models over HTTP and gRPC" \
      org.opencontainers.image.licenses="Apache-2.0"
# torch asks for the user's name, so the id has an entry in /etc/passwd.
RUN groupadd --gid 10001 dat \
    && useradd --uid 10001 --gid dat --no-create-home --home-dir /tmp --shell /usr/sbin/nologin dat \
    # A new volume that is mounted here takes the owner over.
    && install --directory --owner dat --group dat /tmp/cache
COPY --from=builder /opt/venv /opt/venv
WORKDIR /app
COPY . .
# The server is not the owner of these files, and a checkout may keep them from everyone else.
RUN chmod -R a+rX .
# With every cache under /tmp the root file system can be read-only.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    CUDA_CACHE_PATH=/tmp/cache/cuda
USER 10001:10001
# HTTP, gRPC, metrics
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["dat-serve", "healthcheck"]
# Exec form: the server itself is process 1 and gets the stop signal.
CMD ["dat-serve"]
