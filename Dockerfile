# The project and its environment, for Kubernetes (deploy/kuberay) or any machine with Docker. docs/cluster.md.
#
#   docker build --tag m2f --build-arg COMMIT=$(git rev-parse HEAD) .
#   docker run --rm --gpus all --shm-size=8g --volume m2f-storage:/m2f/storage m2f dvc repro evaluate@shapes_tiny
#
# What goes in is named in .dockerignore: no data, and no keys. It runs as the user m2f.

FROM debian:bookworm-slim

# A compiler, for the kernels that are built where they run; wget, with which KubeRay looks whether Ray answers.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
    ca-certificates gcc libc6-dev make python3 python3-dev python3-venv rsync wget \
 && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 m2f && mkdir /m2f && chown m2f:m2f /m2f
WORKDIR /m2f
USER m2f
ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1

# The packages first: another commit with the same requirements.lock keeps this layer.
COPY --chown=m2f:m2f requirements.lock ./
RUN python3 -m venv .venv && .venv/bin/python -m pip install --disable-pip-version-check -r requirements.lock

COPY --chown=m2f:m2f . .
# The folders are there so that a volume in their place is the user's.
RUN make install && mkdir results storage

ARG COMMIT=
ENV PATH=/m2f/.venv/bin:$PATH M2F_GIT_COMMIT=$COMMIT RAY_USAGE_STATS_ENABLED=0 RAY_enable_metrics_collection=0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["m2f", "--help"]
