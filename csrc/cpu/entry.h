// What entry points share: work for PyTorch's threads, their memory, and arguments.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include <sys/mman.h>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "types.h"

namespace kdfast {

// Asks for large pages under memory that is about to be written as a whole: the first touch of a
// page costs more than most arithmetic on it. Up to this size glibc's malloc keeps what it is given
// back; beyond, pages are new each time, and where a hypervisor takes free memory away, new large
// ones can cost twenty times more than usual.
constexpr int64_t LARGE_PAGE = int64_t(2) << 20, MALLOC_KEEPS = int64_t(32) << 20;

inline void use_large_pages(void* start, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    if (bytes > MALLOC_KEEPS) return;
    const uintptr_t inside = ~uintptr_t(LARGE_PAGE - 1);
    const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + LARGE_PAGE - 1) & inside;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + uintptr_t(bytes)) & inside;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Has pages ready for memory that is about to be written and is larger than malloc keeps, so new: in
// one call of the system instead of a fault for each page.
inline void touch_pages(void* start, int64_t bytes) {
#ifdef __linux__
    constexpr int POPULATE_WRITE = 23;  // since Linux 5.14; earlier ones refuse
    constexpr uintptr_t inside = ~uintptr_t(4095);
    const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + 4095) & inside;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + uintptr_t(bytes)) & inside;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, POPULATE_WRITE);
#endif
}

// Memory that a thread keeps from call to call; what is larger than this is given back.
constexpr int64_t KEPT_BYTES = int64_t(32) << 20;

class Scratch {
  public:
    ~Scratch() { std::free(memory_); }

    // Null where there is no memory.
    char* of(int64_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = 0;
            if (posix_memalign(&memory_, 4096, std::size_t(bytes)) != 0) memory_ = nullptr;
            if (memory_ != nullptr) size_ = bytes;
        }
        return static_cast<char*>(memory_);
    }

    void release() {
        if (size_ <= KEPT_BYTES) return;
        std::free(memory_);
        memory_ = nullptr;
        size_ = 0;
    }

  private:
    void* memory_ = nullptr;
    int64_t size_ = 0;
};

// Calls work(i, scratch) for i < items, each thread taking the next one when it is free: PyTorch's
// own split is static, and one busy core would hold up the rest.
template <class Work>
void for_each_item(int64_t items, int64_t scratch_bytes, const Work& work) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    const auto worker = [&](int64_t, int64_t) {
        static thread_local Scratch scratch;
        char* memory = scratch_bytes > 0 ? scratch.of(scratch_bytes) : nullptr;
        if (scratch_bytes > 0 && memory == nullptr) {
            failed = true;
            return;
        }
        for (int64_t i = next++; i < items; i = next++) work(i, memory);
        scratch.release();
    };
    const int64_t threads = int64_t(torch::stable::get_num_threads());
    const int64_t workers = items < threads ? items : threads;
    if (workers > 0) torch::stable::parallel_for(0, workers, 1, worker);
    // Whoever had memory has done the work of those who had none.
    if (failed && next < items)
        throw std::runtime_error("kdfast: no memory for a thread's scratch");
}

inline Storage storage_of(const torch::stable::Tensor& x) {
    using torch::headeronly::ScalarType;
    switch (x.scalar_type()) {
        case ScalarType::Float:
            return F32;
        case ScalarType::Double:
            return F64;
        case ScalarType::BFloat16:
            return BF16;
        case ScalarType::Half:
            return F16;
        default:
            throw std::runtime_error(
                "kdfast: dtype should be float32, float64, bfloat16 or float16");
    }
}

inline Direction direction_of(const std::string& name) {
    if (name == "forward") return FORWARD;
    if (name == "reverse") return REVERSE;
    if (name == "js") return JS;
    throw std::runtime_error("kdfast: direction is '" + name +
                             "', should be forward, reverse or js");
}

// The dtype of losses and other statistics.
inline torch::headeronly::ScalarType statistics_of(const torch::stable::Tensor& x) {
    using torch::headeronly::ScalarType;
    return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace kdfast
