#pragma once

#include "planes.h"
#include <vector>

// The parameters of a convolution: num filters, each of depth x size x size values, and a bias for each.
struct filter_bank
{
    long num, depth, size;
    long stride, padding; // in pixels, along rows and columns
    std::vector<float> values, biases;
};

// A layer of a network.  Each filter slides over an image of as many planes as it is deep, with zeros around it for
// padding, and gives a plane of the output: in each place the sum of its products with the pixels below it, plus its
// bias.  With relu, what is negative becomes zero.
//
// The image is not unrolled into a matrix, as in dlib.  Strips of it are dealt out so that the pixels which one value
// of a filter is multiplied with are neighbours in memory; sums stay in the processor's registers.
//
// Several threads may use it at a time.
class convolution : filter_bank
{
public:
    // Winograd's takes a fourth to a sixth of the products.  It is for images of at least some 200 pixels, filters
    // that reach over 3 to 5 pixels of those they step on by, and a depth of at least 8, so that its transforms pay.
    enum class method { direct, winograd };

    // The stride is at most the size.
    convolution(const filter_bank& filters, bool relu, method how);

    // How many rows or columns an image of so many gives.
    long outputs(const long inputs) const { return (inputs + 2 * padding - size) / stride + 1; }

    long num_planes() const { return num; } // of its output

    // Convolves an image, on all threads or on this one.  With add, its output is added to what is there before relu.
    // out is of outputs(in.rows) x outputs(in.columns) pixels, and does not overlap with in.
    void operator()(const planes<float>& out, const planes<float>& in, bool use_threads, bool add = false) const;

private:
    void directly(const planes<float>& out, const planes<float>& in, bool use_threads, bool add) const;
    void by_winograd(const planes<float>& out, const planes<float>& in, bool use_threads, bool add) const;

    // By Winograd's method, values are those of all filters at the first point, then at the next.
    long side; // of its squares of input; 0 without
    float least; // of the output
};
