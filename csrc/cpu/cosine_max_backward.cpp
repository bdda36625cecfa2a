// Backward of cosine_max on the CPU: only the pair of each maximum has a gradient. The result does
// not depend on the number of threads: every channel is one thread's.
#include "cosine_max.h"

#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

namespace svf_fast {
namespace {

constexpr int64_t kChannels = 64;  // channels of a unit of work, where they are innermost

// For query i and the support j of its maximum: what of each goes into the gradients.
template <typename Acc>
struct Pair {
  int64_t support;  // -1: masked, no gradient
  Acc cross;        // of the other one, to both gradients
  Acc query;        // of the query, to its own gradient
  Acc support_own;  // of the support, to its own gradient
};

template <typename T>
struct Gradients {
  using Acc = accumulator_t<T>;
  Columns<const T> query;
  Columns<const T> support;
  Columns<T> grad_query;
  Columns<T> grad_support;
  const Pair<Acc>* pairs;
};

template <int kBytes, typename T, typename Acc>
SVF_FAST_INLINE void widen_row(const T* from, Acc* to, int64_t count) {
  using V = Vector<Acc, kBytes>;
  for_vectors<kBytes>(from, count, [&](int64_t i, const V& value, int64_t part) SVF_FAST_LAMBDA {
    store_part<kBytes>(to + i, value, part);
  });
}

template <int kBytes, typename T, typename From>
SVF_FAST_INLINE void narrow_row(const From* from, T* to, int64_t count) {
  using Acc = accumulator_t<T>;
  constexpr int64_t lanes = kBytes / sizeof(Acc);
  for (int64_t i = 0; i < count; i += lanes) {
    const int64_t part = std::min(lanes, count - i);
    Acc values[lanes] = {};
    for (int64_t lane = 0; lane < part; ++lane) {
      values[lane] = static_cast<Acc>(from[i + lane]);
    }
    store_part<kBytes>(to + i, Memory<kBytes>::load(values), part);
  }
}

// Units are channels; of the support a channel's gradients are summed in double.
struct Scatter {
  template <int kBytes, typename T, typename Acc>
  static SVF_FAST_INLINE void run(const Gradients<T>& task, Acc* const& rows, double* const& sums,
                                  int64_t begin, int64_t end) {
    const int64_t queries = task.query.positions, supports = task.support.positions;
    Acc* query = rows;
    Acc* support = rows + queries;
    for (int64_t c = begin; c < end; ++c) {
      widen_row<kBytes>(task.query.data + c * task.query.stride, query, queries);
      widen_row<kBytes>(task.support.data + c * task.support.stride, support, supports);
      std::fill_n(sums, supports, 0.0);
      for (int64_t i = 0; i < queries; ++i) {
        const Pair<Acc> pair = task.pairs[i];
        const Acc q = query[i];
        query[i] = 0;
        if (pair.support >= 0) {
          const Acc s = support[pair.support];
          query[i] = pair.cross * s - pair.query * q;
          sums[pair.support] += pair.cross * q - pair.support_own * s;
        }
      }
      narrow_row<kBytes>(query, task.grad_query.data + c * task.grad_query.stride, queries);
      narrow_row<kBytes>(sums, task.grad_support.data + c * task.grad_support.stride, supports);
    }
  }
};

// The same with channels innermost: units are kChannels channels.
struct ScatterRows {
  template <int kBytes, typename T, typename Acc>
  static SVF_FAST_INLINE void run(const Gradients<T>& task, Acc* const&, double* const& sums,
                                  int64_t begin, int64_t end) {
    const int64_t channels = task.query.channels;
    Acc query[kChannels], support[kChannels];
    for (int64_t c = begin * kChannels; c < std::min(end * kChannels, channels); c += kChannels) {
      const int64_t width = std::min(kChannels, channels - c);
      std::fill_n(sums, task.support.positions * kChannels, 0.0);
      for (int64_t i = 0; i < task.query.positions; ++i) {
        const Pair<Acc> pair = task.pairs[i];
        if (pair.support < 0) {
          std::fill_n(query, width, Acc(0));
        } else {
          widen_row<kBytes>(task.query.data + i * task.query.stride + c, query, width);
          widen_row<kBytes>(task.support.data + pair.support * task.support.stride + c, support,
                            width);
          double* sum = sums + pair.support * kChannels;
          for (int64_t k = 0; k < width; ++k) {
            const Acc q = query[k];
            query[k] = pair.cross * support[k] - pair.query * q;
            sum[k] += pair.cross * q - pair.support_own * support[k];
          }
        }
        narrow_row<kBytes>(query, task.grad_query.data + i * task.grad_query.stride + c, width);
      }
      for (int64_t j = 0; j < task.support.positions; ++j) {
        narrow_row<kBytes>(sums + j * kChannels,
                           task.grad_support.data + j * task.grad_support.stride + c, width);
      }
    }
  }
};

template <typename T>
class Backward {
 public:
  using Acc = accumulator_t<T>;

