// gram on the CPU: a product by BLAS per image, or per tile of positions where an operand must be
// widened, rebuilt or decoded first, accumulated in place.
#include <optional>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "blas.h"
#include "columns.h"
#include "dispatch.h"
#include "gram.h"
#include "quantize.h"
#include "widen.h"

namespace svf_fast {
namespace {

constexpr int64_t kTile = 2048;  // positions that are packed at once

// relu(x * scale + shift) per channel; null: x itself.
template <typename Acc>
struct Affine {
  const Acc* scale;
  const Acc* shift;
};

template <typename V>
SVF_FAST_INLINE V relu(const V& value) {
  return value < V{} ? V{} : value;  // NaN stays
}

// A tile widened, and rebuilt if it is to be, in its own layout. Units are rows of the layout.
struct Rebuild {
  template <int kBytes, typename T, typename Acc>
  static SVF_FAST_INLINE void run(const Columns<const T>& from, const Affine<Acc>& affine,
                                  Acc* const& to, int64_t begin, int64_t end) {
    using V = Vector<Acc, kBytes>;
    const int64_t width = from.channels_inner ? from.channels : from.positions;
    for (int64_t row = begin; row < end; ++row) {
      const T* in = from.data + row * from.stride;
      Acc* out = to + row * width;
      if (!affine.scale) {
        for_vectors<kBytes>(in, width,
                            [&](int64_t i, const V& value, int64_t count)
                                SVF_FAST_LAMBDA { store_part<kBytes>(out + i, value, count); });
      } else if (from.channels_inner) {
        for_vectors<kBytes>(
            in, width, [&](int64_t i, const V& value, int64_t count) SVF_FAST_LAMBDA {
              const V scale = load_part<kBytes>(affine.scale + i, count);
              const V shift = load_part<kBytes>(affine.shift + i, count);
              store_part<kBytes>(out + i, rounded<kBytes, T>(relu(value * scale + shift)), count);
            });
      } else {
        const V scale = V{} + affine.scale[row], shift = V{} + affine.shift[row];
        for_vectors<kBytes>(
            in, width, [&](int64_t i, const V& value, int64_t count) SVF_FAST_LAMBDA {
              store_part<kBytes>(out + i, rounded<kBytes, T>(relu(value * scale + shift)), count);
            });
      }
    }
  }
};

// A tile of codes as the numbers that they stand for in T, rebuilt if it is to be.
template <typename T>
struct Decode {
  using Acc = accumulator_t<T>;

  template <int kBytes>
  static SVF_FAST_INLINE void run(const Columns<const uint8_t>& from, const Affine<Acc>& affine,
                                  const Grid<Acc>& grid, Acc* const& to, int64_t begin,
                                  int64_t end) {
    from.channels_inner ? rows<kBytes, true>(from, affine, grid, to, begin, end)
                        : rows<kBytes, false>(from, affine, grid, to, begin, end);
  }

 private:
  template <int kBytes, bool kInner>
  static SVF_FAST_INLINE void rows(const Columns<const uint8_t>& from, const Affine<Acc>& affine,
                                   const Grid<Acc>& grid, Acc* to, int64_t begin, int64_t end) {
    const int64_t width = kInner ? from.channels : from.positions;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t channel = kInner ? 0 : row;
      const Acc* scale = affine.scale ? affine.scale + channel : nullptr;
      const Acc* shift = affine.shift ? affine.shift + channel : nullptr;
      decode<kBytes, kInner, T>(from.data + row * from.stride, width, grid.from(channel), scale,
                                shift, to + row * width);
    }
  }
};

// [count, C, P], or transposed [count, P, C], for BLAS; `stride` from one matrix to the next.
template <typename T>
Tensor operand(const Columns<const T>& x, int64_t count, int64_t channels, int64_t stride,
               bool transposed) {
  return transposed ? matrices(x.data, count, x.positions, channels, stride, x.position_stride(),
                               x.channel_stride())
                    : matrices(x.data, count, channels, x.positions, stride, x.channel_stride(),
                               x.position_stride());
}

// One of the two maps, as it lies or by tiles through a scratch. E: its elements, T or codes.
template <typename T, typename E>
class Source {
 public:
  using Acc = accumulator_t<T>;

