/* check: one step against the reference tensors, bit for bit. dump FILE: all its tensors as they are in memory.
 * time [SECONDS]: multiply-adds per clock. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include "net.h"
#include "reference.h"
#if defined(__linux__)
#include <linux/perf_event.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <x86intrin.h>
#endif

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Clocks of the processor by its own counter, of this thread; where that is not allowed, of the time stamp counter. */
static int counter = -1;
static const char *open_counter(void) {
#if defined(__linux__)
  struct perf_event_attr attr = {.type = PERF_TYPE_HARDWARE, .size = sizeof attr, .config = PERF_COUNT_HW_CPU_CYCLES};
  attr.exclude_kernel = attr.exclude_hv = 1;
  counter = (int)syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0);
  if (counter >= 0) return "cycles of the core, of the first thread";
#endif
#if defined(__x86_64__)
  return "time stamp counter";
#else
  return "";
#endif
}
static double clocks(void) {
#if defined(__linux__)
  long long count;
  if (counter >= 0 && read(counter, &count, sizeof count) == sizeof count) return (double)count;
#endif
#if defined(__x86_64__)
  return (double)__rdtsc();
#else
  return 0;
#endif
}

static float reference_loss;
static elem input[sizeof reference_input / sizeof(elem)];
static void one_step(void) {
  net_init();
  memcpy(input, reference_input, sizeof input);
  reference_loss = net_step(input, reference_target, REFERENCE_RATE, REFERENCE_DECAY);
}

static int compare(const reference_tensor *wanted, int count) {
  for (int t = 0; t < count; t++)
    for (int f = 0; f < net_tensor_count; f++) {
      if (strcmp(net_tensors[f].name, wanted[t].name)) continue;
      for (int i = 0; i < net_tensors[f].count; i++)
        if (memcmp(net_tensors[f].data + i, wanted[t].bits + i, sizeof(elem))) {
          printf("%s[%d] differs from the reference\n", wanted[t].name, i);
          return 1;
        }
    }
  return 0;
}
static int check(void) {
  for (int r = 0; r < reference_count; r++) {
    if (references[r].type != TYPE || references[r].lanes != LANES || references[r].fused != FUSED) continue;
    one_step();
    if (float_bits(reference_loss) != references[r].loss) {
      printf("the loss is %a, which the reference doesn't have\n", reference_loss);
      return 1;
    }
    if (compare(references[r].tensors, references[r].count)) return 1;
    printf("%d tensors and the loss equal to the reference, bit for bit\n", references[r].count);
    return 0;
  }
  printf("no reference for TYPE=%d LANES=%d FUSED=%d; reference.h names what there is\n", TYPE, LANES, FUSED);
  return 1;
}
static int dump(const char *name) {
  one_step();
  FILE *file = fopen(name, "wb");
  if (!file) return perror(name), 1;
  size_t bad = fwrite(&reference_loss, 4, 1, file) != 1;
  for (int f = 0; f < net_tensor_count; f++)
    bad += fwrite(net_tensors[f].data, sizeof(elem), (size_t)net_tensors[f].count, file) != (size_t)net_tensors[f].count;
  return fclose(file) || bad;
}
static int timed(double least) {
  const char *unit = open_counter();
  one_step();
  double start = seconds(), first = clocks(), now;
  long steps = 0;
  do {
    net_step(input, reference_target, 0.0f, 0.0f);
    steps++;
    now = seconds();
  } while (now - start < least || steps < 3);
  double spent = (clocks() - first) / (double)steps;
  printf("{\"type\": %d, \"lanes\": %d, \"unroll\": %d, \"cores\": %d, \"fused\": %d, \"steps\": %ld, ", TYPE, LANES, UNROLL,
         CORES, FUSED, steps);
  printf("\"mac\": %ld, \"clocks\": %.1f, \"clock\": \"%s\", \"seconds\": %.9f, \"mac_per_clock\": %.6f}\n", net_mac, spent, unit,
         (now - start) / (double)steps, spent > 0 ? (double)net_mac / spent : 0.0);
  return 0;
}

int main(int count, char **words) {
  if (!number_check()) {
    fprintf(stderr, "this build doesn't round every operation: compile with -ffp-contract=off -fexcess-precision=16\n");
    return 3;
  }
  if (count == 2 && !strcmp(words[1], "check")) return check();
  if (count == 3 && !strcmp(words[1], "dump")) return dump(words[2]);
  if (count >= 2 && !strcmp(words[1], "time")) return timed(count > 2 ? atof(words[2]) : 1.0);
  fprintf(stderr, "usage: %s check | dump FILE | time [SECONDS]\n", words[0]);
  return 2;
}
