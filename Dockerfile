# syntax=docker/dockerfile:1
# Not built by .ci/run, which needs no container engine; the wheel that both images install is.
#   docker build --target cpu -t trimtab:cpu .      ONNX Runtime on the CPU; no torch
#   docker build --target gpu -t trimtab:gpu .      Triton Inference Server with its TensorRT, and ONNX Runtime's CUDA provider
#   docker build --target gpu-test -t trimtab:gpu-test . && docker run --rm --gpus all trimtab:gpu-test      the tests, on a GPU
# `make lint` checks this file with hadolint.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.07-py3

FROM ${PYTHON_IMAGE} AS wheel
# For the native kernels; without a compiler the wheel would come without them.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_BUILD_CONSTRAINT=/src/constraints.txt
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${PYTHON_IMAGE} AS cpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    pip install --no-cache-dir --constraint /constraints.txt /wheels/*.whl \
    && useradd --create-home --uid 10001 trimtab
USER 10001
WORKDIR /home/trimtab
ENTRYPOINT ["trimtab"]
CMD ["--help"]

FROM ${TRITON_IMAGE} AS gpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PATH=/opt/trimtab/bin:${PATH}
# TensorRT's libraries are the image's own; TRT_VERSION, which NVIDIA's images set, picks the bindings that match them, so
# that the versions which tests without a GPU use must not bind. The Triton language compiles the plugins' kernels.
# onnxruntime and onnxruntime-gpu are the same Python package, so the second replaces the first.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    grep -v '^tensorrt-' /constraints.txt > /opt/constraints.txt \
    && python3 -m venv /opt/trimtab \
    && pip install --no-cache-dir --constraint /opt/constraints.txt \
       /wheels/*.whl triton "tensorrt-cu13-bindings==${TRT_VERSION%%+*}" \
    && pip uninstall --yes onnxruntime \
    && pip install --no-cache-dir --no-deps --constraint /opt/constraints.txt onnxruntime-gpu \
    && useradd --create-home --uid 10001 trimtab
USER 10001
WORKDIR /home/trimtab
# Serves a Triton repository: docker run --gpus all -v $PWD/repository:/models trimtab:gpu
CMD ["tritonserver", "--model-repository=/models"]

FROM gpu AS gpu-test
# Above what serves: torch, the exporters, and the tests. pip would bring onnxruntime back, over the one for GPUs.
USER 0
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --constraint /opt/constraints.txt \
       "$(echo /wheels/*.whl)[train,demo,serve]" hypothesis matplotlib pytest pytest-xdist \
    && pip uninstall --yes onnxruntime onnxruntime-gpu \
    && pip install --no-cache-dir --no-deps --constraint /opt/constraints.txt onnxruntime-gpu
USER 10001
COPY --chown=10001 pyproject.toml constraints.txt /home/trimtab/source/
COPY --chown=10001 tests /home/trimtab/source/tests
COPY --chown=10001 examples /home/trimtab/source/examples
COPY --chown=10001 benchmarks /home/trimtab/source/benchmarks
WORKDIR /home/trimtab/source
CMD ["python", "-m", "pytest"]
