# Targets: operator, node-agent. Everything comes from Debian, PyPI (locked, with hashes) and Go
# modules (go.sum). On the testbed: --build-arg BASE_IMAGE=godwit.local/debian:forky.
ARG BASE_IMAGE=docker.io/library/debian:forky-slim
ARG VERSION=0.1.0

FROM ${BASE_IMAGE} AS hook
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends golang-go ca-certificates
WORKDIR /src
COPY hooks/go.mod hooks/go.sum ./
RUN go mod download
COPY hooks/ ./
ARG VERSION
RUN CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=${VERSION}" \
      -o /godwit-hook ./cmd/godwit-hook

FROM ${BASE_IMAGE} AS criu
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends \
      criu iproute2 nftables tar patchelf gcc libc6-dev
COPY scripts/bundle-criu /usr/local/bin/
COPY node-agent/native /src/native
RUN bundle-criu /payload/criu /src/native \
    && gcc -Wall -Wextra -O2 -shared -fPIC -o /pages.so /src/native/pages.c

FROM ${BASE_IMAGE} AS python
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends python3 python3-venv ca-certificates
COPY requirements.lock /app/
RUN python3 -m venv /app/venv \
    && /app/venv/bin/pip install --no-cache-dir --quiet --only-binary :all: --require-hashes \
         -r /app/requirements.lock \
    && rm -rf /app/venv/lib/python3*/site-packages/pip*
ENV PATH=/app/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    GRPC_ENABLE_FORK_SUPPORT=0

FROM python AS operator
COPY api/src /app/src
COPY operator/src /app/src
RUN python3 -m compileall -q /app/src
ENV PYTHONPATH=/app/src
# kopf asks for the user's name, and this uid has none.
ENV LOGNAME=godwit
USER 65532:65532
ARG VERSION
LABEL org.opencontainers.image.title="godwit-operator" \
      org.opencontainers.image.description="Godwit: decides about migrations" \
      org.opencontainers.image.version="${VERSION}"
ENTRYPOINT ["python3", "-m", "godwit_operator"]

FROM python AS node-agent
RUN DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      python3-pycriu util-linux iproute2 libnftables1 nftables \
    && rm -rf /var/lib/apt/lists/* \
    && ln -s /usr/lib/python3/dist-packages/pycriu "$(echo /app/venv/lib/python3*/site-packages)/pycriu"
COPY --from=criu /payload /payload
COPY --from=hook /godwit-hook /payload/bin/godwit-hook
COPY --from=criu /pages.so /app/lib/pages.so
COPY api/src /app/src
COPY node-agent/src /app/src
RUN python3 -m compileall -q /app/src
# Two heaps, not eight for each processor: what one move's threads have freed serves the next.
ENV PYTHONPATH=/app/src MALLOC_ARENA_MAX=2
ARG VERSION
LABEL org.opencontainers.image.title="godwit-node-agent" \
      org.opencontainers.image.description="Godwit: moves the pods of its node, and prepares it" \
      org.opencontainers.image.version="${VERSION}"
ENTRYPOINT ["python3", "-m", "godwit_agent"]
