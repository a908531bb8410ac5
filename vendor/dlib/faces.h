// What the Python module binds, without the templates that do the work: each of these has a source
// file of its own, so that they are compiled side by side.
#ifndef FACES_H
#define FACES_H

#include <dlib/geometry/rectangle.h>
#include <dlib/pixel.h>
#include <memory>
#include <string>
#include <vector>

// Narrower images have no faces: dlib's pyramids divide by zero there.
const long least_side = 10; // pixels

// An image in somebody else's memory, row by row without gaps.  It has dlib's generic image interface.
struct rgb_view
{
    const dlib::rgb_pixel* pixels;
    long rows, columns;
};

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

// The detector that is part of dlib, by histograms of oriented gradients (HOG).  Several threads may use it at a time.
class frontal_detector
{
public:
    frontal_detector();

    // The faces of an image that is doubled in size so many times before: boxes in its pixels, the surest first.
    std::vector<dlib::rectangle> operator()(const rgb_view& img, int times_doubled) const;

private:
    struct implementation;
    std::shared_ptr<const implementation> impl;
};

// The network that describes a face by 128 numbers, dlib's face_recognition_model_v1.  Several threads may use it at a
// time.
class face_describer
{
public:
    static const long chip_size = 150;

    explicit face_describer(const std::string& file);

    // The descriptors of faces, each cut out as chip_size x chip_size pixels.
    std::vector<std::vector<float>> operator()(const std::vector<rgb_view>& chips) const;

private:
    std::vector<float> describe(const rgb_view& chip, bool use_threads) const;

    struct implementation;
    std::shared_ptr<const implementation> impl;
};

#endif
