#ifndef RESIZE_KERNELS_H
#define RESIZE_KERNELS_H

// The loops of resizing (resize.h).  They are compiled for each level of CPU (cpu.h); each thread may call them for
// memory of its own.

// From what to what a plane is resized.
struct resize_shape
{
    long in_rows, in_columns, out_rows, out_columns;
    // The first num columns of the output lie between lefts[c] and the column on its right, fractions[c] of the way.
    long num;
    const int* lefts;
    const float* fractions;
};

struct resize_kernels
{
    // Set rows [begin,end) of out, whose row r is at out + r * out_step.  space is for 4 * num values.
    void (*bytes)(unsigned char* out, long out_step, const unsigned char* in, long in_step, const resize_shape& shape,
        long begin, long end, unsigned char* space);
    void (*floats)(float* out, long out_step, const float* in, long in_step, const resize_shape& shape, long begin,
        long end, float* space);
};

#endif
