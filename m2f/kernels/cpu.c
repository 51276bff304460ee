/* Loops for which PyTorch's own operations pass over memory many times.

   All arrays are row-major and without gaps; floats are 32 bits wide. A call does the part [begin, end) of the work, so
   that threads can share it. One call writes each output, in a fixed order: the bits do not depend on the number of
   threads. A point (x, y) in [0, 1] runs over a map of h x w pixels, borders included; outside the map all is 0. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline))

enum { MOST_CHANNELS = 256, MOST_POINTS = 64 }; /* of one head */
static const float NOTHING[MOST_CHANNELS];

/* The four pixels around a point: where each lies in its map, and the point's distance from the first. */
typedef struct {
  int64_t place[4]; /* of the upper left, upper right, lower left and lower right pixel; -1: outside */
  float x, y;       /* 0 to 1 */
} Corners;

/* 0 where no pixel is near, as with coordinates that are not finite. */
INLINE int corners_of(float x, float y, int64_t h, int64_t w, Corners *at) {
  x = x * w - 0.5f;
  y = y * h - 0.5f;
  if (!(x > -1 && y > -1 && x < w && y < h)) return 0;
  const float left = floorf(x), top = floorf(y);
  const int64_t column = (int64_t)left, row = (int64_t)top, place = row * w + column;
  const int is_left = column >= 0, is_right = column + 1 < w, is_top = row >= 0, is_bottom = row + 1 < h;
  at->place[0] = is_top && is_left ? place : -1;
  at->place[1] = is_top && is_right ? place + 1 : -1;
  at->place[2] = is_bottom && is_left ? place + w : -1;
  at->place[3] = is_bottom && is_right ? place + w + 1 : -1;
  at->x = x - left;
  at->y = y - top;
  return 1;
}

INLINE void weights_of(const Corners *at, float weight[4]) {
  weight[0] = (1 - at->y) * (1 - at->x);
  weight[1] = (1 - at->y) * at->x;
  weight[2] = at->y * (1 - at->x);
  weight[3] = at->y * at->x;
}

/* Multi-scale deformable attention: value (B, S, K, D), positions (N, 2), offsets in pixels of their level
   (B, N, K, L, P, 2), logits of the weights (B, N, K, L, P), output (B, N, K, D); sizes (L, 2) are h and w of the
   levels, which follow one another in S. */

/* Weights of the points of one head. */
INLINE void softmax(const float *logits, float *weights, int64_t count) {
  float most = logits[0], sum = 0;
  for (int64_t p = 1; p < count; p++) most = logits[p] > most ? logits[p] : most;
  for (int64_t p = 0; p < count; p++) sum += weights[p] = expf(logits[p] - most);
  for (int64_t p = 0; p < count; p++) weights[p] /= sum;
}

INLINE void attend(const float *value, const int64_t *sizes, const float *positions, const float *offsets,
                   const float *logits, float *output, int64_t S, int64_t N, int64_t K, int64_t L, int64_t P,
                   const int64_t D, int64_t begin, int64_t end) {
  for (int64_t query = begin; query < end; query++)
    for (int64_t head = 0; head < K; head++) {
      float sum[MOST_CHANNELS], weights[MOST_POINTS];
      const int64_t first = (query * K + head) * L * P;
      const float *level = value + (query / N * S * K + head) * D, *position = positions + query % N * 2;
      const float *offset = offsets + 2 * first, *weight = weights;
      softmax(logits + first, weights, L * P);
      for (int64_t d = 0; d < D; d++) sum[d] = 0;
      for (int64_t l = 0; l < L; l++) {
        const int64_t h = sizes[2 * l], w = sizes[2 * l + 1];
        for (int64_t p = 0; p < P; p++, offset += 2, weight++) {
          Corners at;
          float share[4];
          const float *pixel[4];
          if (!corners_of(position[0] + offset[0] / w, position[1] + offset[1] / h, h, w, &at)) continue;
          weights_of(&at, share);
          for (int c = 0; c < 4; c++) {
            pixel[c] = at.place[c] < 0 ? NOTHING : level + at.place[c] * K * D;
            share[c] *= *weight;
          }
#pragma omp simd
          for (int64_t d = 0; d < D; d++)
            sum[d] += (share[0] * pixel[0][d] + share[1] * pixel[1][d]) + (share[2] * pixel[2][d] + share[3] * pixel[3][d]);
        }
        level += h * w * K * D;
      }
      for (int64_t d = 0; d < D; d++) output[(query * K + head) * D + d] = sum[d];
    }
}

