// Plain data that entry points and arithmetic share. Like the other headers of problems it is
// compiled for several instruction sets, so it holds no functions.

#pragma once

namespace kdfast {

// KL(t || s), KL(s || t), or the mean of both towards the average map.
enum Direction { FORWARD, REVERSE, JS };

// How numbers lie in memory. Arithmetic is in float, in double for F64.
enum Storage { F32, F64, BF16, F16 };

}  // namespace kdfast
