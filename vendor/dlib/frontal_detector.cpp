#include "frontal_detector.h"
#include "buffer.h"
#include "cpu.h"
#include "resize.h"
#include "threads.h"
#include <algorithm>
#include <dlib/image_processing/frontal_face_detector.h>
#include <memory>

using namespace dlib;

namespace
{
    typedef std::vector<std::vector<rect_detection>> detections; // of each of the five detectors

    // A thread scans so many rows of features at a time, few enough for its processor's second cache, and computes at
    // least so many at a time, as that takes the pixels of three rows of cells more.
    const long rows_scanned = 32, fewest_rows = 16;

    // There are rows and columns of zeros around the features, for windows that lie partly outside.
    const long padding = hog_filter_size - 1, padding_before = padding / 2;

    long aligned(const long floats)
    {
        const long line = buffer<float>::alignment / sizeof(float);
        return (floats + line - 1) / line * line;
    }

    // What dlib's detectors were trained to.
    const frontal_face_detector& detector()
    {
        static const frontal_face_detector trained = get_frontal_face_detector();
        return trained;
    }

    // A scale of the pyramid: its image, its features, and what is found in each band of them.
    struct scale
    {
        planes<unsigned char> image;
        long rows, columns; // of the features, without the zeros around them
        planes<float> features;
        std::vector<detections> found;
    };

    scale make_scale(const planes<unsigned char>& image, buffer<float>& memory)
    {
        const auto inner_cells = [](const long pixels)
        {
            return std::max((pixels + hog_cell_size / 2) / hog_cell_size - 2, 0L);
        };
        const long columns = inner_cells(image.columns), rows = columns > 0 ? inner_cells(image.rows) : 0;
        planes<float> features(nullptr, hog_num_planes, rows + padding, aligned(columns + padding + hog_group_size));
        // A row of all planes, then the next: so that a band of them lies in one place.
        features.plane_step = features.columns;
        features.row_step = features.num * features.columns;
        features.data = memory.get(features.rows * features.row_step);
        const detections none(detector().num_detectors());
        return {image, rows, columns, features, std::vector<detections>((rows + rows_scanned - 1) / rows_scanned, none)};
    }

    // Computes the features of some rows, and sets zeros around them.
    void extract(const scale& s, const long begin, const long end)
    {
        const hog_kernels& kernels = *cpu().hog;
        const planes<float>& out = s.features;
        const long first = begin == 0 ? 0 : begin + padding_before;
        const long last = end == s.rows ? out.rows : end + padding_before;
        for (long r = first; r < last; ++r)
            for (long k = 0; k < out.num; ++k)
            {
                const bool inside = padding_before <= r && r < s.rows + padding_before;
                float* const row = out.row(k, r);
                std::fill(row, row + (inside ? padding_before : out.columns), 0);
                std::fill(row + padding_before + s.columns, row + out.columns, 0);
            }
        const std::unique_ptr<float[]> space(new float[kernels.features_space(s.image.columns)]);
        kernels.features(out.part(padding_before, padding_before, s.rows, s.columns), s.image, begin, end, space.get());
    }

    planes<unsigned char> planes_of(const rgb_view& photo, buffer<unsigned char>& memory)
    {
        const planes<unsigned char> image(memory.get(3 * photo.rows * photo.columns), 3, photo.rows, photo.columns);
        for_each_task(image.rows, [&](const long r)
        {
            const rgb_pixel* const pixels = photo.pixels + r * photo.columns;
            unsigned char *const red = image.row(0, r), *const green = image.row(1, r), *const blue = image.row(2, r);
            for (long c = 0; c < photo.columns; ++c)
            {
                red[c] = pixels[c].red;
                green[c] = pixels[c].green;
                blue[c] = pixels[c].blue;
            }
        });
        return image;
    }

    // One of the filters that dlib's five detectors consist of.  A window's score is the sum over all planes of features,
    // and over all filters for a plane, of what lies in the window times the filter's row, times its column.
    struct separable_filter
    {
        long plane;
        size_t detector;
        matrix<float, 0, 1> row, column;
    };

    std::vector<separable_filter> filters_of(const frontal_face_detector& detector)
    {
        std::vector<separable_filter> filters;
        for (long k = 0; k < hog_num_planes; ++k)
            for (size_t d = 0; d < detector.num_detectors(); ++d)
            {
                const auto& all = detector.get_processed_w(d).get_detect_argument();
                for (size_t i = 0; i < all.row_filters[k].size(); ++i)
                {
                    filters.push_back({k, d, all.row_filters[k][i], all.col_filters[k][i]});
                    DLIB_CASSERT(filters.back().row.size() == hog_filter_size);
                    DLIB_CASSERT(filters.back().column.size() == hog_filter_size);
                }
            }
        return filters;
    }

