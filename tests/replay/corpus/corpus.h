/* Small programs, one per corner of the kernel's interface, for "record equals replay equals native".
 * A source file holds many cases; `./FILE CASE` runs one in a fresh folder of its own and ends with EXIT-SUCCESS.
 * `./FILE` lists the cases. What a case prints must be the same on every native run. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static inline void fail(const char *where, int line, const char *what) {
  dprintf(1, "FAILED %s:%d: %s (errno %d %s)\n", where, line, what, errno, strerror(errno));
  _exit(99);
}
#define CHECK(condition) ((condition) ? (void)0 : fail(__FILE__, __LINE__, #condition))

struct test_case {
  const char *name;
  void (*run)(void);
};

static inline void say(const char *text) { CHECK(write(1, text, strlen(text)) == (ssize_t)strlen(text)); }

static inline void nap_ms(long ms) {
  struct timespec t = {ms / 1000, ms % 1000 * 1000000};
  while (nanosleep(&t, &t) == -1 && errno == EINTR) {
  }
}

static inline int finish_of(pid_t pid) {
  int status = 0;
  pid_t got;
  do got = waitpid(pid, &status, 0);
  while (got == -1 && errno == EINTR);
  CHECK(got == pid);
  return status;
}

static inline void on(int number, void (*handler)(int), int flags) {
  struct sigaction action = {.sa_handler = handler, .sa_flags = flags};
  CHECK(sigaction(number, &action, NULL) == 0);
}

#define MAIN(...)                                                             \
  int main(int argc, char **argv) {                                           \
    static const struct test_case cases[] = {__VA_ARGS__};                    \
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {               \
      if (argc < 2) puts(cases[i].name);                                      \
      else if (!strcmp(argv[1], cases[i].name)) {                             \
        char folder[] = "case-XXXXXX";                                        \
        CHECK(mkdtemp(folder) && chdir(folder) == 0);                         \
        cases[i].run();                                                       \
        say("EXIT-SUCCESS\n");                                                \
        return 0;                                                             \
      }                                                                       \
    }                                                                         \
    return argc < 2 ? 0 : 98;                                                 \
  }
#define C(name) {#name, name}
