# syntax=docker/dockerfile:1
# onewan with PyTorch for CUDA (NVIDIA). From the root of the repository:
#   docker build -f containers/cuda.Dockerfile -t onewan:cuda .
# PyTorch's wheels contain CUDA: the host needs the driver and NVIDIA's container toolkit only.
# docs/containers.md tells more. rocm.Dockerfile differs in nothing but the accelerator.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# The virtual environment. Its compilers and caches stay in this stage.
FROM ${PYTHON_IMAGE} AS build
# The index of another build, by the address that pytorch.org gives after --index-url.
ARG TORCH_INDEX
RUN python -m venv /opt/onewan
ENV PATH=/opt/onewan/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
COPY constraints.txt ./
# A layer of its own, since it is the largest and changes least: the version that CI tests. Without an
# index it is the build for CUDA.
RUN --mount=type=cache,target=/root/.cache/pip \
    grep '^torch==' constraints.txt > torch.txt \
    && pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --requirement torch.txt
COPY pyproject.toml README.md LICENSE ./
COPY docs ./docs
COPY src ./src
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt ".[all]"

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="onewan" \
      org.opencontainers.image.description="Trainer for the Wan 2.2 video models, with PyTorch for CUDA" \
      org.opencontainers.image.licenses="Apache-2.0"
# For OpenCV, which finds changes of scene, and for bitsandbytes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 libgomp1 \
    && rm -rf /var/lib/apt/lists/*
# Files in mounted folders belong to this user: --build-arg UID=$(id -u) --build-arg GID=$(id -g)
ARG UID=1000
ARG GID=1000
RUN groupadd --gid "$GID" onewan \
    && useradd --uid "$UID" --gid "$GID" --create-home onewan \
    && install --directory --owner onewan --group onewan /work /models /cache
COPY --from=build /opt/onewan /opt/onewan
# Everything that is downloaded or compiled while it runs goes to /cache.
ENV PATH=/opt/onewan/bin:$PATH \
    PYTHONNOUSERSITE=1 \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton
USER ${UID}:${GID}
# Run files, clips, their cache and runs; models; downloads.
VOLUME ["/work", "/models", "/cache"]
WORKDIR /work
ENTRYPOINT ["onewan"]
CMD ["--help"]
