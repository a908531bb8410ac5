#ifndef FACE_DETECTOR_H
#define FACE_DETECTOR_H

#include "faces.h"
#include <array>
#include <dlib/cuda/cpu_dlib.h>
#include <dlib/image_processing/box_overlap_testing.h>
#include <dlib/image_processing/full_object_detection.h>

// The network that detects faces, dlib's cnn_face_detection_model_v1, in a fraction of the memory: no layer's
// output is kept.  The image pyramid goes through the first three layers in bands, and the other four take turns
// with two buffers, one of them the pyramid's.  For one photo at a time; an exception leaves it as it was.
class face_detector
{
public:
    explicit face_detector(const std::string& file);

    std::vector<dlib::mmod_rect> operator()(const rgb_view& photo);

private:
    struct layer_type
    {
        dlib::resizable_tensor filters;
        std::vector<float> biases;
        bool use_relu;
        dlib::cpu::tensor_conv conv;
    };

    template <typename con_type>
    void copy_layer(int i, const con_type& con);
    void apply_layer(int i, const dlib::cpu::planes& out, const dlib::cpu::planes& in, bool use_threads);
    void make_pyramid(const dlib::cpu::planes& pyramid, const std::vector<dlib::rectangle>& levels, const rgb_view& photo) const;
    void downsample(const dlib::cpu::planes& features, const dlib::cpu::planes& pyramid, float* space);
    std::vector<dlib::mmod_rect> find_faces(const dlib::cpu::planes& scores, const std::vector<dlib::rectangle>& levels) const;

    std::array<layer_type, 7> layers;
    std::array<float, 3> average; // pixel
    unsigned long padding, outer_padding;
    unsigned long face_width, face_height; // in the pyramid
    dlib::test_box_overlap overlaps;
    std::unique_ptr<float[]> memory; // for the next photo
    size_t memory_size = 0;
};

#endif
