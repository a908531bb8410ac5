#pragma once

#include "planes.h"

// The loops of HOG that take its time: dlib's features (dlib/image_transforms/fhog.h, after Felzenszwalb, Girshick,
// McAllester and Ramanan, "Object Detection with Discriminatively Trained Part-Based Models", 2010), and the filters
// that slide over them.  All sums are in dlib's order, so that features and scores are its own to the last bit; but what
// dlib sums up without SSE3, it sums up in another order.
// They are compiled for each level of CPU (cpu.h); each thread may call them for memory of its own.

enum
{
    hog_cell_size = 8,    // in pixels, along rows and columns
    hog_num_planes = 31,  // 18 orientations, 9 without their signs, 4 of texture
    hog_filter_size = 10, // in cells
    hog_group_size = 8    // dlib computes so many pixels' gradients, or scores, of a row at a time
};

struct hog_kernels
{
    // Sets rows [begin,end) of an image's features.  They have two rows and columns less than it has cells, n / 8
    // rounded, which must be at least three.  space is for features_space(image.columns) floats.
    void (*features)(const planes<float>& out, const planes<unsigned char>& image, long begin, long end, float* space);
    long (*features_space)(long columns);

    // Adds to rows x columns scores the sums of what lies in a window of hog_filter_size x hog_filter_size below and
    // on the right of each, times a filter's rows, times its columns.  It reads and writes up to hog_group_size columns
    // more than these.  space is for (rows + hog_filter_size - 1) * step floats.
    void (*filter)(float* scores, long step, const float* in, long in_step, long rows, long columns,
        const float* row_filter, const float* column_filter, float* space);
};
