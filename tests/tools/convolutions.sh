#!/usr/bin/env bash
# tests/tools/convolutions.sh: checks our dlib.  Builds its convolution for each instruction set that
# has a tile of its own and can be run here, and compares it with the definition (convolutions.cpp);
# then has AddressSanitizer watch what is resized (resizing.cpp).  Needs .venv (make setup).
set -eu
case ${1:-} in -*) sed -n "2,/^set/s/^# \\?//p" "$0"; exit ;; esac
cd "$(dirname "$0")/../.."
source=$(vendor/dlib/build.sh source)
out=vendor/build/convolutions
mkdir -p "$out"
options=(-std=c++14 -DNDEBUG -DDLIB_NO_GUI_SUPPORT -isystem "$source" -pthread)
small=vendor/dlib/dlib.cpp

# compare COMPILER EMULATOR FLAG...
compare() {
    local compiler=$1 emulator=$2 rest=$out/dlib-$1.o file
    shift 2
    for file in "$compiler" $emulator; do
        command -v "$file" > /dev/null || { echo "Not run: $file is not installed"; return; }
    done
    [ "$rest" -nt "$source/key" ] ||
        "$compiler" "${options[@]}" -O1 -r -o "$rest" "$small" "$source"/dlib/cuda/{cpu_dlib,tensor_tools}.cpp
    "$compiler" "${options[@]}" -Wall -Wextra -Werror -O3 -ffp-contract=off "$@" -c vendor/dlib/cpu_conv.cpp -o "$out/convolution.o"
    "$compiler" "${options[@]}" -O2 ${emulator:+-static} tests/tools/convolutions.cpp "$rest" "$out/convolution.o" -o "$out/convolutions"
    printf '%s %s: ' "$compiler" "${*:-}"
    $emulator "$out/convolutions"
}

has() { grep -qw "$1" /proc/cpuinfo || { echo "Not run: this CPU has no $1"; false; }; }

if [ "$(uname -m)" = x86_64 ]; then
    compare g++ ""
    has avx && compare g++ "" -mavx
    has fma && compare g++ "" -mavx2 -mfma
    has avx512f && compare g++ "" -mavx512f -mfma
    # Clang does not know GCC's ivdep.
    has fma && compare clang++ "" -mavx2 -mfma -Wno-unknown-pragmas
    compare aarch64-linux-gnu-g++ qemu-aarch64-static
else
    compare g++ ""
fi

g++ "${options[@]}" -g -O1 -fsanitize=address tests/tools/resizing.cpp "$small" -o "$out/resizing"
"$out/resizing"
