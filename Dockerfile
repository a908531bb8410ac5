# docker build -t facerecognition .
#
# --build-arg MODELS="1 4" omits the files of the other models.
# --build-arg MODELS_FROM=pypi where GitHub can't be reached: another training of the CNN detector.

ARG BASE=debian:trixie-slim


FROM $BASE AS builder
RUN apt-get update && apt-get install -y --no-install-recommends \
    ca-certificates curl g++ make python3-dev python3-venv
WORKDIR /app
COPY vendor/requirements.lock vendor/
RUN python3 -m venv .venv && .venv/bin/pip install -q --require-hashes -r vendor/requirements.lock

COPY vendor/environment.py vendor/
COPY vendor/dlib vendor/dlib/
RUN vendor/dlib/build.sh wheel vendor/wheels && .venv/bin/pip install -q --no-deps vendor/wheels/*.whl \
    && .venv/bin/pip uninstall -qy pip && rm .venv/pip.log
COPY vendor/models.* vendor/
ARG MODELS="1 2 3 4"
ARG MODELS_FROM=github
RUN python3 vendor/models.py $MODELS


# For a release: docker build --target wheel --output wheels --build-arg MODELS= .
FROM scratch AS wheel
COPY --from=builder /app/vendor/wheels /


FROM $BASE
LABEL org.opencontainers.image.title="facerecognition-external-model" \
    org.opencontainers.image.description="Finds and describes faces for Nextcloud's app Face Recognition"
RUN apt-get update && apt-get install -y --no-install-recommends python3 tzdata \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
    && useradd --system --no-create-home facerecognition
WORKDIR /app
COPY --from=builder /app/vendor/models vendor/models
COPY --from=builder /app/.venv .venv
COPY vendor/decoding.py vendor/models.json vendor/models.py vendor/
COPY .deploy/start.sh .deploy/health.py .deploy/gunicorn.conf.py .deploy/
COPY facerecognition-external-model.py ./
ENV PATH=/app/.venv/bin:$PATH
EXPOSE 5000
HEALTHCHECK --start-period=30s --timeout=15s CMD ["python", ".deploy/health.py"]
ENTRYPOINT [".deploy/start.sh"]
CMD ["python", "-m", "gunicorn", "-c", ".deploy/gunicorn.conf.py"]
