#!/usr/bin/env bash
# For the image: installs our dlib into .venv so that it runs on every CPU of this architecture.
#
# On x86-64 it takes three builds to use AVX2 or AVX-512 where there is.  The system's loader
# chooses one: it looks for a library in the folder glibc-hwcaps/x86-64-v4 first (AVX-512), then in
# glibc-hwcaps/x86-64-v3 (AVX2), then where it is (man ld.so, "Hardware capabilities").  It does so
# for libraries that others are linked with, and not for Python's modules.  So each build becomes a
# library, libdlib.so, and the module an empty one that is linked with it.
set -euo pipefail
cd "$(dirname "$0")/../.."

build() {
    CXXFLAGS="$1 -ffp-contract=off" vendor/dlib/build.sh wheel vendor/wheels
    .venv/bin/pip -q install --no-deps --force-reinstall vendor/wheels/*.whl
    module=$(echo .venv/lib/python3*/site-packages/dlib.*.so)
    strip "$module"
}

if [ "$(uname -m)" != x86_64 ]; then
    build ""
    exit
fi

for level in glibc-hwcaps/x86-64-v4 glibc-hwcaps/x86-64-v3 x86-64; do
    build "-march=${level#*/}"
    libraries=$(dirname "$module")/dlib.libs
    folder=$libraries/${level%x86-64}
    mkdir -p "$folder"
    cp "$module" "$folder/libdlib.so"
done
g++ -shared -o "$module" -Wl,--no-as-needed "-L$libraries" -l:libdlib.so -Wl,-rpath,'$ORIGIN/dlib.libs'
