#ifndef RESIZE_KERNELS_H
#define RESIZE_KERNELS_H

// The loops of resizing (resize.h).  They are compiled for each level of CPU (cpu.h); each thread may call them for
// memory of its own.

// From what to what the planes are resized.  Plane k has row r at k * plane_step + r * row_step.
struct resize_shape
{
    long num_planes;
    long in_rows, in_columns, in_row_step, in_plane_step;
    long out_rows, out_columns, out_row_step, out_plane_step;

    // The first num columns of the output lie between the input's column lefts[c] and the one on its right,
    // fractions[c] of the way.  The others are computed in double precision.
    long num;
    const int* lefts;
    const float* fractions;
};

struct resize_kernels
{
    // Set rows [begin,end) of all planes of the output.  space is for 4 * num values.
    void (*bytes)(unsigned char* out, const unsigned char* in, const resize_shape& shape, long begin, long end,
        unsigned char* space);
    void (*floats)(float* out, const float* in, const resize_shape& shape, long begin, long end, float* space);
};

#endif
