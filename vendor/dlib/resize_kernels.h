#pragma once

#include "planes.h"

// The loops of resizing (resize.h).  They are compiled for each level of CPU (cpu.h); each thread may call them for
// memory of its own.

// Where the output's pixels lie in the input, between two rows and between two columns.
struct resize_map
{
    const double* ys; // of each row

    // Of the first num columns, the input's column on the left, and the fraction of the way to the one on its right.
    long num;
    const int* lefts;
    const float* fractions;
    const double* last_xs; // of the other columns
};

struct resize_kernels
{
    // Set rows [begin,end) of all planes of the output.  space is for 4 * num values.
    void (*bytes)(const planes<unsigned char>& out, const planes<unsigned char>& in, const resize_map& map, long begin,
        long end, unsigned char* space);
    void (*floats)(const planes<float>& out, const planes<float>& in, const resize_map& map, long begin, long end,
        float* space);
};
