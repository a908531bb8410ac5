#include "networks.h"
#include <algorithm>
#include <dlib/dnn.h>

using namespace dlib;

namespace
{
    // As in dlib's tools/python/src/cnn_face_detector.cpp
    template <long num_filters, typename SUBNET>
    using con5d = con<num_filters, 5, 5, 2, 2, SUBNET>;
    template <long num_filters, typename SUBNET>
    using con5 = con<num_filters, 5, 5, 1, 1, SUBNET>;
    template <typename SUBNET>
    using downsampler = relu<affine<con5d<32, relu<affine<con5d<32, relu<affine<con5d<16, SUBNET>>>>>>>>>;
    template <typename SUBNET>
    using rcon5 = relu<affine<con5<45, SUBNET>>>;
    using detector_type = loss_mmod<
        con<1, 9, 9, 1, 1, rcon5<rcon5<rcon5<downsampler<input_rgb_image_pyramid<pyramid_down<6>>>>>>>>;

    // As in dlib's tools/python/src/face_recognition.cpp
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
    using describer_type = loss_metric<fc_no_bias<128, avg_pool_everything<level0<level1<level2<level3<level4<
        max_pool<3, 3, 2, 2, relu<affine<con<32, 7, 7, 2, 2, input_rgb_image_sized<150>>>>>>>>>>>>>;

    // Collects the convolutions of one of dlib's networks, which it visits from the last layer to the first.
    class filter_collector
    {
    public:
        explicit filter_collector(std::vector<filter_bank>& collected) : collected(collected) {}

        template <typename layer>
        void operator()(size_t, layer&) {}

        void operator()(size_t, affine_& affine)
        {
            const auto g = affine.get_gamma(), b = affine.get_beta();
            gamma.assign(g.host(), g.host() + g.size());
            beta.assign(b.host(), b.host() + b.size());
        }

        template <long num, long nr, long nc, int stride_y, int stride_x, int padding_y, int padding_x>
        void operator()(size_t, con_<num, nr, nc, stride_y, stride_x, padding_y, padding_x>& con)
        {
            static_assert(nr == nc && stride_y == stride_x && padding_y == padding_x, "Filters are square.");
            const tensor& params = con.get_layer_params(); // filters, then biases
            filter_bank filters = {con.num_filters(), 0, nr, stride_y, con.padding_y(), {}, {}};
            const long size = params.size() / filters.num - 1; // of a filter
            filters.depth = size / (nr * nc);
            filters.values.assign(params.host(), params.host() + filters.num * size);
            filters.biases.assign(params.host() + filters.num * size, params.host() + params.size());
            for (size_t f = 0; f < gamma.size(); ++f)
            {
                for (long i = 0; i < size; ++i)
                    filters.values[f * size + i] *= gamma[f];
                filters.biases[f] = filters.biases[f] * gamma[f] + beta[f];
            }
            gamma.clear();
            collected.push_back(std::move(filters));
        }

    private:
        std::vector<filter_bank>& collected;
        std::vector<float> gamma, beta; // of the affine layer above
    };

    // The convolutions of a network, in the order of the data.
    template <typename network>
    std::vector<filter_bank> filters_of(network& net)
    {
        std::vector<filter_bank> filters;
        visit_computational_layers(net, filter_collector(filters));
        std::reverse(filters.begin(), filters.end());
        return filters;
    }
}

detector_network load_detector(const std::string& file)
{
    detector_type net;
    deserialize(file) >> net;
    const auto& input = input_layer(net);
    const mmod_options& options = net.loss_details().get_options();
    if (options.detector_windows.size() != 1 || options.use_bounding_box_regression)
        throw error(file + " is no detector of this kind.");
    return {filters_of(net), {{input.get_avg_red(), input.get_avg_green(), input.get_avg_blue()}},
        input.get_pyramid_padding(), input.get_pyramid_outer_padding(), options.detector_windows[0].width,
        options.detector_windows[0].height, options.overlaps_nms};
}

describer_network load_describer(const std::string& file)
{
    describer_type net;
    deserialize(file) >> net;
    const tensor& last = layer<1>(net).layer_details().get_layer_params();
    return {filters_of(net), {last.begin(), last.end()}};
}
