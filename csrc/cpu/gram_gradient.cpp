// gram_gradient on the CPU: blocks of M right by BLAS, each reduced with left while it is in cache.
#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "blas.h"
#include "columns.h"
#include "dispatch.h"
#include "gram.h"
#include "widen.h"

namespace svf_fast {
namespace {

constexpr int64_t kBlock = 512;  // directions multiplied at once
constexpr int64_t kWidth = 64;   // directions of a unit of work

// out_r = Σ_c left_cr product_cr in double. Units are rows r where the channels are innermost, else
// kWidth columns, and `out` is padded to whole units.
struct Dots {
  template <int kBytes, typename Acc>
  static SVF_FAST_INLINE void run(const Columns<const Acc>& left, const Columns<const Acc>& product,
                                  double* const& out, int64_t begin, int64_t end) {
    using V = Vector<Acc, kBytes>;
    if (left.channels_inner) {
      for (int64_t r = begin; r < end; ++r) {
        const Acc* row = product.data + r * product.stride;
        DoubleSums<Acc, kBytes> sums;
        for_vectors<kBytes>(left.data + r * left.stride, left.channels,
                            [&](int64_t c, const V& value, int64_t count) SVF_FAST_LAMBDA {
                              sums.add(value, load_part<kBytes>(row + c, count));
                            });
        out[r] = sums.sum();
      }
      return;
    }
    for (int64_t first = begin * kWidth; first < end * kWidth; first += kWidth) {
      std::fill_n(out + first, kWidth, 0.0);
      for (int64_t c = 0; c < left.channels; ++c) {
        const Acc* row = product.data + c * product.stride + first;
        for_vectors<kBytes>(left.data + c * left.stride + first,
                            std::min(kWidth, left.positions - first),
                            [&](int64_t r, const V& value, int64_t count) SVF_FAST_LAMBDA {
                              DoubleSums<Acc, kBytes> sums;
                              sums.load(out + first + r);
                              sums.add(value, load_part<kBytes>(row + r, count));
                              sums.store(out + first + r);
                            });
      }
    }
  }
};

constexpr int64_t kSmall = 64;  // multiplications up to which a group costs less than a call

template <typename Acc>
struct Matrices {
  const Acc* data;
  int64_t group_stride;
  int64_t row_stride;
  int64_t column_stride;

  explicit Matrices(const Tensor& x)
      : data(static_cast<const Acc*>(x.const_data_ptr())),
        group_stride(x.stride(0)),
        row_stride(x.stride(1)),
        column_stride(x.stride(2)) {}
  double at(int64_t group, int64_t row, int64_t column) const {
    return data[group * group_stride + row * row_stride + column * column_stride];
  }
};

// dS of groups as small as those of depthwise convolutions, in double.
template <typename Acc>
void reduce_small(const Tensor& M, const Tensor& left, const Tensor& right, const Tensor& S,
                  const Tensor& out) {
  const int64_t channels = left.size(1), others = right.size(1), rank = left.size(2);
  const Matrices<Acc> middle(M), l(left), u(right);
  const auto* divisor = static_cast<const Acc*>(S.const_data_ptr());
  auto* result = static_cast<Acc*>(out.mutable_data_ptr());
  for (int64_t g = 0; g < S.size(0); ++g) {
    for (int64_t r = 0; r < rank; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t d = 0; d < others; ++d) {
          sum += l.at(g, c, r) * middle.at(g, c, d) * u.at(g, d, r);
        }
      }
      result[g * rank + r] = static_cast<Acc>(sum / divisor[g * rank + r]);
    }
  }
}

template <typename Acc>
void reduce(const Tensor& M, const Tensor& left, const Tensor& right, const Tensor& S,
            const Tensor& out) {
  const int64_t channels = left.size(1), others = right.size(1), rank = left.size(2);
  if (channels * others * rank <= kSmall) {
    return reduce_small<Acc>(M, left, right, S, out);
  }
  const int64_t block = std::min(kBlock, rank);
  std::vector<Tensor> owned;
  Acc* memory = scratch<Acc>(owned, M, channels * block);
  std::vector<double> padded(divide_up(block, kWidth) * kWidth);
  double* sums = padded.data();
  for (int64_t g = 0; g < M.size(0); ++g) {
    const Acc* middle = static_cast<const Acc*>(M.const_data_ptr()) + g * M.stride(0);
    const Acc* other = static_cast<const Acc*>(right.const_data_ptr()) + g * right.stride(0);
    const auto group = columns<const Acc>(left, g);
    for (int64_t first = 0; first < rank; first += block) {
      const int64_t count = std::min(block, rank - first);
      const bool inner = group.channels_inner;
      const Columns<const Acc> product{memory, channels, count, inner ? channels : count, inner};
      const Acc* factor = other + first * right.stride(2);
      if (inner) {
        multiply(matrix(memory, count, channels, channels, 1),
                 matrix(factor, count, others, right.stride(2), right.stride(1)),
                 matrix(middle, others, channels, M.stride(2), M.stride(1)));
      } else {
        multiply(matrix(memory, channels, count, count, 1),
                 matrix(middle, channels, others, M.stride(1), M.stride(2)),
                 matrix(factor, others, count, right.stride(1), right.stride(2)));
      }
      const auto slice = group.slice(first, count);
      torch::stable::parallel_for(
          0, inner ? count : divide_up(count, kWidth), grain(channels * (inner ? 1 : kWidth)),
          [&](int64_t begin, int64_t end) { run<Dots>(slice, product, sums, begin, end); });
      const auto* divisor = static_cast<const Acc*>(S.const_data_ptr()) + g * rank + first;
      auto* result = static_cast<Acc*>(out.mutable_data_ptr()) + g * rank + first;
      for (int64_t r = 0; r < count; ++r) {
        result[r] = static_cast<Acc>(sums[r] / divisor[r]);
      }
    }
  }
}

}  // namespace

Tensor gram_gradient(const Tensor& M, const Tensor& left, const Tensor& right, const Tensor& S) {
  const auto type = M.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "gram_gradient: M must be float32 or float64");
  STD_TORCH_CHECK(M.dim() == 3, "gram_gradient: M must be [G, Ca, Cb]");
  int64_t side = 0;
  for (const Tensor& x : {left, right}) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == M.size(0) && x.size(1) == M.size(++side) &&
                        x.size(2) == left.size(2),
                    "gram_gradient: left must be [G, Ca, R] and right [G, Cb, R]");
  }
  STD_TORCH_CHECK(S.dim() == 2 && S.size(0) == M.size(0) && S.size(1) == left.size(2),
                  "gram_gradient: S must be [G, R]");
  for (const Tensor& x : {left, right, S}) {
    STD_TORCH_CHECK(x.device() == M.device(), "gram_gradient: inputs differ in device");
  }
  Tensor out = torch::stable::new_empty(M, {S.size(0), S.size(1)});
  if (M.numel() == 0 || S.numel() == 0) {
    return torch::stable::zero_(out);
  }
  const Tensor l = readable(as_type(left, type)), r = as_type(right, type);
  const Tensor s = dense_rows(as_type(S, type));
  if (type == ScalarType::Double) {
    reduce<double>(M, l, r, s, out);
  } else {
    reduce<float>(M, l, r, s, out);
  }
  return out;
}

}  // namespace svf_fast

STABLE_TORCH_LIBRARY_IMPL(svf_fast, CPU, library) {
  library.impl("gram_gradient", TORCH_BOX(&svf_fast::gram_gradient));
}
