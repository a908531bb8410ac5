// tests/tools/convolutions.sh: our dlib's convolution against its definition, loop by loop.
//
// Every kind that the networks use and more: filters from 1 to 9 wide, strides 1 to 3, all
// paddings, one and several samples, one and several filters, images down to a pixel, with and
// without biases and relu, added to an output or replacing it, and with filters that are known
// not to change.  Prints the largest difference, relative to the sum of the products' sizes.

#include <dlib/cuda/cpu_dlib.h>
#include <dlib/cuda/tensor_tools.h>
#include <dlib/rand.h>
#include <iostream>

using namespace dlib;

static dlib::rand chance;

static resizable_tensor noise(long n, long k, long nr, long nc)
{
    resizable_tensor t(n, k, nr, nc);
    for (auto& value : t)
        value = chance.get_double_in_range(-1, 1);
    return t;
}

static double difference(
    const tensor& data, const tensor& filters, const tensor& biases,
    long stride, long padding, bool add, bool with_biases, bool relu, bool final)
{
    cpu::tensor_conv conv;
    conv.setup(data, filters, stride, stride, padding, padding);
    if (final)
        conv.set_filters_final();
    const long nr = 1 + (data.nr() + 2*padding - filters.nr())/stride;
    const long nc = 1 + (data.nc() + 2*padding - filters.nc())/stride;
    resizable_tensor output = noise(data.num_samples(), filters.num_samples(), nr, nc);
    const resizable_tensor before = output;
    for (int times = final ? 2 : 1; times > 0; --times)
    {
        output = before;
        if (with_biases)
            conv(add, output, data, filters, biases, relu);
        else
            conv(add, output, data, filters);
    }

    // Winograd's method sums up a square of pixels at once: at the border of an image its error
    // is that of the square, of which a part lies outside.  So take the largest sum around.
    double worst = 0, largest = 0;
    const float* out = output.host();
    const float* was = before.host();
    for (long n = 0; n < data.num_samples(); ++n)
    for (long m = 0; m < filters.num_samples(); ++m)
    for (long r = 0; r < nr; ++r)
    for (long c = 0; c < nc; ++c, ++out, ++was)
    {
        double sum = (add ? *was : 0) + (with_biases ? biases.host()[m] : 0), sizes = 1;
        for (long k = 0; k < data.k(); ++k)
        for (long y = 0; y < filters.nr(); ++y)
        for (long x = 0; x < filters.nc(); ++x)
        {
            const long yy = r*stride - padding + y;
            const long xx = c*stride - padding + x;
            if (0 <= yy && yy < data.nr() && 0 <= xx && xx < data.nc())
            {
                const double product = double(data.host()[((n*data.k() + k)*data.nr() + yy)*data.nc() + xx])
                    * filters.host()[((m*data.k() + k)*filters.nr() + y)*filters.nc() + x];
                sum += product;
                sizes += std::abs(product);
            }
        }
        if (with_biases && relu)
            sum = std::max(sum, 0.0);
        worst = std::max(worst, std::abs(sum - *out));
        largest = std::max(largest, sizes);
    }
    return worst/largest;
}

int main()
{
    double worst = 0;
    long cases = 0;
    for (long samples : {1, 3})
    for (long channels : {1, 3, 16})
    for (long count : {1, 5, 11})
    for (long size : {1, 3, 5, 7, 9})
    for (long stride : {1, 2, 3})
    for (long padding = 0; padding < size; padding += std::max(1L, size/2))
    for (long nr : {1, 2, 7, 30})
    for (long nc : {1, 4, 31, 700})
    {
        if (size > nr + 2*padding || size > nc + 2*padding || (nc == 700 && channels == 16 && size > 5))
            continue;
        const auto data = noise(samples, channels, nr, nc);
        const auto filters = noise(count, channels, size, size);
        const auto biases = noise(1, count, 1, 1);
        const int how = cases++ % 11;
        worst = std::max(worst, difference(data, filters, biases, stride, padding, how & 1, how & 2, how & 4, how & 8));
    }
    std::cout << cases << " convolutions, at most " << worst << " from their definition\n";
    return cases > 1000 && worst < 1e-5 ? 0 : 1;
}
