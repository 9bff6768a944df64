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
    bool ok = h_.dim() >= 1 && h_.numel() > 0;
    for (const Tensor* t : {&h_, &x_, &C_, &D_, &z_, &weight_, &bias_})
      ok = ok && t->is_cpu() && t->scalar_type() == kType<T>;
    if (ok) {
      shape.assign(h_.sizes().begin(), h_.sizes().end());
      Shape rows = shape;
      rows.back() = 1;
      const Shape channels = {shape.back()};
      ok = has_shape(x_, shape) && has_shape(z_, shape) && has_shape(C_, rows) && has_shape(D_, channels) &&
           has_shape(weight_, channels) && has_shape(bias_, channels);
    }
    check(ok,
          "vssm::gated_readout: h, x and z must be (..., E), C (..., 1), and D, weight and bias (E), on the CPU and in "
          "one type, float32 or float64.");
    h = contiguous<T>(h_), x = contiguous<T>(x_), C = contiguous<T>(C_), D = contiguous<T>(D_), z = contiguous<T>(z_);
    weight = contiguous<T>(weight_), bias = contiguous<T>(bias_);
    const int64_t E = shape.back();
    args = {h.numel() / E, E, data(h), data(x), data(z), data(C), data(D), data(weight), data(bias), T(eps)};
  }

  static const T* data(const Tensor& t) { return t.template const_data_ptr<T>(); }
};

template <class T, class... Args>
Tensor forward(const Args&... tensors) {
  const auto& kernels = kernels_for<T>();
  const Inputs<T> in(tensors...);
  const ReadoutArgs<T>& s = in.args;
  Tensor y = empty<T>(in.h, in.shape);
  T* out = y.mutable_data_ptr<T>();
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
  const Tensor grad_y = contiguous<T>(grad_y_);
  const int64_t E = s.channels;

  constexpr int64_t kTasks = 64;  // enough for many threads, few enough parts to add up
  ReadoutGrads<T> grad{};
  grad.tasks = std::min(s.rows, kTasks);
  Shape rows = in.shape;
  rows.back() = 1;
  const Shape parts{grad.tasks, E};
  check(wanted.size() == 7, "vssm::gated_readout: wanted must have 7 flags, got ", wanted.size(), ".");
  const Tensor dh = gradient<T>(wanted[0], in.h, in.shape, grad.h), dx = gradient<T>(wanted[1], in.h, in.shape, grad.x);
  const Tensor dC = gradient<T>(wanted[2], in.h, rows, grad.C), dD = gradient<T>(wanted[3], in.h, parts, grad.D);
  const Tensor dz = gradient<T>(wanted[4], in.h, in.shape, grad.z);
  const Tensor dweight = gradient<T>(wanted[5], in.h, parts, grad.weight);
  const Tensor dbias = gradient<T>(wanted[6], in.h, parts, grad.bias);
  grad.y = grad_y.const_data_ptr<T>();
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
      "Tensor bias, float eps, bool[] wanted) -> (Tensor h, Tensor x, Tensor C, Tensor D, Tensor z, Tensor weight, Tensor bias)");
}

STABLE_TORCH_LIBRARY_IMPL(vssm, CPU, m) {
  m.impl("gated_readout", TORCH_BOX(&gated_readout));
  m.impl("gated_readout_backward", TORCH_BOX(&gated_readout_backward));
}

}  // namespace vssm
