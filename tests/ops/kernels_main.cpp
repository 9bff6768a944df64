// SPDX-License-Identifier: Apache-2.0
// The CPU kernels without torch, over a thread pool of this program's own: what the sanitizers and valgrind can see
// through.
//
//   kernels_main avx512|avx2|portable THREADS [STEP]
//
// With STEP, of the cases of every op one in so many.
//
// Forward and backward of every op run on one thread and on THREADS, which must agree bit for bit, and are held to
// scalar loops in double. Every buffer is a heap block of exactly the size that the kernels are told of, filled with
// NaN: what is read or written beyond it, read before it is written or not written at all shows. Exits with 1 where a
// result is wrong, 2 where the arguments are, and 77 where the CPU lacks the instructions.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels.h"

namespace vssm {
namespace {

constexpr int kWrong = 1, kUsage = 2, kUnsupported = 77;

// ---- threads --------------------------------------------------------------------------------------------------------

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }

  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int64_t threads() const { return workers_.size(); }

  // task(thread, t) for every t below `tasks`: neighbours on different threads, where a race between them shows.
  void run(int64_t tasks, const std::function<void(int64_t, int64_t)>& task) {
    std::unique_lock<std::mutex> lock(mutex_);
    task_ = &task, tasks_ = tasks, running_ = threads(), ready_ = 0, ++round_;
    wake_.notify_all();
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void work(int64_t thread) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (int64_t seen = 0;;) {
      wake_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
      lock.unlock();
      // All leave the lock before any begins: one that took it after another had done its work would be ordered behind
      // that one, and the thread sanitizer see no race between the two. Relaxed, so that this orders nothing either.
      ready_.fetch_add(1, std::memory_order_relaxed);
      while (ready_.load(std::memory_order_relaxed) < threads()) std::this_thread::yield();
      for (int64_t t = thread; t < tasks_; t += threads()) (*task_)(thread, t);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t, int64_t)>* task_ = nullptr;
  int64_t tasks_ = 0, running_ = 0, round_ = 0;
  std::atomic<int64_t> ready_{0};
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

template <class T>
std::vector<T> poisoned(int64_t size) {
  return std::vector<T>(size, std::numeric_limits<T>::quiet_NaN());
}

// What a thread works in: the one buffer that the ops align.
constexpr std::align_val_t kAlignment{64};
struct Free {
  void operator()(void* data) const { ::operator delete(data, kAlignment); }
};
template <class T>
using Scratch = std::unique_ptr<T[], Free>;

template <class T>
Scratch<T> make_scratch(int64_t size) {
  T* const data = static_cast<T*>(::operator new(size * sizeof(T), kAlignment));
  std::fill(data, data + size, std::numeric_limits<T>::quiet_NaN());
  return Scratch<T>(data);
}

// kernel(scratch, begin, end) over all tasks: in one call without a pool, else one by one, each thread with its own
// scratch.
template <class T, class F>
void run(Pool* pool, int64_t tasks, int64_t scratch_size, const F& kernel) {
  std::vector<Scratch<T>> scratch;
  for (int64_t i = 0; i < (pool ? pool->threads() : 1); ++i) scratch.push_back(make_scratch<T>(scratch_size));
  if (!pool) return kernel(scratch[0].get(), 0, tasks);
  pool->run(tasks, [&](int64_t thread, int64_t t) { kernel(scratch[thread].get(), t, t + 1); });
}

// ---- maps and numbers -----------------------------------------------------------------------------------------------

struct Size {
  int64_t batch, height, width, channels;
  int64_t cells() const { return batch * height * width; }
};

// A map over (batch, H, W, orders, width), or (batch, W, H, orders, width) where transposed, from `offset` in the last
// axis.
template <class T>
Map<T> map_of(std::vector<T>& buffer, const Size& z, int64_t orders, int64_t width, int64_t offset, bool transposed) {
  const int64_t cell = orders * width;
  return {buffer.data() + offset, z.height * z.width * cell, transposed ? cell : z.width * cell,
          transposed ? z.height * cell : cell, width};
}

// The number of cell (image * H + i) * W + j.
template <class T>
T& at(const Map<T>& map, const Size& z, int64_t cell, int64_t k, int64_t c) {
  const int64_t image = cell / (z.height * z.width), i = cell / z.width % z.height, j = cell % z.width;
  return map.data[image * map.batch + i * map.row + j * map.column + k * map.order + c];
}

class Random {
 public:
  double operator()(double low, double high) { return low + (high - low) * (bits_() >> 11) * 0x1p-53; }

  template <class T>
  void fill(std::vector<T>& buffer, double low, double high) {
    for (T& value : buffer) value = T((*this)(low, high));
  }
  template <class T>
  void fill(const Map<T>& map, const Size& z, int64_t orders, int64_t last, double low, double high) {
    for (int64_t cell = 0; cell < z.cells(); ++cell)
      for (int64_t k = 0; k < orders; ++k)
        for (int64_t c = 0; c < last; ++c) at(map, z, cell, k, c) = T((*this)(low, high));
  }

 private:
  std::mt19937_64 bits_;
};

template <class T>
Map<const T> read_only(const Map<T>& m) {
  return {m.data, m.batch, m.row, m.column, m.order};
}

// ---- half types -----------------------------------------------------------------------------------------------------

struct Format {
  int fraction, bias;  // bits of the fraction, and of the exponent
};

Format format_of(Type type) { return type == Type::kBfloat16 ? Format{7, 127} : Format{10, 15}; }

// What rounding to a type may change of a number.
double unit_of(Type type) { return type == Type::kWhole ? 0 : std::ldexp(1, -format_of(type).fraction - 1); }

// To the nearest, ties to even.
uint16_t half_of(double value, Type type) {
  const auto [fraction, bias] = format_of(type);
  const int infinity = 0x7fff >> fraction << fraction, sign = std::signbit(value) << 15;
  if (std::isnan(value)) return 0x7fff;
  int exponent;
  std::frexp(value, &exponent);
  exponent = std::max(exponent - 1, 1 - bias);
  const double units = std::nearbyint(std::ldexp(std::abs(value), fraction - exponent));
  return sign | int(std::min<double>(units + (exponent + bias - 1) * (1 << fraction), infinity));
}

double value_of(uint16_t half, Type type) {
  const auto [fraction, bias] = format_of(type);
  const int exponent = (half & 0x7fff) >> fraction, digits = half & ((1 << fraction) - 1);
  double size = std::ldexp(exponent ? digits + (1 << fraction) : digits, std::max(exponent, 1) - bias - fraction);
  if (exponent == 0x7fff >> fraction) size = digits ? std::nan("") : INFINITY;
  return half >> 15 ? -size : size;
}

// A buffer of exactly the size of a tensor, as it lies in memory; NaN to begin with.
template <class T>
class Stored {
 public:
  Stored(int64_t size, Type type) : type_(type) {
    if (type == Type::kWhole) whole_ = poisoned<T>(size);
    else halves_.assign(size, 0x7fff);
  }
  // With the numbers of `values`, which become what they are rounded to.
  Stored(std::vector<T>& values, Type type) : Stored(values.size(), type) {
    if (type == Type::kWhole) whole_ = values;
    for (size_t i = 0; i < halves_.size(); ++i) values[i] = value_of(halves_[i] = half_of(values[i], type), type);
  }

  char* data() { return type_ == Type::kWhole ? (char*)whole_.data() : (char*)halves_.data(); }

  // As `map` has the elements of `values`.
  RawMap map(const Map<const T>& map, const std::vector<T>& values) {
    const int64_t bytes = size_of<T>(type_);
    return {{data() + (map.data - values.data()) * bytes, map.batch * bytes, map.row * bytes, map.column * bytes, 0},
            type_};
  }

  std::vector<T> values() const {
    std::vector<T> values = whole_;
    for (const uint16_t half : halves_) values.push_back(value_of(half, type_));
    return values;
  }

 private:
  Type type_;
  std::vector<T> whole_;
  std::vector<uint16_t> halves_;
};

// A gradient as it lies, and the pointer to it that a kernel takes: where it is not wanted, empty and null.
template <class T>
Stored<T> gradient(bool wanted, int64_t size, Type type, char*& data) {
  Stored<T> buffer(wanted ? size : 0, type);
  data = wanted ? buffer.data() : nullptr;
  return buffer;
}

std::string name_of(Type type) {
  return type == Type::kWhole ? "" : type == Type::kBfloat16 ? ", bfloat16" : ", float16";
}

// ---- checks ---------------------------------------------------------------------------------------------------------

// A sum and that of its terms' sizes, which tells how much rounding may do to it.
struct Sum {
  double value = 0, size = 0;
  void operator+=(double term) { value += term, size += std::abs(term); }
};
using Sums = std::vector<Sum>;

int failures = 0;

// Hold actual(i) to expected[i], relative to the largest of a tensor, and rounded once to the type in which it lies.
template <class T, class F>
void hold(const std::string& what, const Sums& expected, const F& actual, Type type = Type::kWhole) {
  double scale = 0;
  for (const Sum& sum : expected) scale = std::max(scale, sum.size);
  const double limit = (sizeof(T) == 8 ? 1e-14 : 2e-6) * scale;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double got = actual(i), wanted = expected[i].value;
    if (std::abs(got - wanted) <= limit + unit_of(type) * std::abs(wanted)) continue;  // not so where it is NaN
    const char* message = "%s: element %zu is %.9g, expected %.9g to within %.1e\n";
    std::fprintf(stderr, message, what.c_str(), i, got, wanted, limit);
    ++failures;
    return;
  }
}

template <class T>
using Results = std::vector<std::vector<T>>;

// Hold results, those that are not empty, to the same bits.
template <class T>
void hold_bits(const std::string& what, const char* on, const Results<T>& some, const Results<T>& all) {
  for (size_t i = 0; i < some.size(); ++i) {
    if (some[i].empty() || !std::memcmp(some[i].data(), all[i].data(), some[i].size() * sizeof(T))) continue;
    std::fprintf(stderr, "%s: result %zu depends on %s\n", what.c_str(), i, on);
    ++failures;
  }
}

// What a kernel gives on one thread, held to what it gives on several, and where only some gradients are wanted.
// results(pool, wanted) has the outputs in order; of gradient i, bit i of `wanted`.
template <class T, class F>
Results<T> held_results(const std::string& what, Pool& pool, const F& results) {
  constexpr unsigned kAll = ~0u;
  const Results<T> one = results(nullptr, kAll);
  hold_bits(what, "the number of threads", results(&pool, kAll), one);
  for (const unsigned wanted : {0x55555555u, 0xaaaaaaaau, 0u})
    hold_bits(what, "which gradients are wanted", results(nullptr, wanted), one);
  return one;
}

// A gradient, and the pointer to it that a kernel takes: where it is not wanted, empty and null.
template <class T>
std::vector<T> gradient(bool wanted, int64_t size, T*& data) {
  auto buffer = poisoned<T>(wanted ? size : 0);
  data = wanted ? buffer.data() : nullptr;
  return buffer;
}

// Element i of a tensor that comes in parts.
template <class T>
double sum_parts(const std::vector<T>& buffer, int64_t parts, int64_t i) {
  double sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += buffer[part * (buffer.size() / parts) + i];
  return sum;
}

// ---- the selective scan ---------------------------------------------------------------------------------------------

enum : unsigned {
  kWithoutC = 1,   // y is the state
  kStrided = 2,    // dt, B and C are slices of one transposed projection, x and the gradient of y of wider ones
  kPlainStep = 4,  // no softplus
  kLargeStep = 8,  // over both branches of softplus and all of exp's range
  kFewGroups = 16  // backward: tasks of several images and several blocks
};

struct ScanCase {
  Size size;
  int64_t states, rank;
  int ndim;
  std::vector<int> orders;
  unsigned options;
};

// Vectors have 2 to 16 channels and blocks one or two vectors; a chunk has 64 positions.
const ScanCase kScanCases[] = {
    // batch, height, width, channels, states, rank, ndim, orders, options
    {{1, 1, 1, 1}, 1, 0, 1, {0}, 0},
    {{1, 1, 1, 1}, 2, 1, 2, {0, 1, 2, 3}, 0},
    {{2, 1, 9, 7}, 1, 0, 2, {2}, kWithoutC},
    {{1, 11, 1, 7}, 1, 2, 1, {3}, kWithoutC | kStrided},
    {{2, 9, 1, 16}, 1, 3, 2, {1, 3}, 0},
    {{1, 1, 13, 16}, 3, 1, 1, {0, 2}, kStrided},
    {{2, 5, 6, 17}, 2, 17, 2, {0, 1, 2, 3}, kStrided},
    {{2, 6, 5, 17}, 1, 0, 1, {0, 1, 2, 3}, kPlainStep},
    {{1, 4, 7, 32}, 16, 2, 1, {0, 1, 2, 3}, kFewGroups},
    {{1, 7, 4, 31}, 5, 0, 2, {3, 0}, kStrided | kPlainStep},
    {{3, 3, 5, 33}, 2, 4, 2, {0, 1, 2, 3}, kFewGroups},
    {{3, 5, 3, 33}, 1, 5, 1, {1, 2}, kFewGroups | kPlainStep | kStrided},
    {{2, 7, 7, 96}, 1, 6, 2, {0, 1, 2, 3}, kStrided},
    {{2, 7, 7, 96}, 1, 6, 1, {0, 1, 2, 3}, kFewGroups},
    {{1, 3, 4, 130}, 4, 16, 2, {2, 1}, kFewGroups | kStrided},
    {{1, 8, 8, 12}, 2, 0, 2, {0, 1, 2, 3}, kLargeStep},
    {{1, 8, 9, 12}, 3, 3, 1, {0, 3}, kLargeStep},
    // Lines longer than a chunk.
    {{1, 3, 70, 20}, 2, 3, 2, {0, 1, 2, 3}, 0},
    {{1, 66, 2, 9}, 2, 0, 2, {0, 1, 2, 3}, kStrided},
    {{1, 2, 129, 6}, 1, 2, 1, {0, 1, 2, 3}, kStrided},
    {{1, 1, 200, 4}, 1, 1, 2, {0}, kWithoutC},
    // Several bands in backward, blocks of one vector and of two: one line, many, and so many that bands grow with
    // them.
    {{1, 1, 7500, 3}, 2, 1, 1, {0, 2}, 0},
    {{1, 61, 123, 5}, 2, 0, 1, {1}, kStrided},
    {{1, 37, 100, 32}, 1, 0, 1, {2}, 0},
    {{1, 90, 83, 3}, 1, 2, 2, {0, 3}, kStrided},
    {{1, 14, 540, 5}, 2, 0, 2, {2, 1}, 0},
    {{1, 37, 100, 32}, 1, 0, 2, {3}, 0},
    {{1, 61, 123, 5}, 1, 0, 2, {2}, kWithoutC | kPlainStep},
    // Long lines of which there are few, which are walked in strips: forward, then both ways.
    {{2, 3, 150, 5}, 2, 3, 2, {0, 1, 2, 3}, kStrided},
    {{1, 140, 2, 17}, 1, 0, 2, {1, 2}, 0},
    {{1, 5, 1500, 3}, 2, 2, 2, {0, 3}, kStrided},
    {{1, 1501, 5, 3}, 1, 0, 2, {3, 1, 2, 0}, kFewGroups},
    {{1, 1, 7500, 3}, 1, 1, 2, {2}, 0},
    {{1, 3, 1250, 20}, 3, 0, 2, {0, 2}, kPlainStep},
};

std::string name_of(const ScanCase& c) {
  const char* options[] = {" without C", " strided", " plain step", " large step", " few groups"};
  std::string name = "scan " + std::to_string(c.size.batch) + "x" + std::to_string(c.size.height) + "x" +
                     std::to_string(c.size.width) + "x" + std::to_string(c.size.channels) + " N" +
                     std::to_string(c.states) + " R" + std::to_string(c.rank) + " " + std::to_string(c.ndim) +
                     "-D orders";
  for (int order : c.orders) name += " " + std::to_string(order);
  for (int i = 0; i < 5; ++i)
    if (c.options >> i & 1) name += options[i];
  return name;
}

template <class T>
struct ScanInputs {
  ScanArgs<T> args{};
  Size size;
  std::vector<T> x, dt, B, C, grad_y;  // what the maps point to; dt holds B and C too where they are slices of one
  std::vector<T> A, D, bias, weight;   // (K, E, N), (K, E), (K, E), (K, E, R)
  Map<const T> x_map, dy_map;
  std::unique_ptr<Stored<T>> stored_x, stored_dy;  // what the kernels are given of x and the gradient of y

