# docker build -t kimi-vllm .                     for NVIDIA GPUs of compute capability 9.0 or newer
#   docker run --gpus all --ipc=host -p 8000:8000 -v kimi-models:/models kimi-vllm moonshotai/Kimi-Linear-48B-A3B-Instruct
# docker build --target cpu -t kimi-vllm:cpu .    serves the tiny checkpoint without a GPU
#   docker run --shm-size=1g -p 8000:8000 kimi-vllm:cpu
# What follows the image's name goes to `vllm serve`, the model first: vLLM 0.33 refuses some options in front of it. It
# listens on all addresses, port 8000, by default.
ARG PYTHON_TAG=3.11-slim-bookworm
ARG CUDA_PYTHON_TAG=3.12-slim-bookworm

FROM python:${PYTHON_TAG} AS wheel
WORKDIR /src
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:${PYTHON_TAG} AS cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends curl g++ libnuma1 make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home kimi \
    && install -d -o kimi -g kimi /models /home/kimi/kimi-vllm
USER 10001
WORKDIR /home/kimi/kimi-vllm
COPY --chown=kimi:kimi . .
RUN PIP_NO_CACHE_DIR=1 make setup
ENV HF_HOME=/models PATH=/home/kimi/kimi-vllm/.venv/bin:$PATH
VOLUME /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m CMD ["curl", "-fsS", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["vllm", "serve"]
CMD ["configs/models/recall", "--served-model-name", "kimi-recall", "--config", "configs/serve/cpu-demo.yaml"]

FROM python:${CUDA_PYTHON_TAG} AS cuda
# CUDA's libraries come as wheels with torch, the driver with the container runtime. Triton and torch.compile need a
# compiler while serving.
RUN apt-get update \
    && apt-get install -y --no-install-recommends curl g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home kimi \
    && install -d -o kimi -g kimi /models
# --no-deps: the lock is complete, and nothing in it may change under vLLM.
RUN --mount=type=bind,source=requirements/cuda.lock,target=/tmp/cuda.lock \
    python -m pip install --no-cache-dir --no-deps --only-binary :all: -r /tmp/cuda.lock
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    python -m pip install --no-cache-dir --no-deps /dist/*.whl \
    && kimi-vllm --version
USER 10001
WORKDIR /home/kimi
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENV HF_HOME=/models
VOLUME /models
EXPOSE 8000
# Loading 48B parameters from a cold volume takes a while.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m CMD ["curl", "-fsS", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["vllm", "serve"]
