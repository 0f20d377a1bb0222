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
ARG VLLM_VERSION=v0.32.0
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# ---------------------------------------------------------------- what both images are built from
# A layer of its own, so that a changed source file does not install the dependencies again.
FROM ${PYTHON_IMAGE} AS requirements
COPY pyproject.toml /src/
RUN python -c "import tomllib; p = tomllib.load(open('/src/pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *p['optional-dependencies']['lora'], sep='\n')" > /requirements.txt

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY recipes recipes
COPY kdpipe kdpipe
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

# ---------------------------------------------------------------- CPU
FROM ${PYTHON_IMAGE} AS cpu
# PyPI's torch for x86-64 brings CUDA along; PyTorch's own index has the build without.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --from=requirements /requirements.txt /opt/requirements.txt
RUN grep '^torch[<>=]' /opt/requirements.txt > /opt/torch.txt \
    && pip install --no-cache-dir --index-url "${TORCH_INDEX}" -r /opt/torch.txt \
    && pip install --no-cache-dir -r /opt/requirements.txt
COPY --from=wheel /wheel /opt/wheel
RUN pip install --no-cache-dir --no-deps /opt/wheel/*.whl \
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
FROM vllm/vllm-openai:${VLLM_VERSION} AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY --from=requirements /requirements.txt /opt/requirements.txt
# On top of the image's Python, whose torch and vllm are seen and stay as they are: whatever it holds is a constraint,
# so a dependency that does not fit it fails here and not on the first GPU.
RUN python3 -m venv --system-site-packages /opt/kdpipe \
    && /opt/kdpipe/bin/pip list --format=freeze | grep -v '^pip=' > /opt/constraints.txt \
    && /opt/kdpipe/bin/pip install --no-cache-dir --constraint /opt/constraints.txt -r /opt/requirements.txt
COPY --from=wheel /wheel /opt/wheel
RUN /opt/kdpipe/bin/pip install --no-cache-dir --no-deps /opt/wheel/*.whl \
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
