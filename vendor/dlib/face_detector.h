#pragma once

#include "buffer.h"
#include "rgb_view.h"
#include "networks.h"
#include <dlib/image_processing/full_object_detection.h>

// dlib's cnn_face_detection_model_v1, in a fraction of the memory: no layer's output is kept.  The image pyramid goes
// through the first three layers in bands, and the other four take turns with two buffers, one of them the pyramid's.
//
// For one photo at a time; an exception, such as std::bad_alloc, leaves it as it was.
class face_detector
{
public:
    explicit face_detector(const std::string& file);

    // The faces of an image: boxes in its pixels and confidences above 0, the surest first.
    std::vector<dlib::mmod_rect> operator()(const rgb_view& photo);

private:
    void make_pyramid(const planes<float>& pyramid, const std::vector<dlib::rectangle>& scales, const rgb_view& photo) const;
    void downsample(const planes<float>& features, const planes<float>& pyramid, float* space) const;
    std::vector<dlib::mmod_rect> find_faces(const planes<float>& scores, const std::vector<dlib::rectangle>& scales) const;

    const detector_network net;
    const std::vector<convolution> layers;
    buffer<float> memory; // for the next photo
};
