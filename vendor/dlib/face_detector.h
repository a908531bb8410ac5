#ifndef FACE_DETECTOR_H
#define FACE_DETECTOR_H

#include <dlib/image_processing/full_object_detection.h>
#include <dlib/matrix.h>
#include <dlib/pixel.h>
#include <memory>
#include <string>
#include <vector>

// The network that detects faces, dlib's cnn_face_detection_model_v1.
class face_detector
{
public:
    explicit face_detector(const std::string& file);

    std::vector<dlib::mmod_rect> operator()(const dlib::matrix<dlib::rgb_pixel>& img) const;

private:
    struct implementation;
    std::shared_ptr<implementation> impl;
};

#endif
