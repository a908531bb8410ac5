#!/usr/bin/env bash
# make engine: compares our engine with what it shall compute (engine.cpp), on each level of CPU that can be run here:
# by GCC and by Clang, for aarch64 in emulation, and under AddressSanitizer.  Needs .venv and tests/photos.
# With "quick" only by GCC: CI does that.
set -eu
case ${1:-} in -*) sed -n "2,/^set/s/^# \\?//p" "$0"; exit ;; esac
cd "$(dirname "$0")/../.."
source=$(vendor/dlib/build.sh source)
out=vendor/build/engine
mkdir -p "$out"
.venv/bin/python - "$out" << END
import sys; from pathlib import Path; from PIL import Image
for file in Path("tests/photos").glob("[abo]*.[jp]*g"):
    Image.open(file).convert("RGB").reduce(2).save(f"{sys.argv[1]}/{file.stem}.bmp")
END

# compile_level COMPILER LEVEL FLAG...: a level's kernels, which must define nothing but their tables.
compile_level() {
    local compiler=$1 level=$2 kernels
    shift 2
    for kernels in convolution hog resize; do
        "$compiler" -std=c++14 -Wall -Wextra -Werror -Wno-unknown-pragmas -fPIC -O3 -fno-math-errno -fno-trapping-math \
            -ffp-contract=$([ $kernels = convolution ] && echo fast || echo off) -DLEVEL="$level" "$@" \
            -c vendor/dlib/${kernels}_kernels.cpp -o "$out/${kernels}_$level.o"
        [ "$(nm -g --defined-only "$out/${kernels}_$level.o" | grep -vc asan)" = 1 ] ||
            { echo "${kernels}_kernels.cpp defines more than its table"; exit 1; }
    done
}

# compare COMPILER EMULATOR FLAG...
compare() {
    local compiler=$1 emulator=$2 program level flags levels names
    shift 2
    for program in "$compiler" $emulator; do
        command -v "$program" > /dev/null || { echo "Not run: $program is not installed"; return; }
    done
    echo "$compiler $*"
    rm -f "$out"/*.o
    levels=$(sed -n 's/^ *add_level(\([a-z].*\))/\1/p' vendor/dlib/CMakeLists.txt)
    [ -z "$emulator" ] && [ "$(uname -m)" = x86_64 ] && levels=$(grep -v any <<< "$levels") || levels=any
    while read -r level flags; do
        compile_level "$compiler" "$level" "$@" $flags
    done <<< "$levels"
    "$compiler" -std=c++14 -O2 -ffp-contract=off -DDLIB_NO_GUI_SUPPORT -isystem "$source" -Ivendor/dlib -pthread \
        ${emulator:+-static} "$@" -o "$out/engine" "$out"/*.o tests/tools/engine.cpp \
        vendor/dlib/{convolution,cpu,dlib,frontal_detector,resize,threads}.cpp
    names=$(FACES_CPU='?' $emulator "$out/engine" 2>&1 | sed -n 's/,//g; s/.*can take \(.*\)\./\1/p')
    [ -n "$names" ] || { echo "It does not say which levels it can run"; exit 1; }
    for level in $names; do
        FACES_CPU=$level $emulator "$out/engine" "$out"/*.bmp
    done
}

compare g++ ""
[ "${1:-}" != quick ] || exit 0
compare g++ "" -g -fsanitize=address,undefined -fno-sanitize=alignment
compare clang++ ""
if [ "$(uname -m)" = x86_64 ]; then
    compare aarch64-linux-gnu-g++ qemu-aarch64-static
fi
