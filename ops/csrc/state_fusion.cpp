// SPDX-License-Identifier: Apache-2.0
// The state fusion: schema, and the CPU implementation that merges the weights, runs the kernels of the best
// instruction set over PyTorch's thread pool, and adds up partial gradients. Arguments are checked by the public
// function in Python; here only what would read or write out of bounds.
#include "op.h"

namespace vssm {
namespace {

// Where a tap's weight stands among the (3, E, 3, 3) of channel 0: which dilation and which of its nine neighbours.
struct Tap {
  int64_t dilation, neighbour;
};

Tap tap_at(int tap) {
  const int row = kRows[tap], column = kColumns[tap], reach = std::max(std::abs(row), std::abs(column));
  if (reach == 0) return {0, 4};  // the centre, which all three have
  return {reach / 2, (row / reach + 1) * 3 + column / reach + 1};
}

// f(block, tap, dilation, neighbour) for all taps of all blocks of channels, in parallel.
template <class F>
void each_tap(int64_t blocks, int64_t lanes, const F& f) {
  torch::stable::parallel_for(0, blocks, grain(kTaps * lanes), [&](int64_t begin, int64_t end) {
    for (int tap = 0; tap < kTaps; ++tap) {
      const auto [dilation, neighbour] = tap_at(tap);
      for (int64_t block = begin; block < end; ++block) f(block, tap, dilation, neighbour);
    }
  });
}

// The inputs of one call, in the type that it computes in, kept alive while the kernels read them.
template <class T>
struct Inputs {
  FusionArgs<T> args{};
  Tensor h, packed;

  Inputs(const Kernels<T>& kernels, const Tensor& h_, const Tensor& weight_) {
    check(h_.dim() == 4 && h_.numel() > 0 && h_.is_cpu() && weight_.is_cpu() &&
              has_shape(weight_, {3, h_.size(3), 3, 3}),
          "vssm::state_fusion: bad arguments; call vssm.ops.state_fusion, which says which.");
    FusionArgs<T>& s = args;
    s.batch = h_.size(0), s.height = h_.size(1), s.width = h_.size(2), s.channels = h_.size(3);
    s.h = raw_map<T>(h = last_contiguous(readable<T>(h_)));
    s.lanes = kernels.fusion_lanes;
    const int64_t E = s.channels, L = s.lanes;
    const Tensor weight = contiguous<T>(weight_);
    const T* w = weight.template const_data_ptr<T>();
    packed = empty<T>(h, {s.num_blocks() * kTaps * L});
    T* out = packed.template mutable_data_ptr<T>();
    s.packed = out;
    each_tap(s.num_blocks(), L, [&](int64_t block, int tap, int64_t dilation, int64_t neighbour) {
      T* const to = out + (block * kTaps + tap) * L;
      for (int64_t l = 0, e = block * L; l < L; ++l, ++e) {
        to[l] = e < E ? w[(dilation * E + e) * 9 + neighbour] : T(0);
        if (e < E && neighbour == 4) to[l] += w[(E + e) * 9 + 4] + w[(2 * E + e) * 9 + 4];
      }
    });
  }
};

template <class T>
Tensor forward(const Tensor& h, const Tensor& weight) {
  const auto& kernels = kernels_for<T>();
  const Inputs<T> in(kernels, h, weight);
  const FusionArgs<T>& s = in.args;
  char* out;
  const Tensor y = result_like(true, in.h, {s.batch, s.height, s.width, s.channels}, out);
  const int64_t tasks = s.batch * s.num_blocks();
  run<T>(in.h, tasks, y.numel() / tasks, kernels.fusion_forward_scratch(s),
         [&](T* scratch, int64_t begin, int64_t end) { kernels.fusion_forward(s, out, scratch, begin, end); });
  return y;
}

Tensor state_fusion(Tensor h, Tensor weight) {
  const auto type = h.scalar_type();
  return cast(type == ScalarType::Double ? forward<double>(h, weight) : forward<float>(h, weight), type);
}

using Grads = std::tuple<Tensor, Tensor>;

template <class T>
Grads backward(const Tensor& grad_y_, const Tensor& h, const Tensor& weight, const Wanted& wanted) {
  const auto& kernels = kernels_for<T>();
  const Inputs<T> in(kernels, h, weight);
  const FusionArgs<T>& s = in.args;
  const int64_t E = s.channels, L = s.lanes, blocks = s.num_blocks();
  check(grad_y_.is_cpu() && has_shape(grad_y_, {s.batch, s.height, s.width, E}),
        "vssm::state_fusion: grad_y has the wrong shape.");
  check(wanted.size() == 2, "vssm::state_fusion: wanted must have 2 flags, got ", wanted.size(), ".");
  const Tensor grad_y = last_contiguous(readable<T>(grad_y_));

  // Enough tasks for many threads, few enough parts to add up; by the shape alone.
  constexpr int64_t kTasks = 64;
  FusionGrads<T> grad{};
  grad.image_groups = std::min(s.batch, (kTasks + blocks - 1) / blocks);
  T* out;
  const Tensor dh = result_like(wanted[0], in.h, {s.batch, s.height, s.width, E}, grad.h);
  const Tensor parts = gradient<T>(wanted[1], in.h, {grad.image_groups * blocks * kTaps * L}, grad.weight);
  const Tensor dweight = gradient<T>(wanted[1], in.h, {3, E, 3, 3}, out);
  grad.y = raw_map<T>(grad_y);
  const int64_t tasks = grad.image_groups * blocks;
  run<T>(in.h, tasks, h.numel() / tasks, kernels.fusion_backward_scratch(s),
         [&](T* scratch, int64_t begin, int64_t end) { kernels.fusion_backward(s, grad, scratch, begin, end); });

  if (wanted[1]) {
    each_tap(blocks, L, [&](int64_t block, int tap, int64_t dilation, int64_t neighbour) {
      for (int64_t l = 0, e = block * L; l < L && e < E; ++l, ++e) {
        T sum = 0;
        for (int64_t group = 0; group < grad.image_groups; ++group)
          sum += grad.weight[((group * blocks + block) * kTaps + tap) * L + l];
        out[(dilation * E + e) * 9 + neighbour] = sum;
        if (neighbour == 4) out[(E + e) * 9 + 4] = out[(2 * E + e) * 9 + 4] = sum;
      }
    });
  }
  return {dh, dweight};
}

Grads state_fusion_backward(Tensor grad_y, Tensor h, Tensor weight, Wanted wanted) {
  const auto [dh, dweight] = h.scalar_type() == ScalarType::Double ? backward<double>(grad_y, h, weight, wanted)
                                                                   : backward<float>(grad_y, h, weight, wanted);
  return {cast(dh, h.scalar_type()), cast(dweight, weight.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vssm, m) {
  m.def("state_fusion(Tensor h, Tensor weight) -> Tensor");
  m.def("state_fusion_backward(Tensor grad_y, Tensor h, Tensor weight, bool[] wanted) -> (Tensor h, Tensor weight)");
}

STABLE_TORCH_LIBRARY_IMPL(vssm, CPU, m) {
  m.impl("state_fusion", TORCH_BOX(&state_fusion));
  m.impl("state_fusion_backward", TORCH_BOX(&state_fusion_backward));
}

}  // namespace vssm
