#pragma once

#include "rgb_view.h"
#include <dlib/geometry/rectangle.h>
#include <vector>

// The faces of an image that is doubled in size so many times before, as dlib's get_frontal_face_detector() finds them,
// by histograms of oriented gradients (HOG): boxes in the image's pixels, the surest first.  Several threads may call it
// at a time.
std::vector<dlib::rectangle> find_frontal_faces(const rgb_view& photo, int times_doubled);
