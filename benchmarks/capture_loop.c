/* The load of benchmarks/capture.py. usage: capture_loop CPUS
 * For each line "BATCHES PACE" on standard input, CPUS pinned threads make BATCHES batches of 1000 getppid calls each, a batch
 * beginning PACE nanoseconds after the one before (0: at once), and the
 * answer is one line: for each thread the 10th percentile of its batches in picoseconds a call (so that batches in which the
 * thread was preempted do not count), then the number of calls made in all and the nanoseconds it took. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define CALLS 1000
#define BATCHES_MAX 400000
static long batches, pace, cpus;
static long result[64];
static pthread_barrier_t begin, end;

static long now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000L + t.tv_nsec;
}

static int ascending(const void *a, const void *b) {
  long x = *(const long *)a, y = *(const long *)b;
  return (x > y) - (x < y);
}

static void *run(void *argument) {
  long cpu = (long)argument, *times = malloc(BATCHES_MAX * sizeof *times);
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  sched_setaffinity(0, sizeof set, &set);
  for (;;) {
    pthread_barrier_wait(&begin);
    long start = now();
    for (long b = 0; b < batches; b++) {
      long from = now();
      if (from < start + b * pace) {
        struct timespec nap = {0, start + b * pace - from};
        nanosleep(&nap, NULL);
        from = now();
      }
      for (int i = 0; i < CALLS; i++)
        syscall(SYS_getppid);
      times[b] = now() - from;
    }
    qsort(times, batches, sizeof *times, ascending);
    result[cpu] = times[batches / 10] * 1000 / CALLS;
    pthread_barrier_wait(&end);
  }
  return NULL;
}

int main(int argc, char **argv) {
  char line[64];
  cpus = argc > 1 ? atol(argv[1]) : 1;
  pthread_barrier_init(&begin, NULL, cpus + 1);
  pthread_barrier_init(&end, NULL, cpus + 1);
  for (long cpu = 0; cpu < cpus; cpu++) {
    pthread_t thread;
    pthread_create(&thread, NULL, run, (void *)cpu);
  }
  while (fgets(line, sizeof line, stdin)) {
    long from;
    pace = 0;
    sscanf(line, "%ld %ld", &batches, &pace);
    if (batches > BATCHES_MAX)
      batches = BATCHES_MAX;
    from = now();
    pthread_barrier_wait(&begin);
    pthread_barrier_wait(&end);
    from = now() - from;
    for (long cpu = 0; cpu < cpus; cpu++)
      printf("%ld ", result[cpu]);
    printf("%ld %ld\n", cpus * batches * CALLS, from);
    fflush(stdout);
  }
  return 0;
}
