// quantize on the CPU: ranges and codes of a channel at a time while it is in the cache, and what
// is made of codes again.
#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../affine_act.h"
#include "dispatch.h"
#include "widen.h"

namespace svf_fast {
namespace {

constexpr int64_t kWidth = 64;     // channels of a unit of work where they are neighbours
constexpr int64_t kUnit = 16384;   // elements of one
constexpr double kSteps = 254;     // of a range with an edge in it: two codes are cut by it
constexpr double kAllSteps = 255;  // of one without

// How one channel of one image is coded: q = (y - anchor) * inverse + first, rounded down.
template <typename Acc>
struct Code {
  Acc anchor;
  Acc inverse;
  Acc first;  // a half where there is no edge
};

template <typename Acc>
struct Range {
  Acc low;
  Acc high;
  bool finite;
};

// The code of a channel; writes offset, step and the first code that passes.
template <typename Acc>
Code<Acc> plan(const Range<Acc>& range, const Acc* scale, const Acc* shift, Acc& offset, Acc& step,
               Acc& first) {
  const Acc width = range.high - range.low;
  const Acc half = Acc(0.5);
  first = scale ? Acc(128) : Acc(0);
  step = 0;
  if (!range.finite || !std::isfinite(width)) {
    offset = std::numeric_limits<Acc>::quiet_NaN();
    return {0, 0, scale ? first : half};
  }
  offset = range.low;
  if (width < std::numeric_limits<Acc>::min() * 1024) {
    return {range.low, 0, scale ? first : half};
  }
  if (!scale) {
    step = width / Acc(kAllSteps);
    return {range.low, Acc(kAllSteps) / width, half};
  }
  const bool rises = *scale > 0;
  const Acc edge = -*shift / *scale;
  Acc anchor = std::clamp(edge, range.low, range.high);
  if (!std::isfinite(edge)) {
    const bool passes = !(range.low * *scale + *shift <= 0);
    anchor = passes == rises ? range.low : range.high;
  }
  const Acc stopped = rises ? anchor - range.low : range.high - anchor;
  first = std::clamp(std::ceil(stopped / width * Acc(kSteps)), Acc(1), Acc(255));
  step = (rises ? width : -width) / Acc(kSteps);
  offset = anchor + (half - first) * step;
  return {anchor, (rises ? Acc(kSteps) : -Acc(kSteps)) / width, first};
}

template <int kBytes, typename Acc>
struct Extremes {
  using V = Vector<Acc, kBytes>;
  V low = V{} + std::numeric_limits<Acc>::infinity();
  V high = V{} - std::numeric_limits<Acc>::infinity();
  V nothing{};  // NaN where a value was not finite

  SVF_FAST_INLINE void add(const V& value) {
    low = value < low ? value : low;
    high = value > high ? value : high;
    nothing += value - value;
  }
};

// The codes of some values of a channel, or of one value of each of some channels.
template <int kBytes, typename Acc>
SVF_FAST_INLINE Vector<Acc, kBytes> encode(const Vector<Acc, kBytes>& y,
                                           const Vector<Acc, kBytes>& anchor,
                                           const Vector<Acc, kBytes>& inverse,
                                           const Vector<Acc, kBytes>& first) {
  using V = Vector<Acc, kBytes>;
  const V low{}, high = V{} + Acc(255);
  const V code = (y - anchor) * inverse + first;
  const V raised = code >= low ? code : low;  // NaN too
  return raised <= high ? raised : high;
}

// The same beside an edge, which no code crosses: z = y * scale + shift decides as the ReLU did.
template <int kBytes, typename Acc>
SVF_FAST_INLINE Vector<Acc, kBytes> encode(const Vector<Acc, kBytes>& y,
                                           const Vector<Acc, kBytes>& anchor,
                                           const Vector<Acc, kBytes>& inverse,
                                           const Vector<Acc, kBytes>& first,
                                           const Vector<Acc, kBytes>& scale,
                                           const Vector<Acc, kBytes>& shift) {
  using V = Vector<Acc, kBytes>;
  const V zero{}, one = V{} + Acc(1), top = V{} + Acc(255);
  const V z = y * scale + shift;
  const auto stopped = z <= zero;
  const V low = stopped ? zero : first;
  const V high = stopped ? first - one : top;
  const V code = (y - anchor) * inverse + first;
  const V raised = code >= low ? code : low;  // NaN too
  return raised <= high ? raised : high;
}

template <typename T>
struct Quantize {
  using Acc = accumulator_t<T>;
  const T* y;
  const Acc* scale;  // null: no edge
  const Acc* shift;
  uint8_t* codes;
  Acc* offset;
  Acc* step;
  Acc* first;
  Maps maps;
};

// Units are rows of positions, or kWidth channels of an image.
struct Encode {
  template <int kBytes, typename T>
  static SVF_FAST_INLINE void run(const Quantize<T>& task, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      task.maps.channels_last ? columns<kBytes>(task, unit) : row<kBytes>(task, unit);
    }
  }

