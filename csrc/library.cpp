// Schemas of every op. Kernels register themselves beside their definitions, one library per
// dispatch key.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(svf_fast, library) {
  library.def(
      "activation_gradients(Tensor grad, Tensor y, Tensor scale, Tensor shift, Tensor[] before, "
      "Tensor[] after, Tensor? grid=None) -> (Tensor, Tensor, Tensor)");
  library.def(
      "activation_gradients_(Tensor(a!) grad, Tensor y, Tensor scale, Tensor shift, "
      "Tensor[] before, Tensor[] after, Tensor? grid=None) -> (Tensor, Tensor)");
  library.def(
      "affine_act(Tensor y, Tensor scale, Tensor shift, Tensor? residual, Tensor? residual_scale, "
      "bool relu, bool mask) -> (Tensor, Tensor)");
  library.def(
      "affine_act_backward(Tensor grad, Tensor? y, Tensor? mask, Tensor? scale, Tensor? shift) "
      "-> Tensor");
  library.def(
      "affine_act_(Tensor(a!) y, Tensor scale, Tensor shift, Tensor? residual, "
      "Tensor? residual_scale, bool relu, bool mask) -> Tensor");
  library.def(
      "affine_act_backward_(Tensor(a!) grad, Tensor? y, Tensor? mask, Tensor? scale, "
      "Tensor? shift) -> ()");
  library.def("channel_dot(Tensor a, Tensor b) -> Tensor");
  library.def("channel_dot_scale_(Tensor(a!) a, Tensor v, Tensor s) -> Tensor");
  library.def(
      "compose(Tensor U, Tensor S, Tensor V, int groups, ScalarType dtype, Tensor? scale) "
      "-> (Tensor, Tensor)");
  library.def(
      "compose_all(Tensor[] U, Tensor[] S, Tensor[] V, int[] groups, Tensor?[] scale, "
      "ScalarType dtype, Tensor table) -> Tensor[]");
  library.def("cosine_max(Tensor query, Tensor support, Tensor mask) -> (Tensor, Tensor)");
  library.def(
      "cosine_max_backward(Tensor grad, Tensor query, Tensor support, Tensor mask, Tensor values, "
      "Tensor index) -> (Tensor, Tensor)");
  library.def(
      "gram(Tensor a, Tensor b, int groups, Tensor? scale, Tensor? shift, Tensor? grid=None) "
      "-> Tensor");
  library.def("gram_gradient(Tensor M, Tensor left, Tensor right, Tensor S) -> Tensor");
  library.def(
      "scale_gradient(Tensor a, Tensor b, Tensor? scale, Tensor? shift, Tensor left, Tensor right, "
      "Tensor S, Tensor? grid=None) -> Tensor");
  library.def("guards_hold(Tensor S, Tensor guarded, Tensor layers, float limit) -> Tensor");
  library.def(
      "pointwise(Tensor x, Tensor weight, Tensor? in_scale, Tensor? in_shift, Tensor? in_mask, "
      "Tensor? scale, Tensor? shift, Tensor? residual, Tensor? residual_scale, "
      "Tensor? residual_mask, bool relu, bool keep, bool mask) -> (Tensor, Tensor, Tensor)");
  library.def("quantize(Tensor y, Tensor? scale, Tensor? shift) -> (Tensor, Tensor)");
  library.def(
      "dequantize(Tensor codes, Tensor grid, Tensor? scale, Tensor? shift, ScalarType dtype) "
      "-> Tensor");
  library.def("quantized_backward(Tensor grad, Tensor codes, Tensor grid, Tensor scale) -> Tensor");
  library.def(
      "quantized_backward_(Tensor(a!) grad, Tensor codes, Tensor grid, Tensor scale) -> ()");
  library.def("product(Tensor x, Tensor weight) -> Tensor");
  library.def("product_add_(Tensor(a!) out, Tensor x, Tensor weight) -> ()");
  library.def("pointwise_dot(Tensor x, Tensor weight, Tensor v, Tensor s) -> (Tensor, Tensor)");
}
