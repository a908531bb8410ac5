#!/usr/bin/env bash
# make convolutions: checks the patched dlib, whose source is in the folder $1.  Builds its convolution for each
# instruction set that has a tile of its own and can be run here, and compares it with the definition
# (convolutions.cpp); then has AddressSanitizer watch what is resized (resizing.cpp).
set -eu
source=$1
out=$(dirname "$source")/convolutions
options=(-std=c++14 -DNDEBUG -DDLIB_NO_GUI_SUPPORT "-I$source" -pthread)
mkdir -p "$out"

# compare COMPILER EMULATOR FLAG...
compare() {
    local compiler=$1 emulator=$2 rest=$out/dlib-$1.o
    shift 2
    command -v "$compiler" > /dev/null || { echo "Not run: $compiler is not installed"; return; }
    [ -z "$emulator" ] || command -v "$emulator" > /dev/null || { echo "Not run: $emulator is not installed"; return; }
    [ "$rest" -nt vendor/dlib.patch ] ||  # all of dlib but the convolution
        "$compiler" "${options[@]}" -O1 -DDLIB_DNN_CPU_CONV_cPP_ -c "$source/dlib/all/source.cpp" -o "$rest"
    "$compiler" "${options[@]}" -O3 -ffp-contract=off "$@" -c "$source/dlib/cuda/cpu_conv.cpp" -o "$out/convolution.o"
    "$compiler" "${options[@]}" -O2 ${emulator:+-static} tests/tools/convolutions.cpp "$rest" "$out/convolution.o" -o "$out/convolutions"
    printf '%s %s: ' "$compiler" "${*:-}"
    $emulator "$out/convolutions"
}

has() { grep -qw "$1" /proc/cpuinfo; }

if [ "$(uname -m)" = x86_64 ]; then
    compare g++ ""
    has avx && compare g++ "" -mavx
    has fma && compare g++ "" -mavx2 -mfma
    has avx512f && compare g++ "" -mavx512f -mfma
    has fma && compare clang++ "" -mavx2 -mfma
    compare aarch64-linux-gnu-g++ qemu-aarch64-static
else
    compare g++ ""
fi

g++ "${options[@]}" -g -O1 -fsanitize=address -Wno-maybe-uninitialized tests/tools/resizing.cpp "$source/dlib/all/source.cpp" -o "$out/resizing"
"$out/resizing"
