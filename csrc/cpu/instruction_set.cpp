#include "instruction_set.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

constexpr const char* NAMES[] = {"portable", "avx2", "avx512"};

#if defined(__x86_64__)
// clang's __builtin_cpu_supports does not know "f16c".
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool runs_here(InstructionSet set) {
    if (set == InstructionSet::portable) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (set == InstructionSet::avx2) return avx2;
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

struct Choice {
    InstructionSet set = InstructionSet::portable;
    std::string error;
};

Choice choose() {
    Choice choice;
    const char* wanted = std::getenv("KDFAST_CPU_ISA");
    std::string allowed;
    bool found = false;
    for (int i = 0; i < 3; i++) {
        const InstructionSet set = static_cast<InstructionSet>(i);
        if (!runs_here(set)) continue;
        allowed += (allowed.empty() ? "" : ", ") + std::string(NAMES[i]);
        if (wanted == nullptr || *wanted == 0 || wanted == std::string(NAMES[i])) {
            choice.set = set;
            found = true;
        }
    }
    if (!found) {
        choice.error = "KDFAST_CPU_ISA is '" + std::string(wanted) +
                       "', should be one that this processor runs (" + allowed + "), or unset";
    }
    return choice;
}

const Choice& chosen() {
    static const Choice choice = choose();
    return choice;
}

}  // namespace

InstructionSet instruction_set() {
    const Choice& choice = chosen();
    if (!choice.error.empty()) throw std::runtime_error(choice.error);
    return choice.set;
}

// For Python: the name, or null where KDFAST_CPU_ISA is wrong.
extern "C" __attribute__((visibility("default"))) const char* kdfast_cpu_isa() {
    const Choice& choice = chosen();
    return choice.error.empty() ? NAMES[static_cast<int>(choice.set)] : nullptr;
}