/* Queries [begin, end) of all B * N. */
void deformable_forward(const float *value, const int64_t *sizes, const float *positions, const float *offsets,
                        const float *logits, float *output, int64_t S, int64_t N, int64_t K, int64_t L, int64_t P,
                        int64_t D, int64_t begin, int64_t end) {
  if (D == 32)
    attend(value, sizes, positions, offsets, logits, output, S, N, K, L, P, 32, begin, end);
  else if (D == 16)
    attend(value, sizes, positions, offsets, logits, output, S, N, K, L, P, 16, begin, end);
  else
    attend(value, sizes, positions, offsets, logits, output, S, N, K, L, P, D, begin, end);
}

INLINE void attend_back(const float *value, const int64_t *sizes, const float *positions, const float *offsets,
                        const float *logits, const float *gradient, float *to_value, float *to_offsets,
                        float *to_logits, int64_t S, int64_t N, int64_t K, int64_t L, int64_t P, const int64_t D,
                        int64_t begin, int64_t end) {
  float unused[MOST_CHANNELS];
  for (int64_t part = begin; part < end; part++) { /* a head of an image: nobody else adds to its values */
    const int64_t image = part / K, head = part % K, values = (image * S * K + head) * D;
    for (int64_t n = 0; n < N; n++) {
      const int64_t query = (image * N + n) * K + head, begin_of_points = query * L * P;
      const float *given = gradient + query * D;
      float weights[MOST_POINTS], to_weights[MOST_POINTS], mean = 0;
      int64_t first = values, p_of_all = 0;
      softmax(logits + begin_of_points, weights, L * P);
      for (int64_t l = 0; l < L; l++) {
        const int64_t h = sizes[2 * l], w = sizes[2 * l + 1];
        for (int64_t p = 0; p < P; p++, p_of_all++) {
          Corners at;
          float share[4], dot[4] = {0, 0, 0, 0};
          const float *pixel[4], *offset = offsets + 2 * (begin_of_points + p_of_all);
          float *to_pixel[4], *to_offset = to_offsets + 2 * (begin_of_points + p_of_all);
          if (!corners_of(positions[2 * n] + offset[0] / w, positions[2 * n + 1] + offset[1] / h, h, w, &at)) {
            to_weights[p_of_all] = to_offset[0] = to_offset[1] = 0;
            continue;
          }
          weights_of(&at, share);
          const float weight = weights[p_of_all];
          float weighted[4];
          for (int c = 0; c < 4; c++) {
            pixel[c] = at.place[c] < 0 ? NOTHING : value + first + at.place[c] * K * D;
            to_pixel[c] = at.place[c] < 0 ? unused : to_value + first + at.place[c] * K * D;
            weighted[c] = share[c] * weight;
          }
          float dot0 = 0, dot1 = 0, dot2 = 0, dot3 = 0;
#pragma omp simd reduction(+ : dot0, dot1, dot2, dot3)
          for (int64_t d = 0; d < D; d++) {
            dot0 += given[d] * pixel[0][d];
            dot1 += given[d] * pixel[1][d];
            dot2 += given[d] * pixel[2][d];
            dot3 += given[d] * pixel[3][d];
          }
          for (int c = 0; c < 4; c++) {
            float *to = to_pixel[c];
            const float factor = weighted[c];
#pragma omp simd
            for (int64_t d = 0; d < D; d++) to[d] += factor * given[d];
          }
          dot[0] = dot0, dot[1] = dot1, dot[2] = dot2, dot[3] = dot3;
          to_weights[p_of_all] = (share[0] * dot[0] + share[1] * dot[1]) + (share[2] * dot[2] + share[3] * dot[3]);
          to_offset[0] = weight * ((1 - at.y) * (dot[1] - dot[0]) + at.y * (dot[3] - dot[2]));
          to_offset[1] = weight * ((1 - at.x) * (dot[2] - dot[0]) + at.x * (dot[3] - dot[1]));
        }
        first += h * w * K * D;
      }
      for (int64_t p = 0; p < L * P; p++) mean += weights[p] * to_weights[p];
      for (int64_t p = 0; p < L * P; p++) to_logits[begin_of_points + p] = weights[p] * (to_weights[p] - mean);
    }
  }
}

