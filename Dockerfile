# docker build -t facerecognition .
#
# MODELS="1 4" leaves out the files of the other models.  For an NVIDIA card (untested, for want of
# one): --build-arg BUILDER=nvidia/cuda:12.9.1-cudnn-devel-ubuntu24.04
#       --build-arg BASE=nvidia/cuda:12.9.1-cudnn-runtime-ubuntu24.04

ARG BASE=debian:trixie-slim
ARG BUILDER=$BASE


FROM $BUILDER AS builder
RUN apt-get update && apt-get install -y --no-install-recommends \
    bzip2 ca-certificates curl g++ make patch python3-dev python3-venv
WORKDIR /app
COPY Makefile requirements.txt ./
COPY vendor/dlib.* vendor/models.sha256 vendor/

# The models first: they change least.
ARG MODELS="1 2 3 4"
RUN for model in $MODELS; do make -s FACE_MODEL=$model download-models || exit 1; done && rm -rf vendor/build

# A dlib that any CPU of this architecture runs; and for x86 two more, for CPUs with AVX2 and with AVX-512,
# which are twice as fast and more.  The system's loader takes the one that is right: Python's module
# becomes an empty library that needs libdlib.so, which is looked for in glibc-hwcaps/, too.
RUN x86=$(uname -m | grep x86_64 || true); \
    make -s DLIB=patched CXXFLAGS="${x86:+-march=x86-64} -ffp-contract=off" .venv/installed-patched \
    && if [ "$x86" ]; then cd .venv/lib/python3*/site-packages && module=$(ls _dlib_pybind11*.so) \
    && mkdir dlib.libs && mv $module dlib.libs/libdlib.so \
    && for level in x86-64-v3 x86-64-v4; do rm -r /app/vendor/wheels \
    && make -s -C /app CXXFLAGS="-march=$level -ffp-contract=off" vendor/wheels/patched \
    && python3 -m zipfile -e /app/vendor/wheels/patched/*.whl /tmp/$level && mkdir -p dlib.libs/glibc-hwcaps/$level \
    && mv /tmp/$level/$module dlib.libs/glibc-hwcaps/$level/libdlib.so || exit 1; done \
    && g++ -shared -o $module -Wl,--no-as-needed -Ldlib.libs -l:libdlib.so -Wl,-rpath,'$ORIGIN/dlib.libs'; fi
RUN .venv/bin/pip uninstall -qy pip && find .venv -name '*.so*' -type f -exec strip {} + \
    && find .venv \( -name tests -o -name f2py -o -name include -o -name '*.pyi' \) -prune -exec rm -r {} +


FROM $BASE
RUN apt-get update && apt-get install -y --no-install-recommends python3 && apt-get clean && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin \
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
