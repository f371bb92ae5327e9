/* A storm of system calls with its own count: usage: storm CPUS CALLS
 * For every line on standard input each of CPUS threads, pinned to its own processor, makes CALLS getppid system calls; then
 * the number of calls made in all is answered on one line. Threads wait between storms by spinning on memory only, so
 * that nothing but the calls themselves enters the kernel: read and write of the lines are the main thread's. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static long calls;
static pthread_barrier_t begin, end;

static void storm(void) {
  for (long i = 0; i < calls; i++)
    syscall(SYS_getppid);
}

static void *run(void *cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET((long)cpu, &set);
  sched_setaffinity(0, sizeof set, &set);
  for (;;) {
    pthread_barrier_wait(&begin);
    storm();
    pthread_barrier_wait(&end);
  }
  return NULL;
}

int main(int argc, char **argv) {
  char line[64];
  long cpus = atol(argv[1]);
  calls = atol(argv[2]);
  pthread_barrier_init(&begin, NULL, cpus + 1);
  pthread_barrier_init(&end, NULL, cpus + 1);
  for (long cpu = 0; cpu < cpus; cpu++) {
    pthread_t thread;
    pthread_create(&thread, NULL, run, (void *)cpu);
  }
  while (read(0, line, sizeof line) > 0) {
    int n;
    pthread_barrier_wait(&begin);
    pthread_barrier_wait(&end);
    n = snprintf(line, sizeof line, "%ld\n", cpus * calls);
    if (write(1, line, n) != n)
      return 1;
  }
  return 0;
}
