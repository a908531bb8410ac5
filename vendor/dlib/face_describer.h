#pragma once

#include "convolution.h"
#include "rgb_view.h"
#include <string>

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

    std::vector<convolution> layers;
    std::array<float, 3> average; // pixel
    std::vector<float> last; // 256 x 128: from the last layer's mean values to a descriptor
};
