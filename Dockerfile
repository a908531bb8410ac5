# docker build -t facerecognition .
#
# --build-arg MODELS="1 4" omits the files of the other models.  For an NVIDIA card (untested):
# --build-arg BUILDER=nvidia/cuda:12.9.1-cudnn-devel-ubuntu24.04
# --build-arg BASE=nvidia/cuda:12.9.1-cudnn-runtime-ubuntu24.04

ARG BASE=debian:trixie-slim
ARG BUILDER=$BASE


FROM $BUILDER AS builder
RUN apt-get update && apt-get install -y --no-install-recommends \
    bzip2 ca-certificates curl g++ make patch python3-dev python3-venv
WORKDIR /app
COPY Makefile requirements.txt ./
COPY vendor vendor/
RUN make -s .venv/installed-base

# In the order of how seldom they change.
ARG MODELS="1 2 3 4"
RUN vendor/models.sh $MODELS && rm -rf vendor/build
RUN vendor/dlib-for-any-cpu.sh
RUN .venv/bin/pip uninstall -qy pip \
    && find .venv -name '*.so*' -type f -exec strip {} + \
    && find .venv \( -name tests -o -name f2py -o -name include -o -name '*.pyi' \) \
        -prune -exec rm -r {} +


FROM $BASE
LABEL org.opencontainers.image.title="facerecognition-external-model" \
    org.opencontainers.image.description="Finds and describes faces for Nextcloud's app Face Recognition"
RUN apt-get update && apt-get install -y --no-install-recommends python3 tzdata \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
    && useradd --system --no-create-home facerecognition
WORKDIR /app
COPY --from=builder /app/vendor/models vendor/models
COPY --from=builder /app/.venv .venv
COPY vendor/models.sha256 vendor/
COPY facerecognition-external-model.py ./
ENV PATH=/app/.venv/bin:$PATH
USER facerecognition
EXPOSE 5000
HEALTHCHECK --start-period=30s --timeout=15s CMD ["python", "-c", \
    "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ.get(\"PORT\") or 5000}/health', timeout=10)"]
CMD ["python", "facerecognition-external-model.py"]
