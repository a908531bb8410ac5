#include "face_detector.h"
#include <algorithm>
#include <atomic>
#include <cstring>
#include <dlib/dnn.h>
#include <sys/mman.h>

using namespace dlib;
using cpu::planes;

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
    using pyramid_type = pyramid_down<6>;
    using net_type = loss_mmod<
        con<1, 9, 9, 1, 1, rcon5<rcon5<rcon5<downsampler<input_rgb_image_pyramid<pyramid_type>>>>>>>;

    // What a photo of 0.31 megapixels needs, on two threads, is kept for the next one.  It takes time to get memory
    // from the system, most of all on a virtual machine whose host has to find it first.
    const size_t bytes_kept = 24 << 20;

    // Advises the system on the whole pages of memory that lie beyond so many bytes.  To get them takes a sixth of
    // the detection at 4 megapixels if they are of 4 KB, and little if they are of 2 MB.
    void advise(float* const memory, const size_t size, const size_t beyond, const int advice)
    {
        const size_t page = 2 << 20;
        const size_t begin = ((size_t)memory + beyond + page - 1) / page * page, end = (size_t)(memory + size) / page * page;
        if (begin < end)
            madvise((void*)begin, end - begin, advice);
    }

    // A thread takes the features of a band, and what the layers below need for these, from top to bottom.
    const long band_nr = 16, band_nc = 96;
    const long first_size = 16 * (4 * band_nr + 9) * (4 * band_nc + 9);
    const long second_size = 32 * (2 * band_nr + 3) * (2 * band_nc + 3);

    long num_threads() { return std::max(1ul, default_thread_pool().num_threads_in_pool()); }

    // Moves the last rows up to the first, and returns how many.
    long keep_last_rows(const planes& p, const long num)
    {
        for (long k = 0; k < p.k; ++k)
            std::copy_n(p.row(0, k, p.nr - num), num * p.nc, p.row(0, k, 0));
        return num;
    }

    // Does to rows [begin,end) what resize_image() does, to the last bit.  Row r of plane k counts as k*to.nr+r.
    void resize_rows(const planes& to, const planes& from, const long begin, const long end)
    {
        const double x_scale = (from.nc - 1) / (double)std::max(to.nc - 1, 1L);
        const double y_scale = (from.nr - 1) / (double)std::max(to.nr - 1, 1L);

        // Each column lies between two of the input, at a fraction of the way from the left to the right one.
        std::vector<int32> lefts;
        std::vector<float> fracs;
        float xs[4];
        for (int i = 0; i < 4; ++i)
            xs[i] = -4 * x_scale + i * x_scale;
        while ((long)lefts.size() + 4 <= to.nc)
        {
            for (float& x : xs)
                x += (float)(4 * x_scale);
            if ((long)xs[3] + 1 >= from.nc)
                break;
            for (const float x : xs)
            {
                lefts.push_back((int32)x);
                fracs.push_back(x - lefts.back());
            }
        }
        const long num = lefts.size();

        // Of two rows of the input, the left and the right pixel for each column.
        std::vector<float> above(2 * num), below(2 * num);
        const float *top_row = nullptr, *bottom_row = nullptr;
        const auto load = [&](std::vector<float>& pairs, const float* const row)
        {
            for (long c = 0; c < num; ++c)
                std::memcpy(&pairs[2 * c], row + lefts[c], 2 * sizeof(float));
        };

        double y = 0;
        for (long i = begin / to.nr * to.nr; i < end; ++i)
        {
            const long k = i / to.nr, r = i % to.nr;
            y = r == 0 ? 0 : y + y_scale;
            if (i < begin)
                continue;
            const long top = static_cast<long>(std::floor(y));
            const double tb_frac = y - top;
            const float* const last_bottom = bottom_row;
            top_row = from.row(0, k, top);
            bottom_row = from.row(0, k, std::min(top + 1, from.nr - 1));
            if (top_row == last_bottom)
                above.swap(below);
            else
                load(above, top_row);
            load(below, bottom_row);

            float* const out = to.row(0, k, r);
            const float b = tb_frac, t = 1 - tb_frac;
            const float *const fs = fracs.data(), *const as = above.data(), *const bs = below.data();
            #pragma GCC ivdep
            for (long c = 0; c < num; ++c)
                out[c] = t * (1 - fs[c]) * as[2 * c] + t * fs[c] * as[2 * c + 1] + b * (1 - fs[c]) * bs[2 * c] + b * fs[c] * bs[2 * c + 1];
            double x = -x_scale + num * x_scale;
            for (long c = num; c < to.nc; ++c)
            {
                x += x_scale;
                const long left = static_cast<long>(std::floor(x));
                const long right = std::min(left + 1, from.nc - 1);
                const float lr_frac = x - left;
                out[c] = (1 - tb_frac) * ((1 - lr_frac) * top_row[left] + lr_frac * top_row[right])
                    + tb_frac * ((1 - lr_frac) * bottom_row[left] + lr_frac * bottom_row[right]);
            }
        }
    }
}

