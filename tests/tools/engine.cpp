// tests/tools/engine.sh: the parts of our engine against what they shall compute.
//
//   engine PHOTO.bmp...   prints what was compared, and fails if something differs
//
// Convolutions against their definition, loop by loop: every kind that the networks use and more.  Resizing and HOG
// against the dlib that we compile with, to the last bit and box.

#include "convolution.h"
#include "cpu.h"
#include "frontal_detector.h"
#include "resize.h"
#include "threads.h"
#include <dlib/image_io.h>
#include <dlib/image_processing/frontal_face_detector.h>
#include <dlib/image_transforms.h>
#include <dlib/rand.h>
#include <iostream>

using namespace dlib;

static dlib::rand chance;

static std::vector<float> noise(long size)
{
    std::vector<float> values(size);
    for (auto& value : values)
        value = chance.get_double_in_range(-1, 1);
    return values;
}

// The largest difference of a convolution from its definition, relative to the largest sum of the products' sizes.
// Winograd's method sums up a square of pixels at once: at the border of an image its error is that of the square, of
// which a part lies outside.
static double difference(const filter_bank& filters, long rows, long columns, convolution::method how, bool add, bool relu, bool use_threads)
{
    const convolution layer(filters, relu, how);
    auto input = noise(filters.depth * rows * columns);
    const planes<float> in(input.data(), filters.depth, rows, columns);
    auto output = noise(filters.num * layer.outputs(rows) * layer.outputs(columns));
    const auto before = output;
    const planes<float> out(output.data(), filters.num, layer.outputs(rows), layer.outputs(columns));
    layer(out, in, use_threads, add);

    double worst = 0, largest = 0;
    const float* was = before.data();
    for (long f = 0; f < out.num; ++f)
        for (long r = 0; r < out.rows; ++r)
            for (long c = 0; c < out.columns; ++c, ++was)
            {
                double sum = (add ? *was : 0) + filters.biases[f], sizes = 1;
                for (long k = 0; k < in.num; ++k)
                    for (long y = 0; y < filters.size; ++y)
                        for (long x = 0; x < filters.size; ++x)
                        {
                            const long yy = r * filters.stride - filters.padding + y;
                            const long xx = c * filters.stride - filters.padding + x;
                            if (yy < 0 || yy >= rows || xx < 0 || xx >= columns)
                                continue;
                            const long i = ((f * in.num + k) * filters.size + y) * filters.size + x;
                            const double product = double(in.row(k, yy)[xx]) * filters.values[i];
                            sum += product;
                            sizes += std::abs(product);
                        }
                worst = std::max(worst, std::abs((relu ? std::max(sum, 0.0) : sum) - out.row(f, r)[c]));
                largest = std::max(largest, sizes);
            }
    return worst / largest;
}

static bool check_convolutions()
{
    double worst = 0;
    long cases = 0;
    for (long depth : {1, 3, 16})
        for (long num : {1, 5, 11})
            for (long size : {1, 3, 5, 7, 9})
                for (long stride = 1; stride <= std::min(size, 3L); ++stride)
                    for (long padding = 0; padding < size; padding += std::max(1L, size / 2))
                        for (long rows : {1, 2, 7, 30})
                            for (long columns : {1, 4, 31, 900})
                            {
                                if (size > rows + 2 * padding || size > columns + 2 * padding || (columns == 900 && depth == 16 && size > 5))
                                    continue;
                                const filter_bank filters = {num, depth, size, stride, padding, noise(num * depth * size * size), noise(num)};
                                const long reach = (size + stride - 1) / stride;
                                for (auto how : {convolution::method::direct, convolution::method::winograd})
                                    if (how == convolution::method::direct || (3 <= reach && reach <= 5))
                                    {
                                        const long i = cases++ % 7;
                                        worst = std::max(worst, difference(filters, rows, columns, how, i & 1, i & 2, i & 4));
                                    }
                            }
    std::cout << cases << " convolutions, at most " << worst << " from their definition\n";
    return cases > 1000 && worst < 1e-5;
}

// The planes of an image of dlib's, one after the other.
template <typename T, typename image_type>
static std::vector<T> planes_in(const image_type& img)
{
    std::vector<T> values;
    for (size_t k = 0; k < sizeof(img[0][0]) / sizeof(T); ++k)
        for (long r = 0; r < img.nr(); ++r)
            for (long c = 0; c < img.nc(); ++c)
                values.push_back(((const T*)&img[r][c])[k]);
    return values;
}

template <typename pixel, typename T>
static bool check_resizing(long rows, long columns, long out_rows, long out_columns)
{
    const long num = sizeof(pixel) / sizeof(T);
    array2d<pixel> from(rows, columns), to(out_rows, out_columns);
    for (auto& p : from)
        for (long k = 0; k < num; ++k)
            ((T*)&p)[k] = chance.get_random_32bit_number() % 256;
    std::vector<T> input = planes_in<T>(from), output(num * out_rows * out_columns);
    const resizing<T> tasks(planes<T>(output.data(), num, out_rows, out_columns), planes<T>(input.data(), num, rows, columns));
    for_each_task(tasks.num, [&](long i) { tasks.run(i); });
    if (std::max(columns, out_columns) > 38000)
        return true; // dlib writes beyond the end of a row
    resize_image(from, to);
    return planes_in<T>(to) == output;
}