 private:
  template <int kBytes, typename T>
  static SVF_FAST_INLINE void row(const Quantize<T>& task, int64_t row) {
    using Acc = accumulator_t<T>;
    using V = Vector<Acc, kBytes>;
    const int64_t positions = task.maps.positions, channel = row % task.maps.channels;
    const T* y = task.y + row * positions;
    Extremes<kBytes, Acc> seen;
    constexpr int64_t lanes = kBytes / sizeof(Acc);
    int64_t i = 0;
    for (; i + lanes <= positions; i += lanes) {
      seen.add(Memory<kBytes>::load(y + i));
    }
    if (i < positions) {  // lanes behind the last: the first value again
      T padded[lanes];
      std::fill_n(padded, lanes, y[0]);
      std::memcpy(padded, y + i, (positions - i) * sizeof(T));
      seen.add(Memory<kBytes>::load(padded));
    }
    Range<Acc> range{seen.low[0], seen.high[0], true};
    for (int64_t lane = 0; lane < lanes; ++lane) {
      range.low = std::min<Acc>(range.low, seen.low[lane]);
      range.high = std::max<Acc>(range.high, seen.high[lane]);
      range.finite = range.finite && seen.nothing[lane] == 0;
    }
    const Acc* scale = task.scale ? task.scale + channel : nullptr;
    const Acc* shift = task.scale ? task.shift + channel : nullptr;
    const auto code =
        plan<Acc>(range, scale, shift, task.offset[row], task.step[row], task.first[row]);
    const V anchor = V{} + code.anchor, inverse = V{} + code.inverse, first = V{} + code.first;
    uint8_t* to = task.codes + row * positions;
    if (!task.scale) {
      for_vectors<kBytes>(y, positions,
                          [&](int64_t at, const V& value, int64_t count) SVF_FAST_LAMBDA {
                            store_codes<kBytes, Acc>(
                                to + at, encode<kBytes, Acc>(value, anchor, inverse, first), count);
                          });
      return;
    }
    const V factor = V{} + *scale, term = V{} + *shift;
    for_vectors<kBytes>(
        y, positions, [&](int64_t at, const V& value, int64_t count) SVF_FAST_LAMBDA {
          store_codes<kBytes, Acc>(
              to + at, encode<kBytes, Acc>(value, anchor, inverse, first, factor, term), count);
        });
  }

  template <int kBytes, typename T>
  static SVF_FAST_INLINE void columns(const Quantize<T>& task, int64_t unit) {
    using Acc = accumulator_t<T>;
    using V = Vector<Acc, kBytes>;
    constexpr int64_t lanes = kBytes / sizeof(Acc), vectors = kWidth / lanes;
    const int64_t channels = task.maps.channels, positions = task.maps.positions;
    const int64_t units = divide_up(channels, kWidth);
    const int64_t image = unit / units, at = unit % units * kWidth;
    const int64_t width = std::min(kWidth, channels - at);
    const T* y = task.y + image * positions * channels + at;
    uint8_t* to = task.codes + image * positions * channels + at;
    const auto part = [&](int64_t v) { return std::min(lanes, width - v * lanes); };

    Extremes<kBytes, Acc> seen[vectors];
    for (int64_t p = 0; p < positions; ++p) {
      for (int64_t v = 0; v < vectors; ++v) {
        if (v * lanes < width) {
          seen[v].add(load_part<kBytes>(y + p * channels + v * lanes, part(v)));
        }
      }
    }
    Acc anchor[kWidth] = {}, inverse[kWidth] = {}, first[kWidth] = {};
    Acc factor[kWidth] = {}, term[kWidth] = {};
    for (int64_t c = 0; c < width; ++c) {
      const auto& column = seen[c / lanes];
      const int64_t lane = c % lanes, row = image * channels + at + c;
      const Range<Acc> range{column.low[lane], column.high[lane], column.nothing[lane] == 0};
      if (task.scale) {
        factor[c] = task.scale[at + c];
        term[c] = task.shift[at + c];
      }
      const auto code =
          plan<Acc>(range, task.scale ? factor + c : nullptr, task.scale ? term + c : nullptr,
                    task.offset[row], task.step[row], task.first[row]);
      anchor[c] = code.anchor;
      inverse[c] = code.inverse;
      first[c] = code.first;
    }
    for (int64_t p = 0; p < positions; ++p) {
      for (int64_t v = 0; v < vectors && v * lanes < width; ++v) {
        const int64_t c = v * lanes;
        const V value = load_part<kBytes>(y + p * channels + c, part(v));
        const V a = Memory<kBytes>::load(anchor + c), i = Memory<kBytes>::load(inverse + c);
        const V f = Memory<kBytes>::load(first + c);
        const V codes = task.scale
                            ? encode<kBytes, Acc>(value, a, i, f, Memory<kBytes>::load(factor + c),
                                                  Memory<kBytes>::load(term + c))
                            : encode<kBytes, Acc>(value, a, i, f);
        store_codes<kBytes, Acc>(to + p * channels + c, codes, part(v));
      }
    }
  }
};

// Codes become numbers, activations or masks, run by run of one channel or one position.
template <typename T>
struct Decode {
  using Acc = accumulator_t<T>;
  T* out;
  const T* grad;  // null: the values themselves
  const uint8_t* codes;
  Grid<Acc> grid;
  const Acc* scale;  // null: no ReLU
  const Acc* shift;
  Maps maps;
};

template <bool kLast>
struct Loop {
  template <int kBytes, typename T>
  static SVF_FAST_INLINE void run(const Decode<T>& task, int64_t begin, int64_t end) {
    using Acc = accumulator_t<T>;
    const int64_t channels = task.maps.channels;
    const int64_t length = kLast ? channels : task.maps.positions;
    while (begin < end) {
      const int64_t row = begin / length, offset = begin % length;
      const int64_t count = std::min(length - offset, end - begin);
      const int64_t image = row / (kLast ? task.maps.positions : channels);
      const int64_t channel = kLast ? offset : row % channels;
      const auto grid = task.grid.from(image * channels + channel);
      const Acc* scale = task.scale ? task.scale + channel : nullptr;
      const Acc* shift = task.shift ? task.shift + channel : nullptr;
      task.grad ? masked<kBytes>(task, begin, count, grid, scale)
                : decode<kBytes, kLast, T>(task.codes + begin, count, grid, scale, shift,
                                           task.out + begin);
      begin += count;
    }
  }