template <typename con_type>
void face_detector::copy_layer(const int i, const con_type& con)
{
    layer_type& layer = layers[i];
    const tensor& params = con.get_layer_params(); // filters, then biases
    const long num = con.num_filters();
    layer.filters.set_size(num, (params.size() / num - 1) / (con.nr() * con.nc()), con.nr(), con.nc());
    std::copy_n(params.host(), layer.filters.size(), layer.filters.host());
    layer.biases.assign(params.end() - num, params.end());
    layer.use_relu = !con.relu_is_disabled();
    layer.conv.setup(layer.filters, layer.filters, con.stride_y(), con.stride_x(), con.padding_y(), con.padding_x());
    layer.conv.set_filters_final();
}

face_detector::face_detector(const std::string& file)
{
    net_type net;
    deserialize(file) >> net;
    fuse_layers(net);
    copy_layer(0, layer<19>(net).layer_details());
    copy_layer(1, layer<16>(net).layer_details());
    copy_layer(2, layer<13>(net).layer_details());
    copy_layer(3, layer<10>(net).layer_details());
    copy_layer(4, layer<7>(net).layer_details());
    copy_layer(5, layer<4>(net).layer_details());
    copy_layer(6, layer<1>(net).layer_details());

    const auto& input = input_layer(net);
    average = {{input.get_avg_red(), input.get_avg_green(), input.get_avg_blue()}};
    padding = input.get_pyramid_padding();
    outer_padding = input.get_pyramid_outer_padding();

    const mmod_options& options = net.loss_details().get_options();
    if (options.detector_windows.size() != 1 || options.use_bounding_box_regression)
        throw error(file + " is no detector of this kind.");
    face_width = options.detector_windows[0].width;
    face_height = options.detector_windows[0].height;
    overlaps = options.overlaps_nms;
}

void face_detector::apply_layer(const int i, const planes& out, const planes& in, const bool use_threads)
{
    layer_type& layer = layers[i];
    layer.conv.convolve(false, out, in, layer.filters, layer.biases.data(), layer.use_relu, use_threads);
}

// As input_rgb_image_pyramid does, but on all threads.
void face_detector::make_pyramid(const planes& pyramid, const std::vector<rectangle>& levels, const rgb_view& photo) const
{
    parallel_for_blocked(0, pyramid.nr, [&](const long begin, const long end)
    {
        for (long r = begin; r < end; ++r)
            for (long k = 0; k < pyramid.k; ++k)
            {
                // Zeros around the levels, which stand from left to right.  Those of a tiny photo overlap.
                float* const row = pyramid.row(0, k, r);
                long done = 0;
                for (const auto& level : levels)
                    if (level.top() <= r && r <= level.bottom())
                    {
                        if (done < level.left())
                            std::fill(row + done, row + level.left(), 0);
                        done = std::max(done, level.right() + 1);
                    }
                std::fill(row + done, row + pyramid.nc, 0);

                const long y = r - levels[0].top();
                if (0 <= y && y < photo.rows)
                {
                    const unsigned char* const pixels = &photo.pixels[y * photo.columns].red + k;
                    for (long x = 0; x < photo.columns; ++x)
                        row[levels[0].left() + x] = (pixels[3 * x] - average[k]) / 256;
                }
            }
    });
    for (size_t i = 1; i < levels.size(); ++i)
    {
        const auto level = [&](const rectangle& r) { return pyramid.part(r.top(), r.left(), r.height(), r.width()); };
        const planes from = level(levels[i - 1]), to = level(levels[i]);
        const auto resize = [&](const long begin, const long end) { resize_rows(to, from, begin, end); };
        if (to.nr * to.nc < 64 * 64)
            resize(0, 3 * to.nr);
        else
            parallel_for_blocked(0, 3 * to.nr, resize, 2);
    }
}