  Backward(const Tensor& grad, const Tensor& mask, const Tensor& values, const Tensor& index)
      : grad_(static_cast<const Acc*>(grad.const_data_ptr())),
        mask_(static_cast<const Acc*>(mask.const_data_ptr())),
        values_(static_cast<const Acc*>(values.const_data_ptr())),
        index_(static_cast<const int64_t*>(index.const_data_ptr())) {}

  void image(int64_t number, Gradients<T> task) {
    const int64_t queries = task.query.positions, supports = task.support.positions;
    pair(number, task);
    task.pairs = pairs_.data();
    const bool inner = task.query.channels_inner;
    const int64_t width = inner ? kChannels : 1;
    torch::stable::parallel_for(0, divide_up(task.query.channels, width),
                                grain(width * (queries + supports)),
                                [&](int64_t begin, int64_t end) {
                                  std::vector<Acc> rows(inner ? 0 : queries + supports);
                                  std::vector<double> sums(supports * width);
                                  if (inner) {
                                    run<ScatterRows>(task, rows.data(), sums.data(), begin, end);
                                  } else {
                                    run<Scatter>(task, rows.data(), sums.data(), begin, end);
                                  }
                                });
  }

 private:
  // With n = |q||s'| + eps, s' = m s and f = (q·s')/n:
  // df/dq = s'/n - f |s'|/(|q| n) q and df/ds = m (q/n - f |q|/(|s'| n) s'); at 0 a norm is flat.
  void pair(int64_t number, const Gradients<T>& task) {
    const int64_t queries = task.query.positions, supports = task.support.positions;
    std::vector<Acc> query_norms(queries), support_norms(supports);
    norms_of(task.query, query_norms.data());
    norms_of(task.support, support_norms.data());
    pairs_.resize(queries);
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t at = number * queries + i, j = index_[at];
      STD_TORCH_CHECK(0 <= j && j < supports, "cosine_max_backward: index out of range");
      const double weight = mask_[number * supports + j];
      if (weight == 0) {
        pairs_[i] = {-1, 0, 0, 0};
        continue;
      }
      const double q = query_norms[i], s = std::abs(weight) * support_norms[j];
      const double scale = grad_[at] / (q * s + kEpsilon), cosine = values_[at];
      pairs_[i] = {j, static_cast<Acc>(scale * weight),
                   static_cast<Acc>(q == 0 ? 0 : scale * cosine * s / q),
                   static_cast<Acc>(s == 0 ? 0 : scale * cosine * q / s * weight * weight)};
    }
  }

  const Acc* grad_;
  const Acc* mask_;
  const Acc* values_;
  const int64_t* index_;
  std::vector<Pair<Acc>> pairs_;
};

Tensor channels_inner(const Tensor& x) {
  return torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(x, 1, 2)), 1,
                                  2);
}

Tensor zeros_like(const Tensor& x, bool inner) {
  const int64_t sizes[] = {x.size(0), x.size(inner ? 2 : 1), x.size(inner ? 1 : 2)};
  const Tensor zeros = torch::stable::new_zeros(x, {sizes, 3});
  return inner ? torch::stable::transpose(zeros, 1, 2) : zeros;
}

std::tuple<Tensor, Tensor> cosine_max_backward(const Tensor& grad, const Tensor& query,
                                               const Tensor& support, const Tensor& mask,
                                               const Tensor& values, const Tensor& index) {
  check_cosine_max(query, support, mask);
  for (const Tensor& x : {grad, values, index}) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == query.size(0) && x.size(1) == query.size(2),
                    "cosine_max_backward: grad, values and index must be [B, N]");
    STD_TORCH_CHECK(x.device() == query.device(), "cosine_max_backward: inputs differ in device");
  }
  STD_TORCH_CHECK(grad.scalar_type() == mask.scalar_type() &&
                      values.scalar_type() == mask.scalar_type() &&
                      index.scalar_type() == ScalarType::Long,
                  "cosine_max_backward: grad and values must have the mask's dtype, index int64");
  const bool inner = is_channels_inner(query);
  Tensor grad_query = zeros_like(query, inner), grad_support = zeros_like(support, inner);
  if (grad_query.numel() == 0) {
    return {grad_query, grad_support};
  }
  const Tensor q = readable(query);
  const bool alike = inner ? is_channels_inner(support) : support.stride(2) == 1;
  const Tensor s = alike   ? support
                   : inner ? channels_inner(support)
                           : torch::stable::contiguous(support);
  const Tensor arriving = torch::stable::contiguous(grad),
               weights = torch::stable::contiguous(mask);
  const Tensor maxima = torch::stable::contiguous(values);
  const Tensor chosen = torch::stable::contiguous(index);
  with_type(query.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Backward<T> backward(arriving, weights, maxima, chosen);
    for (int64_t b = 0; b < query.size(0); ++b) {
      backward.image(b, {columns<const T>(q, b), columns<const T>(s, b), columns<T>(grad_query, b),
                         columns<T>(grad_support, b), nullptr});
    }
  });
  return {grad_query, grad_support};
}

}  // namespace
}  // namespace svf_fast

STABLE_TORCH_LIBRARY_IMPL(svf_fast, CPU, library) {
  library.impl("cosine_max_backward", TORCH_BOX(&svf_fast::cosine_max_backward));
}
