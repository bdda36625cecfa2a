// compose on the CPU: U diag(S) into a scratch, its product with V by BLAS, rounded once.
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "blas.h"
#include "columns.h"
#include "dispatch.h"
#include "widen.h"

namespace svf_fast {
namespace {

// to[i] = from[i] * by[i], or * by[0] with kOne, along rows of `width`.
struct Scale {
  template <int kBytes, typename Acc>
  static SVF_FAST_INLINE void run(const Acc* const& from, const Acc* const& by, Acc* const& to,
                                  const int64_t& width, const bool& by_rows, int64_t begin,
                                  int64_t end) {
    using V = Vector<Acc, kBytes>;
    for (int64_t row = begin; row < end; ++row) {
      const V same = V{} + (by_rows ? by[row] : Acc(0));
      Acc* out = to + row * width;
      for_vectors<kBytes>(from + row * width, width,
                          [&](int64_t i, const V& value, int64_t count) SVF_FAST_LAMBDA {
                            const V factor = by_rows ? same : load_part<kBytes>(by + i, count);
                            store_part<kBytes>(out + i, value * factor, count);
                          });
    }
  }
};

template <typename Acc>
void scale_rows(const Acc* from, const Acc* by, Acc* to, int64_t rows, int64_t width,
                bool by_rows) {
  torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
    run<Scale>(from, by, to, width, by_rows, begin, end);
  });
}

constexpr int64_t kSmallRank = 4;  // up to which a group costs less than a call of a product

// U diag(S) V of groups of small rank, as depthwise convolutions have them. Units are rows of U.
template <typename Acc>
struct Small {
  const Acc* U;  // [groups * rows, rank]
  const Acc* S;  // [groups, rank]
  const Acc* V;  // [groups * rank, columns]
  Acc* W;        // [groups * rows, columns]
  int64_t rows;
  int64_t rank;
  int64_t columns;
};

struct ComposeSmall {
  template <int kBytes, typename Acc>
  static SVF_FAST_INLINE void run(const Small<Acc>& task, int64_t begin, int64_t end) {
    using V = Vector<Acc, kBytes>;
    const auto& [U, S, factor, W, rows, rank, columns] = task;
    for (int64_t row = begin; row < end; ++row) {
      Acc* out = W + row * columns;
      const int64_t first = row / rows * rank;
      for (int64_t r = 0; r < rank; ++r) {
        const V scale = V{} + U[row * rank + r] * S[first + r];
        for_vectors<kBytes>(factor + (first + r) * columns, columns,
                            [&](int64_t i, const V& value, int64_t count) SVF_FAST_LAMBDA {
                              const V before = r == 0 ? V{} : load_part<kBytes>(out + i, count);
                              store_part<kBytes>(out + i, before + scale * value, count);
                            });
      }
    }
  }
};

template <typename Acc>
void product(const Tensor& U, const Tensor& S, const Tensor& V, int64_t groups, const Tensor& out) {
  const int64_t rows = U.size(0) / groups, rank = U.size(1), columns = V.numel() / V.size(0);
  const auto* u = static_cast<const Acc*>(U.const_data_ptr());
  const auto* s = static_cast<const Acc*>(S.const_data_ptr());
  const auto* v = static_cast<const Acc*>(V.const_data_ptr());
  auto* w = static_cast<Acc*>(out.mutable_data_ptr());
  if (groups > 1 && rank <= kSmallRank) {
    const Small<Acc> task{u, s, v, w, rows, rank, columns};
    torch::stable::parallel_for(
        0, U.size(0), grain(rank * columns),
        [&](int64_t begin, int64_t end) { run<ComposeSmall>(task, begin, end); });
    return;
  }
  std::vector<Tensor> owned;
  Acc* scaled = scratch<Acc>(owned, U, rows * rank);
  for (int64_t g = 0; g < groups; ++g) {
    scale_rows(u + g * rows * rank, s + g * rank, scaled, rows, rank, false);
    multiply(matrix(w + g * rows * columns, rows, columns, columns, 1),
             matrix(scaled, rows, rank, rank, 1),
             matrix(v + g * rank * columns, rank, columns, columns, 1));
  }
}

// Uninitialised [Co, *kernel] whose columns lie as those of a dense V: channels last, or as
// written.
Tensor weight_like(const Tensor& U, const Tensor& V, ScalarType type) {
  std::vector<int64_t> sizes(V.sizes().begin(), V.sizes().end());
  std::vector<int64_t> strides(V.strides().begin(), V.strides().end());
  sizes[0] = U.size(0);
  strides[0] = V.numel() / V.size(0);
  return empty_strided(sizes, strides, type, U.device());
}

// W and scale * W in `type`, by way of Acc.
template <typename Acc>
std::tuple<Tensor, Tensor> composed(const Tensor& U, const Tensor& S, const Tensor& V,
                                    int64_t groups, ScalarType type,
                                    const std::optional<Tensor>& scale) {
  constexpr ScalarType wide = kBlasType<Acc>;
  Tensor v = as_type(V, wide);
  v = is_dense(v) ? v : torch::stable::contiguous(v);
  const Tensor u = dense_rows(as_type(U, wide)), s = dense_rows(as_type(S, wide));
  Tensor weight = weight_like(u, v, wide);
  product<Acc>(u, s, v, groups, weight);
  Tensor scaled = torch::stable::new_empty(weight, {0}, type);
  if (scale) {
    const Tensor by = dense_rows(as_type(*scale, wide));
    Tensor wider = weight_like(u, v, wide);
    scale_rows(static_cast<const Acc*>(weight.const_data_ptr()),
               static_cast<const Acc*>(by.const_data_ptr()),
               static_cast<Acc*>(wider.mutable_data_ptr()), u.size(0), v.numel() / v.size(0), true);
    scaled = as_type(wider, type);
  }
  return {as_type(weight, type), scaled};
}

std::tuple<Tensor, Tensor> compose(const Tensor& U, const Tensor& S, const Tensor& V,
                                   int64_t groups, ScalarType dtype,
                                   const std::optional<Tensor>& scale) {
  STD_TORCH_CHECK(U.dim() == 2 && S.dim() == 1 && V.dim() >= 2 && groups > 0 &&
                      U.size(0) % groups == 0 && S.size(0) == groups * U.size(1) &&
                      V.size(0) == S.size(0) && V.numel() > 0,
                  "compose: expected U [Co, R], S [G * R], V [G * R, ...]");
  STD_TORCH_CHECK(!scale || (scale->dim() == 1 && scale->size(0) == U.size(0)),
                  "compose: scale must be [Co]");
  for (const auto type : {U.scalar_type(), S.scalar_type(), V.scalar_type(), dtype}) {
    STD_TORCH_CHECK(is_supported(type), "compose: unsupported dtype");
  }
  const bool wide = U.scalar_type() == ScalarType::Double ||
                    S.scalar_type() == ScalarType::Double ||
                    V.scalar_type() == ScalarType::Double || dtype == ScalarType::Double;
  return wide ? composed<double>(U, S, V, groups, dtype, scale)
              : composed<float>(U, S, V, groups, dtype, scale);
}

}  // namespace
}  // namespace svf_fast

STABLE_TORCH_LIBRARY_IMPL(svf_fast, CPU, library) {
  library.impl("compose", TORCH_BOX(&svf_fast::compose));
}
