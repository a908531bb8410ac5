#include "faces.h"
#include <dlib/dnn.h>

using namespace dlib;

namespace
{
    template <template <int, template <typename> class, int, typename> class block, int N, template <typename> class BN, typename SUBNET>
    using residual = add_prev1<block<N, BN, 1, tag1<SUBNET>>>;
    template <template <int, template <typename> class, int, typename> class block, int N, template <typename> class BN, typename SUBNET>
    using residual_down = add_prev2<avg_pool<2, 2, 2, 2, skip1<tag2<block<N, BN, 2, tag1<SUBNET>>>>>>;
    template <int N, template <typename> class BN, int stride, typename SUBNET>
    using block = BN<con<N, 3, 3, 1, 1, relu<BN<con<N, 3, 3, stride, stride, SUBNET>>>>>;
    template <int N, typename SUBNET>
    using ares = relu<residual<block, N, affine, SUBNET>>;
    template <int N, typename SUBNET>
    using ares_down = relu<residual_down<block, N, affine, SUBNET>>;
    template <typename SUBNET>
    using level0 = ares_down<256, SUBNET>;
    template <typename SUBNET>
    using level1 = ares<256, ares<256, ares_down<256, SUBNET>>>;
    template <typename SUBNET>
    using level2 = ares<128, ares<128, ares_down<128, SUBNET>>>;
    template <typename SUBNET>
    using level3 = ares<64, ares<64, ares<64, ares_down<64, SUBNET>>>>;
    template <typename SUBNET>
    using level4 = ares<32, ares<32, ares<32, SUBNET>>>;
    using net_type = loss_metric<fc_no_bias<128, avg_pool_everything<level0<level1<level2<level3<level4<
        max_pool<3, 3, 2, 2, relu<affine<con<32, 7, 7, 2, 2, input_rgb_image_sized<face_describer::chip_size>>>>>>>>>>>>>;
}

// Has convolutions transform their filters once for all.
struct final_filters
{
    template <typename layer>
    void operator()(size_t, layer&) const {}

    template <long num, long nr, long nc, int sy, int sx, int py, int px>
    void operator()(size_t, con_<num, nr, nc, sy, sx, py, px>& layer) const { layer.set_filters_final(); }
};

struct face_describer::implementation
{
    net_type net;
};

face_describer::face_describer(const std::string& file) : impl(std::make_shared<implementation>())
{
    deserialize(file) >> impl->net;
    fuse_layers(impl->net);
    visit_computational_layers(impl->net, final_filters());
}

std::vector<std::vector<float>> face_describer::operator()(const std::vector<rgb_view>& chips) const
{
    std::vector<matrix<rgb_pixel>> images(chips.size());
    for (size_t i = 0; i < chips.size(); ++i)
        assign_image(images[i], chips[i]);
    std::vector<std::vector<float>> descriptors;
    for (const auto& descriptor : impl->net(images, 4)) // at once; the network keeps 4 MB for each
        descriptors.emplace_back(descriptor.begin(), descriptor.end());
    return descriptors;
}
