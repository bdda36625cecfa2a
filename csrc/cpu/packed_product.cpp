// Blocks of both operands are packed so that a tile of the product reads them in order (Goto and
// van de Geijn, "Anatomy of high-performance matrix multiplication", 2008).
#include "packed_product.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "columns.h"
#include "dispatch.h"
#include "widen.h"

namespace svf_fast {

#if defined(__x86_64__)

namespace {

constexpr int64_t kRows = 14;           // of a tile: two vectors a row fill the 32 registers
constexpr int64_t kDepth = 256;         // terms summed at once: a tile's columns stay in L1
constexpr int64_t kRowBlock = 48 * 14;  // rows packed at once: they stay in L2
constexpr int64_t kColumnBlock = 1024;  // columns packed at once
constexpr int64_t kPart = 1 << 20;      // multiplications that are worth a thread

template <typename T, int kBytes = 64>
constexpr int64_t kLanes = kBytes / sizeof(T);
template <typename T>
constexpr int64_t kColumns = 2 * kLanes<T>;  // of a tile

template <typename T>
struct Matrix {
  T* data;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;

  Matrix at(int64_t offset) const {
    return {data + offset, rows, columns, row_stride, column_stride};
  }
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  Matrix slice(int64_t row, int64_t height, int64_t column, int64_t width) const {
    return {data + row * row_stride + column * column_stride, std::min(height, rows - row),
            std::min(width, columns - column), row_stride, column_stride};
  }
};

// The first or the second half of two vectors, an element of each in turns.
template <bool kSecond, typename V, size_t... kLane>
SVF_FAST_INLINE V zip(const V& a, const V& b, std::index_sequence<kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  constexpr int kFirst = kSecond ? kCount / 2 : 0;
  return __builtin_shufflevector(a, b,
                                 (kFirst + static_cast<int>(kLane) / 2 + kCount * (kLane % 2))...);
}

// The transpose of as many vectors as each has elements, in place.
template <typename T, int kBytes>
SVF_FAST_INLINE void transpose(Vector<T, kBytes>* square) {
  constexpr int64_t lanes = kLanes<T, kBytes>;
  using Lanes = std::make_index_sequence<lanes>;
  for (int64_t done = 1; done < lanes; done *= 2) {
    Vector<T, kBytes> next[lanes];
    for (int64_t i = 0; i < lanes / 2; ++i) {
      next[2 * i] = zip<false>(square[i], square[i + lanes / 2], Lanes{});
      next[2 * i + 1] = zip<true>(square[i], square[i + lanes / 2], Lanes{});
    }
    std::copy_n(next, lanes, square);
  }
}

// Packs to[panel][column][kWidth], panels of kWidth rows, zeros where there are no more rows.
template <int64_t kWidth, int kBytes, typename T>
SVF_FAST_INLINE void pack(const Matrix<const T>& from, T* to) {
  constexpr int64_t lanes = kLanes<T, kBytes>;
  for (int64_t row = 0; row < from.rows; row += kWidth, to += kWidth * from.columns) {
    const auto panel = from.slice(row, kWidth, 0, from.columns);
    if (from.column_stride != 1 || from.row_stride == 1) {
      for (int64_t k = 0; k < from.columns; ++k) {
        for (int64_t i = 0; i < kWidth; ++i) {
          const T* in = panel.data + k * from.column_stride + i * from.row_stride;
          to[k * kWidth + i] = i < panel.rows ? *in : T(0);
        }
      }
      continue;
    }
    for (int64_t k = 0; k < from.columns; k += lanes) {
      const int64_t columns = std::min(lanes, from.columns - k);
      for (int64_t i = 0; i < kWidth; i += lanes) {
        Vector<T, kBytes> square[lanes] = {};
        for (int64_t lane = 0; lane < std::min(lanes, panel.rows - i); ++lane) {
          square[lane] = load_part<kBytes>(panel.data + (i + lane) * from.row_stride + k, columns);
        }
        transpose<T, kBytes>(square);
        for (int64_t column = 0; column < columns; ++column) {
          store_part<kBytes>(to + (k + column) * kWidth + i, square[column],
                             std::min(lanes, kWidth - i));
        }
      }
    }
  }
}

// to[0 .. count] = sum, or += sum
template <int kBytes, typename T, typename V>
SVF_FAST_INLINE void put(T* to, const V& sum, int64_t count, bool add) {
  store_part<kBytes>(to, add ? load_part<kBytes>(to, count) + sum : sum, count);
}

// out = a b, or out += a b, of packed operands, a tile.
template <int kBytes, typename T>
SVF_FAST_INLINE void multiply_tile(const Matrix<T>& out, bool add, const T* a, const T* b,
                                   int64_t depth) {
  using V = Vector<T, kBytes>;
  constexpr int64_t lanes = kLanes<T, kBytes>;
  V sums[kRows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const V first = Memory<kBytes>::load(b + k * 2 * lanes);
    const V second = Memory<kBytes>::load(b + k * 2 * lanes + lanes);
#pragma GCC unroll 14
    for (int64_t i = 0; i < kRows; ++i) {
      const V factor = a[k * kRows + i] - V{};  // unlike 0 + x, x - 0 costs nothing
      sums[i][0] += factor * first;
      sums[i][1] += factor * second;
    }
  }
#pragma GCC unroll 14
  for (int64_t i = 0; i < kRows; ++i) {
    if (i < out.rows) {
      T* row = out.data + i * out.row_stride;
      put<kBytes>(row, sums[i][0], std::min(lanes, out.columns), add);
      if (out.columns > lanes) {
        put<kBytes>(row + lanes, sums[i][1], out.columns - lanes, add);
      }
    }
  }
}

// out = a b, or out += a b, where the columns of out are neighbours. One thread does it.
struct Multiply {
  template <int kBytes, typename T>
  static SVF_FAST_INLINE void run(const Matrix<T>& out, const bool& add, const Matrix<const T>& a,
                                  const Matrix<const T>& b, T* const& packed_a,
                                  T* const& packed_b) {
    constexpr int64_t width = 2 * kLanes<T, kBytes>;
    for (int64_t column = 0; column < out.columns; column += kColumnBlock) {
      for (int64_t k = 0; k == 0 || k < a.columns; k += kDepth) {  // the sum of no terms is 0
        const auto right = b.slice(k, kDepth, column, kColumnBlock);
        pack<width, kBytes>(right.transposed(), packed_b);
        for (int64_t row = 0; row < out.rows; row += kRowBlock) {
          const auto left = a.slice(row, kRowBlock, k, kDepth);
          pack<kRows, kBytes>(left, packed_a);
          const auto block = out.slice(row, kRowBlock, column, kColumnBlock);
          for (int64_t j = 0; j < block.columns; j += width) {
            for (int64_t i = 0; i < block.rows; i += kRows) {
              multiply_tile<kBytes>(block.slice(i, kRows, j, width), add || k > 0,
                                    packed_a + i * right.rows, packed_b + j * right.rows,
                                    right.rows);
            }
          }
        }
      }
    }
  }
};

// Memory for `size` elements that a thread keeps: fresh pages would cost as much as the product.
template <typename T>
T* workspace(int64_t size) {
  struct alignas(64) Line {
    char bytes[64];
  };
  thread_local std::vector<Line> memory;
  memory.resize(std::max<size_t>(memory.size(), divide_up(size * sizeof(T), sizeof(Line))));
  return reinterpret_cast<T*>(memory.data());
}

// How many parts the rows and the columns of each product are cut into, a thread each. Packing is
// least where parts are square.
std::pair<int64_t, int64_t> parts(int64_t count, int64_t rows, int64_t columns, int64_t depth) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = count >= 4 * threads ? 1 : threads / std::gcd(threads, count);
  const int64_t total = std::clamp<int64_t>(rows * columns * depth / kPart, 1, wanted);
  std::pair<int64_t, int64_t> best{1, total};
  for (int64_t high = 1; high <= total; ++high) {
    const auto edges = [&](int64_t h) { return rows / h + columns * h / total; };
    if (total % high == 0 && edges(high) < edges(best.first)) {
      best = {high, total / high};
    }
  }
  return best;
}

template <typename T>
void multiply_each(const Matrix<T>& out, bool add, const Matrix<const T>& a,
                   const Matrix<const T>& b, int64_t count, int64_t out_stride, int64_t a_stride,
                   int64_t b_stride) {
  if (out.column_stride != 1 && out.columns > 1) {
    STD_TORCH_CHECK(out.row_stride == 1 || out.rows == 1, "multiply_packed: strides of out");
    return multiply_each(out.transposed(), add, b.transposed(), a.transposed(), count, out_stride,
                         b_stride, a_stride);
  }
  const auto [high, wide] = parts(count, out.rows, out.columns, a.columns);
  const int64_t height = divide_up(divide_up(out.rows, kRows), high) * kRows;
  const int64_t width = divide_up(divide_up(out.columns, kColumns<T>), wide) * kColumns<T>;
  torch::stable::parallel_for(
      0, count * high * wide, 1, [&, high = high, wide = wide](int64_t begin, int64_t end) {
        T* packed_a = workspace<T>(kDepth * (kRowBlock + kColumnBlock));
        T* packed_b = packed_a + kDepth * kRowBlock;
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t number = unit / wide / high;
          const int64_t row = unit / wide % high * height, column = unit % wide * width;
          if (row < out.rows && column < out.columns) {
            run_avx512<Multiply>(out.at(number * out_stride).slice(row, height, column, width), add,
                                 a.at(number * a_stride).slice(row, height, 0, a.columns),
                                 b.at(number * b_stride).slice(0, b.rows, column, width), packed_a,
                                 packed_b);
          }
        }
      });
}

