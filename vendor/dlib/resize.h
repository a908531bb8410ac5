#pragma once

#include "planes.h"
#include <vector>

// Resizes an image as dlib's resize_image() does, to the last bit: by bilinear interpolation, planes of floats like its
// images of floats, and planes of bytes like its rgb_pixels, which it rounds down.  (Of rows above some 38,000 pixels
// dlib reads or writes beyond the end; here, those are resized like the others.)
//
// Its tasks may be run in any order and by any thread:
//     const resizing<float> tasks(to, from);
//     for_each_task(tasks.num, [&](const long i) { tasks.run(i); });
template <typename T>
class resizing
{
public:
    // The images are of as many planes, and do not overlap.
    resizing(const planes<T>& to, const planes<T>& from);

    long num = 0; // of tasks: none if an image is empty

    // Sets some rows of the output.
    void run(long task) const;

private:
    planes<T> to, from;
    std::vector<double> ys, last_xs; // see resize_map
    std::vector<int> lefts;
    std::vector<float> fractions;
    long rows_per_task;
};
