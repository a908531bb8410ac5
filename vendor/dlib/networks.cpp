#include "networks.h"
#include <cmath>
#include <dlib/serialize.h>
#include <fstream>

using namespace dlib;

namespace
{
    // The values of a file, in the order in which deserialize() of dlib's dnn/core.h, layers.h, input.h and loss.h reads
    // them.  Instantiating the networks for that would take longer to compile than all else here.
    class reader
    {
    public:
        explicit reader(const std::string& file) : in(file, std::ios::binary)
        {
            if (!in)
                throw serialization_error("it can't be opened");
        }

        template <typename T>
        T read()
        {
            T value;
            deserialize(value, in);
            return value;
        }

        template <typename T>
        void skip(const int num)
        {
            for (int i = 0; i < num; ++i)
                read<T>();
        }

        std::array<float, 3> average() { return {{read<float>(), read<float>(), read<float>()}}; }

        void skip_aliases(const int num) { skip<long>(5 * num); } // version and shape of a tensor's part

        std::vector<float> tensor()
        {
            long size = 1;
            read<long>(); // version
            for (int i = 0; i < 4; ++i)
                size *= read<long>();
            std::vector<float> values(size);
            in.read(reinterpret_cast<char*>(values.data()), size * sizeof(float)); // little-endian, as the CPUs here
            if (!in)
                throw serialization_error("it is cut short");
            return values;
        }

        // The name of the input.  Before it stand the versions of all layers, from the last to the first.
        std::string past_versions()
        {
            long number = read<long>();
            while (number < 4)
                number = read<long>();
            std::string name(number, ' ');
            in.read(&name[0], number);
            return name;
        }

        bool at_end() { return in.peek() == EOF; }

    private:
        std::ifstream in;
    };

    filter_bank read_convolution(reader& in)
    {
        filter_bank filters;
        filters.values = in.tensor(); // and then the biases
        filters.num = in.read<long>();
        filters.size = in.read<long>();
        const long columns = in.read<long>();
        filters.stride = in.read<long>();
        in.skip<long>(1);
        filters.padding = in.read<long>();
        in.skip<long>(1);
        in.skip_aliases(2);
        in.skip<double>(4); // for training
        if (columns != filters.size || filters.num < 1)
            throw serialization_error("its filters are not square");
        filters.depth = (filters.values.size() / filters.num - 1) / (columns * columns);
        filters.biases.assign(filters.values.end() - filters.num, filters.values.end());
        filters.values.resize(filters.values.size() - filters.num);
        return filters;
    }

    // Gamma and beta of each plane, from an affine layer or from the batch normalization it was trained as.
    std::vector<float> read_affine(reader& in, const bool normalization)
    {
        std::vector<float> params = in.tensor();
        in.skip_aliases(2);
        if (!normalization)
        {
            in.skip<long>(1);
            return params;
        }
        in.tensor();
        in.tensor();
        const auto means = in.tensor(), variances = in.tensor();
        in.skip<long>(2);
        in.skip<double>(4);
        const float epsilon = in.read<double>();
        for (size_t i = 0; i < means.size(); ++i)
        {
            params[i] /= std::sqrt(variances[i] + epsilon);
            params[means.size() + i] -= params[i] * means[i];
        }
        return params;
    }

    // Reads all layers, in the order of the data.  last is that of fc, if there is one.
    std::vector<filter_bank> read_layers(reader& in, std::vector<float>* last = nullptr)
    {
        std::vector<filter_bank> layers;
        while (!in.at_end())
        {
            const bool first = layers.empty();
            const auto name = in.read<std::string>();
            if (name == "con_4")
                layers.push_back(read_convolution(in));
            else if (!first && (name == "affine_" || name == "bn_con2"))
            {
                filter_bank& filters = layers.back();
                const auto params = read_affine(in, name == "bn_con2");
                const long size = filters.values.size() / filters.num;
                for (long f = 0; f < filters.num; ++f)
                {
                    for (long i = 0; i < size; ++i)
                        filters.values[f * size + i] *= params[f];
                    filters.biases[f] = filters.biases[f] * params[f] + params[filters.num + f];
                }
            }
            else if (name == "max_pool_2" || name == "avg_pool_2")
                in.skip<long>(6);
            else if (last && name == "fc_2")
            {
                in.skip<long>(2);
                *last = in.tensor();
                in.skip_aliases(2);
                in.skip<long>(1);
                in.skip<double>(4);
            }
            else if (name != "relu_" && name != "add_prev_")
                throw serialization_error("it has a layer " + name);
            in.skip<bool>(3);
            for (int i = 0; i < 3; ++i)
                in.tensor(); // gradients, which are empty
            if (first)
                in.skip<long>(1);
        }
        return layers;
    }

    // What read returns, or an error that names the file.
    template <typename T>
    auto from_file(const std::string& file, const std::string& kind, const T& read)
    {
        try
        {
            reader in(file);
            in.skip<long>(1);
            if (in.read<std::string>() != kind)
                throw serialization_error("it is of another kind");
            return read(in);
        }
        catch (const std::exception& e)
        {
            throw error(file + " can't be read: " + e.what());
        }
    }
}

detector_network load_detector(const std::string& file)
{
    return from_file(file, "loss_mmod_", [](reader& in) {
        detector_network net;
        if (in.read<long>() != 1)
            throw serialization_error("it has another version");
        net.face_width = in.read<long>();
        net.face_height = in.read<long>();
        in.skip<double>(3); // for training
        net.overlaps = in.read<test_box_overlap>();
        in.skip<test_box_overlap>(1);
        if (in.past_versions() != "input_rgb_image_pyramid")
            throw serialization_error("it has another input");
        net.average = in.average();
        net.layers = read_layers(in);
        return net;
    });
}

describer_network load_describer(const std::string& file)
{
    return from_file(file, "loss_metric_2", [](reader& in) {
        describer_network net;
        in.skip<double>(2); // for training
        in.past_versions();
        net.average = in.average();
        in.skip<long>(2);
        net.layers = read_layers(in, &net.last);
        return net;
    });
}
