# syntax=docker/dockerfile:1
# kdpipe for GPUs (target gpu, the default) and for CPUs (target cpu).
#
#   docker build -t kdpipe .
#   docker run --rm --init --gpus all --shm-size 8g --user "$(id -u):$(id -g)" \
#     -v "$PWD:/work" -v kdpipe-cache:/cache kdpipe run gsm8k-qwen3-opd
#
#   docker build -t kdpipe:cpu --target cpu .
#   docker run --rm --init --user "$(id -u):$(id -g)" -v "$PWD:/work" kdpipe:cpu run quickstart
#
# Any user id works: what is written goes to /work (the workspace, ./kdpipe-out there) and /cache.
# A release names both by digest too (CONTRIBUTING, "A release").
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# ---------------------------------------------------------------- what both images are built from
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY requirements-image.txt /opt/requirements.txt
RUN sed -n '/^setuptools==/,/[^\\]$/p' /opt/requirements.txt > /opt/build.txt \
    && pip install --no-cache-dir --require-hashes -r /opt/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY recipes recipes
COPY docs docs
COPY kdpipe kdpipe
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheel .

# ---------------------------------------------------------------- CPU
FROM ${PYTHON_IMAGE} AS cpu
# PyPI's torch for x86-64 brings CUDA along; PyTorch's own index has the build without.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements-image.txt /opt/requirements.txt
# torch by its version alone: the builds of that index are not those whose hashes PyPI gives.
RUN grep -o '^torch==[^ ]*' /opt/requirements.txt > /opt/torch.txt \
    && sed '/^torch==/,/[^\\]$/d' /opt/requirements.txt > /opt/locked.txt \
    && pip install --no-cache-dir --no-deps --index-url "${TORCH_INDEX}" -r /opt/torch.txt \
    && pip install --no-cache-dir --require-hashes -r /opt/locked.txt
COPY --from=wheel /wheel /opt/wheel
# Without an index: what the locked packages do not fulfil fails here.
RUN pip install --no-cache-dir --no-index /opt/wheel/*.whl \
    && pip check \
    && mkdir -p /cache /work && chmod 1777 /cache /work
# A user id without an account has neither a home nor a name; libraries ask for both.
ENV HOME=/cache \
    USER=kdpipe \
    XDG_CACHE_HOME=/cache \
    XDG_CONFIG_HOME=/cache/config \
    HF_HOME=/cache/huggingface \
    TORCH_HOME=/cache/torch \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton \
    MPLCONFIGDIR=/cache/matplotlib \
    MLFLOW_DISABLE_TELEMETRY=true \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /work
VOLUME /cache
USER 1000:1000
ENTRYPOINT ["kdpipe"]
CMD ["--help"]

# ---------------------------------------------------------------- GPU
FROM ${VLLM_IMAGE} AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY requirements-image.txt /opt/requirements.txt
# On top of the image's Python, whose torch and vllm are seen and stay as they are: whatever it holds is a constraint and
# the rest is locked, so a dependency that does not fit it fails here and not on the first GPU. Not held: the setuptools
# that a new environment brings, older than what torch takes, and cachetools 8, which MLflow does not take.
RUN python3 -m venv --system-site-packages /opt/kdpipe \
    && /opt/kdpipe/bin/pip uninstall --yes setuptools \
    && { /opt/kdpipe/bin/pip check || true; } > /opt/before.txt \
    && /opt/kdpipe/bin/pip list --format=freeze | grep -vE '^(pip|cachetools)=' > /opt/constraints.txt \
    && sed -E 's/==.*//; s/[_.]/-/g; s|.*|/^\L&==/,/[^\\\\]$/d|' /opt/constraints.txt > /opt/held.sed \
    && sed -f /opt/held.sed /opt/requirements.txt > /opt/locked.txt \
    && /opt/kdpipe/bin/pip install --no-cache-dir --require-hashes --constraint /opt/constraints.txt -r /opt/locked.txt \
    && ! { /opt/kdpipe/bin/pip check || true; } | grep -vxFf /opt/before.txt
COPY --from=wheel /wheel /opt/wheel
RUN /opt/kdpipe/bin/pip install --no-cache-dir --no-index /opt/wheel/*.whl \
    && mkdir -p /cache /work && chmod 1777 /cache /work
ENV PATH=/opt/kdpipe/bin:$PATH \
    HOME=/cache \
    USER=kdpipe \
    XDG_CACHE_HOME=/cache \
    XDG_CONFIG_HOME=/cache/config \
    HF_HOME=/cache/huggingface \
    TORCH_HOME=/cache/torch \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton \
    CUDA_CACHE_PATH=/cache/cuda \
    FLASHINFER_WORKSPACE_BASE=/cache \
    VLLM_CACHE_ROOT=/cache/vllm \
    VLLM_CONFIG_ROOT=/cache/config/vllm \
    VLLM_NO_USAGE_STATS=1 \
    MPLCONFIGDIR=/cache/matplotlib \
    MLFLOW_DISABLE_TELEMETRY=true \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /work
VOLUME /cache
USER 1000:1000
ENTRYPOINT ["kdpipe"]
CMD ["--help"]
