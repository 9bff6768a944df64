// SPDX-License-Identifier: Apache-2.0
// The op: schema, and the CPU implementation that prepares arguments, runs the kernels of the best instruction set over
// PyTorch's thread pool, and adds up partial gradients. Arguments are checked by the public function in Python; here
// only what would read or write out of bounds. Everything goes through PyTorch's stable ABI.
#include "op.h"

namespace vssm {
namespace {

void check_shape(const char* name, const Tensor& t, const Shape& shape) {
  check(t.is_cpu(), "vssm::selective_scan: ", name, " must be on the CPU.");
  check(has_shape(t, shape), "vssm::selective_scan: ", name,
        " has the wrong shape; call vssm.ops.selective_scan, which says why.");
}

// The inputs of one call, in the type that it computes in, kept alive while the kernels read them.
template <class T>
struct Inputs {
  ScanArgs<T> args{};
  Tensor x, dt, A, B;
  std::optional<Tensor> C, D, dt_bias, dt_weight;
  const T one = 1;

  Inputs(const Kernels<T>& kernels, const Tensor& x_, const Tensor& dt_, const Tensor& A_,
         const Tensor& B_, const std::optional<Tensor>& C_, const std::optional<Tensor>& D_,
         const std::optional<Tensor>& dt_bias_, const std::optional<Tensor>& dt_weight_, int64_t ndim,
         const Shape& orders, bool softplus) {
    check(x_.dim() == 4 && A_.dim() == 3 && (!dt_weight_ || dt_weight_->dim() == 3) && x_.numel() > 0 &&
              A_.numel() > 0 && (ndim == 1 || ndim == 2) && !orders.empty() && orders.size() <= 4,
          "vssm::selective_scan: bad arguments; call vssm.ops.selective_scan, which says which.");
    ScanArgs<T>& s = args;
    s.batch = x_.size(0), s.height = x_.size(1), s.width = x_.size(2), s.channels = x_.size(3);
    s.num_orders = orders.size(), s.states = A_.size(2), s.rank = dt_weight_ ? dt_weight_->size(2) : 0;
    s.ndim = ndim, s.softplus = softplus;
    for (size_t k = 0; k < orders.size(); ++k) {
      check(orders[k] >= 0 && orders[k] < 4, "vssm::selective_scan: orders must be 0, 1, 2 or 3.");
      s.orders[k] = orders[k];
    }
    const int64_t K = s.num_orders, E = s.channels, N = s.states, R = s.rank;
    const Shape per_state{s.batch, s.height, s.width, K, N};
    check(x_.is_cpu(), "vssm::selective_scan: x must be on the CPU.");
    check(C_ || (K == 1 && N == 1 && !D_), "vssm::selective_scan: without C one order, one state and no D are needed.");
    check_shape("dt", dt_, {s.batch, s.height, s.width, K, R ? R : E});
    check_shape("A", A_, {K, E, N});
    check_shape("B", B_, per_state);
    if (C_) check_shape("C", *C_, per_state);
    if (D_) check_shape("D", *D_, {K, E});
    if (dt_bias_) check_shape("dt_bias", *dt_bias_, {K, E});
    if (dt_weight_) check_shape("dt_weight", *dt_weight_, {K, E, R});

    s.x = raw_map<T>(x = last_contiguous(readable<T>(x_)));
    s.dt = map<T>(dt = widened(kernels, dt_));
    s.B = map<T>(B = widened(kernels, B_));
    A = contiguous<T>(A_);
    if (C_) s.C = map<T>(*(C = widened(kernels, *C_)));
    else s.C = {&one, 0, 0, 0, 0};  // y is the state itself
    if (D_) D = contiguous<T>(*D_);
    if (dt_bias_) dt_bias = contiguous<T>(*dt_bias_);
    if (dt_weight_) dt_weight = contiguous<T>(*dt_weight_);
    s.lanes = kernels.scan_lanes(s.batch, E);
    s.A = data(A), s.D = data(D), s.bias = data(dt_bias), s.weight = data(dt_weight);
  }
  Inputs(const Inputs&) = delete;  // args may point to `one`

