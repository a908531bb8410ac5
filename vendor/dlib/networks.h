#pragma once

#include "convolution.h"
#include <array>
#include <dlib/image_processing/box_overlap_testing.h>
#include <string>

// What dlib's two networks were trained to, read from their files.  An affine layer after a convolution is folded into
// its filters.  Both throw dlib::error, which names the file, if it is of another kind.  That its layers are as large as
// those of the app's file is not checked here: models.py checks the file's hash.

// Of dlib's cnn_face_detection_model_v1.
struct detector_network
{
    std::vector<filter_bank> layers; // in the order of the data
    std::array<float, 3> average;    // red, green and blue, which pixels are seen relative to
    unsigned long face_width, face_height; // in a scale of the pyramid
    dlib::test_box_overlap overlaps;       // whether two boxes are taken to be of the same face
};

detector_network load_detector(const std::string& file);

// Of dlib's face_recognition_model_v1.
struct describer_network
{
    std::vector<filter_bank> layers; // in the order of the data
    std::array<float, 3> average;    // as above
    std::vector<float> last;         // from the last layer's mean values to a descriptor: 256 x 128
};

describer_network load_describer(const std::string& file);
