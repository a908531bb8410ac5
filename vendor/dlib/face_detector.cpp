#include "face_detector.h"
#include <dlib/dnn.h>

using namespace dlib;

namespace
{
    template <long num_filters, typename SUBNET>
    using con5d = con<num_filters, 5, 5, 2, 2, SUBNET>;
    template <long num_filters, typename SUBNET>
    using con5 = con<num_filters, 5, 5, 1, 1, SUBNET>;
    template <typename SUBNET>
    using downsampler = relu<affine<con5d<32, relu<affine<con5d<32, relu<affine<con5d<16, SUBNET>>>>>>>>>;
    template <typename SUBNET>
    using rcon5 = relu<affine<con5<45, SUBNET>>>;
    using net_type = loss_mmod<
        con<1, 9, 9, 1, 1, rcon5<rcon5<rcon5<downsampler<input_rgb_image_pyramid<pyramid_down<6>>>>>>>>;
}

struct face_detector::implementation
{
    net_type net;
};

face_detector::face_detector(const std::string& file) : impl(std::make_shared<implementation>())
{
    deserialize(file) >> impl->net;
    set_inference_only(impl->net, true);
}

std::vector<mmod_rect> face_detector::operator()(const matrix<rgb_pixel>& img) const
{
    return impl->net(img);
}