template <typename T>
Matrix<T> matrix_of(const Tensor& x) {
  const int64_t first = x.dim() - 2;
  return {static_cast<T*>(const_cast<void*>(x.const_data_ptr())), x.size(first), x.size(first + 1),
          x.stride(first), x.stride(first + 1)};
}

}  // namespace

bool multiplies_packed() {
  static const bool decided = isa() == Isa::kAvx512 && !__builtin_cpu_is("intel");
  return decided;
}

void multiply_packed(const Tensor& out, bool add, const Tensor& a, const Tensor& b) {
  const bool many = out.dim() == 3;
  const auto stride = [&](const Tensor& x) { return many ? x.stride(0) : 0; };
  const auto multiply = [&](auto type) {
    using T = decltype(type);
    multiply_each(matrix_of<T>(out), add, matrix_of<const T>(a), matrix_of<const T>(b),
                  many ? out.size(0) : 1, stride(out), stride(a), stride(b));
  };
  out.scalar_type() == ScalarType::Double ? multiply(double{}) : multiply(float{});
}

#else

bool multiplies_packed() { return false; }

void multiply_packed(const Tensor&, bool, const Tensor&, const Tensor&) {
  STD_TORCH_CHECK(false, "multiply_packed: not on this machine");
}

#endif

}  // namespace svf_fast
