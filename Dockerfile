# The policy server. JAX's wheels bring the CUDA libraries, so there is no CUDA base image.
#   docker build -t semanticvla-serve .                     (--build-arg REQUIREMENTS=requirements-cuda.txt for NVIDIA GPUs)
#   docker run -p 8000:8000 -v $PWD/policies:/policies:ro -v compiled:/compiled semanticvla-serve --policy=/policies/mine
FROM python:3.11-slim

ARG REQUIREMENTS=requirements.txt
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 XLA_PYTHON_CLIENT_PREALLOCATE=false \
    JAX_COMPILATION_CACHE_DIR=/compiled

WORKDIR /app
COPY requirements*.txt pyproject.toml README.md LICENSE ./
RUN pip install -r ${REQUIREMENTS} -r requirements-serve.txt -r requirements-build.txt
COPY semanticvla_jax semanticvla_jax
RUN pip install --no-build-isolation --no-deps . \
    && useradd --create-home --uid 1000 policy \
    && install -d -o policy /compiled

USER policy
VOLUME /compiled
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
# The key is read from a file, so that it is in no image and in no list of processes.
ENTRYPOINT ["python", "-m", "semanticvla_jax.serve", "run", "--host=0.0.0.0"]