 private:
  static const T* data(const std::optional<Tensor>& t) { return t ? t->template const_data_ptr<T>() : nullptr; }
};

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T, class... Args>
Tensor forward(const Args&... args) {
  const auto& kernels = kernels_for<T>();
  const Inputs<T> in(kernels, args...);
  const ScanArgs<T>& s = in.args;
  char* out;
  const Tensor y = result_like(true, in.x, {s.batch, s.height, s.width, s.channels}, out);
  const int64_t tasks = s.batch * s.num_blocks();
  run<T>(in.x, tasks, y.numel() * s.num_orders / tasks, kernels.scan_forward_scratch(s),
         [&](T* scratch, int64_t begin, int64_t end) { kernels.scan_forward(s, out, scratch, begin, end); });
  return y;
}

Tensor selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, std::optional<Tensor> C, std::optional<Tensor> D,
                      std::optional<Tensor> dt_bias, std::optional<Tensor> dt_weight, int64_t ndim, Shape orders,
                      bool softplus) {
  const auto type = x.scalar_type();
  const Tensor y = type == ScalarType::Double
                       ? forward<double>(x, dt, A, B, C, D, dt_bias, dt_weight, ndim, orders, softplus)
                       : forward<float>(x, dt, A, B, C, D, dt_bias, dt_weight, ndim, orders, softplus);
  return cast(y, type);
}

// ---- backward -------------------------------------------------------------------------------------------------------

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T, class... Args>
Grads backward(const Tensor& grad_y_, const Wanted& wanted, const Args&... args) {
  const auto& kernels = kernels_for<T>();
  const Inputs<T> in(kernels, args...);
  const ScanArgs<T>& s = in.args;
  const int64_t K = s.num_orders, E = s.channels, N = s.states, R = s.rank, L = s.lanes, blocks = s.num_blocks();
  const Shape per_state{s.batch, s.height, s.width, K, N};
  check_shape("grad_y", grad_y_, {s.batch, s.height, s.width, E});
  check(wanted.size() == 8, "vssm::selective_scan: wanted must have 8 flags, got ", wanted.size(), ".");
  const Tensor grad_y = last_contiguous(readable<T>(grad_y_));

  // Enough tasks for many threads, few enough parts to add up; by the shape alone.
  constexpr int64_t kTasks = 32;
  ScanGrads<T> grad{};
  grad.image_groups = std::min(s.batch, (2 * kTasks + blocks - 1) / blocks);
  grad.channel_groups = std::min(blocks, (kTasks + grad.image_groups - 1) / grad.image_groups);
  const int64_t cells = s.batch * s.height * s.width * K, G = grad.channel_groups;
  grad.weight = wanted[7] && R;
  const Tensor dx = result_like(wanted[0], in.x, {s.batch, s.height, s.width, E}, grad.x);
  const Tensor ddt = gradient<T>(wanted[1], in.x, {R ? G * cells * R : cells * E}, grad.dt);
  const Tensor dB = gradient<T>(wanted[3], in.x, {G * cells * N}, grad.B);
  const Tensor dC = gradient<T>(wanted[4] && in.C, in.x, {G * cells * N}, grad.C);
  const Tensor params = empty<T>(in.x, {grad.image_groups * blocks * K * grad.params_size(s)});
  grad.y = raw_map<T>(grad_y);
  grad.params = params.mutable_data_ptr<T>();
  const int64_t tasks = grad.image_groups * G;
  run<T>(in.x, tasks, in.x.numel() * K / tasks, kernels.scan_backward_scratch(s),
         [&](T* scratch, int64_t begin, int64_t end) { kernels.scan_backward(s, grad, scratch, begin, end); });

  // Parameters: add up the image groups, from blocks of lanes back to channels.
  T *A_out, *D_out, *bias_out, *weight_out;
  const Tensor dA = gradient<T>(wanted[2], in.x, {K, E, N}, A_out);
  const Tensor dD = gradient<T>(wanted[5] && in.D, in.x, {K, E}, D_out);
  const Tensor dbias = gradient<T>(wanted[6] && in.dt_bias, in.x, {K, E}, bias_out);
  const Tensor dweight = gradient<T>(grad.weight, in.x, {K, E, R}, weight_out);
  const int64_t size = grad.params_size(s), stride = blocks * K * size;
  torch::stable::parallel_for(0, blocks * K, grain(size * grad.image_groups), [&](int64_t begin, int64_t end) {
    std::vector<T> sum(size);
    for (int64_t task = begin; task < end; ++task) {
      const T* part = grad.params + task * size;
      std::copy(part, part + size, sum.begin());
      for (int64_t group = 1; group < grad.image_groups; ++group)
        for (int64_t i = 0; i < size; ++i) sum[i] += part[group * stride + i];
      const int64_t first = task / K * L, k = task % K, valid = std::min(L, E - first);
      const T *bias = &sum[N * L], *skip = bias + L, *weight = skip + L;
      for (int64_t l = 0; l < valid; ++l) {
        const int64_t channel = k * E + first + l;
        for (int64_t n = 0; A_out && n < N; ++n) A_out[channel * N + n] = sum[n * L + l];
        if (bias_out) bias_out[channel] = bias[l];
        if (D_out) D_out[channel] = skip[l];
        for (int64_t r = 0; weight_out && r < R; ++r) weight_out[channel * R + r] = weight[r * L + l];
      }
    }
  });

  const Shape dt_shape{s.batch, s.height, s.width, K, R ? R : E};
  return {dx, sum_parts<T>(ddt, R ? G : 1, dt_shape), dA, sum_parts<T>(dB, G, per_state),
          sum_parts<T>(dC, G, per_state), dD, dbias, dweight};
}

Grads selective_scan_backward(Tensor grad_y, Tensor x, Tensor dt, Tensor A, Tensor B, std::optional<Tensor> C,
                              std::optional<Tensor> D, std::optional<Tensor> dt_bias, std::optional<Tensor> dt_weight,
                              int64_t ndim, Shape orders, bool softplus, Wanted wanted) {
  const auto computed = [&](auto one) {
    return backward<decltype(one)>(grad_y, wanted, x, dt, A, B, C, D, dt_bias, dt_weight, ndim, orders, softplus);
  };
  const Grads grads = x.scalar_type() == ScalarType::Double ? computed(1.) : computed(1.f);
  // Each in its input's type; an absent input's is empty, in grad_y's.
  const auto type = [&](const std::optional<Tensor>& input) { return (input ? *input : grad_y).scalar_type(); };
  return {cast(std::get<0>(grads), x.scalar_type()), cast(std::get<1>(grads), dt.scalar_type()),
          cast(std::get<2>(grads), A.scalar_type()), cast(std::get<3>(grads), B.scalar_type()),
          cast(std::get<4>(grads), type(C)),         cast(std::get<5>(grads), type(D)),
          cast(std::get<6>(grads), type(dt_bias)),   cast(std::get<7>(grads), type(dt_weight))};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vssm, m) {
  m.def(
      "selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor? C, Tensor? D, Tensor? dt_bias, "
      "Tensor? dt_weight, int ndim, int[] orders, bool softplus) -> Tensor");
  m.def(
      "selective_scan_backward(Tensor grad_y, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor? C, Tensor? D, "
      "Tensor? dt_bias, Tensor? dt_weight, int ndim, int[] orders, bool softplus, bool[] wanted) -> "
      "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor dt_bias, Tensor dt_weight)");
}

STABLE_TORCH_LIBRARY_IMPL(vssm, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward));
}

}  // namespace vssm