 private:
  template <int kBytes, typename T, typename Acc>
  static SVF_FAST_INLINE void masked(const Decode<T>& task, int64_t at, int64_t count,
                                     const Grid<Acc>& grid, const Acc* scale) {
    using V = Vector<Acc, kBytes>;
    const V zero{};
    for_vectors<kBytes>(
        task.grad + at, count, [&](int64_t i, const V& value, int64_t part) SVF_FAST_LAMBDA {
          const V code = load_codes<kBytes, Acc>(task.codes + at + i, part);
          const V first = per_channel<kBytes, kLast>(grid.first, i, part);
          const V factor = per_channel<kBytes, kLast>(scale, i, part);
          store_part<kBytes>(task.out + at + i, code >= first ? value * factor : zero, part);
        });
  }
};

template <typename T>
void run_units(const Decode<T>& task) {
  const int64_t elements = task.maps.batch * task.maps.channels * task.maps.positions;
  torch::stable::parallel_for(0, divide_up(elements, kUnit), 2, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kUnit, last = std::min(end * kUnit, elements);
    task.maps.channels_last ? run<Loop<true>>(task, first, last)
                            : run<Loop<false>>(task, first, last);
  });
}

// As maps_of, which joins the images of a map of one channel: here each has a range of its own.
Maps maps_by_images(const Tensor& x) {
  Maps maps = maps_of(x);
  if (x.size(1) == 1) {
    maps = {x.size(0), 1, x.numel() / std::max<int64_t>(1, x.size(0)), false};
  }
  return maps;
}

std::tuple<Tensor, Tensor> quantize(const Tensor& y, const std::optional<Tensor>& scale,
                                    const std::optional<Tensor>& shift) {
  check_same_maps("quantize", y, y);
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(),
                  "quantize: scale and shift come together");
  if (scale) {
    check_channels("quantize", "scale", *scale, y);
    check_channels("quantize", "shift", *shift, y);
  }
  const Tensor from = dense(y);
  Tensor codes = empty_strided_like(from, ScalarType::Byte);
  Tensor grid =
      torch::stable::new_empty(from, {3, y.size(0), y.size(1)}, accumulation_type(y.scalar_type()));
  if (y.numel() == 0) {
    return {std::move(codes), torch::stable::zero_(grid)};
  }
  with_type(y.scalar_type(), [&]<typename T>(T) {
    using Acc = accumulator_t<T>;
    Quantize<T> task{};
    task.y = static_cast<const T*>(from.const_data_ptr());
    task.scale = data<Acc>(scale);
    task.shift = data<Acc>(shift);
    task.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
    task.offset = static_cast<Acc*>(grid.mutable_data_ptr());
    task.step = task.offset + grid.numel() / 3;
    task.first = task.step + grid.numel() / 3;
    task.maps = maps_by_images(from);
    const auto& maps = task.maps;
    const int64_t units =
        maps.batch * (maps.channels_last ? divide_up(maps.channels, kWidth) : maps.channels);
    const int64_t size = maps.positions * (maps.channels_last ? kWidth : 1);
    torch::stable::parallel_for(0, units, divide_up(kUnit, size),
                                [&](int64_t begin, int64_t end) { run<Encode>(task, begin, end); });
  });
  return {std::move(codes), std::move(grid)};
}

