# The base needs Python 3.11 or newer with venv and nothing else; both stages use the same one, because the
# virtual environment links to its interpreter.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/venv
WORKDIR /app
# An editable install needs of the source only the names of its packages, so empty ones do, and this
# layer, nearly all of the image, is rebuilt only when the dependencies change. The optional secret
# is a pip.conf with the builder's own package index; it never enters a layer.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    mkdir model service demo \
    && touch README.md model/__init__.py service/__init__.py demo/__init__.py \
    && PIP_CONSTRAINT=constraints.txt /opt/venv/bin/pip install --editable . \
    && /opt/venv/bin/pip uninstall --yes pip \
    # C++ headers and torch's own tests, 145 MB that inference does not read
    && rm -rf /opt/venv/lib/python3*/site-packages/torch/include \
             /opt/venv/lib/python3*/site-packages/torch/test

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="dat-serve" \
      org.opencontainers.image.description="Serve DAT vision models over HTTP and gRPC" \
      org.opencontainers.image.licenses="Apache-2.0"
# torch asks for the user's name, so the id has an entry in /etc/passwd.
RUN groupadd --gid 10001 dat \
    && useradd --uid 10001 --gid dat --no-create-home --home-dir /tmp --shell /usr/sbin/nologin dat
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
