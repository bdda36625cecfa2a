// cosine_max on the CPU: products of tiles by BLAS, each followed by a running maximum over the
// support positions, so that no matrix of queries by supports exists. Results do not depend on how
// a pass is split among threads: every query position, and in backward every channel, has one.
#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../maps.h"
#include "blas.h"
#include "dispatch.h"
#include "widen.h"

namespace svf_fast {
namespace {

constexpr int64_t kTile = 1024;    // positions of a tile
constexpr int64_t kLanes = 64;     // query positions of a unit of work: whole vectors of any set
constexpr int64_t kChannels = 64;  // channels of a unit of backward, channels innermost
constexpr int64_t kGrain = 32768;  // elements that are worth a thread
constexpr double kEpsilon = 1e-7;  // of the definition

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One image [C, P] of which either the positions or the channels of a row are neighbours.
template <typename T>
struct Columns {
  T* data;
  int64_t channels;
  int64_t positions;
  int64_t stride;  // from row to row
  bool channels_inner;

  int64_t channel_stride() const { return channels_inner ? 1 : stride; }
  int64_t position_stride() const { return channels_inner ? stride : 1; }
  Columns slice(int64_t first, int64_t count) const {
    return {data + first * position_stride(), channels, count, stride, channels_inner};
  }
};

bool is_channels_inner(const Tensor& x) {
  return x.size(1) > 1 && x.stride(1) == 1 && x.stride(2) > 1;
}

Tensor readable(const Tensor& x) {
  return x.stride(2) == 1 || is_channels_inner(x) ? x : torch::stable::contiguous(x);
}

template <typename T>
Columns<T> columns(const Tensor& x, int64_t image) {
  const bool inner = is_channels_inner(x);
  T* data = static_cast<T*>(const_cast<void*>(x.const_data_ptr())) + image * x.stride(0);
  return {data, x.size(1), x.size(2), x.stride(inner ? 2 : 1), inner};
}

// Columns `index` of an image, times `weight`; null: all of them, times one.
template <typename Acc>
struct Choice {
  const int64_t* index;
  const Acc* weight;
};

// The chosen columns, widened, in the layout of the image. Units are the rows of the result.
struct Pack {
  template <int kBytes, typename T, typename Acc>
  static SVF_FAST_INLINE void run(const Columns<const T>& from, const Choice<Acc>& choice,
                                  const Columns<Acc>& to, int64_t begin, int64_t end) {
    using V = Vector<Acc, kBytes>;
    T gathered[kTile];
    for (int64_t row = begin; row < end; ++row) {
      Acc* out = to.data + row * to.stride;
      if (from.channels_inner) {
        const V factor = V{} + (choice.weight ? choice.weight[row] : Acc(1));
        const T* in = from.data + (choice.index ? choice.index[row] : row) * from.stride;
        for_vectors<kBytes>(in, from.channels,
                            [&](int64_t c, const V& value, int64_t count) SVF_FAST_LAMBDA {
                              store_part<kBytes>(out + c, value * factor, count);
                            });
        continue;
      }
      const T* in = from.data + row * from.stride;
      if (choice.index) {
        for (int64_t i = 0; i < to.positions; ++i) {
          gathered[i] = in[choice.index[i]];
        }
        in = gathered;
      }
      for_vectors<kBytes>(in, to.positions,
                          [&](int64_t i, const V& value, int64_t count) SVF_FAST_LAMBDA {
                            V factor = V{} + Acc(1);
                            if (choice.weight) {
                              std::memcpy(&factor, choice.weight + i, count * sizeof(Acc));
                            }
                            store_part<kBytes>(out + i, value * factor, count);
                          });
    }
  }
};

// Euclidean norms of columns, summed in double. Units are positions.
struct Norms {
  template <int kBytes, typename T, typename Acc>
  static SVF_FAST_INLINE void run(const Columns<const T>& x, Acc* const& norms, int64_t begin,
                                  int64_t end) {
    constexpr int kWide = kBytes / sizeof(Acc) * sizeof(double);
    using V = Vector<Acc, kBytes>;
    using Wide = Vector<double, kWide>;
    if (x.channels_inner) {
      for (int64_t p = begin; p < end; ++p) {
        Wide sum{};
        for_vectors<kBytes>(x.data + p * x.stride, x.channels,
                            [&](int64_t, const V& value, int64_t) SVF_FAST_LAMBDA {
                              const Wide wide = __builtin_convertvector(value, Wide);
                              sum += wide * wide;
                            });
        norms[p] = static_cast<Acc>(std::sqrt(sum_lanes<double, kWide>(sum)));
      }
      return;
    }
    double sums[kTile];
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t width = std::min(kTile, end - first);
      std::fill_n(sums, width, 0.0);
      for (int64_t c = 0; c < x.channels; ++c) {
        for_vectors<kBytes>(x.data + c * x.stride + first, width,
                            [&](int64_t i, const V& value, int64_t count) SVF_FAST_LAMBDA {
                              const Wide wide = __builtin_convertvector(value, Wide);
                              Wide sum{};
                              std::memcpy(&sum, sums + i, count * sizeof(double));
                              sum += wide * wide;
                              std::memcpy(sums + i, &sum, count * sizeof(double));
                            });
      }
      for (int64_t i = 0; i < width; ++i) {
        norms[first + i] = static_cast<Acc>(std::sqrt(sums[i]));
      }
    }
  }
};

// Products of a tile [supports, kTile], and the best of all tiles so far, padded to whole units.
template <typename Acc>
struct Candidates {
  using Index = std::conditional_t<sizeof(Acc) == 4, int32_t, int64_t>;
  const Acc* product;
  const Acc* query_norms;
  const Acc* support_norms;
  Acc* best;
  Index* index;
  int64_t supports;
  int64_t first_support;
};

// The first of the largest cosines, NaN above all, as torch.max has it. Units: kLanes queries.
struct Maximum {
  template <int kBytes, typename Acc>
  static SVF_FAST_INLINE void run(const Candidates<Acc>& tile, int64_t begin, int64_t end) {
    using V = Vector<Acc, kBytes>;
    using Index = Vector<typename Candidates<Acc>::Index, kBytes>;
    constexpr int64_t lanes = kBytes / sizeof(Acc);
    for (int64_t j = 0; j < tile.supports; ++j) {
      const Acc* row = tile.product + j * kTile;
      const V support_norm = V{} + tile.support_norms[j];
      const Index position =
          Index{} + static_cast<typename Candidates<Acc>::Index>(tile.first_support + j);
      for (int64_t i = begin * kLanes; i < end * kLanes; i += lanes) {
        const V norms = Memory<kBytes>::load(tile.query_norms + i) * support_norm;
        const V cosine = Memory<kBytes>::load(row + i) / (norms + static_cast<Acc>(kEpsilon));
        const V best = Memory<kBytes>::load(tile.best + i);
        const auto better = (cosine > best) | ((cosine != cosine) & (best == best));
        Index index;
        std::memcpy(&index, tile.index + i, kBytes);
        index = better ? position : index;
        std::memcpy(tile.index + i, &index, kBytes);
        Memory<kBytes>::store(tile.best + i, better ? cosine : best);
      }
    }
  }
};

template <typename Acc>
Acc* scratch(std::vector<Tensor>& owned, const Tensor& like, int64_t size) {
  owned.push_back(torch::stable::new_empty(like, {&size, 1}, kBlasType<Acc>));
  return static_cast<Acc*>(owned.back().mutable_data_ptr());
}

int64_t grain(int64_t elements_of_a_unit) {
  return divide_up(kGrain, std::max<int64_t>(1, elements_of_a_unit));
}

template <typename T, typename Acc>
void norms_of(const Columns<const T>& x, Acc* norms) {
  torch::stable::parallel_for(0, x.positions, grain(x.channels), [&](int64_t begin, int64_t end) {
    run<Norms>(x, norms, begin, end);
  });
}

template <typename T>
class Forward {
 public:
  using Acc = accumulator_t<T>;

