#pragma once

#include <dlib/image_processing/generic_image.h>

// An image in somebody else's memory, row by row without gaps.  It has dlib's generic image interface.
struct rgb_view
{
    const dlib::rgb_pixel* pixels;
    long rows, columns;
};

// Narrower images have no faces: dlib's pyramids divide by zero there.
const long least_side = 10; // pixels

inline long num_rows(const rgb_view& img) { return img.rows; }
inline long num_columns(const rgb_view& img) { return img.columns; }
inline const void* image_data(const rgb_view& img) { return img.pixels; }
inline size_t width_step(const rgb_view& img) { return img.columns * sizeof(dlib::rgb_pixel); }

namespace dlib
{
    template <>
    struct image_traits<rgb_view>
    {
        typedef rgb_pixel pixel_type;
    };
}
