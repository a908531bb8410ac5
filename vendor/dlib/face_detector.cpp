#include "face_detector.h"
#include "resize.h"
#include "threads.h"
#include <algorithm>
#include <atomic>
#include <dlib/dnn/utilities.h>
#include <dlib/image_transforms/image_pyramid.h>

using namespace dlib;

namespace
{
    typedef pyramid_down<6> pyramid_type;
    const long padding = 10, outer_padding = 11; // of the pyramid, as dlib has them for this version of the file

    // The first three layers, the downsampler, have filters of 5 x 5 and a stride of 2.  So n rows of their output are
    // made from this many of their input...
    constexpr long rows_for(const long n) { return 2 * (n - 1) + 5; }
    // ... and a pixel of the features, which they give, is seen by these rows of the pyramid, and centred on their middle.
    const long feature_step = 8, feature_centre = rows_for(rows_for(rows_for(1))) / 2;

    // A thread takes the features of a band, and what the layers below need for these, from top to bottom.  Both fit into
    // the processor's second cache.
    const long band_rows = 16, band_columns = 96;
    const long second_size = 32 * rows_for(band_rows) * rows_for(band_columns);
    const long first_size = 16 * rows_for(rows_for(band_rows)) * rows_for(rows_for(band_columns));

    // What a photo of 0.31 megapixels needs, on two threads, is kept for the next one.  It takes time to get memory
    // from the system, most of all on a virtual machine whose host has to find it first.
    const size_t bytes_kept = 24 << 20;

    // The first and the last layer are too shallow, or too wide, for Winograd's method; relu follows all but the last.
    std::vector<convolution> layers_of(const detector_network& net)
    {
        std::vector<convolution> layers;
        for (const auto& filters : net.layers)
        {
            const bool first = layers.empty(), last = layers.size() + 1 == net.layers.size();
            const auto method = first || last ? convolution::method::direct : convolution::method::winograd;
            layers.emplace_back(filters, !last, method);
        }
        return layers;
    }

    // Moves the last rows up to the first.
    void keep_last_rows(const planes<float>& p, const long num)
    {
        for (long k = 0; k < p.num; ++k)
            std::copy_n(p.row(k, p.rows - num), num * p.columns, p.row(k, 0));
    }
}

face_detector::face_detector(const std::string& file) : net(load_detector(file)), layers(layers_of(net)) {}

// As dlib's input_rgb_image_pyramid does, but on all threads.
void face_detector::make_pyramid(const planes<float>& pyramid, const std::vector<rectangle>& scales,
    const rgb_view& photo) const
{
    const long rows_at_a_time = 32;
    for_each_task((pyramid.rows + rows_at_a_time - 1) / rows_at_a_time, [&](const long i)
    {
        for (long r = i * rows_at_a_time; r < std::min((i + 1) * rows_at_a_time, pyramid.rows); ++r)
            for (long k = 0; k < pyramid.num; ++k)
            {
                // Zeros around the scales, which stand from left to right.  Those of a photo narrower than 22 pixels
                // overlap: there, which pixels are read before they are overwritten is not as in dlib.
                float* const row = pyramid.row(k, r);
                long done = 0;
                for (const auto& scale : scales)
                    if (scale.top() <= r && r <= scale.bottom())
                    {
                        std::fill(row + std::min(done, scale.left()), row + scale.left(), 0);
                        done = scale.right() + 1;
                    }
                std::fill(row + done, row + pyramid.columns, 0);

                const long y = r - scales[0].top();
                if (0 <= y && y < photo.rows)
                {
                    const unsigned char* const pixels = &photo.pixels[y * photo.columns].red + k;
                    for (long x = 0; x < photo.columns; ++x)
                        row[scales[0].left() + x] = (pixels[3 * x] - net.average[k]) / 256;
                }
            }
    });
    const auto scale = [&](const rectangle& r) { return pyramid.part(r.top(), r.left(), r.height(), r.width()); };
    for (size_t i = 1; i < scales.size(); ++i)
    {
        const resizing<float> tasks(scale(scales[i]), scale(scales[i - 1]));
        for_each_task(tasks.num, [&](const long task) { tasks.run(task); });
    }
}

