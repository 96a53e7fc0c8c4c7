// SPDX-License-Identifier: Apache-2.0
// Bodies of the functions in simd.h. simd.cpp includes this file once per instruction set, inside
// a namespace and with KVC_LANES floats per vector; hence no include guard and no includes: an
// inline function of the standard library compiled here could be linked into code for older CPUs.

typedef float Vec __attribute__((vector_size(4 * KVC_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * KVC_LANES)));
typedef float LooseVec __attribute__((vector_size(4 * KVC_LANES), aligned(4), may_alias));
typedef int32_t LooseIntVec __attribute__((vector_size(4 * KVC_LANES), aligned(4), may_alias));
typedef uint32_t UnsignedVec __attribute__((vector_size(4 * KVC_LANES)));
typedef uint16_t LooseShortVec __attribute__((vector_size(2 * KVC_LANES), aligned(2), may_alias));

constexpr int kVecs = kPanel / KVC_LANES;  // vectors in a panel
constexpr int kGemmRows = 12 / kVecs;      // 12 accumulators leave registers for the operands
constexpr float kInfinity = __builtin_inff();

inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
inline IntVec load(const int32_t* p) { return *reinterpret_cast<const LooseIntVec*>(p); }

inline float add_lanes(Vec v) {
  float partial[KVC_LANES];
  store(partial, v);
  for (int width = KVC_LANES / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) partial[i] += partial[i + width];
  }
  return partial[0];
}

// 2^x for x <= 0, within 3e-7 of itself (minimax polynomial, 1e-7, and rounding); 0 below -127 (so
// for -inf), NaN for NaN. Adding 1.5 * 2^23 rounds to an integer that stays in the low bits, from
// where it is shifted into the exponent.
inline Vec exp2_negative(Vec x) {
  const Vec lowest = Vec{} - 127.0f;
  x = x < lowest ? lowest : x;
  const Vec magic = Vec{} + 12582912.0f;
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec p = f * 1.326472604e-3f + 9.671512722e-3f;
  p = p * f + 5.550733747e-2f;
  p = p * f + 2.402224208e-1f;
  p = p * f + 6.931469776e-1f;
  p = p * f + 1.0f;
  return (Vec)((IntVec)p + ((IntVec)shifted << 23));
}

// tanh(x) to 1e-6 of itself, as -e / (2 + e) with e = exp(-2 |x|) - 1, which is computed without
// the difference where it would cancel; the polynomial is that of exp2_negative. NaN for NaN.
inline Vec tanh(Vec x) {
  const UnsignedVec sign = (UnsignedVec)x & 0x80000000u;
  const Vec lowest = Vec{} - 127.0f, one = Vec{} + 1.0f, magic = Vec{} + 12582912.0f;
  Vec exponent = (Vec)((UnsignedVec)x ^ sign) * -2.885390082f;
  exponent = exponent < lowest ? lowest : exponent;
  const Vec shifted = exponent + magic;
  const Vec f = exponent - (shifted - magic);
  Vec p = f * 1.326472604e-3f + 9.671512722e-3f;
  p = p * f + 5.550733747e-2f;
  p = p * f + 2.402224208e-1f;
  p = p * f + 6.931469776e-1f;
  const Vec power = (Vec)((IntVec)one + ((IntVec)shifted << 23));
  const Vec e = (power - one) + power * (p * f);
  return (Vec)((UnsignedVec)(-e / (e + 2.0f)) | sign);
}

template <int kRows>
inline void gemm_block(const Gemm& g, int64_t row) {
  Vec acc[kRows][kVecs];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVecs; ++v) {
      acc[i][v] = g.add ? load(g.c + (row + i) * g.c_row + v * KVC_LANES) : Vec{};
    }
  }
  const float* a = g.a + row * g.a_row;
  const float* b = g.b;
  for (int64_t k = 0; k < g.depth; ++k, a += g.a_depth, b += g.b_depth) {
    Vec column[kVecs];
    for (int v = 0; v < kVecs; ++v) column[v] = load(b + v * KVC_LANES);
    for (int i = 0; i < kRows; ++i) {
      const float x = a[i * g.a_row];
      for (int v = 0; v < kVecs; ++v) acc[i][v] += x * column[v];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVecs; ++v) store(g.c + (row + i) * g.c_row + v * KVC_LANES, acc[i][v]);
  }
}

