// A process that runs the launchers of csrc/cuda on the SIMT executor for tests/simt_host.py.
// Requests come on stdin and answers go to stdout, in native byte order:
//   request   seed u64, name, number of arguments u32, arguments
//   argument  'i' int64 | 'd' double | 'n' (null) | 'b' size u64, bytes | 'l' count u32, arguments
//             | 'r' index u32: the same buffer as the 'b' of that number in the request
//   answer    status i32, then the bytes of every 'b' in the order of the request
// Every buffer is a heap block of exactly its size: AddressSanitizer sees an access outside.
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "nowag/operations.h"
#include "planted.h"
#include "simt.h"

namespace {

using nowag::KmeansProblem;
using nowag::Status;

struct Argument {
    char kind = 'n';
    int64_t integer = 0;
    double real = 0.0;
    size_t size = 0;
    std::unique_ptr<unsigned char[]> bytes;
    unsigned char* address = nullptr;  // of these, or of an earlier argument's
    std::vector<Argument> list;
    std::vector<KmeansProblem> problems;
    std::vector<int64_t> words;
};

template <typename T>
T read_value() {
    T value;
    if (std::fread(&value, sizeof value, 1, stdin) != 1) std::exit(0);
    return value;
}

using Buffers = std::vector<unsigned char*>;  // of a request, in order

Argument read_argument(Buffers& buffers) {
    Argument argument;
    argument.kind = read_value<char>();
    if (argument.kind == 'i') argument.integer = read_value<int64_t>();
    if (argument.kind == 'd') argument.real = read_value<double>();
    if (argument.kind == 'b') {
        argument.size = read_value<uint64_t>();
        argument.bytes = std::make_unique<unsigned char[]>(argument.size);
        if (std::fread(argument.bytes.get(), 1, argument.size, stdin) != argument.size)
            std::exit(1);
        argument.address = argument.bytes.get();
        buffers.push_back(argument.address);
    }
    if (argument.kind == 'r') argument.address = buffers.at(read_value<uint32_t>());
    if (argument.kind == 'l') {
        const auto count = read_value<uint32_t>();
        for (uint32_t i = 0; i < count; ++i) argument.list.push_back(read_argument(buffers));
    }
    return argument;
}

void write_buffers(const std::vector<Argument>& arguments) {
    for (const Argument& argument : arguments) {
        if (argument.kind == 'b') std::fwrite(argument.bytes.get(), 1, argument.size, stdout);
        write_buffers(argument.list);
    }
}

template <typename T>
T convert(Argument& argument);

// A list of problems, each a list of its fields.
const KmeansProblem* problems_of(Argument& argument) {
    argument.problems.clear();
    for (Argument& item : argument.list) {
        KmeansProblem problem{};
        size_t index = 0;
        const auto read = [&](auto& field) {
            field = convert<std::decay_t<decltype(field)>>(item.list.at(index++));
        };
        std::apply([&](auto&... field) { (read(field), ...); }, nowag::fields(problem));
        argument.problems.push_back(problem);
    }
    return argument.problems.data();
}

// A list of integers and addresses.
const int64_t* words_of(Argument& argument) {
    argument.words.clear();
    for (const Argument& item : argument.list) {
        argument.words.push_back(item.address != nullptr ? reinterpret_cast<int64_t>(item.address)
                                                         : item.integer);
    }
    return argument.words.data();
}

template <typename T>
T convert(Argument& argument) {
    if constexpr (std::is_same_v<T, const KmeansProblem*>) {
        return problems_of(argument);
    } else if constexpr (std::is_same_v<T, const int64_t*>) {
        return argument.kind == 'l' ? words_of(argument) : reinterpret_cast<T>(argument.address);
    } else if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(argument.address);
    } else if constexpr (std::is_floating_point_v<T>) {
        return static_cast<T>(argument.real);
    } else {
        return static_cast<T>(argument.integer);
    }
}

using Operation = std::function<Status(std::vector<Argument>&)>;

template <typename Launcher, typename... Ts, size_t... kIndex>
Operation operation(int64_t (*workspace)(Ts...), Launcher* launcher,
                    std::index_sequence<kIndex...>) {
    return [=](std::vector<Argument>& arguments) {
        const int64_t bytes = workspace(convert<Ts>(arguments.at(kIndex))...);
        const auto scratch = std::make_unique<unsigned char[]>(static_cast<size_t>(bytes));
        std::memset(scratch.get(), 0xa5, static_cast<size_t>(bytes));
        return launcher(convert<Ts>(arguments.at(kIndex))..., scratch.get(), nullptr);
    };
}

template <typename Launcher, typename... Ts>
Operation operation(int64_t (*workspace)(Ts...), Launcher* launcher) {
    return operation(workspace, launcher, std::index_sequence_for<Ts...>{});
}

#define NOWAG_ENTRY(stem, name) \
    {#name, operation(nowag::cuda::name##_workspace, nowag::cuda::name)},

std::map<std::string, Operation> operations() {
    std::map<std::string, Operation> all = {NOWAG_OPERATIONS(NOWAG_ENTRY)};
    for (const auto& [name, planted] : simt::planted_kernels()) {
        all[name] = [run = planted](std::vector<Argument>& arguments) {
            run(convert<int*>(arguments.at(0)));
            return Status::ok;
        };
    }
    return all;
}

}  // namespace

int main() {
    const std::map<std::string, Operation> known = operations();
    for (;;) {
        simt::set_seed(read_value<uint64_t>());
        std::string name(read_value<uint32_t>(), ' ');
        if (std::fread(name.data(), 1, name.size(), stdin) != name.size()) return 1;
        std::vector<Argument> arguments;
        Buffers buffers;
        const auto count = read_value<uint32_t>();
        for (uint32_t i = 0; i < count; ++i) arguments.push_back(read_argument(buffers));
        const auto status = static_cast<int32_t>(known.at(name)(arguments));
        std::fwrite(&status, sizeof status, 1, stdout);
        write_buffers(arguments);
        std::fflush(stdout);
    }
}
