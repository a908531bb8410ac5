#include "faces.h"
#include <dlib/image_processing/frontal_face_detector.h>

using namespace dlib;

struct frontal_detector::implementation
{
    frontal_face_detector detector = get_frontal_face_detector();
};

frontal_detector::frontal_detector() : impl(std::make_shared<implementation>()) {}

std::vector<rectangle> frontal_detector::operator()(const rgb_view& img, const int times_doubled) const
{
    if (times_doubled <= 0)
        return impl->detector(img);
    pyramid_down<2> pyr;
    array2d<rgb_pixel> larger;
    pyramid_up(img, larger, pyr);
    for (int i = 1; i < times_doubled; ++i)
        pyramid_up(larger, pyr);
    auto boxes = impl->detector(larger);
    for (auto& box : boxes)
        box = pyr.rect_down(box, times_doubled);
    return boxes;
}
