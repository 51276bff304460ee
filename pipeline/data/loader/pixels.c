/* Loops over pixels for which OpenCV's operations pass over memory many times. Their results equal OpenCV's, to the bit
   (pipeline.data.loader.pixels compares before it uses them). */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* Red, green and blue to hue, saturation and value as OpenCV has them (hue 0 to 179), there the saturation times a
   factor, truncated, or else the hue turned by 0 to 179, and back. Choices are masks: branches would keep the loop from
   being made of vectors. */
INLINE void change(uint8_t *restrict red, uint8_t *restrict green, uint8_t *restrict blue, int64_t n,
                   const int saturate, float factor, int by) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const int r = red[i], g = green[i], b = blue[i];
    const int more = g > b ? g : b, less = g < b ? g : b;
    const int value = r > more ? r : more, range = value - (r < less ? r : less);
    /* OpenCV's tables of 255 / value and 30 / range, in 1 / 4096, rounded */
    const int per_value = (int)(1044480.0f / (float)(value ? value : 1) + 0.5f);
    const int per_range = (int)(122880.0f / (float)(range ? range : 1) + 0.5f);
    const int turned = value == r ? g - b : value == g ? b - r + 2 * range : r - g + 4 * range;
    int hue = (turned * per_range + 2048) >> 12, saturation = (range * per_value + 2048) >> 12;
    hue += hue < 0 ? 180 : 0;
    if (saturate) {
      const float product = (float)saturation * factor;
      saturation = (int)(product > 255 ? 255 : product);
    } else {
      hue += by;
      hue -= hue >= 180 ? 180 : 0;
    }
    const float sixths = (float)hue * (6.0f / 180.0f), s = (float)saturation * (1.0f / 255.0f);
    const float v = (float)value * (1.0f / 255.0f);
    const int sector = (int)sixths;
    const float part = sixths - (float)sector, across = sector & 1 ? part : 1.0f - part;
    const int top = (int)(v * 255.0f), low = (int)(v * (1.0f - s) * 255.0f);
    const int slope = (int)(v * fmaf(-s, across, 1.0f) * 255.0f);
    const int red_top = -((sector == 0) | (sector == 5)), red_low = -((sector == 2) | (sector == 3));
    const int green_top = -((sector == 1) | (sector == 2)), green_low = -(sector >= 4);
    const int blue_top = -((sector == 3) | (sector == 4)), blue_low = -(sector <= 1);
    red[i] = (uint8_t)((top & red_top) | (low & red_low) | (slope & ~(red_top | red_low)));
    green[i] = (uint8_t)((top & green_top) | (low & green_low) | (slope & ~(green_top | green_low)));
    blue[i] = (uint8_t)((top & blue_top) | (low & blue_low) | (slope & ~(blue_top | blue_low)));
  }
}

/* Planes of red, green and blue, `plane` bytes apart, of rows that are `line` bytes apart; what is in them is replaced.
   Row by row, so that what one step has made is at hand for the next. */
void distort(uint8_t *planes, int64_t rows, int64_t width, int64_t plane, int64_t line, int64_t saturates, float factor,
             int64_t turns, int64_t by) {
  for (int64_t row = 0; row < rows; row++, planes += line) {
    if (saturates) change(planes, planes + plane, planes + 2 * plane, width, 1, factor, 0);
    if (turns) change(planes, planes + plane, planes + 2 * plane, width, 0, 0, (int)by);
  }
}

/* How often each of 256 values is there, in rows that are `line` bytes apart. Maps of labels hold long runs. */
void count(const uint8_t *ids, int64_t *counts, int64_t rows, int64_t width, int64_t line) {
  const uint64_t everywhere = 0x0101010101010101u;
  memset(counts, 0, 256 * sizeof *counts);
  for (int64_t row = 0; row < rows; row++, ids += line) {
    uint64_t run = ids[0] * everywhere, eight;
    int64_t j = 0;
    for (; j + 8 <= width; j += 8) {
      memcpy(&eight, ids + j, 8);
      if (eight == run) {
        counts[ids[j]] += 8;
        continue;
      }
      for (int k = 0; k < 8; k++) counts[ids[j + k]]++;
      run = ids[j + 7] * everywhere;
    }
    for (; j < width; j++) counts[ids[j]]++;
  }
}
