#!/usr/bin/env bash
# Gets what tests and measurements need:
#
#   tests/tools/get.sh tests/photos  portraits of two presidents, in the public domain, and NASA's
#                                    of Eileen Collins, out of two packages on PyPI
#   tests/tools/get.sh .venv/stock   an environment with stock dlib, which takes 7 minutes to build
#   tests/tools/get.sh .venv/onnx    an environment with ONNX Runtime and OpenVINO
set -euo pipefail
cd "$(dirname "$0")/../.."

photos() {
    .venv/bin/python vendor/environment.py download --no-deps -d "$1" \
        --no-binary face_recognition --only-binary scikit-image \
        face_recognition==1.3.0 scikit-image==0.26.0
    tar xzf "$1"/*.tar.gz -C "$1" --strip-components 3 \
        --wildcards '*/test_images/*.jpg' '*/test_images/*.png'
    .venv/bin/python -m zipfile -e "$1"/*.whl "$1/skimage"
    mv "$1/skimage/skimage/data/astronaut.png" "$1"
    rm -rf "$1"/skimage "$1"/*.whl "$1"/*.gz
}

environment() {
    .venv/bin/python -m venv "$1"
    CXXFLAGS='' "$1/bin/python" -m pip --disable-pip-version-check -q install "${@:2}"
}

dlib=$(sed 's/.* //; s/\.tar\.gz$//; s/-/==/' vendor/dlib/sha256)
part=${1:-}.part
rm -rf "$part"
[ ! -e "${1:-}" ] || exit 0
echo "Getting ${1:-}, once"
mkdir -p "$part"
case ${1:-} in
    tests/photos) photos "$part" ;;
    .venv/stock) environment "$part" --no-binary dlib "$dlib" flask numpy pillow ;;
    .venv/onnx) environment "$part" onnx onnxruntime openvino ;;
    *) rm -r "$part"; sed -n '2,/^set/s/^# \?//p' "$0"; exit 1 ;;
esac
mv "$part" "$1"
