#!/usr/bin/env bash
# Gets dlib for the Python in .venv.
#
#   vendor/dlib/build.sh source        the release, verified and patched, in vendor/build/dlib-VERSION
#   vendor/dlib/build.sh wheel FOLDER  a wheel of it, compiled with $CXXFLAGS, in FOLDER
#   vendor/dlib/build.sh key           a hash of all that such a wheel depends on
#
# A wheel takes minutes to build, so a copy is kept next to pip's cache, for the next clone here.
set -euo pipefail
cd "$(dirname "$0")/../.."
release=$(cut -c67- vendor/dlib/sha256)
release=${release%.tar.gz}
source=vendor/build/$release
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

# All that a build writes is in a folder of its own until it is complete, so that two can run at once.
make_temporary() {
    mkdir -p vendor/build
    temporary=$(mktemp -d vendor/build/tmp.XXXXXX)
    trap 'rm -rf "$temporary"' EXIT
    trap 'exit 130' INT TERM
}

# The patches' hash is part of the source's name.
get_source() {
    local stamp
    stamp=$(cd vendor/dlib && cat sha256 series *.patch | sha256sum)
    [ "$(cat "$source/stamp" 2> /dev/null)" = "$stamp" ] && return
    make_temporary
    pip -q download --no-deps --no-binary dlib -d "$temporary" "${release/-/==}"
    (cd "$temporary" && sha256sum --quiet -c ../../dlib/sha256 && tar xf "$release.tar.gz")
    while read -r patch; do
        patch -s --fuzz=0 -d "$temporary/$release" -p1 < "vendor/dlib/$patch"
    done < vendor/dlib/series
    echo "$stamp" > "$temporary/$release/stamp"
    rm -rf "$source"
    mv -T "$temporary/$release" "$source"
}

# What -march=native means depends on the CPU; GCC tells by --help=target.
key() {
    { find vendor/dlib -type f | sort | xargs cat
      .venv/bin/python -VV
      echo "${CXXFLAGS:-}"
      "${CXX:-c++}" --version
      "${CXX:-c++}" ${CXXFLAGS:-} -Q --help=target 2> /dev/null || true
    } | sha256sum | cut -c1-16
}

build() {
    local log=vendor/build/dlib.log
    get_source
    echo "Building dlib, once: about 1.5 minutes on two cores"
    pip wheel -v --no-deps -C cmake.define.DLIB="$PWD/$source" -w "$1" ./vendor/dlib 2>&1 | tee "$log" |
        sed -unE 's/^ *(\[[0-9]+\/[0-9]+\]).*\/(.*)\.o$/\1 \2/p' || {
        tail -30 "$log"
        echo "dlib could not be built (its log: $log); make DLIB=prebuilt ... uses a slower one"
        exit 1
    } >&2
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