  Source(const Flat& x, const Affine<Acc>& affine, const Grid<Acc>& grid, int64_t tile,
         std::vector<Tensor>& owned)
      : affine_(affine), grid_(grid), channels_(x.size(1)) {
    if (is_packed()) {
      scratch_ = scratch<Acc>(owned, x.tensor(), x.size(1) * tile);
    }
  }

  bool is_packed() const { return !std::is_same_v<E, Acc> || affine_.scale; }

  Columns<const Acc> tile(const Columns<const E>& x, int64_t image) {
    if constexpr (std::is_same_v<E, Acc>) {
      if (!is_packed()) {
        return x;
      }
    }
    const int64_t rows = x.channels_inner ? x.positions : x.channels;
    const int64_t width = x.channels_inner ? x.channels : x.positions;
    torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
      if constexpr (std::is_same_v<E, uint8_t>) {
        run<Decode<T>>(x, affine_, grid_.from(image * channels_), scratch_, begin, end);
      } else {
        run<Rebuild>(x, affine_, scratch_, begin, end);
      }
    });
    return {scratch_, x.channels, x.positions, width, x.channels_inner};
  }

 private:
  Affine<Acc> affine_;
  Grid<Acc> grid_;
  int64_t channels_;
  Acc* scratch_ = nullptr;
};

// [N, C, P] whose images are one sequence of positions: channels innermost.
bool is_sequence(const Flat& x) {
  return x.size(0) == 1 ||
         (x.size(2) == 1 ? x.stride(1) == 1
                         : is_channels_inner(x) && x.stride(0) == x.size(2) * x.stride(2));
}

template <typename T>
Columns<const T> sequence(const Flat& x) {
  if (x.size(0) == 1) {
    return columns<const T>(x, 0);
  }
  return {columns<const T>(x, 0).data, x.size(1), x.size(0) * x.size(2),
          x.size(2) == 1 ? x.stride(0) : x.stride(2), true};
}

// Every image and group in one call: from image to image as from group to group.
bool is_regular(const Flat& x, int64_t groups) {
  return groups == 1 || x.stride(0) == x.size(1) * (is_channels_inner(x) ? 1 : x.stride(1));
}

template <typename T>
void multiply_images(const Flat& a, const Flat& b, int64_t groups, Tensor& out) {
  const int64_t images = a.size(0), count = images * groups;
  const int64_t rows = a.size(1) / groups, width = b.size(1) / groups;
  std::vector<Tensor> owned;
  const T* products = scratch<T>(owned, a.tensor(), count * rows * width);
  multiply_each(matrices(products, count, rows, width, rows * width, width, 1),
                operand(columns<const T>(a, 0), count, rows, a.stride(0) / groups, false),
                operand(columns<const T>(b, 0), count, width, b.stride(0) / groups, true));
  const int64_t image = 0;
  torch::stable::sum_out(out, torch::stable::view(owned[0], {images, groups, rows, width}),
                         torch::headeronly::IntHeaderOnlyArrayRef(&image, 1));
}

// A and B: the elements of a and of b, T or, for one of them, codes on the grid.
template <typename T, typename A, typename B>
void accumulate(const Flat& a, const Flat& b, int64_t groups,
                const Affine<accumulator_t<T>>& affine, const Grid<accumulator_t<T>>& grid,
                Tensor& out) {
  std::vector<Tensor> owned;
  constexpr bool coded = !std::is_same_v<A, B>;  // each image has a grid of its own
  const bool together = !coded && is_sequence(a) && is_sequence(b);
  const int64_t images = together ? 1 : a.size(0);
  const int64_t positions = together ? a.size(0) * a.size(2) : a.size(2);
  const int64_t limit = std::min(kTile, positions);
  Source<T, A> left(a, affine, grid, limit, owned);
  Source<T, B> right(b, {nullptr, nullptr}, grid, limit, owned);
  const bool packed = left.is_packed() || right.is_packed();
  if constexpr (std::is_same_v<T, accumulator_t<T>> && !coded) {
    if (!packed && images > 1 && is_regular(a, groups) && is_regular(b, groups)) {
      return multiply_images<T>(a, b, groups, out);
    }
  }
  bool first_tile = true;
  const int64_t step = packed ? limit : positions;
  for (int64_t n = 0; n < images; ++n) {
    const auto image_a = together ? sequence<A>(a) : columns<const A>(a, n);
    const auto image_b = together ? sequence<B>(b) : columns<const B>(b, n);
    for (int64_t first = 0; first < positions; first += step) {
      const int64_t count = std::min(step, positions - first);
      const auto tile_a = left.tile(image_a.slice(first, count), n);
      const auto tile_b = right.tile(image_b.slice(first, count), n);
      const int64_t rows = a.size(1) / groups, width = b.size(1) / groups;
      add_products(out, !first_tile,
                   operand(tile_a, groups, rows, rows * tile_a.channel_stride(), false),
                   operand(tile_b, groups, width, width * tile_b.channel_stride(), true));
      first_tile = false;
    }
  }
}

