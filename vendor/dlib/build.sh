#!/usr/bin/env bash
# Gets our dlib for the Python in .venv.
#
#   vendor/dlib/build.sh source        dlib's release, verified: prints the folder
#   vendor/dlib/build.sh wheel FOLDER  a wheel of our engine beside it, in FOLDER
#   vendor/dlib/build.sh key           a hash of all that such a wheel depends on
#
# A copy of the wheel is kept next to pip's cache, for the next clone.
set -euo pipefail
cd "$(dirname "$0")/../.."
release=$(sed 's/.* //; s/\.tar\.gz$//' vendor/dlib/sha256)
source=vendor/build/source/$release
pip() { .venv/bin/python vendor/environment.py "$@"; }
trap 'exit 130' INT

# One build at a time, by one user.
lock() {
    mkdir -p vendor/build && { exec 9> vendor/build/lock; } 2> /dev/null || {
        echo "Another user has built here before: sudo chown -R $(id -un) '$PWD'"
        exit 1
    } >&2
    flock -n 9 || { echo "Waiting for another build in this folder"; flock 9; } >&2
}

get_source() {
    local new=vendor/build/new
    [ -e "$source" ] && return
    rm -rf vendor/build/dlib-* vendor/build/source "$new"
    pip download --no-deps --no-binary dlib -d "$new" "${release/-/==}"
    (cd "$new" && sha256sum --quiet -c ../../dlib/sha256 && tar xf "$release.tar.gz" --no-same-owner)
    rm "$new/$release.tar.gz"
    mv -T "$new" vendor/build/source
}

key() {
    { cat vendor/dlib/{*.cpp,*.h,CMakeLists.txt,build.sh,pyproject.toml,sha256}
      .venv/bin/python -VV
      "${CXX:-c++}" --version
    } | sha256sum | cut -c1-16
}

build() {
    local jobs cores
    # A compiler takes up to 1.5 GB.
    jobs=$(awk '/^MemAvailable/ { print int($2 / 1500000) }' /proc/meminfo)
    cores=$(nproc)
    unset CXXFLAGS # which instructions are used is decided when the module is loaded
    export CMAKE_BUILD_PARALLEL_LEVEL=$((jobs < 1 ? 1 : jobs < cores ? jobs : cores))
    echo "Building dlib, once: about a minute on two cores"
    pip wheel -v --no-deps --config-settings "cmake.define.DLIB=$PWD/$source" -w "$1" ./vendor/dlib || {
        echo "dlib could not be built; make DLIB=prebuilt ... uses a slower one"
        exit 1
    } >&2
}

wheel() {
    local cache kept
    cache=$(.venv/bin/python -m pip cache dir 2> /dev/null || echo vendor/build)/facerecognition-external-model
    mkdir -p "$cache" 2> /dev/null && [ -w "$cache" ] || cache=vendor/build
    kept=$cache/$(key)
    if ! [ -e "$kept" ]; then
        get_source
        part=$kept.$$
        trap 'rm -rf "$part"' EXIT
        build "$part"
        mv -T "$part" "$kept" 2> /dev/null || [ -e "$kept" ]
    fi
    rm -rf "$1"
    mkdir -p "$(dirname "$1")"
    cp -r "$kept" "$1"
}

case ${1:-} in
    source) lock && get_source && echo "$source" ;;
    wheel) lock && wheel "$2" ;;
    key) key ;;
    *) sed -n '2,/^set/s/^# \?//p' "$0"; exit 1 ;;
esac