inline void gemm(const Gemm& g) {
  int64_t row = 0;
  for (; row + kGemmRows <= g.m; row += kGemmRows) gemm_block<kGemmRows>(g, row);
  if (kGemmRows > 8) {
    for (; row + 8 <= g.m; row += 8) gemm_block<8>(g, row);
  }
  if (kGemmRows > 4) {
    for (; row + 4 <= g.m; row += 4) gemm_block<4>(g, row);
  }
  for (; row + 2 <= g.m; row += 2) gemm_block<2>(g, row);
  if (row < g.m) gemm_block<1>(g, row);
}

template <int kRows, int kKeys>
inline void dot_block(const float* q, const float* keys, int64_t key_stride, int64_t size,
                      float* out, int64_t out_stride) {
  Vec acc[kRows][kKeys] = {};
  for (int64_t d = 0; d < size; d += KVC_LANES) {
    for (int k = 0; k < kKeys; ++k) {
      const Vec key = load(keys + k * key_stride + d);
      for (int r = 0; r < kRows; ++r) acc[r][k] += key * load(q + r * size + d);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kKeys; ++k) out[r * out_stride + k] = add_lanes(acc[r][k]);
  }
}

inline void dots(const float* q, int64_t num_rows, const float* keys, int64_t key_stride,
                 int64_t num_keys, int64_t size, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < num_rows; r += 2) {
    const bool pair = r + 1 < num_rows;
    const float* row = q + r * size;
    float* target = out + r * out_stride;
    int64_t k = 0;
    for (; k + 4 <= num_keys; k += 4) {
      const float* key = keys + k * key_stride;
      if (pair) {
        dot_block<2, 4>(row, key, key_stride, size, target + k, out_stride);
      } else {
        dot_block<1, 4>(row, key, key_stride, size, target + k, out_stride);
      }
    }
    for (; k < num_keys; ++k) {
      const float* key = keys + k * key_stride;
      dot_block<1, 1>(row, key, key_stride, size, target + k, out_stride);
      if (pair) dot_block<1, 1>(row + size, key, key_stride, size, target + out_stride + k, 0);
    }
  }
}

template <int kKeys>
inline void squares_block(const float* keys, int64_t key_stride, int64_t size, float* out) {
  Vec acc[kKeys] = {};
  for (int64_t d = 0; d < size; d += KVC_LANES) {
    for (int k = 0; k < kKeys; ++k) {
      const Vec key = load(keys + k * key_stride + d);
      acc[k] += key * key;
    }
  }
  for (int k = 0; k < kKeys; ++k) out[k] = add_lanes(acc[k]);
}

inline void squares(const float* keys, int64_t key_stride, int64_t num_keys, int64_t size,
                    float* out) {
  int64_t k = 0;
  for (; k + 4 <= num_keys; k += 4) {
    squares_block<4>(keys + k * key_stride, key_stride, size, out + k);
  }
  for (; k < num_keys; ++k) squares_block<1>(keys + k * key_stride, key_stride, size, out + k);
}

inline void soft_cap(float* logits, int64_t count, float cap) {
  for (int64_t i = 0; i < count; i += KVC_LANES) store(logits + i, tanh(load(logits + i)) * cap);
}

