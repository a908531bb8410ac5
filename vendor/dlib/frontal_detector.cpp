#include "faces.h"
#include <dlib/image_processing/frontal_face_detector.h>
#include <dlib/threads.h>
#include <mutex>

using namespace dlib;

namespace
{
    typedef std::vector<rect_detection> detections;
    typedef std::pair<double, rectangle> box_type;

    // In the order of the scan, row by row.
    bool stands_before(const box_type& a, const box_type& b)
    {
        return std::make_pair(a.second.top(), a.second.left()) < std::make_pair(b.second.top(), b.second.left());
    }
}

struct frontal_detector::implementation
{
    const frontal_face_detector detector = get_frontal_face_detector();
};

frontal_detector::frontal_detector() : impl(std::make_shared<implementation>()) {}

// As object_detector's operator() does, but a thread takes a level of the pyramid from its image to its detections,
// so that neither the features nor the images of all levels are there at a time.
std::vector<rectangle> frontal_detector::operator()(const rgb_view& photo, const int times_doubled) const
{
    const pyramid_down<2> doubler;
    array2d<rgb_pixel> image;
    if (times_doubled > 0)
        pyramid_up(photo, image, doubler);
    else
        assign_image(image, photo);
    for (int i = 1; i < times_doubled; ++i)
        pyramid_up(image, doubler);

    const frontal_face_detector& detector = impl->detector;
    const pyramid_down<6> pyramid;
    std::mutex mutex; // for image and the two below
    rectangle size = get_rect(image); // as dlib counts levels by it: images can be a pixel smaller
    std::vector<std::vector<detections>> found; // at each level, by each of the five detectors
    parallel_for(0, std::max(1ul, default_thread_pool().num_threads_in_pool()), [&](long)
    {
        scan_fhog_pyramid<pyramid_down<6>> scanner;
        scanner.copy_configuration(detector.get_scanner());
        scanner.set_max_pyramid_levels(1);
        std::unique_lock<std::mutex> lock(mutex);
        while (!size.is_empty())
        {
            array2d<rgb_pixel> own, smaller;
            rectangle next = pyramid.rect_down(size);
            if (next.width() < scanner.get_min_pyramid_layer_width() || next.height() < scanner.get_min_pyramid_layer_height())
                next = rectangle();
            else
                pyramid(image, smaller);
            const size_t level = found.size();
            found.emplace_back(detector.num_detectors()); // or throws, and leaves all as it was for the other threads
            own.swap(image);
            image.swap(smaller);
            size = next;
            lock.unlock();

            scanner.load(own);
            own.clear();
            std::vector<detections> here(detector.num_detectors());
            for (size_t i = 0; i < here.size(); ++i)
            {
                const auto& filters = detector.get_processed_w(i);
                const double least = filters.w(scanner.get_num_dimensions());
                std::vector<box_type> boxes;
                scanner.detect(filters.get_detect_argument(), boxes, least);
                std::sort(boxes.begin(), boxes.end(), stands_before);
                for (const auto& box : boxes)
                {
                    here[i].emplace_back();
                    here[i].back().detection_confidence = box.first - least;
                    here[i].back().rect = pyramid.rect_up(box.second, level);
                }
            }
            lock.lock();
            found[level].swap(here);
        }
    });

    // In dlib's steps, as std::sort() would else give equal scores another order.
    detections all;
    for (unsigned long i = 0; i < detector.num_detectors(); ++i)
    {
        detections own;
        for (const auto& level : found)
            own.insert(own.end(), level[i].begin(), level[i].end());
        std::sort(own.rbegin(), own.rend());
        all.insert(all.end(), own.begin(), own.end());
    }
    std::sort(all.rbegin(), all.rend());
    const test_box_overlap& overlaps = detector.get_overlap_tester();
    std::vector<rectangle> boxes;
    for (const auto& face : all)
        if (std::none_of(boxes.begin(), boxes.end(), [&](const rectangle& box) { return overlaps(box, face.rect); }))
            boxes.push_back(face.rect);
    for (auto& box : boxes)
        box = doubler.rect_down(box, times_doubled);
    return boxes;
}
