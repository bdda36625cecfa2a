// The type in which sums over elements of a storage type are kept.
#pragma once

namespace svf_fast {

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using accumulator_t = typename Accumulator<T>::type;

}  // namespace svf_fast