  Forward(const Tensor& query, const Tensor& support, const Tensor& mask)
      : query_(query), support_(support), mask_(mask) {
    const int64_t channels = query.size(1);
    const int64_t padded = divide_up(query.size(2), kLanes) * kLanes;
    query_tile_ = scratch<Acc>(owned_, query, channels * std::min(kTile, query.size(2)));
    support_tile_ = scratch<Acc>(owned_, query, channels * std::min(kTile, support.size(2)));
    product_ = scratch<Acc>(owned_, query, kTile * std::min(kTile, support.size(2)));
    support_norms_ = scratch<Acc>(owned_, query, kTile);
    query_norms_ = scratch<Acc>(owned_, query, padded);
    best_ = scratch<Acc>(owned_, query, padded);
    best_index_.resize(padded);
  }

  void image(int64_t number, Acc* values, int64_t* index) {
    const auto query = columns<const T>(query_, number);
    const auto support = columns<const T>(support_, number);
    choose(static_cast<const Acc*>(mask_.const_data_ptr()) + number * support.positions,
           support.positions);
    norms_of(query, query_norms_);
    std::fill(best_, best_ + best_index_.size(), -std::numeric_limits<Acc>::infinity());
    const int64_t chosen = chosen_.size();
    for (int64_t j = 0; j < chosen; j += kTile) {
      const int64_t supports = std::min(kTile, chosen - j);
      const auto right = support_operand(support, j, supports);
      norms_of(right, support_norms_);
      for (int64_t i = 0; i < query.positions; i += kTile) {
        const int64_t queries = std::min(kTile, query.positions - i);
        const auto left = query_operand(query.slice(i, queries));
        multiply(matrix(product_, supports, queries, kTile, 1),
                 matrix(right.data, supports, right.channels, right.position_stride(),
                        right.channel_stride()),
                 matrix(left.data, left.channels, queries, left.channel_stride(),
                        left.position_stride()));
        const Candidates<Acc> tile{product_,  query_norms_ + i,       support_norms_,
                                   best_ + i, best_index_.data() + i, supports,
                                   j};
        torch::stable::parallel_for(
            0, divide_up(queries, kLanes), grain(kLanes * supports),
            [&](int64_t begin, int64_t end) { run<Maximum>(tile, begin, end); });
      }
    }
    finish(query.positions, support.positions, values, index);
  }

