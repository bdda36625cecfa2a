#include "guarded.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace svf_fast {

template <typename T>
std::vector<std::vector<int64_t>> guarded_directions(const T* S, int64_t groups, int64_t rank,
                                                     double limit, int64_t multiple) {
  std::vector<double> ratio(groups * rank);
  double sum = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const T* values = S + g * rank;
    double square = 0;
    for (int64_t r = 0; r < rank; ++r) {
      square += static_cast<double>(values[r]) * values[r];
    }
    for (int64_t r = 0; r < rank; ++r) {
      const double own = static_cast<double>(values[r]) * values[r];
      double& found = ratio[g * rank + r];
      found = own > 0 && std::isfinite(square) ? square / (rank * own)
                                               : std::numeric_limits<double>::infinity();
      sum += found;
    }
  }
  std::vector<std::vector<int64_t>> guarded(groups);
  const double allowed = limit * limit;
  if (sum <= allowed * static_cast<double>(ratio.size())) {
    return guarded;
  }
  std::vector<std::vector<int64_t>> order(groups, std::vector<int64_t>(rank));
  for (int64_t g = 0; g < groups; ++g) {
    std::iota(order[g].begin(), order[g].end(), int64_t(0));
    const double* own = ratio.data() + g * rank;
    std::stable_sort(order[g].begin(), order[g].end(),
                     [own](int64_t a, int64_t b) { return own[a] < own[b]; });
  }
  sum = 0;
  int64_t unguarded = 0;
  for (int64_t place = 0; place < rank; ++place) {
    for (int64_t g = 0; g < groups; ++g) {
      sum += ratio[g * rank + order[g][place]];
    }
    unguarded += sum <= allowed * static_cast<double>(groups * (place + 1)) ? 1 : 0;
  }
  const int64_t wanted = (rank - unguarded + multiple - 1) / multiple * multiple;
  const int64_t count = std::min(rank, wanted);
  for (int64_t g = 0; g < groups; ++g) {
    guarded[g].assign(order[g].end() - count, order[g].end());
    std::sort(guarded[g].begin(), guarded[g].end());
  }
  return guarded;
}

template std::vector<std::vector<int64_t>> guarded_directions(const float*, int64_t, int64_t,
                                                              double, int64_t);
template std::vector<std::vector<int64_t>> guarded_directions(const double*, int64_t, int64_t,
                                                              double, int64_t);

}  // namespace svf_fast