    // Finds what the detectors see in a band of the features, in the order of dlib's scan: row by row.
    void scan(scale& s, const size_t number, const long band)
    {
        static const std::vector<separable_filter> filters = filters_of(detector());
        const auto& scanner = detector().get_scanner();
        const long begin = band * rows_scanned, rows = std::min(rows_scanned, s.rows - begin);
        const long step = aligned(s.columns + hog_group_size), num_scores = detector().num_detectors() * rows * step;
        buffer<float> memory;
        float *const scores = memory.get(num_scores + (rows + padding) * step), *const space = scores + num_scores;
        std::fill(scores, space, 0);
        for (const auto& f : filters)
            cpu().hog->filter(scores + f.detector * rows * step, step, s.features.row(f.plane, begin), s.features.row_step,
                rows, s.columns, f.row.begin(), f.column.begin(), space);

        const long width = scanner.get_fhog_window_width() - 2 * scanner.get_padding();
        const long height = scanner.get_fhog_window_height() - 2 * scanner.get_padding();
        detections& found = s.found[band];
        const float* score = scores;
        for (size_t d = 0; d < found.size(); ++d)
        {
            const double threshold = detector().get_processed_w(d).w(scanner.get_num_dimensions());
            for (long r = 0; r < rows; ++r, score += step)
                for (long c = 0; c < s.columns; ++c)
                    if (score[c] >= threshold)
                    {
                        const point middle = point(c, begin + r) + point(hog_filter_size / 2, hog_filter_size / 2);
                        const rectangle box = scanner.get_feature_extractor().feats_to_image(
                            centered_rect(middle, width, height), hog_cell_size, hog_filter_size, hog_filter_size);
                        found[d].emplace_back();
                        found[d].back().detection_confidence = score[c] - threshold;
                        found[d].back().rect = pyramid_down<6>().rect_up(box, number);
                    }
        }
    }

    // Sorts in dlib's steps, as std::sort() would else give equal scores another order.
    std::vector<rectangle> without_overlaps(const detections& found)
    {
        std::vector<rect_detection> all;
        for (auto own : found)
        {
            std::sort(own.rbegin(), own.rend());
            all.insert(all.end(), own.begin(), own.end());
        }
        std::sort(all.rbegin(), all.rend());
        const test_box_overlap& overlaps = detector().get_overlap_tester();
        std::vector<rectangle> boxes;
        for (const auto& face : all)
            if (std::none_of(boxes.begin(), boxes.end(), [&](const rectangle& box) { return overlaps(box, face.rect); }))
                boxes.push_back(face.rect);
        return boxes;
    }
}

// As object_detector's operator() does, but in tasks of some rows.  While the features of a scale are computed, the scores
// of the scale before and the image of the next are, too: waiting for each would take a tenth of the time on two threads.
std::vector<rectangle> find_frontal_faces(const rgb_view& photo, const int times_doubled)
{
    if (std::min(photo.rows, photo.columns) < least_side)
        return {};
    buffer<unsigned char> image_memory[2];
    planes<unsigned char> image = planes_of(photo, image_memory[0]);
    int next = 1; // of the two
    const auto new_image = [&](const long rows, const long columns)
    {
        const auto memory = image_memory[next].get(3 * rows * columns);
        next = 1 - next;
        return planes<unsigned char>(memory, 3, rows, columns);
    };

    const pyramid_down<2> doubler;
    for (int i = 0; i < times_doubled; ++i)
    {
        const rectangle size = doubler.rect_up(rectangle(image.columns, image.rows));
        const planes<unsigned char> doubled = new_image(size.bottom() + 1, size.right() + 1);
        const resizing<unsigned char> tasks(doubled, image);
        for_each_task(tasks.num, [&](const long task) { tasks.run(task); });
        image = doubled;
    }

    // Two scales' images and features are in use at a time, and take turns with the memory of the first two.
    buffer<float> features_memory[2];
    std::vector<scale> scales;
    const auto& scanner = detector().get_scanner();
    rectangle size(image.columns, image.rows); // dlib counts scales by it, though images can be a pixel smaller
    do
    {
        scales.push_back(make_scale(image, features_memory[scales.size() % 2]));
        size = pyramid_down<6>().rect_down(size);
        image = new_image(5 * image.rows / 6, 5 * image.columns / 6);
    } while (size.width() >= scanner.get_min_pyramid_layer_width()
        && size.height() >= scanner.get_min_pyramid_layer_height());

    detections found(detector().num_detectors());
    const planes<unsigned char> none(nullptr, 3, 0, 0);
    scales.push_back(make_scale(none, features_memory[scales.size() % 2]));
    for (size_t i = 0; i < scales.size(); ++i)
    {
        scale& now = scales[i];
        const bool last = i + 1 == scales.size();
        const resizing<unsigned char> resize(last ? none : scales[i + 1].image, now.image);
        const long num_extracted = std::min((now.rows + fewest_rows - 1) / fewest_rows, 2 * num_threads());
        const long num_scanned = i > 0 ? scales[i - 1].found.size() : 0;
        for_each_task(num_extracted + num_scanned + resize.num, [&](const long task)
        {
            if (task < num_extracted)
                extract(now, task * now.rows / num_extracted, (task + 1) * now.rows / num_extracted);
            else if (task < num_extracted + num_scanned)
                scan(scales[i - 1], i - 1, task - num_extracted);
            else
                resize.run(task - num_extracted - num_scanned);
        });
        for (long band = 0; band < num_scanned; ++band)
            for (size_t d = 0; d < found.size(); ++d)
                found[d].insert(found[d].end(), scales[i - 1].found[band][d].begin(), scales[i - 1].found[band][d].end());
    }
    std::vector<rectangle> boxes = without_overlaps(found);
    for (auto& box : boxes)
        box = doubler.rect_down(box, times_doubled);
    return boxes;
}
