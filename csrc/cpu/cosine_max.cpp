// cosine_max on the CPU: products of tiles by BLAS, each followed by a running maximum over the
// support positions, so that no matrix of queries by supports exists.
#include "cosine_max.h"

#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "blas.h"

namespace svf_fast {
namespace {

constexpr int64_t kTile = 1024;  // positions of a tile
constexpr int64_t kLanes = 64;   // query positions of a unit of work: whole vectors of any set

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
      for_vectors<kBytes>(
          in, to.positions, [&](int64_t i, const V& value, int64_t count) SVF_FAST_LAMBDA {
            const V factor =
                choice.weight ? load_part<kBytes>(choice.weight + i, count) : V{} + Acc(1);
            store_part<kBytes>(out + i, value * factor, count);
          });
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

std::tuple<Tensor, Tensor> cosine_max(const Tensor& query, const Tensor& support,
                                      const Tensor& mask) {
  check_cosine_max(query, support, mask);
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

}  // namespace
}  // namespace svf_fast

STABLE_TORCH_LIBRARY_IMPL(svf_fast, CPU, library) {
  library.impl("cosine_max", TORCH_BOX(&svf_fast::cosine_max));
}