/* Heads [begin, end) of all B * K. to_value must be 0 before. */
void deformable_backward(const float *value, const int64_t *sizes, const float *positions, const float *offsets,
                         const float *logits, const float *gradient, float *to_value, float *to_offsets,
                         float *to_logits, int64_t S, int64_t N, int64_t K, int64_t L, int64_t P, int64_t D,
                         int64_t begin, int64_t end) {
  if (D == 32)
    attend_back(value, sizes, positions, offsets, logits, gradient, to_value, to_offsets, to_logits, S, N, K, L, P, 32,
                begin, end);
  else if (D == 16)
    attend_back(value, sizes, positions, offsets, logits, gradient, to_value, to_offsets, to_logits, S, N, K, L, P, 16,
                begin, end);
  else
    attend_back(value, sizes, positions, offsets, logits, gradient, to_value, to_offsets, to_logits, S, N, K, L, P, D,
                begin, end);
}

/* Reading maps at points. No branch, so that the compiler makes vector instructions of it. */

INLINE void pixels_at(int32_t h, int32_t w, float x, float y, int32_t place[4], float share[4]) {
  x = x * w - 0.5f;
  y = y * h - 0.5f;
  const float left = floorf(x), top = floorf(y), across = x - left, down = y - top;
  const int32_t column = (int32_t)left, row = (int32_t)top;
  const int is_left = column >= 0 && column < w, is_right = column >= -1 && column < w - 1;
  const int is_top = row >= 0 && row < h, is_bottom = row >= -1 && row < h - 1;
  const int32_t left_column = is_left ? column : 0, right_column = is_right ? column + 1 : 0;
  const int32_t top_row = is_top ? row * w : 0, bottom_row = is_bottom ? (row + 1) * w : 0;
  const float left_share = is_left ? 1 - across : 0, right_share = is_right ? across : 0;
  const float top_share = is_top ? 1 - down : 0, bottom_share = is_bottom ? down : 0;
  place[0] = top_row + left_column, share[0] = top_share * left_share;
  place[1] = top_row + right_column, share[1] = top_share * right_share;
  place[2] = bottom_row + left_column, share[2] = bottom_share * left_share;
  place[3] = bottom_row + right_column, share[3] = bottom_share * right_share;
}

/* Masks at points: a mask is where maps[map[r]], of h x w integers of 1 or 4 bytes, holds value[r]. Points are
   (R / group, P, 2), of which `group` masks in turn share a row; output (R, P); masks [begin, end). */

#define EQUAL(name, integer)                                                                                           \
  void name(const integer *maps, const int64_t *map, const int32_t *value, const float *points, float *output,         \
            int64_t group, int64_t h, int64_t w, int64_t P, int64_t begin, int64_t end) {                              \
    for (int64_t r = begin; r < end; r++) {                                                                            \
      const integer *ids = maps + map[r] * h * w;                                                                      \
      const integer wanted = (integer)value[r];                                                                        \
      const float *point = points + r / group * P * 2;                                                                 \
      _Pragma("omp simd") for (int64_t p = 0; p < P; p++) {                                                            \
        int32_t place[4];                                                                                              \
        float share[4];                                                                                                \
        pixels_at((int32_t)h, (int32_t)w, point[2 * p], point[2 * p + 1], place, share);                               \
        output[r * P + p] = ((ids[place[0]] == wanted ? share[0] : 0) + (ids[place[1]] == wanted ? share[1] : 0)) +    \
                            ((ids[place[2]] == wanted ? share[2] : 0) + (ids[place[3]] == wanted ? share[3] : 0));     \
      }                                                                                                                \
    }                                                                                                                  \
  }
EQUAL(equal_1, uint8_t)
EQUAL(equal_4, int32_t)

/* Uniform draws of m2f.draws: keys (2, R) low and high words, output (R, count); rows [begin, end). */

INLINE uint32_t finalised(uint32_t x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

INLINE void draw_row(uint32_t low, uint32_t high, float *row, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++)
    row[i] = (float)(int32_t)(finalised(finalised((uint32_t)i ^ low) + high) >> 8) * 0x1p-24f;
}

void draw(const uint32_t *keys, float *output, int64_t rows, int64_t count, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) draw_row(keys[r], keys[rows + r], output + r * count, count);
}

/* The `wanted`-th smallest (from 1) of floats without sign, given as their bits, which sort alike; and how many are
   smaller. Digit by digit from the highest: 12, 10 and 10 bits. NaN counts as the largest. */