inline void softmax_panel(const SoftmaxPanel& s) {
  for (int v = 0; v < kPanel; v += KVC_LANES) {
    const Vec old = load(s.maximum + v);
    Vec maximum = old;
    if (s.visible) {
      const IntVec visible = load(s.visible + v);
      for (int64_t k = 0; k < s.num_keys; ++k) {
        const IntVec key = IntVec{} + static_cast<int32_t>(k);
        const Vec x = key < visible ? load(s.logits + k * kPanel + v) : Vec{} - kInfinity;
        store(s.logits + k * kPanel + v, x);
        maximum = x > maximum ? x : maximum;
      }
    } else {
      for (int64_t k = 0; k < s.num_keys; ++k) {
        const Vec x = load(s.logits + k * kPanel + v);
        maximum = x > maximum ? x : maximum;
      }
    }
    const Vec correction = exp2_negative(old - maximum);
    Vec sum = load(s.sum + v) * correction;
    for (int64_t k = 0; k < s.num_keys; ++k) {
      const Vec p = exp2_negative(load(s.logits + k * kPanel + v) - maximum);
      store(s.logits + k * kPanel + v, p);
      sum += p;
    }
    store(s.maximum + v, maximum);
    store(s.sum + v, sum);
    store(s.correction + v, correction);
  }
}

inline float softmax_row(float* logits, int64_t num_keys, float* maximum, float* sum) {
  float top = *maximum;
  for (int64_t k = 0; k < num_keys; ++k) top = logits[k] > top ? logits[k] : top;
  const int64_t whole = (num_keys + KVC_LANES - 1) / KVC_LANES * KVC_LANES;
  for (int64_t k = num_keys; k < whole; ++k) logits[k] = -kInfinity;
  Vec total = {};
  for (int64_t k = 0; k < whole; k += KVC_LANES) {
    const Vec p = exp2_negative(load(logits + k) - top);
    store(logits + k, p);
    total += p;
  }
  const float correction = exp2_negative(Vec{} + (*maximum - top))[0];
  *sum = *sum * correction + add_lanes(total);
  *maximum = top;
  return correction;
}

inline void scale(float* values, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
}

// Turns the logits of key k into probabilities and adds up what one member of the group or one
// query needs no other for.
template <bool kEntropies>
inline void statistics_of_heads(const StatisticsTile& s, int64_t k) {
  const IntVec key = IntVec{} + static_cast<int32_t>(k);
  const bool by_head = s.out[kHeadSumSquares] != nullptr, highest = s.out[kMaximum] != nullptr;
  float head_squares = 0;
  Vec total = {}, squares = {}, entropy = {}, top = {};
  for (int64_t g = 0; g < s.group; ++g) {
    Vec head = {};
    for (int64_t i = 0; i < s.query_panels * kPanel; i += KVC_LANES) {
      float* lanes =
          s.logits + k * kPanel + g * s.group_stride + i / kPanel * s.panel_stride + i % kPanel;
      const int64_t query = g * s.query_panels * kPanel + i;
      const Vec exponent = load(lanes) - load(s.maximum + query);
      const IntVec seen = key < load(s.visible + i);
      const Vec p = seen ? exp2_negative(exponent) * load(s.inverse + query) : Vec{};
      store(lanes, p);
      head += p;
      squares += p * p;
      if (highest) top = (p > top) | (p != p) ? p : top;  // NaN stays
      if (kEntropies) {
        // log2 p without a logarithm per key; p is 0 below the bound, so any finite number does.
        const Vec lowest = Vec{} - 127.0f;
        const Vec log2 = (exponent < lowest ? lowest : exponent) + load(s.log2_inverse + query);
        entropy -= seen ? p * log2 : Vec{};
      }
    }
    total += head;
    if (by_head) {
      const float sum = add_lanes(head);
      head_squares += sum * sum;
    }
  }
  if (s.out[kSum]) s.out[kSum][k] = add_lanes(total);
  if (s.out[kSumSquares]) s.out[kSumSquares][k] = add_lanes(squares);
  if (by_head) s.out[kHeadSumSquares][k] = head_squares;
  if (kEntropies) s.out[kEntropy][k] = add_lanes(entropy) / kLog2E;
  if (highest) {
    float most = 0;
    for (int i = 0; i < KVC_LANES; ++i) most = top[i] > most || top[i] != top[i] ? top[i] : most;
    s.out[kMaximum][k] = most;
  }
}