  ScanInputs(const ScanCase& c, Type type, int64_t lanes) : size(c.size) {
    const bool strided = c.options & kStrided, plain = c.options & kPlainStep, has_C = !(c.options & kWithoutC);
    const int64_t cells = size.cells(), E = size.channels, K = c.orders.size(), N = c.states, R = c.rank;
    const int64_t steps = R ? R : E, margin = strided ? 3 : 0;
    ScanArgs<T>& s = args;
    s.batch = size.batch, s.height = size.height, s.width = size.width, s.channels = E;
    s.num_orders = K, s.states = N, s.rank = R, s.ndim = c.ndim, s.softplus = !plain;
    std::copy(c.orders.begin(), c.orders.end(), s.orders);
    s.lanes = lanes;

    Random random;
    auto wide = [&](std::vector<T>& buffer) {
      buffer = poisoned<T>(cells * (E + margin));
      const auto map = map_of(buffer, size, 1, E + margin, margin, false);
      random.fill(map, size, 1, E, -2, 2);
      return read_only(map);
    };
    x_map = wide(x), dy_map = wide(grad_y);
    stored_x = std::make_unique<Stored<T>>(x, type), stored_dy = std::make_unique<Stored<T>>(grad_y, type);
    s.x = stored_x->map(x_map, x), dy = stored_dy->map(dy_map, grad_y);

    const int64_t all = steps + N + (has_C ? N : 0);
    dt = poisoned<T>(cells * K * (strided ? all : steps));
    auto field = [&](std::vector<T>& own, int64_t offset, int64_t last, double low, double high) {
      if (!strided && offset) own = poisoned<T>(cells * K * last);
      const auto map = strided ? map_of(dt, size, K, all, offset, true) : map_of(own, size, K, last, 0, false);
      random.fill(map, size, K, last, low, high);
      return read_only(map);
    };
    const double spread = c.options & kLargeStep ? 30 : 2;
    s.dt = plain ? field(dt, 0, steps, 1e-3, 0.3) : field(dt, 0, steps, -spread, spread);
    s.B = field(B, steps, N, -2, 2);
    if (has_C) {
      s.C = field(C, steps + N, N, -2, 2);
    } else {
      C = {1};
      s.C = {C.data(), 0, 0, 0, 0};
    }

    A.resize(K * E * N), D.resize(K * E), bias.resize(K * E), weight.resize(K * E * R);
    for (size_t i = 0; i < A.size(); ++i) A[i] = -T(random(0.5, 1.5) * (i % N + 1));
    if (has_C) random.fill(D, 0.7, 1.3);
    // Without softplus nothing keeps the steps positive but their terms.
    const double unit = 1 / std::sqrt(std::max<int64_t>(R, 1));
    random.fill(bias, plain ? 1e-3 : -5, plain ? 0.1 : -1);
    random.fill(weight, plain ? 0 : -unit, unit);
    s.A = A.data(), s.D = D.data(), s.bias = bias.data(), s.weight = weight.data();
  }
  ScanInputs(const ScanInputs&) = delete;  // args points into it
  RawMap dy;
};

struct ScanSums {
  Sums y, x, dt, B, C, A, D, bias, weight;
};

// The definition, one number at a time: h = a h[above] + g with g = a g[before] + dt x B, and its gradients in reverse.
// In 1-D the whole map is one line.
template <class T>
ScanSums scan_reference(const ScanInputs<T>& in) {
  const ScanArgs<T>& s = in.args;
  const Size& z = in.size;
  const int64_t K = s.num_orders, E = s.channels, N = s.states, R = s.rank, steps = R ? R : E, cells = z.cells();
  const int64_t positions = z.height * z.width;
  ScanSums sum{Sums(cells * E), Sums(cells * E), Sums(cells * K * steps), Sums(cells * K * N), Sums(cells * K * N),
               Sums(K * E * N), Sums(K * E),     Sums(K * E),             Sums(K * E * R)};
  std::vector<double> step(positions), slope(positions), dstep(positions), a(positions), g(positions), h(positions),
      dg(positions), dh(positions);
  for (int64_t k = 0; k < K; ++k) {
    const bool transposed = s.orders[k] % 2;
    const int64_t inner = s.ndim == 1 ? positions : transposed ? z.height : z.width;
    std::vector<int64_t> walk;  // the cells of an image as the order visits them
    for (int64_t m = 0; m < positions; ++m)
      walk.push_back(transposed ? m % z.height * z.width + m / z.height : m);
    if (s.orders[k] >= 2) std::reverse(walk.begin(), walk.end());

    for (int64_t image = 0; image < z.batch; ++image)
      for (int64_t e = 0; e < E; ++e) {
        const int64_t channel = k * E + e, first = image * positions;
        auto x = [&](int64_t m) -> double { return at(in.x_map, z, first + walk[m], 0, e); };
        auto dy = [&](int64_t m) -> double { return at(in.dy_map, z, first + walk[m], 0, e); };
        auto dt = [&](int64_t m, int64_t r) -> double { return at(s.dt, z, first + walk[m], k, r); };
        for (int64_t m = 0; m < positions; ++m) {
          double raw = in.bias[channel] + (R ? 0 : dt(m, e));
          for (int64_t r = 0; r < R; ++r) raw += in.weight[channel * R + r] * dt(m, r);
          const bool linear = !s.softplus || raw > 20;  // PyTorch's softplus is, beyond 20
          step[m] = linear ? raw : std::log1p(std::exp(raw));
          slope[m] = linear ? 1 : 1 / (1 + std::exp(-raw));
          dstep[m] = 0;
          const int64_t i = (first + walk[m]) * E + e;
          sum.y[i] += in.D[channel] * x(m);
          sum.x[i] += in.D[channel] * dy(m);
          sum.D[channel] += dy(m) * x(m);
        }
        for (int64_t n = 0; n < N; ++n) {
          const double A = in.A[channel * N + n];
          auto B = [&](int64_t m) -> double { return at(s.B, z, first + walk[m], k, n); };
          auto C = [&](int64_t m) -> double { return at(s.C, z, first + walk[m], k, n); };
          auto before = [&](int64_t m) { return m % inner ? g[m - 1] : 0; };
          auto above = [&](int64_t m) { return m >= inner ? h[m - inner] : 0; };
          for (int64_t m = 0; m < positions; ++m) {
            a[m] = std::exp(step[m] * A);
            g[m] = a[m] * before(m) + step[m] * x(m) * B(m);
            h[m] = a[m] * above(m) + g[m];
            sum.y[(first + walk[m]) * E + e] += C(m) * h[m];
          }
          for (int64_t m = positions - 1; m >= 0; --m) {
            dh[m] = C(m) * dy(m) + (m + inner < positions ? a[m + inner] * dh[m + inner] : 0);
            dg[m] = dh[m] + ((m + 1) % inner ? a[m + 1] * dg[m + 1] : 0);
            const double da = dg[m] * before(m) + dh[m] * above(m);
            const int64_t cell = first + walk[m];
            sum.x[cell * E + e] += dg[m] * step[m] * B(m);
            sum.B[(cell * K + k) * N + n] += dg[m] * step[m] * x(m);
            sum.C[(cell * K + k) * N + n] += dy(m) * h[m];
            sum.A[channel * N + n] += da * a[m] * step[m];
            dstep[m] += dg[m] * x(m) * B(m) + da * a[m] * A;
          }
        }
        for (int64_t m = 0; m < positions; ++m) {
          const double draw = dstep[m] * slope[m];
          Sum* ddt = &sum.dt[((first + walk[m]) * K + k) * steps];
          sum.bias[channel] += draw;
          if (!R) ddt[e] += draw;
          for (int64_t r = 0; r < R; ++r) {
            ddt[r] += draw * in.weight[channel * R + r];
            sum.weight[channel * R + r] += draw * dt(m, r);
          }
        }
      }
  }
  return sum;
}

template <class T>
void check_scan(const Kernels<T>& kernels, const ScanCase& c, Type type, int64_t lanes, Pool& pool) {
  const ScanInputs<T> in(c, type, lanes);
  const ScanArgs<T>& s = in.args;
  const bool few = c.options & kFewGroups;
  const int64_t K = s.num_orders, E = s.channels, N = s.states, R = s.rank, L = s.lanes, blocks = s.num_blocks();
  const int64_t cells = in.size.cells();
  ScanGrads<T> grad{};
  const int64_t images = grad.image_groups = few ? (s.batch + 1) / 2 : s.batch;
  const int64_t groups = grad.channel_groups = few ? (blocks + 1) / 2 : blocks;

  auto results = [&](Pool* pool, unsigned wanted) {
    grad.weight = R && wanted & 16;
    const int64_t size = grad.params_size(s);
    Stored<T> y(cells * E, type), dx = gradient<T>(wanted & 1, cells * E, type, grad.x);
    auto ddt = gradient<T>(wanted & 2, cells * K * (R ? groups * R : E), grad.dt),
         dB = gradient<T>(wanted & 4, groups * cells * K * N, grad.B),
         dC = gradient<T>(wanted & 8 && !(c.options & kWithoutC), groups * cells * K * N, grad.C),
         params = poisoned<T>(images * blocks * K * size);
    run<T>(pool, s.batch * blocks, kernels.scan_forward_scratch(s), [&](T* scratch, int64_t begin, int64_t end) {
      kernels.scan_forward(s, y.data(), scratch, begin, end);
    });
    grad.y = in.dy, grad.params = params.data();
    run<T>(pool, images * groups, kernels.scan_backward_scratch(s), [&](T* scratch, int64_t begin, int64_t end) {
      kernels.scan_backward(s, grad, scratch, begin, end);
    });
    if (R && !grad.weight) params.clear();  // which is laid out otherwise then
    return Results<T>{y.values(), dx.values(), ddt, dB, dC, params};
  };
  const std::string kind = sizeof(T) == 8 ? " double " : " ", width = ", " + std::to_string(L) + " lanes";
  const std::string name = kernels.name + kind + name_of(c) + width + name_of(type);
  const auto one = held_results<T>(name, pool, results);
  grad.weight = R;
  const int64_t size = grad.params_size(s);

  const ScanSums sum = scan_reference(in);
  const auto &y = one[0], &dx = one[1], &ddt = one[2], &dB = one[3], &dC = one[4], &params = one[5];
  hold<T>(name + ", y", sum.y, [&](int64_t i) { return y[i]; }, type);
  hold<T>(name + ", gradient of x", sum.x, [&](int64_t i) { return dx[i]; }, type);
  hold<T>(name + ", gradient of dt", sum.dt, [&](int64_t i) { return sum_parts(ddt, R ? groups : 1, i); });
  hold<T>(name + ", gradient of B", sum.B, [&](int64_t i) { return sum_parts(dB, groups, i); });
  if (!dC.empty()) hold<T>(name + ", gradient of C", sum.C, [&](int64_t i) { return sum_parts(dC, groups, i); });
  // Of a parameter (K, E, rows) whose rows stand from `row` on in those of its block.
  auto hold_rows = [&](const char* what, const Sums& expected, int64_t row, int64_t rows) {
    hold<T>(name + ", gradient of " + what, expected, [&](int64_t i) {
      const int64_t k = i / rows / E, e = i / rows % E, r = row + i % rows;
      return sum_parts(params, images, (e / L * K + k) * size + r * L + e % L);
    });
  };
  hold_rows("A", sum.A, 0, N);
  hold_rows("the bias", sum.bias, N, 1);
  hold_rows("D", sum.D, N + 1, 1);
  hold_rows("the weight", sum.weight, N + 2, R);
}

// ---- the state fusion -----------------------------------------------------------------------------------------------

struct FusionCase {
  Size size;
  unsigned options;
};

// Maps smaller than the reach of a tap, larger, and of several bands.
const FusionCase kFusionCases[] = {
    {{1, 1, 1, 1}, 0},          {{2, 1, 9, 7}, 0},          {{2, 11, 1, 16}, kStrided}, {{3, 4, 6, 17}, kFewGroups},
    {{1, 6, 5, 33}, kStrided},  {{2, 7, 7, 96}, kStrided},  {{1, 13, 21, 31}, 0},       {{3, 12, 11, 5}, kFewGroups},
    {{1, 21, 1010, 2}, 0},      {{1, 17, 1010, 1}, kStrided},   {{2, 2, 1537, 3}, kFewGroups}, {{1, 1, 513, 5}, 0},
};

std::string name_of(const FusionCase& c) {
  return "fusion " + std::to_string(c.size.batch) + "x" + std::to_string(c.size.height) + "x" +
         std::to_string(c.size.width) + "x" + std::to_string(c.size.channels) +
         (c.options & kStrided ? " strided" : "") + (c.options & kFewGroups ? " few groups" : "");
}

template <class T>
void check_fusion(const Kernels<T>& kernels, const FusionCase& c, Type type, Pool& pool) {
  const Size& z = c.size;
  const int64_t E = z.channels, L = kernels.fusion_lanes, cells = z.cells(), margin = c.options & kStrided ? 3 : 0;
  Random random;
  auto h = poisoned<T>(cells * (E + margin)), grad_y = poisoned<T>(cells * (E + margin));
  auto weight = poisoned<T>(kTaps * E);
  const auto h_map = map_of(h, z, 1, E + margin, margin, margin);
  const auto dy_map = map_of(grad_y, z, 1, E + margin, margin, false);
  random.fill(h_map, z, 1, E, -2, 2);
  random.fill(dy_map, z, 1, E, -2, 2);
  random.fill(weight, -0.5, 0.5);

  Stored<T> stored_h(h, type), stored_dy(grad_y, type);
  FusionArgs<T> s{z.batch, z.height, z.width, E, stored_h.map(read_only(h_map), h), nullptr, L};
  const int64_t blocks = s.num_blocks();
  std::vector<T> packed(blocks * kTaps * L);
  for (int64_t tap = 0; tap < kTaps; ++tap)
    for (int64_t e = 0; e < E; ++e) packed[(e / L * kTaps + tap) * L + e % L] = weight[tap * E + e];
  s.packed = packed.data();
  const int64_t images = c.options & kFewGroups ? (z.batch + 1) / 2 : z.batch;

  auto results = [&](Pool* pool, unsigned wanted) {
    FusionGrads<T> grad{stored_dy.map(read_only(dy_map), grad_y), nullptr, nullptr, images};
    Stored<T> y(cells * E, type), dh = gradient<T>(wanted & 1, cells * E, type, grad.h);
    auto dweight = gradient<T>(wanted & 2, images * packed.size(), grad.weight);
    run<T>(pool, z.batch * blocks, kernels.fusion_forward_scratch(s), [&](T* scratch, int64_t begin, int64_t end) {
      kernels.fusion_forward(s, y.data(), scratch, begin, end);
    });
    run<T>(pool, images * blocks, kernels.fusion_backward_scratch(s), [&](T* scratch, int64_t begin, int64_t end) {
      kernels.fusion_backward(s, grad, scratch, begin, end);
    });
    return Results<T>{y.values(), dh.values(), dweight};
  };
  const std::string kind = sizeof(T) == 8 ? " double " : " ", name = kernels.name + kind + name_of(c) + name_of(type);
  const auto one = held_results<T>(name, pool, results);

  // The definition: each tap weighs the position that it reaches, or the border where there is none.
  Sums y(cells * E), dh(cells * E), dweight(kTaps * E);
  for (int64_t cell = 0; cell < cells; ++cell)
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      const int64_t i = std::clamp<int64_t>(cell / z.width % z.height + kRows[tap], 0, z.height - 1);
      const int64_t j = std::clamp<int64_t>(cell % z.width + kColumns[tap], 0, z.width - 1);
      const int64_t from = (cell / (z.height * z.width) * z.height + i) * z.width + j;
      for (int64_t e = 0; e < E; ++e) {
        const double w = weight[tap * E + e], value = at(h_map, z, from, 0, e), dy = at(dy_map, z, cell, 0, e);
        y[cell * E + e] += w * value;
        dh[from * E + e] += w * dy;
        dweight[tap * E + e] += dy * value;
      }
    }
  hold<T>(name + ", y", y, [&](int64_t i) { return one[0][i]; }, type);
  hold<T>(name + ", gradient of h", dh, [&](int64_t i) { return one[1][i]; }, type);
  hold<T>(name + ", gradient of the weight", dweight, [&](int64_t i) {
    return sum_parts(one[2], images, (i % E / L * kTaps + i / E) * L + i % E % L);
  });
}