template <typename T>
Decode<T> decoding(const Tensor& out, const Tensor& codes, const Tensor& grid,
                   const std::optional<Tensor>& scale, const std::optional<Tensor>& shift) {
  using Acc = accumulator_t<T>;
  Decode<T> task{};
  task.out = static_cast<T*>(out.mutable_data_ptr());
  task.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  task.grid = grid_of<Acc>(grid);
  task.scale = data<Acc>(scale);
  task.shift = data<Acc>(shift);
  task.maps = maps_by_images(codes);
  return task;
}

Tensor dequantize(const Tensor& codes, const Tensor& grid, const std::optional<Tensor>& scale,
                  const std::optional<Tensor>& shift, ScalarType type) {
  check_quantized("dequantize", codes, grid, type);
  STD_TORCH_CHECK(is_supported(type), "dequantize: unsupported dtype");
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(),
                  "dequantize: scale and shift come together");
  const Tensor from = dense(codes);
  Tensor out = empty_strided_like(from, type);
  if (scale) {
    check_channels("dequantize", "scale", *scale, out);
    check_channels("dequantize", "shift", *shift, out);
  }
  if (out.numel() > 0) {
    with_type(type, [&]<typename T>(T) { run_units(decoding<T>(out, from, grid, scale, shift)); });
  }
  return out;
}

void backward_into(const Tensor& grad, const Tensor& codes, const Tensor& grid, const Tensor& scale,
                   const Tensor& out) {
  const char* op = "quantized_backward";
  check_quantized(op, codes, grid, grad.scalar_type());
  STD_TORCH_CHECK(is_supported(grad.scalar_type()) && is_dense(grad) && grad.dim() == codes.dim() &&
                      grad.device() == codes.device(),
                  op, ": grad must be a contiguous or channels_last map");
  for (int64_t dim = 0; dim < grad.dim(); ++dim) {
    STD_TORCH_CHECK(grad.size(dim) == codes.size(dim), op, ": grad and codes differ in shape");
  }
  check_channels(op, "scale", scale, grad);
  if (grad.numel() == 0) {
    return;
  }
  Tensor from = codes;
  if (maps_by_images(grad).channels_last != maps_by_images(codes).channels_last ||
      !is_dense(codes)) {
    from = empty_strided_like(grad, ScalarType::Byte);
    torch::stable::copy_(from, codes);
  }
  with_type(grad.scalar_type(), [&]<typename T>(T) {
    auto task = decoding<T>(out, from, grid, scale, std::nullopt);
    task.grad = static_cast<const T*>(grad.const_data_ptr());
    run_units(task);
  });
}

Tensor quantized_backward(const Tensor& grad, const Tensor& codes, const Tensor& grid,
                          const Tensor& scale) {
  const Tensor from = dense(grad);
  Tensor out = empty_strided_like(from);
  backward_into(from, codes, grid, scale, out);
  return out;
}

}  // namespace

void check_quantized(const char* op, const Tensor& codes, const Tensor& grid, ScalarType type) {
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.dim() >= 2, op,
                  ": codes must be uint8 [N, C, *spatial]");
  STD_TORCH_CHECK(grid.scalar_type() == accumulation_type(type) && grid.is_contiguous() &&
                      grid.device() == codes.device() && grid.dim() == 3 && grid.size(0) == 3 &&
                      grid.size(1) == codes.size(0) && grid.size(2) == codes.size(1),
                  op, ": grid must be the contiguous [3, N, C] that quantize made of such maps");
}

void quantized_backward_in_place(const Tensor& grad, const Tensor& codes, const Tensor& grid,
                                 const Tensor& scale) {
  backward_into(grad, codes, grid, scale, grad);
}

}  // namespace svf_fast

STABLE_TORCH_LIBRARY_IMPL(svf_fast, CPU, library) {
  library.impl("quantize", TORCH_BOX(&svf_fast::quantize));
  library.impl("dequantize", TORCH_BOX(&svf_fast::dequantize));
  library.impl("quantized_backward", TORCH_BOX(&svf_fast::quantized_backward));
  library.impl("quantized_backward_", TORCH_BOX(&svf_fast::quantized_backward_in_place));
}