// What needs the mean over the group, from the probabilities.
inline void statistics_of_queries(const StatisticsTile& s, int64_t k) {
  const IntVec key = IntVec{} + static_cast<int32_t>(k);
  const Vec group = Vec{} + static_cast<float>(s.group);
  Vec low = {}, squares = {};
  for (int64_t i = 0; i < s.query_panels * kPanel; i += KVC_LANES) {
    const float* lanes = s.logits + k * kPanel + i / kPanel * s.panel_stride + i % kPanel;
    Vec over_group = {};
    for (int64_t g = 0; g < s.group; ++g) over_group += load(lanes + g * s.group_stride);
    const Vec mean = over_group / group;
    const Vec is_low = mean < load(s.uniform + i) ? Vec{} + 1.0f : Vec{};
    low += key < load(s.visible + i) ? is_low : Vec{};
    squares += mean * mean;
  }
  if (s.out[kLowCount]) s.out[kLowCount][k] = add_lanes(low);
  if (s.out[kMeanSquares]) s.out[kMeanSquares][k] = add_lanes(squares);
}

inline void statistics(const StatisticsTile& s) {
  const bool by_query = s.out[kLowCount] || s.out[kMeanSquares];
  const int64_t last = s.num_queries - 1;
  const float* last_lane = s.logits + last / kPanel * s.panel_stride + last % kPanel;
  for (int64_t k = 0; k < s.num_keys; ++k) {
    if (s.out[kEntropy]) {
      statistics_of_heads<true>(s, k);
    } else {
      statistics_of_heads<false>(s, k);
    }
    if (by_query) statistics_of_queries(s, k);
    if (s.out[kLast]) {
      float p = 0;
      for (int64_t g = 0; g < s.group; ++g) p += last_lane[k * kPanel + g * s.group_stride];
      s.out[kLast][k] = p;
    }
  }
}

inline void raise(const float* logits, const float* shift, int64_t num_keys, float* top) {
  for (int v = 0; v < kPanel; v += KVC_LANES) {
    const Vec by = load(shift + v);
    for (int64_t k = v; k < num_keys * kPanel; k += kPanel) {
      const Vec x = load(logits + k) - by, old = load(top + k);
      const Vec higher = x <= old ? old : x;  // x if it is NaN
      store(top + k, old == old ? higher : old);
    }
  }
}

// Exact for every value. Normal halves get 112 more on the exponent by a product, which also keeps
// infinities and NaN; halves with exponent 0 become normal floats by a difference.
inline Vec half_to_float(UnsignedVec half) {
  const UnsignedVec bits = half << 16, twice = bits + bits;
  const Vec normal = (Vec)((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const Vec small = (Vec)((twice >> 17) | (126u << 23)) - 0.5f;
  const UnsignedVec magnitude = twice < (1u << 27) ? (UnsignedVec)small : (UnsignedVec)normal;
  return (Vec)(magnitude | (bits & 0x80000000u));
}

inline void from_half(const uint16_t* in, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + KVC_LANES <= count; i += KVC_LANES) {
    const LooseShortVec half = *reinterpret_cast<const LooseShortVec*>(in + i);
    store(out + i, half_to_float(__builtin_convertvector(half, UnsignedVec)));
  }
  for (; i < count; ++i) out[i] = half_to_float(UnsignedVec{} + in[i])[0];
}

inline void from_bfloat16(const uint16_t* in, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + KVC_LANES <= count; i += KVC_LANES) {
    const LooseShortVec half = *reinterpret_cast<const LooseShortVec*>(in + i);
    store(out + i, (Vec)(__builtin_convertvector(half, UnsignedVec) << 16));
  }
  for (; i < count; ++i) out[i] = ((Vec)((UnsignedVec{} + in[i]) << 16))[0];
}