// The first three layers, band by band.
void face_detector::downsample(const planes<float>& features, const planes<float>& pyramid, float* const space) const
{
    const long num_across = (features.columns + band_columns - 1) / band_columns;
    const long num_down = std::min((features.rows + band_rows - 1) / band_rows, 8 * num_threads() / num_across + 1);
    std::atomic<long> next(0);
    for_each_task(num_threads(), [&](const long thread)
    {
        float* const own = space + thread * (first_size + second_size);
        for (long i = next++; i < num_across * num_down; i = next++)
        {
            const long c = i % num_across * features.columns / num_across;
            const long columns = (i % num_across + 1) * features.columns / num_across - c;
            const long begin = i / num_across * features.rows / num_down;
            const long end = (i / num_across + 1) * features.rows / num_down;
            const long second_columns = rows_for(columns), first_columns = rows_for(second_columns);
            const planes<float> first(own, 16, rows_for(rows_for(band_rows)), first_columns);
            const planes<float> second(own + first_size, 32, rows_for(band_rows), second_columns);
            for (long r = begin; r < end; r += band_rows)
            {
                const long rows = std::min(band_rows, end - r);
                // Above, these have the last rows of the band before, of which the layers above need some again.
                const long kept_second = r == begin ? 0 : rows_for(0), kept_first = r == begin ? 0 : rows_for(rows_for(0));
                keep_last_rows(first, kept_first);
                keep_last_rows(second, kept_second);
                const long new_second = rows_for(rows) - kept_second, new_first = rows_for(rows_for(rows)) - kept_first;
                const long top = feature_step * r + 2 * kept_first;
                layers[0](first.part(kept_first, 0, new_first, first_columns),
                    pyramid.part(top, feature_step * c, rows_for(new_first), rows_for(first_columns)), false);
                layers[1](second.part(kept_second, 0, new_second, second_columns),
                    first.part(2 * kept_second, 0, rows_for(new_second), first_columns), false);
                layers[2](features.part(r, c, rows, columns), second.part(0, 0, rows_for(rows), second_columns), false);
            }
        }
    });
}

// As dlib's loss_mmod does in to_label().
std::vector<mmod_rect> face_detector::find_faces(const planes<float>& scores, const std::vector<rectangle>& scales) const
{
    std::vector<mmod_rect> found, faces;
    for (long r = 0; r < scores.rows; ++r)
        for (long c = 0; c < scores.columns; ++c)
            if (scores.row(0, r)[c] > 0)
            {
                const dpoint centre(feature_step * c + feature_centre, feature_step * r + feature_centre);
                const auto box = centered_drect(centre, net.face_width, net.face_height);
                found.emplace_back(tiled_pyramid_to_image<pyramid_type>(scales, box), scores.row(0, r)[c]);
            }
    std::sort(found.rbegin(), found.rend(), [](const mmod_rect& a, const mmod_rect& b)
        { return a.detection_confidence < b.detection_confidence; });
    for (const auto& face : found)
        if (std::none_of(faces.begin(), faces.end(), [&](const mmod_rect& other) { return net.overlaps(other, face); }))
            faces.push_back(face);
    return faces;
}

std::vector<mmod_rect> face_detector::operator()(const rgb_view& photo)
{
    if (std::min(photo.rows, photo.columns) < least_side)
        return {};
    long rows, columns;
    std::vector<rectangle> scales;
    impl::compute_tiled_image_pyramid_details(pyramid_type(), photo.rows, photo.columns, padding, outer_padding,
        scales, rows, columns);
    const auto downsampled = [&](const long n) { return layers[2].outputs(layers[1].outputs(layers[0].outputs(n))); };
    const long out_rows = downsampled(rows), out_columns = downsampled(columns), plane = out_rows * out_columns;

    // The pyramid or 45 planes of features; 32 planes of them and the space of the threads, or 45.
    const size_t size0 = std::max(3 * rows * columns, 45 * plane);
    const size_t size1 = std::max(45 * plane, 32 * plane + num_threads() * (first_size + second_size));
    float* const all = memory.get(size0 + size1);
    float* const buffers[] = {all, all + size0};

    const planes<float> pyramid(buffers[0], 3, rows, columns);
    make_pyramid(pyramid, scales, photo);
    planes<float> features(buffers[1], 32, out_rows, out_columns);
    downsample(features, pyramid, buffers[1] + 32 * plane);
    for (size_t i = 3; i < layers.size(); ++i)
    {
        const planes<float> out(buffers[(i + 1) % 2], layers[i].num_planes(), out_rows, out_columns);
        layers[i](out, features, true);
        features = out;
    }
    const auto faces = find_faces(features, scales);
    memory.keep(bytes_kept);
    return faces;
}
