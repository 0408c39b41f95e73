// Decoding on a CPU: products of a few rows with packed weights, and the blocks of a decoder around them.
//
// A weight [n, k] lies in panels of 32 outputs, each panel input by input, so that it is read once, in one
// stream, for up to ROWS rows. bfloat16 and int8 hold two inputs of an output side by side, and the rows are
// rounded to bfloat16. Plain C functions; `kernels.py` compiles, checks and calls them.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef int16_t Shorts __attribute__((vector_size(32)));

constexpr long LANES = 16, PANEL = 32;
#ifdef __AVX512F__
constexpr int ROWS = 12;  // 24 of 32 registers hold sums
#else
constexpr int ROWS = 3;
#endif
constexpr long AHEAD = 3072;  // bytes
constexpr long PART = 128;    // words: 16 KiB of a panel

enum Kind : long { FLOAT32, BFLOAT16, INT8 };

template <class V>
inline V load(const void *from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float *to, Lanes value) { std::memcpy(to, &value, sizeof value); }

inline uint32_t rounded(float x) {  // bits of the nearest bfloat16, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// sums += (two bfloat16 per lane of w) * (two bfloat16 in x)
inline void multiply_pairs(Lanes &sums, Ints w, uint32_t x) {
#ifdef __AVX512BF16__
  sums = (Lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)(__m512i)w, (__m512bh)_mm512_set1_epi32((int)x));
#else
  const uint32_t low = x << 16, high = x & 0xffff0000;
  float even, odd;
  std::memcpy(&even, &low, 4);
  std::memcpy(&odd, &high, 4);
  sums += (Lanes)(w << 16) * even + (Lanes)(w & (int)0xffff0000) * odd;
#endif
}

inline Ints widened(const int8_t *from) {  // 32 levels as bfloat16, in order
#ifdef __AVX512BF16__
  const auto half = [](const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(p)));
  };
  return (Ints)(__m512i)_mm512_cvtne2ps_pbh(half(from + 16), half(from));
#else
  const Ints both = __builtin_convertvector(load<Shorts>(from), Ints);
  const Lanes even = __builtin_convertvector((both << 24) >> 24, Lanes);
  const Lanes odd = __builtin_convertvector(both >> 8, Lanes);
  return (Ints)(((Ints)even >> 16) & 0xffff) | ((Ints)odd & (int)0xffff0000);
#endif
}

// sums[r] += x[r] times a panel, for R rows; x: words (floats, or pairs of bfloat16), `stride` apart by row
template <int R, long K>
inline void panel(const uint32_t *x, long stride, const char *w, long words, float (*sums)[PANEL]) {
  Lanes first[R], second[R];
  for (int r = 0; r < R; r++) first[r] = load<Lanes>(sums[r]), second[r] = load<Lanes>(sums[r] + LANES);
  for (long i = 0; i < words; i++, w += K == INT8 ? 2 * PANEL : 4 * PANEL) {
    __builtin_prefetch(w + AHEAD);
    if (K != INT8) __builtin_prefetch(w + AHEAD + 64);
    if (K == FLOAT32) {
      const Lanes a = load<Lanes>(w), b = load<Lanes>(w + 64);
      for (int r = 0; r < R; r++) {
        const float value = ((const float *)x)[r * stride + i];
        first[r] += a * value;
        second[r] += b * value;
      }
    } else {
      const Ints a = K == INT8 ? widened((const int8_t *)w) : load<Ints>(w);
      const Ints b = K == INT8 ? widened((const int8_t *)w + 32) : load<Ints>(w + 64);
      for (int r = 0; r < R; r++) {
        multiply_pairs(first[r], a, x[r * stride + i]);
        multiply_pairs(second[r], b, x[r * stride + i]);
      }
    }
  }
  for (int r = 0; r < R; r++) store(sums[r], first[r]), store(sums[r] + LANES, second[r]);
}

