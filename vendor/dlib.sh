#!/usr/bin/env bash
# Gets dlib for the Python in .venv.
#
#   vendor/dlib.sh source        the release, verified and patched, in vendor/build/dlib-20.0.1
#   vendor/dlib.sh wheel FOLDER  a wheel of it, compiled with $CXXFLAGS, in FOLDER
#   vendor/dlib.sh key           a hash of all that such a wheel depends on
#
# A wheel takes minutes to build, so a copy is kept next to pip's cache, for the next clone here.
set -euo pipefail
cd "$(dirname "$0")/.."
version=20.0.1
source=vendor/build/dlib-$version
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

get_source() {
    [ "$source" -nt vendor/dlib.patch ] && return
    rm -rf "$source"
    mkdir -p vendor/build
    pip -q download --no-deps --no-binary dlib -d vendor/build "dlib==$version"
    (cd vendor/build && sha256sum --quiet -c ../dlib.sha256 && tar xf "dlib-$version.tar.gz")
    patch -s -d "$source" -p1 < vendor/dlib.patch
    touch "$source"
}

# What -march=native means depends on the CPU; GCC tells by --help=target.
key() {
    { cat vendor/dlib.patch vendor/dlib.sha256 "$0"
      .venv/bin/python -VV
      echo "${CXXFLAGS:-}"
      "${CXX:-c++}" --version
      "${CXX:-c++}" ${CXXFLAGS:-} -Q --help=target 2> /dev/null || true
    } | sha256sum | cut -c1-16
}

build() {
    get_source
    echo "Building dlib, once: about 3 minutes on two cores"
    local log=vendor/build/dlib.log
    export DLIB_PYTHON_FACES_ONLY=ON DLIB_NO_GUI_SUPPORT=ON DLIB_USE_BLAS=OFF DLIB_USE_LAPACK=OFF
    export DLIB_GIF_SUPPORT=OFF DLIB_WEBP_SUPPORT=OFF DLIB_JXL_SUPPORT=OFF
    pip wheel -v --no-deps -w "$1" "./$source" 2>&1 | tee "$log" |
        sed -unE 's/^ *(\[ *[0-9]+%\]).*\/(.*)\.o$/\1 \2/p' || {
        rm -rf "$1"
        tail -30 "$log"
        echo "dlib could not be built (its log: $log); make DLIB=prebuilt ... uses a slower one"
        exit 1
    } >&2
    rm -rf "$source" "$source.tar.gz"
}

wheel() {
    local cache kept
    cache=$(pip cache dir 2> /dev/null || echo vendor/build)/facerecognition-external-model
    mkdir -p "$cache" 2> /dev/null && [ -w "$cache" ] || cache=vendor/build
    kept=$cache/$(key)
    if ! [ -e "$kept" ]; then
        build "$kept.$$"
        mv -T "$kept.$$" "$kept"
    fi
    rm -rf "$1"
    mkdir -p "$(dirname "$1")"
    cp -r "$kept" "$1"
}

case ${1:-} in
    source) get_source ;;
    wheel) wheel "$2" ;;
    key) key ;;
    *) sed -n '2,/^set/s/^# \?//p' "$0"; exit 1 ;;
esac
