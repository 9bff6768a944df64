// SPDX-License-Identifier: Apache-2.0
// The gated readout: schema, and the CPU implementation that runs the kernels of the best instruction set over
// PyTorch's thread pool and adds up partial gradients.
#include "op.h"

namespace vssm {
namespace {

// The inputs of one call, in the type that it computes in, kept alive while the kernels read them.
template <class T>
struct Inputs {
  ReadoutArgs<T> args{};
  Shape shape;
  Tensor h, x, C, D, z, weight, bias;

  Inputs(const Tensor& h_, const Tensor& x_, const Tensor& C_, const Tensor& D_, const Tensor& z_,
         const Tensor& weight_, const Tensor& bias_, double eps) {
    const Type type = type_of<T>(h_);
    const ScalarType lies = type == Type::kWhole ? kType<T> : h_.scalar_type();
    bool ok = h_.dim() >= 1 && h_.numel() > 0;
    for (const Tensor* t : {&h_, &x_, &C_, &z_}) ok = ok && t->is_cpu() && t->scalar_type() == lies;
    for (const Tensor* t : {&D_, &weight_, &bias_}) ok = ok && t->is_cpu() && t->scalar_type() == kType<T>;
    if (ok) {
      shape.assign(h_.sizes().begin(), h_.sizes().end());
      Shape rows = shape;
      rows.back() = 1;
      const Shape channels = {shape.back()};
      ok = has_shape(x_, shape) && has_shape(z_, shape) && has_shape(C_, rows) && has_shape(D_, channels) &&
           has_shape(weight_, channels) && has_shape(bias_, channels);
    }
    check(ok,
          "vssm::gated_readout: h, x and z must be (..., E), C (..., 1), and D, weight and bias (E), on the CPU, the "
          "maps in one type, and the parameters in float64 if that is float64, else in float32.");
    using torch::stable::contiguous;
    h = contiguous(h_), x = contiguous(x_), C = contiguous(C_), z = contiguous(z_);
    D = contiguous(D_), weight = contiguous(weight_), bias = contiguous(bias_);
    const int64_t E = shape.back();
    args = {h.numel() / E, E,       type,         bytes_of(h), bytes_of(x), bytes_of(z),
            bytes_of(C),   data(D), data(weight), data(bias),  T(eps)};
  }

  static const T* data(const Tensor& t) { return t.template const_data_ptr<T>(); }
};

template <class T, class... Args>
Tensor forward(const Args&... tensors) {
  const auto& kernels = kernels_for<T>();
  const Inputs<T> in(tensors...);
  const ReadoutArgs<T>& s = in.args;
  char* out;
  const Tensor y = result_like(true, in.h, in.shape, out);
  run<T>(in.h, s.rows, s.channels, kernels.readout_scratch(s),
         [&](T* scratch, int64_t begin, int64_t end) { kernels.readout_forward(s, out, scratch, begin, end); });
  return y;
}

Tensor gated_readout(Tensor h, Tensor x, Tensor C, Tensor D, Tensor z, Tensor weight, Tensor bias, double eps) {
  return h.scalar_type() == ScalarType::Double ? forward<double>(h, x, C, D, z, weight, bias, eps)
                                               : forward<float>(h, x, C, D, z, weight, bias, eps);
}

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T, class... Args>
Grads backward(const Tensor& grad_y_, const Wanted& wanted, const Args&... tensors) {
  const auto& kernels = kernels_for<T>();
  const Inputs<T> in(tensors...);
  const ReadoutArgs<T>& s = in.args;
  check(grad_y_.is_cpu() && has_shape(grad_y_, in.shape), "vssm::gated_readout: grad_y has the wrong shape.");
  const Tensor grad_y = torch::stable::contiguous(cast(grad_y_, in.h.scalar_type()));
  const int64_t E = s.channels;

  constexpr int64_t kTasks = 64;  // enough for many threads, few enough parts to add up
  ReadoutGrads<T> grad{};
  grad.tasks = std::min(s.rows, kTasks);
  Shape rows = in.shape;
  rows.back() = 1;
  const Shape parts{grad.tasks, E};
  check(wanted.size() == 7, "vssm::gated_readout: wanted must have 7 flags, got ", wanted.size(), ".");
  const Tensor dh = result_like(wanted[0], in.h, in.shape, grad.h);
  const Tensor dx = result_like(wanted[1], in.h, in.shape, grad.x);
  const Tensor dC = result_like(wanted[2], in.h, rows, grad.C);
  const Tensor dD = gradient<T>(wanted[3], in.h, parts, grad.D);
  const Tensor dz = result_like(wanted[4], in.h, in.shape, grad.z);
  const Tensor dweight = gradient<T>(wanted[5], in.h, parts, grad.weight);
  const Tensor dbias = gradient<T>(wanted[6], in.h, parts, grad.bias);
  grad.y = bytes_of(grad_y);
  run<T>(in.h, grad.tasks, in.h.numel() / grad.tasks, kernels.readout_scratch(s),
         [&](T* scratch, int64_t begin, int64_t end) { kernels.readout_backward(s, grad, scratch, begin, end); });
  const auto summed = [&](const Tensor& t) { return sum_parts<T>(t, grad.tasks, {E}); };
  return {dh, dx, dC, summed(dD), dz, summed(dweight), summed(dbias)};
}

Grads gated_readout_backward(Tensor grad_y, Tensor h, Tensor x, Tensor C, Tensor D, Tensor z, Tensor weight,
                             Tensor bias, double eps, Wanted wanted) {
  return h.scalar_type() == ScalarType::Double ? backward<double>(grad_y, wanted, h, x, C, D, z, weight, bias, eps)
                                               : backward<float>(grad_y, wanted, h, x, C, D, z, weight, bias, eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vssm, m) {
  m.def(
      "gated_readout(Tensor h, Tensor x, Tensor C, Tensor D, Tensor z, Tensor weight, Tensor bias, float eps) "
      "-> Tensor");
  m.def(
      "gated_readout_backward(Tensor grad_y, Tensor h, Tensor x, Tensor C, Tensor D, Tensor z, Tensor weight, "
      "Tensor bias, float eps, bool[] wanted) -> "
      "(Tensor h, Tensor x, Tensor C, Tensor D, Tensor z, Tensor weight, Tensor bias)");
}

STABLE_TORCH_LIBRARY_IMPL(vssm, CPU, m) {
  m.impl("gated_readout", TORCH_BOX(&gated_readout));
  m.impl("gated_readout_backward", TORCH_BOX(&gated_readout_backward));
}

}  // namespace vssm
