# For a CPU. With `--build-arg TORCH_INDEX=https://pypi.org/simple` for an NVIDIA GPU: PyPI's torch for Linux has CUDA.
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
# What torch needs comes from PyPI with the rest.
RUN pip install --no-deps -c constraints.txt --index-url "$TORCH_INDEX" torch
COPY src src
RUN pip install -c constraints.txt '.[serve,train]'

# Bases from the hub, and what novelty has read.
ENV HF_HOME=/cache/huggingface DYLORA_MOE_CACHE=/cache/dylora-moe
RUN useradd --uid 1000 --create-home user && install --directory --owner=user /cache
USER user
WORKDIR /home/user
VOLUME /cache

EXPOSE 8000
HEALTHCHECK --start-period=5m --timeout=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["dylora-moe"]
CMD ["serve", "/model", "--host", "0.0.0.0"]
