// tests/tools/convolutions.sh, under AddressSanitizer: what is resized stays within its rows, however wide.

#include <dlib/image_processing/frontal_face_detector.h>
#include <dlib/image_transforms.h>
#include <iostream>

using namespace dlib;

template <typename pixel>
static void resize(long nr, long nc, double scale)
{
    array2d<pixel> in(nr, nc), out(std::lround(nr*scale), std::lround(nc*scale));
    assign_all_pixels(in, 100);
    resize_image(in, out);
}

int main()
{
    for (const long wide : {30000, 38001, 45000, 50000, 58000, 62500, 65500, 131000})
        for (const double scale : {2.0, 1.9, 5.0/6, 0.5, 0.01})
        {
            resize<unsigned char>(3, wide, scale);
            resize<unsigned char>(wide, 3, scale);
            resize<float>(3, wide, scale);
            resize<rgb_pixel>(3, wide, scale);
            resize<rgb_pixel>(wide, 3, scale);
        }
    auto detector = get_frontal_face_detector();
    for (const auto& size : {point(65500, 126), point(126, 65500)})
    {
        array2d<rgb_pixel> img(size.y(), size.x());
        assign_all_pixels(img, rgb_pixel(90, 90, 90));
        pyramid_up(img);
        detector(img);
    }
    std::cout << "Nothing is written outside of an image\n";
}
