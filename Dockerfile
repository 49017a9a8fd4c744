# syntax=docker/dockerfile:1
# A CPU:  docker build -t spm-hub .
# CUDA:   docker build -t spm-hub --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=serve,ui

WORKDIR /build
COPY . .
# The index of torch has builds such as 2.13.0+cpu, which pip prefers to 2.13.0; everything else comes from PyPI.
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url "${TORCH_INDEX}" ".[${EXTRAS}]" \
    && rm -rf /build/* \
    && useradd --create-home --uid 1000 spmhub \
    && install -d -o spmhub /data

USER spmhub
WORKDIR /data
# Registry and downloads; mount a volume here to keep them.
ENV XDG_DATA_HOME=/data HF_HOME=/data/huggingface
VOLUME /data

EXPOSE 8000 7860
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=120s CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"
ENTRYPOINT ["spmhub"]
CMD ["serve", "--host", "0.0.0.0"]
