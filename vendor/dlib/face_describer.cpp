#include "face_describer.h"
#include "networks.h"
#include "threads.h"
#include <algorithm>
#include <numeric>

namespace
{
    // Planes with their memory.
    struct image : std::vector<float>, planes<float>
    {
        image(const long num, const long rows, const long columns)
            : std::vector<float>(num * rows * columns), planes<float>(std::vector<float>::data(), num, rows, columns) {}
        image(image&&) = default; // a copy's planes would be the other's
        image& operator=(image&&) = default;
    };

    // The chip as the network sees it: relative to the average pixel.
    image as_planes(const rgb_view& chip, const std::array<float, 3>& average)
    {
        image seen(3, chip.rows, chip.columns);
        for (long k = 0; k < 3; ++k)
            for (long i = 0; i < chip.rows * chip.columns; ++i)
                seen.row(k, 0)[i] = ((&chip.pixels[i].red)[k] - average[k]) / 256;
        return seen;
    }

    // Joins each square of size x size pixels, every two pixels; planes beyond those of the input are zero.
    template <typename join_type>
    image pooled(const planes<float>& in, const long num, const long size, const join_type& join)
    {
        image out(num, (in.rows - size) / 2 + 1, (in.columns - size) / 2 + 1);
        for (long k = 0; k < in.num; ++k)
            for (long y = 0; y < out.rows; ++y)
                for (long x = 0; x < out.columns; ++x)
                {
                    float joined = 0; // nothing is below, after relu
                    for (long i = 0; i < size; ++i)
                        for (long j = 0; j < size; ++j)
                            joined = join(joined, in.row(k, 2 * y + i)[2 * x + j]);
                    out.row(k, y)[x] = joined;
                }
        return out;
    }
}

face_describer::face_describer(const std::string& file)
{
    describer_network trained = load_describer(file);
    for (const auto& filters : trained.layers)
    {
        // Where there are 64 planes or fewer, images have 17 x 17 pixels or more.  Relu follows each layer.
        const bool large = filters.depth >= 8 && filters.num <= 64 && filters.stride == 1;
        layers.emplace_back(filters, true, large ? convolution::method::winograd : convolution::method::direct);
    }
    average = trained.average;
    last.swap(trained.last);
}

std::vector<float> face_describer::describe(const rgb_view& chip, const bool use_threads) const
{
    auto layer = layers.begin();
    const image in = as_planes(chip, average);
    image first(layer->num_planes(), layer->outputs(in.rows), layer->outputs(in.columns));
    (*layer++)(first, in, use_threads);
    image now = pooled(first, first.num, 3, [](const float a, const float b) { return std::max(a, b); });

    // Blocks of two layers, around which a shortcut leads.  Where a block halves the image, so does the shortcut; its
    // image can be a pixel larger then, where nothing is added to it.
    while (layer != layers.end())
    {
        const convolution &one = *layer++, &two = *layer++;
        image between(one.num_planes(), one.outputs(now.rows), one.outputs(now.columns));
        one(between, now, use_threads);
        if (between.rows < now.rows)
            now = pooled(now, two.num_planes(), 2, [](const float a, const float b) { return a + b / 4; });
        two(now.part(0, 0, between.rows, between.columns), between, use_threads, true);
    }

    std::vector<float> descriptor(128);
    for (long k = 0; k < now.num; ++k)
    {
        const float* const pixels = now.row(k, 0);
        const float mean = std::accumulate(pixels, pixels + now.plane_step, 0.0f) / now.plane_step;
        for (size_t i = 0; i < descriptor.size(); ++i)
            descriptor[i] += mean * last[k * descriptor.size() + i];
    }
    return descriptor;
}

std::vector<std::vector<float>> face_describer::operator()(const std::vector<rgb_view>& chips) const
{
    std::vector<std::vector<float>> descriptors(chips.size());
    const bool one_for_each_thread = (long)chips.size() >= num_threads();
    const auto describe_one = [&](const long i) { descriptors[i] = describe(chips[i], !one_for_each_thread); };
    if (one_for_each_thread)
        for_each_task(chips.size(), describe_one);
    else
        for (size_t i = 0; i < chips.size(); ++i)
            describe_one(i);
    return descriptors;
}
