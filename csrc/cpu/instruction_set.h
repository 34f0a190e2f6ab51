// Which instruction set runs, chosen once: the best that this processor has, or KDFAST_CPU_ISA.

#pragma once

enum class InstructionSet { portable, avx2, avx512 };

// Raises when KDFAST_CPU_ISA names one that is unknown or that this processor lacks.
InstructionSet instruction_set();

// Calls `function` of the namespace of the instruction set in use.
#if defined(__x86_64__)
#define KDFAST_CALL(function, ...)                                               \
    (instruction_set() == InstructionSet::avx512 ? avx512::function(__VA_ARGS__) \
     : instruction_set() == InstructionSet::avx2 ? avx2::function(__VA_ARGS__)   \
                                                 : portable::function(__VA_ARGS__))
#else
#define KDFAST_CALL(function, ...) (instruction_set(), portable::function(__VA_ARGS__))
#endif

// Declares a function in each of them.
#define KDFAST_DECLARE(...) \
    namespace portable {    \
    __VA_ARGS__;            \
    }                       \
    namespace avx2 {        \
    __VA_ARGS__;            \
    }                       \
    namespace avx512 {      \
    __VA_ARGS__;            \
    }