template <long K, int R = ROWS>
inline void panel_of(int rows, const uint32_t *x, long stride, const char *w, long words, float (*sums)[PANEL]) {
  if (rows == R) return panel<R, K>(x, stride, w, words, sums);
  if constexpr (R > 1) panel_of<K, R - 1>(rows, x, stride, w, words, sums);
}

}  // namespace

extern "C" {

struct Matrix {
  const char *data;    // packed
  const float *scale;  // [n] of int8, else null
  long kind, n, k;
};

struct Block {
  Matrix qkv, out, inner, outer;  // inner: gate and up
  const float *norm1, *norm2, *q_norm, *k_norm;  // all but the second may be null
  float eps1, eps2, eps_heads;
  long heads, groups, width;  // query heads, key/value heads, head width
  long interleaved;           // rotated pairs are (2i, 2i + 1), not (i, i + width / 2)
};

// y [rows, n] = x [rows, k] times the matrix, plus what `add` [rows, n] holds (may be null, may be y)
void lexel_product(const Matrix *m, const float *x, const float *add, float *y, long rows, long threads) {
  const long k = m->k, n = m->n, panels = (n + PANEL - 1) / PANEL;
  const long words = m->kind == FLOAT32 ? k : k / 2;
  const long bytes = PANEL * k * (m->kind == FLOAT32 ? 4 : m->kind == BFLOAT16 ? 2 : 1);
  static thread_local std::vector<uint32_t> pairs;
  const uint32_t *input = (const uint32_t *)x;
  if (m->kind != FLOAT32) {
    pairs.resize(rows * words);
    uint32_t *to = pairs.data();
    for (long i = 0; i < rows * words; i++) to[i] = rounded(x[2 * i]) | rounded(x[2 * i + 1]) << 16;
    input = to;
  }
  // Beyond ROWS rows, a part of the panel that stays in the first cache serves all of them before the next.
  if (rows == 0) return;
  const long chunks = (rows + ROWS - 1) / ROWS, chunk = (rows + chunks - 1) / chunks;
  const long part = chunks == 1 ? words : PART, step = bytes / words;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (long p = 0; p < panels; p++) {
    static thread_local std::vector<float> buffer;
    buffer.assign(rows * PANEL, 0.0f);
    float(*sums)[PANEL] = (float(*)[PANEL])buffer.data();
    for (long i = 0; i < words; i += part) {
      const long some = words - i < part ? words - i : part;
      const char *w = m->data + p * bytes + i * step;
      for (long r = 0; r < rows; r += chunk) {
        const int many = rows - r < chunk ? rows - r : chunk;
        const uint32_t *from = input + r * words + i;
        if (m->kind == FLOAT32) panel_of<FLOAT32>(many, from, words, w, some, sums + r);
        else if (m->kind == BFLOAT16) panel_of<BFLOAT16>(many, from, words, w, some, sums + r);
        else panel_of<INT8>(many, from, words, w, some, sums + r);
      }
    }
    const long valid = n - p * PANEL < PANEL ? n - p * PANEL : PANEL;
    for (long r = 0; r < rows; r++) {
      float *line = sums[r], *to = y + r * n + p * PANEL;
      if (m->scale) for (long j = 0; j < valid; j++) line[j] *= m->scale[p * PANEL + j];
      if (add) for (long j = 0; j < valid; j++) line[j] += add[r * n + p * PANEL + j];
      std::memcpy(to, line, valid * sizeof(float));
    }
  }
}

}  // extern "C"