void check(const Tensor& a, const Tensor& b, int64_t groups, const std::optional<Tensor>& grid) {
  if (grid) {
    const bool left = a.scalar_type() == ScalarType::Byte;
    check_quantized("gram", left ? a : b, *grid, (left ? b : a).scalar_type());
    STD_TORCH_CHECK(is_supported((left ? b : a).scalar_type()), "gram: unsupported dtype");
  } else {
    STD_TORCH_CHECK(is_supported(a.scalar_type()), "gram: unsupported dtype");
    STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "gram: a and b differ in dtype");
  }
  STD_TORCH_CHECK(a.device() == b.device(), "gram: a and b differ in device");
  STD_TORCH_CHECK(a.dim() >= 2 && a.dim() == b.dim(), "gram: inputs must be [N, C, *spatial]");
  for (int64_t dim = 0; dim < a.dim(); ++dim) {
    STD_TORCH_CHECK(dim == 1 || a.size(dim) == b.size(dim),
                    "gram: a and b differ in images or positions");
  }
  STD_TORCH_CHECK(groups > 0 && a.size(1) % groups == 0 && b.size(1) % groups == 0,
                  "gram: groups must divide the channels of a and b");
}

Tensor channel_values(const char* name, const std::optional<Tensor>& values, const Tensor& a,
                      ScalarType type) {
  STD_TORCH_CHECK(values, "gram: scale and shift come together");
  STD_TORCH_CHECK(values->scalar_type() == accumulation_type(type), "gram: ", name,
                  " must be float32, or float64 for float64 maps");
  STD_TORCH_CHECK(values->device() == a.device(), "gram: ", name, " is on another device");
  STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == a.size(1), "gram: ", name,
                  " must be [C], C the channels of a");
  return dense_rows(*values);
}

}  // namespace

Tensor gram(const Tensor& a, const Tensor& b, int64_t groups, const std::optional<Tensor>& scale,
            const std::optional<Tensor>& shift, const std::optional<Tensor>& grid) {
  check(a, b, groups, grid);
  const bool left_coded = a.scalar_type() == ScalarType::Byte;
  const ScalarType type = (left_coded ? b : a).scalar_type();
  std::optional<Tensor> factor, term;
  if (scale || shift) {
    factor = channel_values("scale", scale, a, type);
    term = channel_values("shift", shift, a, type);
  }
  Tensor out = torch::stable::new_empty(a, {groups, a.size(1) / groups, b.size(1) / groups},
                                        accumulation_type(type));
  if (a.numel() == 0 || b.numel() == 0) {
    return torch::stable::zero_(out);
  }
  const Flat left(a), right(b);
  with_type(type, [&](auto value) {
    using T = decltype(value);
    using Acc = accumulator_t<T>;
    Affine<Acc> affine{nullptr, nullptr};
    if (factor) {
      affine = {static_cast<const Acc*>(factor->const_data_ptr()),
                static_cast<const Acc*>(term->const_data_ptr())};
    }
    if (!grid) {
      return accumulate<T, T, T>(left, right, groups, affine, {}, out);
    }
    const auto codes = grid_of<Acc>(*grid);
    left_coded ? accumulate<T, uint8_t, T>(left, right, groups, affine, codes, out)
               : accumulate<T, T, uint8_t>(left, right, groups, affine, codes, out);
  });
  return out;
}

}  // namespace svf_fast

STABLE_TORCH_LIBRARY_IMPL(svf_fast, CPU, library) {
  library.impl("gram", TORCH_BOX(&svf_fast::gram));
}