// ---- the gated readout ----------------------------------------------------------------------------------------------

// Less than a vector, full groups of vectors, single ones and a rest; fewer rows than tasks and more.
const std::pair<int64_t, int64_t> kReadoutCases[] = {{1, 2}, {3, 7}, {5, 16}, {70, 33}, {2, 96}, {9, 213}, {130, 20}};

template <class T>
void check_readout(const Kernels<T>& kernels, int64_t rows, int64_t E, Type type, Pool& pool) {
  Random random;
  auto made = [&](int64_t size, double low, double high) {
    auto buffer = poisoned<T>(size);
    random.fill(buffer, low, high);
    return buffer;
  };
  auto h = made(rows * E, -2, 2), x = made(rows * E, -2, 2), z = made(rows * E, -8, 8), grad_y = made(rows * E, -2, 2),
       C = made(rows, -2, 2);
  const auto D = made(E, 0.7, 1.3), weight = made(E, 0.5, 1.5), bias = made(E, -1, 1);
  Stored<T> stored_h(h, type), stored_x(x, type), stored_z(z, type), stored_dy(grad_y, type), stored_C(C, type);
  const ReadoutArgs<T> s{rows, E, type, stored_h.data(), stored_x.data(), stored_z.data(), stored_C.data(),
                         D.data(), weight.data(), bias.data(), T(1e-5)};
  const int64_t tasks = std::min<int64_t>(rows, 6);

  auto results = [&](Pool* pool, unsigned wanted) {
    ReadoutGrads<T> grad{};
    grad.y = stored_dy.data(), grad.tasks = tasks;
    Stored<T> y(rows * E, type), dh = gradient<T>(wanted & 1, rows * E, type, grad.h),
        dx = gradient<T>(wanted & 2, rows * E, type, grad.x), dz = gradient<T>(wanted & 4, rows * E, type, grad.z),
        dC = gradient<T>(wanted & 8, rows, type, grad.C);
    auto dD = gradient<T>(wanted & 16, tasks * E, grad.D),
         dweight = gradient<T>(wanted & 32, tasks * E, grad.weight),
         dbias = gradient<T>(wanted & 64, tasks * E, grad.bias);
    run<T>(pool, rows, kernels.readout_scratch(s),
           [&](T* scratch, int64_t begin, int64_t end) { kernels.readout_forward(s, y.data(), scratch, begin, end); });
    run<T>(pool, tasks, kernels.readout_scratch(s),
           [&](T* scratch, int64_t begin, int64_t end) { kernels.readout_backward(s, grad, scratch, begin, end); });
    return Results<T>{y.values(), dh.values(), dx.values(), dz.values(), dC.values(), dD, dweight, dbias};
  };
  const std::string name = std::string(kernels.name) + (sizeof(T) == 8 ? " double" : "") + " readout " +
                           std::to_string(rows) + "x" + std::to_string(E) + name_of(type);
  const auto one = held_results<T>(name, pool, results);

  Sums y(rows * E), dh(rows * E), dx(rows * E), dz(rows * E), dC(rows), dD(E), dweight(E), dbias(E);
  std::vector<double> u(E), n(E), dn(E);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = row * E;
    double mean = 0, variance = 0, mean_dn = 0, mean_dn_n = 0;
    for (int64_t e = 0; e < E; ++e) mean += (u[e] = C[row] * double(h[first + e]) + D[e] * double(x[first + e])) / E;
    for (int64_t e = 0; e < E; ++e) variance += (u[e] - mean) * (u[e] - mean) / E;
    const double rate = 1 / std::sqrt(variance + 1e-5);
    for (int64_t e = 0; e < E; ++e) {
      const double gate = 1 / (1 + std::exp(-double(z[first + e]))), silu = z[first + e] * gate, dy = grad_y[first + e];
      n[e] = (u[e] - mean) * rate;
      y[first + e] += n[e] * weight[e] * silu, y[first + e] += bias[e] * silu;
      dz[first + e] += dy * (n[e] * weight[e] + bias[e]) * gate * (1 + z[first + e] * (1 - gate));
      dweight[e] += dy * silu * n[e];
      dbias[e] += dy * silu;
      dn[e] = dy * silu * weight[e];
      mean_dn += dn[e] / E, mean_dn_n += dn[e] * n[e] / E;
    }
    for (int64_t e = 0; e < E; ++e) {
      for (const double du : {rate * dn[e], -rate * mean_dn, -rate * n[e] * mean_dn_n}) {
        dh[first + e] += du * C[row];
        dx[first + e] += du * D[e];
        dC[row] += du * h[first + e];
        dD[e] += du * x[first + e];
      }
    }
  }
  const Sums* const maps[] = {&y, &dh, &dx, &dz, &dC};
  const char* const names[] = {", y", ", gradient of h", ", gradient of x", ", gradient of z", ", gradient of C"};
  for (int i = 0; i < 5; ++i) hold<T>(name + names[i], *maps[i], [&](int64_t j) { return one[i][j]; }, type);
  const Sums* const parameters[] = {&dD, &dweight, &dbias};
  const char* const kinds[] = {"D", "the weight", "the bias"};
  for (int i = 0; i < 3; ++i)
    hold<T>(name + ", gradient of " + kinds[i], *parameters[i],
            [&](int64_t e) { return sum_parts(one[5 + i], tasks, e); });
}

