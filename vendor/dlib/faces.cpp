// The Python module: of dlib's own, what detects and describes faces, under the same names.
#include "cpu.h"
#include "face_describer.h"
#include "face_detector.h"
#include "frontal_detector.h"
#include "rgb_view.h"
#include <cstring>
#include <dlib/image_processing/shape_predictor.h>
#include <dlib/image_transforms/interpolation.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace dlib;

namespace
{
    // Keeps an array, so that its pixels stay where they are while other Python threads run.
    class image
    {
    public:
        image(const py::array& a)
        {
            if (a.dtype().kind() != 'u' || a.itemsize() != 1 || a.ndim() != 3 || a.shape(2) != 3)
                throw error("Unsupported image type, must be 8bit RGB image.");
            array = a;
        }

        rgb_view view() const
        {
            return {reinterpret_cast<const rgb_pixel*>(array.data()), long(array.shape(0)), long(array.shape(1))};
        }

    private:
        py::array_t<unsigned char, py::array::c_style> array;
    };

    template <typename T>
    auto without_gil(const T& run) -> decltype(run())
    {
        py::gil_scoped_release release;
        return run();
    }

    std::vector<mmod_rect> detect(face_detector& detector, const py::array& array, const int times_doubled)
    {
        if (times_doubled != 0)
            throw error("This detector takes an image as it is: set upsample_num_times to 0.");
        const image img(array);
        return without_gil([&] { return detector(img.view()); });
    }

    // dlib's detector, of which there is one.
    struct frontal_detector {};

    std::vector<rectangle> detect_frontal(frontal_detector, const py::array& array, const int times_doubled)
    {
        const image img(array);
        return without_gil([&] { return find_frontal_faces(img.view(), times_doubled); });
    }

    shape_predictor load_shape_predictor(const std::string& file)
    {
        shape_predictor predictor;
        deserialize(file) >> predictor;
        return predictor;
    }

    full_object_detection find_landmarks(const shape_predictor& predictor, const py::array& array, const rectangle& box)
    {
        const image img(array);
        return without_gil([&] { return predictor(img.view(), box); });
    }

    py::array get_face_chip(const py::array& array, const full_object_detection& face, const long size, const double padding)
    {
        const image img(array);
        py::array_t<unsigned char> result({size, size, 3L});
        unsigned char* const pixels = result.mutable_data();
        without_gil([&] {
            matrix<rgb_pixel> chip;
            extract_image_chip(img.view(), get_face_chip_details(face, size, padding), chip);
            std::memcpy(pixels, &chip(0, 0), chip.size() * sizeof(rgb_pixel));
        });
        return result;
    }

    std::vector<std::vector<float>> compute_face_descriptors(const face_describer& describer, const std::vector<py::array>& arrays)
    {
        const std::vector<image> chips(arrays.begin(), arrays.end());
        std::vector<rgb_view> views;
        for (const auto& chip : chips)
        {
            views.push_back(chip.view());
            if (views.back().rows != face_describer::chip_size || views.back().columns != face_describer::chip_size)
                throw error("Unsupported image size, it should be of size 150x150.");
        }
        return without_gil([&] { return describer(views); });
    }

    std::vector<point> get_parts(const full_object_detection& face)
    {
        std::vector<point> parts(face.num_parts());
        for (unsigned long i = 0; i < parts.size(); ++i)
            parts[i] = face.part(i);
        return parts;
    }

    std::string repr(const rectangle& r)
    {
        return py::str("rectangle({},{},{},{})").format(r.left(), r.top(), r.right(), r.bottom());
    }
}

PYBIND11_MODULE(dlib, m)
{
    m.attr("__version__") = VERSION;
    m.attr("DLIB_FAST_FACES") = cpu().name;

    py::class_<point>(m, "point")
        .def(py::init<long, long>(), py::arg("x"), py::arg("y"))
        .def_property_readonly("x", [](const point& p) { return p.x(); })
        .def_property_readonly("y", [](const point& p) { return p.y(); });

    py::class_<rectangle>(m, "rectangle")
        .def(py::init<long, long, long, long>(), py::arg("left"), py::arg("top"), py::arg("right"), py::arg("bottom"))
        .def("left", [](const rectangle& r) { return r.left(); })
        .def("top", [](const rectangle& r) { return r.top(); })
        .def("right", [](const rectangle& r) { return r.right(); })
        .def("bottom", [](const rectangle& r) { return r.bottom(); })
        .def("width", &rectangle::width)
        .def("height", &rectangle::height)
        .def("area", &rectangle::area)
        .def("is_empty", &rectangle::is_empty)
        .def("intersect", &rectangle::intersect, py::arg("rectangle"))
        .def("__eq__", [](const rectangle& a, const rectangle& b) { return a == b; })
        .def("__repr__", &repr);
    m.def("translate_rect", [](const rectangle& r, const point& p) { return translate_rect(r, p); },
        py::arg("rect"), py::arg("p"));

    py::class_<mmod_rect>(m, "mmod_rectangle")
        .def_readonly("rect", &mmod_rect::rect)
        .def_readonly("confidence", &mmod_rect::detection_confidence);
    py::class_<face_detector>(m, "cnn_face_detection_model_v1")
        .def(py::init<std::string>(), py::arg("filename"))
        .def("__call__", &detect, py::arg("img"), py::arg("upsample_num_times") = 0);

    py::class_<frontal_detector>(m, "fhog_object_detector")
        .def("__call__", &detect_frontal, py::arg("image"), py::arg("upsample_num_times") = 0);
    m.def("get_frontal_face_detector", [] { return frontal_detector(); });

    py::class_<full_object_detection>(m, "full_object_detection")
        .def("parts", &get_parts);
    py::class_<shape_predictor>(m, "shape_predictor")
        .def(py::init(&load_shape_predictor))
        .def("__call__", &find_landmarks, py::arg("image"), py::arg("box"));
    m.def("get_face_chip", &get_face_chip,
        py::arg("img"), py::arg("face"), py::arg("size") = 150, py::arg("padding") = 0.25);

    py::class_<face_describer>(m, "face_recognition_model_v1")
        .def(py::init<std::string>(), py::arg("filename"))
        .def("compute_face_descriptor", &compute_face_descriptors, py::arg("img_list"));
}