static uint32_t nth_smallest(const uint32_t *bits, int64_t count, int64_t wanted, int64_t *smaller) {
  static const int shifts[3] = {20, 10, 0};
  uint32_t found = 0, known = 0;
  *smaller = 0;
  for (int digit = 0; digit < 3; digit++) {
    const uint32_t size = digit ? 1u << 10 : 1u << 12;
    int32_t held[1 << 12] = {0};
    for (int64_t i = 0; i < count; i++)
      if ((bits[i] & known) == found) held[bits[i] >> shifts[digit] & (size - 1)]++;
    uint32_t value = 0;
    while (*smaller + held[value] < wanted) *smaller += held[value++];
    found |= value << shifts[digit];
    known |= (size - 1) << shifts[digit];
  }
  return found;
}

/* m2f.points.uncertain_points: of `candidates` drawn points of every row the `certain` at which |map| is smallest, the
   earlier where they are equal, then the drawn points after the candidates: output (R, points, 2). 0: there was no
   memory for the draws. */
int uncertain(const float *maps, const uint32_t *keys, float *output, int64_t rows, int64_t h, int64_t w,
               int64_t candidates, int64_t certain, int64_t points, int64_t begin, int64_t end) {
  const int64_t drawn = candidates + points - certain;
  float *point = malloc((2 * drawn + candidates) * sizeof(float));
  if (!point) return 0;
  uint32_t *bits = (uint32_t *)(point + 2 * drawn);
  for (int64_t r = begin; r < end; r++) {
    const float *map = maps + r * h * w;
    float *chosen = output + r * points * 2;
    draw_row(keys[r], keys[rows + r], point, 2 * drawn);
#pragma omp simd
    for (int64_t p = 0; p < candidates; p++) {
      int32_t place[4];
      float share[4];
      pixels_at((int32_t)h, (int32_t)w, point[2 * p], point[2 * p + 1], place, share);
      union { float number; uint32_t bits; } doubt;
      doubt.number = (share[0] * map[place[0]] + share[1] * map[place[1]]) + (share[2] * map[place[2]] + share[3] * map[place[3]]);
      bits[p] = doubt.bits & 0x7FFFFFFFu;
    }
    int64_t smaller, taken = 0;
    const uint32_t limit = certain ? nth_smallest(bits, candidates, certain, &smaller) : 0;
    int64_t equal = certain - (certain ? smaller : 0);
    for (int64_t p = 0; p < candidates && taken < certain; p++)
      if (bits[p] < limit || (bits[p] == limit && equal-- > 0)) {
        chosen[2 * taken] = point[2 * p];
        chosen[2 * taken++ + 1] = point[2 * p + 1];
      }
    for (int64_t i = 2 * candidates; i < 2 * drawn; i++) chosen[2 * certain + i - 2 * candidates] = point[i];
  }
  free(point);
  return 1;
}

/* Matching costs and losses of mask logits x at points: with s = sigmoid(x) and a true mask t, the mean over the points of
   softplus(x) - t x, and 1 - (2 sum(s t) + 1) / (sum(s) + sum(t) + 1). */

enum { POINTS_AT_ONCE = 512, QUERIES_AT_ONCE = 4 };

/* exp(-x) of x >= 0 within some 1e-7 of itself: 2^-n times the exponential series of the rest, |rest| <= ln(2) / 2. */
INLINE float exp_of_minus(float x) {
  x = x < 87 ? x : 87; /* about 1e-38, the end of the floats */
  const float n = floorf(x * 1.44269504f + 0.5f);
  const float rest = (n * 0.693359375f - x) + n * -2.12194440e-4f; /* ln(2) in two parts: the first product is exact */
  float series = 1.0f / 5040;
  series = series * rest + 1.0f / 720;
  series = series * rest + 1.0f / 120;
  series = series * rest + 1.0f / 24;
  series = series * rest + 1.0f / 6;
  series = series * rest + 0.5f;
  series = series * rest + 1;
  series = series * rest + 1;
  union { int32_t bits; float number; } power;
  power.bits = (127 - (int32_t)n) << 23;
  return power.number * series;
}

/* log(1 + x) of 0 <= x <= 1, as 2 artanh(x / (2 + x)) by its series: the argument is at most 1 / 3. */
INLINE float log_of_1_plus(float x) {
  const float ratio = x / (2 + x), square = ratio * ratio;
  float series = 1.0f / 15;
  series = series * square + 1.0f / 13;
  series = series * square + 1.0f / 11;
  series = series * square + 1.0f / 9;
  series = series * square + 1.0f / 7;
  series = series * square + 1.0f / 5;
  series = series * square + 1.0f / 3;
  series = series * square + 1;
  return 2 * ratio * series;
}

