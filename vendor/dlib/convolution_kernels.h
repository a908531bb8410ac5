#pragma once

// The loops of a convolution that take its time.  They are compiled for each level of CPU (cpu.h); each thread may
// call them for memory of its own.  Positions are what a convolution computes side by side: pixels of its output, or
// squares of 4 x 4 of them (convolution.h).

enum { square_size = 4 };

struct convolution_kernels
{
    // How many positions are computed at a time: what "block" means below.
    long block_size;

    // For num_filters filters f and the first count <= block_size positions i, sets sums[f * sum_step + i] to the sum
    // over j < depth of weights[f * depth + j] * in[offsets[j] + i].  It reads and writes up to a whole block.
    void (*multiply)(float* sums, long sum_step, const float* in, const long* offsets, long depth, const float* weights,
        long num_filters, long count);

    // Winograd's transforms, for filters of 3 x 3 ([0]) and of 5 x 5 ([1]), whose squares of input have sides of 6 and
    // 8 pixels.  For a block of squares i, whose j-th pixel is in[offsets[j] + i], sets out[j * step + i] to the
    // square's value at the j-th of side * side points.
    void (*squares_to_points[2])(float* out, long step, const float* in, const long* offsets);

    // For a block of squares i, whose sum at the j-th point is in[j * step + i], sets the squares' pixels of output,
    // row by row: out[(y * block_size + i) * square_size + x].
    void (*points_to_squares[2])(float* out, const float* in, long step);

    // Deals a row out to step planes, like cards: for i < n and j < step, out[j * plane + i] becomes in[i * step + j],
    // or 0 if i * step + j does not lie in [left, right).
    void (*deal)(float* out, long plane, const float* in, long n, long step, long left, long right);

    // Sets n pixels out[i] to values[i] + bias, plus the former out[i] if they are to be added, but at least to least.
    void (*store)(float* out, const float* values, long n, float bias, bool add, float least);
};
