// Matrix products of our own, for machines whose BLAS leaves vectors unused: MKL multiplies on
// processors that are not Intel's as if they had no AVX-512, at half their speed.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace svf_fast {

// Whether this is such a machine.
bool multiplies_packed();

// out = a b, or out += a b, for matrices [rows, columns], or [count, rows, columns], of one dtype,
// float or double, in any layout; of out either the columns or the rows are neighbours.
void multiply_packed(const torch::stable::Tensor& out, bool add, const torch::stable::Tensor& a,
                     const torch::stable::Tensor& b);

}  // namespace svf_fast