static bool check_all_resizing()
{
    long cases = 0, same = 0;
    for (const long side : {1, 2, 3, 5, 8, 31, 100, 641, 30000, 38001, 50000, 65500})
        for (const long other : {1, 2, 7, 90})
            for (const double scale : {2.0, 1.9, 1.0, 5.0 / 6, 0.5, 0.01})
            {
                const long new_side = std::max(1L, std::lround(side * scale)), new_other = std::max(1L, std::lround(other * scale));
                cases += 4;
                same += check_resizing<float, float>(other, side, new_other, new_side);
                same += check_resizing<float, float>(side, other, new_side, new_other);
                same += check_resizing<rgb_pixel, unsigned char>(other, side, new_other, new_side);
                same += check_resizing<rgb_pixel, unsigned char>(side, other, new_side, new_other);
            }
    std::cout << same << " of " << cases << " images resized as by dlib\n";
    return same == cases;
}

// Few values, so that colours often have equal gradients: which of them counts depends on the column.
static bool check_features()
{
    float worst = 0; // dlib's own sums depend on what it is compiled for
    for (long columns = 20; columns < 60; ++columns)
        for (const long rows : {20, 31, 44})
        {
            array2d<rgb_pixel> img(rows, columns);
            for (auto& p : img)
                p = rgb_pixel(chance.get_random_32bit_number() % 3, chance.get_random_32bit_number() % 3, 90);
            dlib::array<array2d<float>> expected;
            extract_fhog_features(img, expected, hog_cell_size, 1, 1);
            auto image = planes_in<unsigned char>(img);
            const planes<unsigned char> in(image.data(), 3, rows, columns);
            std::vector<float> features(hog_num_planes * expected[0].size()), space(cpu().hog->features_space(columns));
            const planes<float> out(features.data(), hog_num_planes, expected[0].nr(), expected[0].nc());
            for (long r = 0; r < out.rows; ++r)
                cpu().hog->features(out, in, r, r + 1, space.data());
            for (long k = 0; k < out.num; ++k)
                for (long i = 0; i < out.plane_step; ++i)
                    worst = std::max(worst, std::abs((&expected[k][0][0])[i] - out.row(k, 0)[i]));
        }
    std::cout << "HOG's features at most " << worst << " from dlib's\n";
    return worst < 1e-6;
}

static bool check_hog(const int num_photos, char** const photos)
{
    auto stock = get_frontal_face_detector();
    long cases = 0, same = 0, boxes = 0;
    const auto check = [&](const array2d<rgb_pixel>& img)
    {
        for (const int times : {0, 1})
        {
            array2d<rgb_pixel> doubled;
            assign_image(doubled, img);
            if (times)
                pyramid_up(doubled);
            auto expected = stock(doubled);
            for (auto& box : expected)
                box = pyramid_down<2>().rect_down(box, times);
            ++cases;
            boxes += expected.size();
            same += find_frontal_faces({&img[0][0], img.nr(), img.nc()}, times) == expected;
        }
    };
    for (int i = 0; i < num_photos; ++i)
    {
        array2d<rgb_pixel> photo, tile, smaller;
        load_bmp(photo, photos[i]);
        for (; photo.size() > 90000; photo.swap(smaller))
        {
            check(photo);
            pyramid_down<4>()(photo, smaller);
        }
        check(photo);
        tile.set_size(photo.nr() * 2, photo.nc() * 4); // with equal scores
        for (long r = 0; r < tile.nr(); ++r)
            for (long c = 0; c < tile.nc(); ++c)
                tile[r][c] = photo[r % photo.nr()][c % photo.nc()];
        check(tile);
    }
    for (const auto& size : {point(1, 1), point(1, 200), point(200, 1), point(39, 41), point(80, 80), point(83, 500), point(36000, 90)})
    {
        array2d<rgb_pixel> img(size.y(), size.x());
        for (auto& p : img)
            p = rgb_pixel(chance.get_random_8bit_number(), 90, chance.get_random_8bit_number());
        check(img);
    }
    std::cout << "HOG's boxes as dlib's in " << same << " of " << cases << " images, with " << boxes << " faces\n";
    array2d<rgb_pixel> wide(126, 65500), high(65500, 126); // where dlib writes beyond the end of a row
    find_frontal_faces({&wide[0][0], wide.nr(), wide.nc()}, 1);
    find_frontal_faces({&high[0][0], high.nr(), high.nc()}, 1);
    return same == cases && boxes > 0;
}

int main(int argc, char** argv)
{
    std::cout << cpu().name << ":\n";
    bool same = check_convolutions();
    same &= check_all_resizing();
    same &= check_features();
    same &= check_hog(argc - 1, argv + 1);
    return same ? 0 : 1;
}