// The first three layers, whose filters are 5 x 5 with a stride of 2: a row of theirs depends on 5 of the layer below.
void face_detector::downsample(const planes& features, const planes& pyramid, float* const space)
{
    const long num_across = (features.nc + band_nc - 1) / band_nc;
    const long num_down = std::min((features.nr + band_nr - 1) / band_nr, 8 * num_threads() / num_across + 1);
    std::atomic<long> next(0);
    parallel_for(0, num_threads(), [&](const long thread)
    {
        float* const first_data = space + thread * (first_size + second_size);
        for (long i = next++; i < num_across * num_down; i = next++)
        {
            const long c = i % num_across * features.nc / num_across;
            const long nc = (i % num_across + 1) * features.nc / num_across - c;
            const long begin = i / num_across * features.nr / num_down;
            const long end = (i / num_across + 1) * features.nr / num_down;
            const planes first(first_data, 1, 16, 4 * band_nr + 9, 4 * nc + 9);
            const planes second(first_data + first_size, 1, 32, 2 * band_nr + 3, 2 * nc + 3);
            for (long r = begin; r < end; r += band_nr)
            {
                const long nr = std::min(band_nr, end - r);
                long kept_first = 0, kept_second = 0;
                if (r != begin)
                {
                    // Above, these have the last rows of the band before.
                    kept_first = keep_last_rows(first, 9);
                    kept_second = keep_last_rows(second, 3);
                }
                apply_layer(0, first.part(kept_first, 0, 4 * nr + 9 - kept_first, first.nc),
                    pyramid.part(8 * r + 2 * kept_first, 8 * c, 2 * (4 * nr + 9 - kept_first) + 3, 8 * nc + 21), false);
                apply_layer(1, second.part(kept_second, 0, 2 * nr + 3 - kept_second, second.nc),
                    first.part(2 * kept_second, 0, 2 * (2 * nr + 3 - kept_second) + 3, first.nc), false);
                apply_layer(2, features.part(r, c, nr, nc), second.part(0, 0, 2 * nr + 3, second.nc), false);
            }
        }
    });
}

// As loss_mmod's to_label() does
std::vector<mmod_rect> face_detector::find_faces(const planes& scores, const std::vector<rectangle>& levels) const
{
    std::vector<mmod_rect> found, faces;
    for (long r = 0; r < scores.nr; ++r)
        for (long c = 0; c < scores.nc; ++c)
            if (scores.row(0, 0, r)[c] > 0)
            {
                const auto box = centered_drect(dpoint(8 * c + 14, 8 * r + 14), face_width, face_height);
                found.emplace_back(tiled_pyramid_to_image<pyramid_type>(levels, box), scores.row(0, 0, r)[c]);
            }
    std::sort(found.rbegin(), found.rend(), [](const mmod_rect& a, const mmod_rect& b)
        { return a.detection_confidence < b.detection_confidence; });
    for (const auto& face : found)
        if (std::none_of(faces.begin(), faces.end(), [&](const mmod_rect& other) { return overlaps(other, face); }))
            faces.push_back(face);
    return faces;
}

std::vector<mmod_rect> face_detector::operator()(const rgb_view& photo)
{
    long nr, nc;
    std::vector<rectangle> levels;
    impl::compute_tiled_image_pyramid_details(pyramid_type(), photo.rows, photo.columns, padding, outer_padding, levels, nr, nc);
    const auto halved = [](const long n) { return (n - 5) / 2 + 1; };
    const long out_nr = halved(halved(halved(nr))), out_nc = halved(halved(halved(nc))), plane = out_nr * out_nc;

    const size_t size0 = std::max(3 * nr * nc, 45 * plane);
    const size_t size1 = std::max(45 * plane, 32 * plane + num_threads() * (first_size + second_size));
    if (size0 + size1 > memory_size)
    {
        memory.reset();
        memory_size = 0;
        memory.reset(new float[size0 + size1]);
        memory_size = size0 + size1;
        advise(memory.get(), memory_size, 0, MADV_HUGEPAGE);
    }
    float* const buffers[] = {memory.get(), memory.get() + size0};

    const planes pyramid(buffers[0], 1, 3, nr, nc);
    make_pyramid(pyramid, levels, photo);
    planes features(buffers[1], 1, 32, out_nr, out_nc);
    downsample(features, pyramid, buffers[1] + 32 * plane);
    for (int i = 3; i < 7; ++i)
    {
        const planes out(buffers[(i + 1) % 2], 1, layers[i].filters.num_samples(), out_nr, out_nc);
        apply_layer(i, out, features, true);
        features = out;
    }
    const auto faces = find_faces(features, levels);
    advise(memory.get(), memory_size, bytes_kept, MADV_DONTNEED);
    return faces;
}
