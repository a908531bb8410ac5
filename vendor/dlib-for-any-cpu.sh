#!/usr/bin/env bash
# For the image: installs a dlib into .venv that runs on every CPU of this architecture.
#
# On x86-64 it takes three builds to use AVX2 or AVX-512 where there is.  The system's loader
# chooses one: it looks for a library in the folder glibc-hwcaps/x86-64-v4 first (AVX-512), then in
# glibc-hwcaps/x86-64-v3 (AVX2), then where it is (man ld.so, "Hardware capabilities").  It does so
# for libraries that others are linked with, and not for Python's modules.  So each build becomes a
# library, libdlib.so, and the module an empty one that is linked with it.
set -euo pipefail
cd "$(dirname "$0")/.."

build() { CXXFLAGS="$1 -ffp-contract=off" vendor/dlib.sh wheel vendor/wheels/patched; }

if [ "$(uname -m)" != x86_64 ]; then
    build ""
    .venv/bin/pip -q install --no-deps vendor/wheels/patched/*.whl
    exit
fi

build -march=x86-64
.venv/bin/pip -q install --no-deps vendor/wheels/patched/*.whl
cd .venv/lib/python3*/site-packages
module=$(echo _dlib_pybind11*.so)
mkdir dlib.libs
mv "$module" dlib.libs/libdlib.so
g++ -shared -o "$module" -Wl,--no-as-needed -Ldlib.libs -l:libdlib.so \
    -Wl,-rpath,'$ORIGIN/dlib.libs'

cd - > /dev/null
for level in x86-64-v3 x86-64-v4; do
    build -march=$level
    folder=$(echo .venv/lib/python3*/site-packages)/dlib.libs/glibc-hwcaps/$level
    mkdir -p "$folder"
    .venv/bin/python -m zipfile -e vendor/wheels/patched/*.whl vendor/build/wheel
    mv "vendor/build/wheel/$module" "$folder/libdlib.so"
    rm -r vendor/build/wheel
done