INLINE float sigmoid_of(float x, float exp_of_minus_abs) { return (x >= 0 ? 1 : exp_of_minus_abs) / (1 + exp_of_minus_abs); }

INLINE void values_at(const float *map, const float *point, float *x, int64_t h, int64_t w, int64_t count) {
  for (int64_t p = 0; p < count; p++) {
    int32_t place[4];
    float share[4];
    pixels_at((int32_t)h, (int32_t)w, point[2 * p], point[2 * p + 1], place, share);
    x[p] = (share[0] * map[place[0]] + share[1] * map[place[1]]) + (share[2] * map[place[2]] + share[3] * map[place[3]]);
  }
}

/* The costs of every query and true mask. Masks at points are rows of `masks` (B, T, P) with sums `areas` (B, T); maps (B, Q, h, w), points (B, P, 2); output: the
   mean cross entropy and the dice cost of every pair, both (B, Q, T). Parts [begin, end) of QUERIES_AT_ONCE queries of one
   image; `sums` has 2 * QUERIES_AT_ONCE * T zeros for each. */
INLINE void costs_of_part(const float *const map[QUERIES_AT_ONCE], const float *points, const float *masks, double *sums,
                          double softplus[QUERIES_AT_ONCE], double inside[QUERIES_AT_ONCE], int64_t T, int64_t h, int64_t w,
                          int64_t P) {
  float x[QUERIES_AT_ONCE][POINTS_AT_ONCE], s[QUERIES_AT_ONCE][POINTS_AT_ONCE];
  for (int64_t first = 0; first < P; first += POINTS_AT_ONCE) {
    const int64_t count = P - first < POINTS_AT_ONCE ? P - first : POINTS_AT_ONCE;
    const float *point = points + first * 2;
#pragma omp simd
    for (int64_t p = 0; p < count; p++) {
      int32_t place[4];
      float share[4];
      pixels_at((int32_t)h, (int32_t)w, point[2 * p], point[2 * p + 1], place, share);
      for (int q = 0; q < QUERIES_AT_ONCE; q++)
        x[q][p] = (share[0] * map[q][place[0]] + share[1] * map[q][place[1]]) +
                  (share[2] * map[q][place[2]] + share[3] * map[q][place[3]]);
    }
    for (int q = 0; q < QUERIES_AT_ONCE; q++) {
      float plus = 0, area = 0;
#pragma omp simd reduction(+ : plus, area)
      for (int64_t p = 0; p < count; p++) {
        const float power = exp_of_minus(fabsf(x[q][p]));
        s[q][p] = sigmoid_of(x[q][p], power);
        area += s[q][p];
        plus += (x[q][p] > 0 ? x[q][p] : 0) + log_of_1_plus(power);
      }
      softplus[q] += plus, inside[q] += area;
    }
    for (int64_t t = 0; t < T; t++) {
      const float *mask = masks + t * P + first;
      float x0 = 0, x1 = 0, x2 = 0, x3 = 0, s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : x0, x1, x2, x3, s0, s1, s2, s3)
      for (int64_t p = 0; p < count; p++) {
        x0 += mask[p] * x[0][p], s0 += mask[p] * s[0][p];
        x1 += mask[p] * x[1][p], s1 += mask[p] * s[1][p];
        x2 += mask[p] * x[2][p], s2 += mask[p] * s[2][p];
        x3 += mask[p] * x[3][p], s3 += mask[p] * s[3][p];
      }
      double *sum = sums + t * 2 * QUERIES_AT_ONCE;
      sum[0] += x0, sum[1] += x1, sum[2] += x2, sum[3] += x3;
      sum[4] += s0, sum[5] += s1, sum[6] += s2, sum[7] += s3;
    }
  }
}