 private:
  void choose(const Acc* mask, int64_t positions) {
    chosen_.clear();
    weights_.clear();
    first_masked_ = positions;
    for (int64_t p = 0; p < positions; ++p) {
      if (mask[p] != 0) {
        chosen_.push_back(p);
        weights_.push_back(mask[p]);
      } else {
        first_masked_ = std::min(first_masked_, p);
      }
    }
  }

  Columns<const Acc> pack(const Columns<const T>& x, const Choice<Acc>& choice, int64_t count,
                          Acc* memory) {
    const Columns<Acc> packed{memory, x.channels, count, x.channels_inner ? x.channels : count,
                              x.channels_inner};
    const int64_t rows = x.channels_inner ? count : x.channels;
    torch::stable::parallel_for(0, rows, grain(packed.stride), [&](int64_t begin, int64_t end) {
      run<Pack>(x, choice, packed, begin, end);
    });
    return {memory, packed.channels, count, packed.stride, packed.channels_inner};
  }

  Columns<const Acc> query_operand(const Columns<const T>& x) {
    if constexpr (std::is_same_v<T, Acc>) {
      return x;
    } else {
      return pack(x, {nullptr, nullptr}, x.positions, query_tile_);
    }
  }

  Columns<const Acc> support_operand(const Columns<const T>& x, int64_t first, int64_t count) {
    if constexpr (std::is_same_v<T, Acc>) {
      const auto* weight = weights_.data() + first;
      if (chosen_[first + count - 1] - chosen_[first] == count - 1 &&
          std::all_of(weight, weight + count, [](Acc value) { return value == 1; })) {
        return x.slice(chosen_[first], count);
      }
    }
    return pack(x, {chosen_.data() + first, weights_.data() + first}, count, support_tile_);
  }

