// Which directions of a spectrum have too small a value to divide by: svf_fast/svd.py.
#pragma once

#include <cstdint>
#include <vector>

namespace svf_fast {

// The indices of each group, ascending, of the smallest |S_r|: as many as leave the root mean
// square of S_rms / |S_r| over the others at most `limit`, filled up to a multiple of `multiple`.
template <typename T>
std::vector<std::vector<int64_t>> guarded_directions(const T* S, int64_t groups, int64_t rank,
                                                     double limit, int64_t multiple);

}  // namespace svf_fast