namespace {

// exp to about 2 units in the last place for x <= 88 (Cephes); 0 below -87
inline Lanes exponential(Lanes x) {
  const Lanes top = Lanes{} + 88.0f, bottom = Lanes{} - 87.0f;
  const Ints gone = x < bottom;
  x = x > top ? top : x;
  x = gone ? bottom : x;
  const Lanes shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const Lanes whole = shifted - 12582912.0f;
  const Lanes rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Lanes y = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.0f;
  const Ints power = (__builtin_convertvector(whole, Ints) + 127) << 23;
  y *= (Lanes)power;
  return gone ? Lanes{} : y;
}

// Sums within two registers: lane i of the result is lanes 2i and 2i + 1 of x and y laid side by side
inline Lanes paired(Lanes x, Lanes y) {
  return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// The sums of 16 registers, one per lane
inline Lanes totals(Lanes (&x)[LANES]) {
  for (int many = LANES / 2; many; many /= 2)
    for (int i = 0; i < many; i++) x[i] = paired(x[2 * i], x[2 * i + 1]);
  return x[0];
}

inline float total(Lanes x) {
  for (int i = 0; i < 4; i++) x = paired(x, x);
  return x[0];
}

void normalize(const float *x, const float *weight, float eps, float *y, long d) {
  Lanes squares{};
  long i = 0;
  for (; i + LANES <= d; i += LANES) squares += load<Lanes>(x + i) * load<Lanes>(x + i);
  float sum = total(squares);
  for (; i < d; i++) sum += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(sum / d + eps);
  for (i = 0; i < d; i++) y[i] = x[i] * factor * weight[i];
}

void rotate(const float *x, const float *cos, const float *sin, float *y, long e, bool interleaved) {
  const long half = e / 2;
  for (long i = 0; i < half; i++) {
    const long a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + half;
    const float first = x[a], second = x[b];
    y[a] = first * cos[i] - second * sin[i];
    y[b] = second * cos[i] + first * sin[i];
  }
}

float *scratch(long size, int which) {
  static thread_local std::vector<float> buffers[4];
  if ((long)buffers[which].size() < size) buffers[which].resize(size);
  return buffers[which].data();
}

// sums over s of weights[t] * values[t, 0:16 N]
template <int N>
void mix(const float *values, const float *weights, float factor, float *to, long s, long e) {
  Lanes sum[N] = {};
  for (long t = 0; t < s; t++)
    for (int j = 0; j < N; j++) sum[j] += load<Lanes>(values + t * e + j * LANES) * weights[t];
  for (int j = 0; j < N; j++) store(to + j * LANES, sum[j] * factor);
}

// One head of one row: out [l] (rows of e, `stride` apart) from q [l, e] and s keys and values
void attend(const float *q, const float *keys, const float *values, const float *mask, long mask_stride,
            float *out, long stride, long l, long s, long e) {
  float *scores = scratch(s + LANES, 3);
  const float scale = 1.0f / std::sqrt((float)e);
  for (long i = 0; i < l; i++) {
    const float *query = q + i * e, *line = mask ? mask + i * mask_stride : nullptr;
    for (long t = 0; t < s; t += LANES) {
      Lanes sums[LANES];
      for (int j = 0; j < LANES; j++) {
        const float *key = keys + (t + j < s ? t + j : s - 1) * e;
        sums[j] = Lanes{};
        long c = 0;
        for (; c + LANES <= e; c += LANES) sums[j] += load<Lanes>(query + c) * load<Lanes>(key + c);
        for (; c < e; c++) sums[j][0] += query[c] * key[c];
      }
      store(scores + t, totals(sums) * scale);
    }
    float largest = -INFINITY;
    for (long t = 0; t < s; t++) {
      if (line) scores[t] += line[t];
      largest = scores[t] > largest ? scores[t] : largest;
    }
    float *to = out + i * stride;
    std::memset(to, 0, e * sizeof(float));
    if (largest == -INFINITY) continue;  // nothing may be seen
    for (long t = s; t < s + LANES; t++) scores[t] = -INFINITY;
    Lanes sums{};
    for (long t = 0; t < s; t += LANES) {
      const Lanes weight = exponential(load<Lanes>(scores + t) - largest);
      store(scores + t, weight);
      sums += weight;
    }
    const float factor = 1.0f / total(sums);
    long c = 0;
    for (; c + 4 * LANES <= e; c += 4 * LANES) mix<4>(values + c, scores, factor, to + c, s, e);
    for (; c + 2 * LANES <= e; c += 2 * LANES) mix<2>(values + c, scores, factor, to + c, s, e);
    for (; c + LANES <= e; c += LANES) mix<1>(values + c, scores, factor, to + c, s, e);
    for (; c < e; c++) {
      for (long t = 0; t < s; t++) to[c] += values[t * e + c] * scores[t];
      to[c] *= factor;
    }
  }
}

}  // namespace

extern "C" {

// y [rows, d]: root-mean-square normalised x
void lexel_normalize(const float *x, const float *weight, float eps, float *y, long rows, long d) {
  for (long i = 0; i < rows; i++) normalize(x + i * d, weight, eps, y + i * d, d);
}

// x [b, l, d] → normalised, rotated queries [b, h, l, e] and keys [b, g, l, e], and values [b, g, l, e];
// cos, sin: [b or 1, l, e / 2], `turn` apart from row to row of the batch.
void lexel_open(const Block *block, const float *x, const float *cos, const float *sin, long turn, float *q,
                float *k, float *v, long b, long l, long threads) {
  const long d = block->qkv.k, n = block->qkv.n, e = block->width, h = block->heads, g = block->groups;
  float *normal = scratch(b * l * d, 0), *joined = scratch(b * l * n, 1), *head = scratch(e, 2);
  if (block->norm1)
    for (long i = 0; i < b * l; i++) normalize(x + i * d, block->norm1, block->eps1, normal + i * d, d);
  lexel_product(&block->qkv, block->norm1 ? normal : x, nullptr, joined, b * l, threads);
  for (long row = 0; row < b; row++)
    for (long i = 0; i < l; i++)
      for (long j = 0; j < h + 2 * g; j++) {
        const float *from = joined + (row * l + i) * n + j * e;
        if (j >= h + g) {
          std::memcpy(v + ((row * g + j - h - g) * l + i) * e, from, e * sizeof(float));
          continue;
        }
        float *to = j < h ? q + ((row * h + j) * l + i) * e : k + ((row * g + j - h) * l + i) * e;
        const float *weight = j < h ? block->q_norm : block->k_norm;
        if (weight) {
          normalize(from, weight, block->eps_heads, head, e);
          from = head;
        }
        const long at = row * turn + i * (e / 2);
        rotate(from, cos + at, sin + at, to, e, block->interleaved);
      }
}

// y [b, l, d] = x plus attention of q to keys and values [b, g, s, e] (strides of row and head given), plus the
// feed-forward of that. mask: additive [b or 1, l, s] with the given strides, or null.
void lexel_close(const Block *block, const float *x, const float *q, const float *keys, const float *values,
                 long key_row, long key_head, long value_row, long value_head, const float *mask, long mask_row,
                 long mask_line, float *y, long b, long l, long s, long threads) {
  const long d = block->qkv.k, e = block->width, h = block->heads, share = h / block->groups;
  const long rows = b * l, units = block->outer.k;
  float *mixed = scratch(rows * h * e, 0), *inner = scratch(rows * 2 * units, 1);
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
  for (long row = 0; row < b; row++)
    for (long j = 0; j < h; j++)
      attend(q + (row * h + j) * l * e, keys + row * key_row + j / share * key_head,
             values + row * value_row + j / share * value_head, mask ? mask + row * mask_row : nullptr, mask_line,
             mixed + row * l * h * e + j * e, h * e, l, s, e);
  lexel_product(&block->out, mixed, x, y, rows, threads);
  float *normal = scratch(rows * (d > units ? d : units), 0);
  for (long i = 0; i < rows; i++) normalize(y + i * d, block->norm2, block->eps2, normal + i * d, d);
  lexel_product(&block->inner, normal, nullptr, inner, rows, threads);
  for (long i = 0; i < rows; i++) {
    const float *gate = inner + i * 2 * units, *up = gate + units;
    float *to = normal + i * units;
    long j = 0;
    for (; j + LANES <= units; j += LANES) {
      const Lanes value = load<Lanes>(gate + j);
      store(to + j, value / (1.0f + exponential(-value)) * load<Lanes>(up + j));
    }
    for (; j < units; j++) to[j] = gate[j] / (1.0f + std::exp(-gate[j])) * up[j];
  }
  lexel_product(&block->outer, normal, y, y, rows, threads);
}

}  // extern "C"
