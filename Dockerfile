# docker run --gpus all -p 8000:8000 IMAGE                      serves the embedded model
# docker run --gpus all -p 8000:8000 -v /models:/models IMAGE serve /models/x
ARG BASE=debian:bookworm-slim

# What others wrote is by far the most, and changes least: a stage, and a layer of the image, of its own.
FROM ${BASE} AS dependencies
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv ca-certificates \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
RUN python3 -m venv /opt/leyden
COPY constraints.txt .
ARG TORCH_INDEX=""
RUN /opt/leyden/bin/pip install --no-cache-dir -c constraints.txt \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
COPY pyproject.toml .
RUN python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*p['dependencies'], *p['optional-dependencies']['structured'], sep='\n')" > requirements.txt \
    && /opt/leyden/bin/pip install --no-cache-dir -c constraints.txt -r requirements.txt

FROM dependencies AS build
COPY . leyden
RUN /opt/leyden/bin/pip install --no-cache-dir --no-deps --prefix /opt/own ./leyden

FROM ${BASE}
# Triton compiles its launchers at run time: a C compiler and the Python headers, and nothing else.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 gcc libc6-dev libpython3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 leyden \
    && install --directory --owner=leyden --group=leyden /cache
COPY --from=dependencies /opt/leyden /opt/leyden
COPY --from=build /opt/own /opt/leyden
# /tmp works in a read-only container too; a volume on /cache (TRITON_CACHE_DIR=/cache/triton) outlives the container.
ENV PATH=/opt/leyden/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    TRITON_CACHE_DIR=/tmp/triton \
    LEYDEN_HOST=0.0.0.0
# A number: with a name Kubernetes cannot tell that it is not root (runAsNonRoot).
USER 10001
# Not the source folder: its `kernels` would shadow a package that transformers looks for.
WORKDIR /home/leyden
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=600s \
    CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ.get('LEYDEN_PORT', '8000') + '/health', timeout=2)"]
ENTRYPOINT ["leyden"]
CMD ["serve"]