  // Positions of the mask's zeros, all of similarity 0, enter in the place of their first.
  void finish(int64_t queries, int64_t supports, Acc* values, int64_t* index) {
    for (int64_t i = 0; i < queries; ++i) {
      values[i] = best_[i];
      index[i] = chosen_.empty() ? 0 : chosen_[best_index_[i]];
      if (first_masked_ < supports) {
        const Acc zero = query_norms_[i] * 0;  // NaN for a query that is not finite
        const bool first = zero == values[i] && first_masked_ < index[i];
        if (chosen_.empty() || zero > values[i] || first ||
            (zero != zero && values[i] == values[i])) {
          values[i] = zero;
          index[i] = first_masked_;
        }
      }
    }
  }

  const Tensor& query_;
  const Tensor& support_;
  const Tensor& mask_;
  std::vector<Tensor> owned_;
  Acc* query_tile_;
  Acc* support_tile_;
  Acc* product_;
  Acc* support_norms_;
  Acc* query_norms_;
  Acc* best_;
  std::vector<typename Candidates<Acc>::Index> best_index_;
  std::vector<int64_t> chosen_;
  std::vector<Acc> weights_;
  int64_t first_masked_ = 0;
};

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

void check(const Tensor& query, const Tensor& support, const Tensor& mask) {
  STD_TORCH_CHECK(is_supported(query.scalar_type()), "cosine_max: unsupported dtype");
  STD_TORCH_CHECK(query.scalar_type() == support.scalar_type(),
                  "cosine_max: query and support differ in dtype");
  STD_TORCH_CHECK(mask.scalar_type() == accumulation_type(query.scalar_type()),
                  "cosine_max: mask must be float32, or float64 for float64 maps");
  STD_TORCH_CHECK(query.device() == support.device() && query.device() == mask.device(),
                  "cosine_max: inputs differ in device");
  STD_TORCH_CHECK(query.dim() == 3 && support.dim() == 3 && mask.dim() == 2,
                  "cosine_max: inputs must be [B, C, N], [B, C, M] and [B, M]");
  STD_TORCH_CHECK(support.size(0) == query.size(0) && support.size(1) == query.size(1) &&
                      mask.size(0) == query.size(0) && mask.size(1) == support.size(2),
                  "cosine_max: inputs differ in shape");
  STD_TORCH_CHECK(support.size(2) > 0, "cosine_max: no support position");
  STD_TORCH_CHECK(support.size(2) <= std::numeric_limits<int32_t>::max(),
                  "cosine_max: too many support positions");
}

template <typename Body>
void with_type(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    default:
      return body(Half{});
  }
}

std::tuple<Tensor, Tensor> cosine_max(const Tensor& query, const Tensor& support,
                                      const Tensor& mask) {
  check(query, support, mask);
  const int64_t batch = query.size(0), positions = query.size(2);
  const int64_t sizes[] = {batch, positions};
  Tensor values =
      torch::stable::new_empty(query, {sizes, 2}, accumulation_type(query.scalar_type()));
  Tensor index = torch::stable::new_empty(query, {sizes, 2}, ScalarType::Long);
  if (values.numel() == 0) {
    return {values, index};
  }
  const Tensor q = readable(query), s = readable(support);
  const Tensor weights = torch::stable::contiguous(mask);
  with_type(query.scalar_type(), [&](auto type) {
    using T = decltype(type);
    Forward<T> forward(q, s, weights);
    auto* value = static_cast<accumulator_t<T>*>(values.mutable_data_ptr());
    auto* position = static_cast<int64_t*>(index.mutable_data_ptr());
    for (int64_t b = 0; b < batch; ++b) {
      forward.image(b, value + b * positions, position + b * positions);
    }
  });
  return {values, index};
}

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
  check(query, support, mask);
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
  library.impl("cosine_max", TORCH_BOX(&svf_fast::cosine_max));
  library.impl("cosine_max_backward", TORCH_BOX(&svf_fast::cosine_max_backward));
}