// ---------------------------------------------------------------------------------------------------------------------

template <class T>
void check_all(const Kernels<T>& kernels, int step, Pool& pool) {
  const int64_t vector = kernels.fusion_lanes;  // blocks of the scan have one or two
  int number = 0;
  auto each = [&](const auto& cases, const auto& check) {
    for (size_t i = 0; i < std::size(cases); i += step) check(cases[i]);
  };
  // In T, and where that is float every case in one of the half types, in turns.
  auto each_type = [&](const auto& check) {
    check(Type::kWhole);
    if (sizeof(T) == sizeof(float)) check(number++ % 2 ? Type::kBfloat16 : Type::kFloat16);
  };
  each(kScanCases, [&](const ScanCase& c) {
    each_type([&](Type type) {
      for (int64_t lanes : {vector, 2 * vector}) check_scan(kernels, c, type, lanes, pool);
    });
  });
  each(kFusionCases, [&](const FusionCase& c) {
    each_type([&](Type type) { check_fusion(kernels, c, type, pool); });
  });
  each(kReadoutCases, [&](const auto& c) {
    each_type([&](Type type) { check_readout(kernels, c.first, c.second, type, pool); });
  });
}

bool supported(const std::string& path) {
#if defined(__x86_64__)
  if (path == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (path == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return path == "portable";
}

const Kernels<float>& kernels_of(const std::string& path) {
#if defined(__x86_64__)
  if (path == "avx512") return kAvx512;
  if (path == "avx2") return kAvx2;
#endif
  return kPortable;
}

}  // namespace
}  // namespace vssm

int main(int argc, char** argv) {
  using namespace vssm;
  const bool complete = argc == 3 || argc == 4;
  const std::string path = complete ? argv[1] : "";
  const int threads = complete ? std::atoi(argv[2]) : 0, step = argc == 4 ? std::atoi(argv[3]) : 1;
  if ((path != "avx512" && path != "avx2" && path != "portable") || threads < 1 || step < 1) {
    std::fprintf(stderr, "usage: kernels_main avx512|avx2|portable THREADS [STEP]\n");
    return kUsage;
  }
  if (!supported(path)) {
    std::printf("this CPU lacks the instructions of %s\n", path.c_str());
    return kUnsupported;
  }
  Pool pool(threads);
  check_all(kernels_of(path), step, pool);
  if (path == "portable") check_all(kPortableDouble, step, pool);
  if (failures) return kWrong;
  std::printf("%s: all results right, and the same on 1 and %d threads\n", path.c_str(), threads);
}