void mask_costs(const float *maps, const float *points, const float *masks, const float *areas, double *sums,
                float *entropy, float *dice, int64_t Q, int64_t T, int64_t h, int64_t w, int64_t P, int64_t begin,
                int64_t end) {
  const int64_t parts = (Q + QUERIES_AT_ONCE - 1) / QUERIES_AT_ONCE;
  for (int64_t part = begin; part < end; part++) {
    const int64_t image = part / parts, first = part % parts * QUERIES_AT_ONCE;
    const float *map[QUERIES_AT_ONCE];
    double *sum = sums + part * 2 * QUERIES_AT_ONCE * T, softplus[QUERIES_AT_ONCE] = {0}, inside[QUERIES_AT_ONCE] = {0};
    for (int64_t q = 0; q < QUERIES_AT_ONCE; q++) /* the last part may have fewer: its last one fills the places */
      map[q] = maps + (image * Q + (first + q < Q ? first + q : Q - 1)) * h * w;
    costs_of_part(map, points + image * P * 2, masks + image * T * P, sum, softplus, inside, T, h, w, P);
    for (int64_t q = 0; q < QUERIES_AT_ONCE && first + q < Q; q++)
      for (int64_t t = 0; t < T; t++) {
        const double product = sum[t * 2 * QUERIES_AT_ONCE + q], overlap = sum[(t * 2 + 1) * QUERIES_AT_ONCE + q];
        const int64_t pair = (image * Q + first + q) * T + t;
        entropy[pair] = (float)((softplus[q] - product) / P);
        dice[pair] = (float)(1 - (2 * overlap + 1) / (inside[q] + areas[image * T + t] + 1));
      }
  }
}

/* The losses of pairs [begin, end): maps (R, h, w), points (R, P, 2), masks at the points (R, P); output: mean cross entropy
   and dice (R), and for the gradient sum(s t) and sum(s) + sum(t) + 1 (R, 2). */
void mask_losses(const float *maps, const float *points, const float *masks, float *entropy, float *dice, double *sums,
                 int64_t h, int64_t w, int64_t P, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const float *map = maps + r * h * w;
    double loss = 0, overlap = 0, area = 1;
    for (int64_t first = 0; first < P; first += POINTS_AT_ONCE) {
      const int64_t count = P - first < POINTS_AT_ONCE ? P - first : POINTS_AT_ONCE;
      const float *point = points + (r * P + first) * 2, *mask = masks + r * P + first;
      float x[POINTS_AT_ONCE], in_loss = 0, in_overlap = 0, in_area = 0;
      values_at(map, point, x, h, w, count);
#pragma omp simd reduction(+ : in_loss, in_overlap, in_area)
      for (int64_t p = 0; p < count; p++) {
        const float power = exp_of_minus(fabsf(x[p])), s = sigmoid_of(x[p], power);
        in_loss += (x[p] > 0 ? x[p] : 0) - mask[p] * x[p] + log_of_1_plus(power);
        in_overlap += mask[p] * s;
        in_area += mask[p] + s;
      }
      loss += in_loss, overlap += in_overlap, area += in_area;
    }
    entropy[r] = (float)(loss / P);
    dice[r] = (float)(1 - (2 * overlap + 1) / area);
    sums[2 * r] = overlap, sums[2 * r + 1] = area;
  }
}

/* Their gradient: of the losses (R) each, to the maps (R, h, w), which must be 0 before. */
void mask_losses_backward(const float *maps, const float *points, const float *masks, const double *sums,
                          const float *to_entropy, const float *to_dice, float *to_maps, int64_t h, int64_t w, int64_t P,
                          int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const float *map = maps + r * h * w;
    float *to_map = to_maps + r * h * w;
    const double area = sums[2 * r + 1];
    const float by_loss = to_entropy[r] / P, by_overlap = (float)(-2 * to_dice[r] / area);
    const float by_area = (float)(to_dice[r] * (2 * sums[2 * r] + 1) / (area * area));
    for (int64_t first = 0; first < P; first += POINTS_AT_ONCE) {
      const int64_t count = P - first < POINTS_AT_ONCE ? P - first : POINTS_AT_ONCE;
      const float *point = points + (r * P + first) * 2, *mask = masks + r * P + first;
      float x[POINTS_AT_ONCE];
      values_at(map, point, x, h, w, count);
#pragma omp simd
      for (int64_t p = 0; p < count; p++) {
        const float s = sigmoid_of(x[p], exp_of_minus(fabsf(x[p])));
        x[p] = by_loss * (s - mask[p]) + (by_overlap * mask[p] + by_area) * s * (1 - s);
      }
      for (int64_t p = 0; p < count; p++) {
        int32_t place[4];
        float share[4];
        pixels_at((int32_t)h, (int32_t)w, point[2 * p], point[2 * p + 1], place, share);
        for (int c = 0; c < 4; c++) to_map[place[c]] += share[c] * x[p];
      }
    }
  }
}
