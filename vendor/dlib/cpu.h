#pragma once

#include "convolution_kernels.h"
#include "hog_kernels.h"
#include "resize_kernels.h"

// The kernels are the loops that take the time.  Their sources are compiled several times, each time with other
// instructions and into another namespace, which LEVEL names.  One build so serves every CPU of an architecture.
//
// A kernel's source uses no inline function of a header, neither of the standard library's nor of dlib's: of one that
// several sources define, the linker keeps one for all, and it could be the one with AVX-512.  Those of lanes.h are in an
// anonymous namespace, and planes::row() is always inlined.
struct cpu_level
{
    const char* name;
    const convolution_kernels* convolution;
    const hog_kernels* hog;
    const resize_kernels* resizing;
};

// The best level that the CPU and the operating system support, or the one that the environment variable FACES_CPU
// names.  Throws dlib::error if that is none, or not supported.
const cpu_level& cpu();
