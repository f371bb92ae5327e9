#include "corpus.h"
#include <setjmp.h>
#include <sys/signalfd.h>
#include <ucontext.h>

static volatile sig_atomic_t hits;
static volatile int last_code, last_value;
static void count(int n) { (void)n; hits++; }
static void info(int n, siginfo_t *s, void *u) {
  (void)n, (void)u;
  hits++, last_code = s->si_code, last_value = s->si_value.sival_int;
}
static void on_info(int number, int flags) {
  struct sigaction action = {.sa_sigaction = info, .sa_flags = SA_SIGINFO | flags};
  CHECK(sigaction(number, &action, NULL) == 0);
}

static void alarm_pause(void) {
  on(SIGALRM, count, 0);
  alarm(1);
  CHECK(alarm(1) == 1);
  CHECK(pause() == -1 && errno == EINTR && hits == 1);
}
static void itimer_loop(void) {
  on(SIGALRM, count, 0);
  struct itimerval it = {{0, 5000}, {0, 5000}};
  CHECK(setitimer(ITIMER_REAL, &it, NULL) == 0);
  volatile unsigned long spin = 0;
  while (hits < 5) spin++;
  struct itimerval old;
  memset(&it, 0, sizeof it);
  CHECK(setitimer(ITIMER_REAL, &it, &old) == 0 && old.it_interval.tv_usec == 5000);
}
static void itimer_virtual(void) {
  on(SIGVTALRM, count, 0);
  struct itimerval it = {{0, 0}, {0, 10000}};
  CHECK(setitimer(ITIMER_VIRTUAL, &it, NULL) == 0);
  while (!hits) getppid();
}
static void spin_with_calls(void) {
  on(SIGALRM, count, 0);
  struct itimerval it = {{0, 0}, {0, 20000}};
  CHECK(setitimer(ITIMER_REAL, &it, NULL) == 0);
  while (!hits) getppid();
}
static void posix_timer(void) {
  on_info(SIGRTMIN + 1, 0);
  timer_t id;
  struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 1, .sigev_value.sival_int = 77};
  CHECK(timer_create(CLOCK_MONOTONIC, &event, &id) == 0);
  struct itimerspec ts = {{0, 2000000}, {0, 2000000}}, left;
  CHECK(timer_settime(id, 0, &ts, NULL) == 0);
  while (hits < 3) nap_ms(1);
  CHECK(last_code == SI_TIMER && last_value == 77);
  CHECK(timer_gettime(id, &left) == 0 && left.it_interval.tv_nsec == 2000000);
  CHECK(timer_getoverrun(id) >= 0 && timer_delete(id) == 0);
  CHECK(timer_delete((timer_t)12345) == -1);
}
static void *timer_thread(union sigval v) { hits += v.sival_int; return NULL; }
static void posix_timer_thread(void) {
  timer_t id;
  struct sigevent event = {.sigev_notify = SIGEV_THREAD, .sigev_notify_function = (void (*)(union sigval))timer_thread,
                           .sigev_value.sival_int = 3};
  CHECK(timer_create(CLOCK_REALTIME, &event, &id) == 0);
  struct itimerspec ts = {{0, 0}, {0, 3000000}};
  CHECK(timer_settime(id, 0, &ts, NULL) == 0);
  while (hits != 3) nap_ms(2);
}
static void sleep_restart(void) {
  on(SIGUSR1, count, SA_RESTART);
  pid_t parent = getpid(), child = fork();
  if (!child) {
    for (int i = 0; i < 3; i++) nap_ms(5), kill(parent, SIGUSR1);
    _exit(0);
  }
  struct timespec t = {0, 60000000}, left = {0, 0};
  int interrupted = 0;
  while (nanosleep(&t, &left) == -1) t = left, interrupted++;
  CHECK(finish_of(child) == 0);
  CHECK(interrupted == 3 && hits == 3);
}
static void absolute_sleep(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  t.tv_nsec += 3000000;
  if (t.tv_nsec >= 1000000000) t.tv_sec++, t.tv_nsec -= 1000000000;
  CHECK(clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == 0);
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  CHECK(now.tv_sec > t.tv_sec || (now.tv_sec == t.tv_sec && now.tv_nsec >= t.tv_nsec));
}
static void read_restarted(int flags, int expect_eintr) {
  int p[2];
  CHECK(pipe(p) == 0);
  on(SIGUSR1, count, flags);
  pid_t parent = getpid(), child = fork();
  if (!child) {
    nap_ms(10), kill(parent, SIGUSR1), nap_ms(10);
    CHECK(write(p[1], "x", 1) == 1);
    _exit(0);
  }
  char c = 0;
  ssize_t n = read(p[0], &c, 1);
  if (expect_eintr) CHECK(n == -1 && errno == EINTR);
  else CHECK(n == 1 && c == 'x');
  CHECK(hits == 1);
  if (expect_eintr) CHECK(read(p[0], &c, 1) == 1);
  CHECK(finish_of(child) == 0);
}
static void read_restart(void) { read_restarted(SA_RESTART, 0); }
static void read_no_restart(void) { read_restarted(0, 1); }
static void poll_interrupted(void) {
  on(SIGALRM, count, SA_RESTART);
  struct itimerval it = {{0, 0}, {0, 5000}};
  int p[2];
  CHECK(pipe(p) == 0);
  CHECK(setitimer(ITIMER_REAL, &it, NULL) == 0);
  struct pollfd f = {p[0], POLLIN, 0};
  CHECK(poll(&f, 1, -1) == -1 && errno == EINTR);
  CHECK(setitimer(ITIMER_REAL, &it, NULL) == 0);
  struct timespec t = {5, 0};
  CHECK(ppoll(&f, 1, &t, NULL) == -1 && errno == EINTR);
  CHECK(setitimer(ITIMER_REAL, &it, NULL) == 0);
  fd_set set;
  FD_ZERO(&set);
  FD_SET(p[0], &set);
  CHECK(select(p[0] + 1, &set, NULL, NULL, NULL) == -1 && errno == EINTR);
  CHECK(hits == 3);
}
static void ignored_does_not_interrupt(void) {
  signal(SIGUSR1, SIG_IGN);
  pid_t parent = getpid(), child = fork();
  if (!child) {
    for (int i = 0; i < 3; i++) nap_ms(3), kill(parent, SIGUSR1);
    _exit(0);
  }
  struct pollfd f = {-1, 0, 0};
  CHECK(poll(&f, 1, 40) == 0);
  CHECK(finish_of(child) == 0);
}
static void wait_interrupted_by_sigchld(void) {
  on(SIGCHLD, count, 0);
  pid_t child = fork();
  if (!child) nap_ms(5), _exit(7);
  int n = 0;
  while (usleep(200000) == -1 && errno == EINTR && !n) n = hits;
  CHECK(n == 1);
  CHECK(WEXITSTATUS(finish_of(child)) == 7);
}
static void altstack(void) {
  static char stack[65536];
  stack_t s = {.ss_sp = stack, .ss_size = sizeof stack}, old;
  CHECK(sigaltstack(&s, NULL) == 0);
  on(SIGUSR1, count, SA_ONSTACK);
  raise(SIGUSR1);
  CHECK(sigaltstack(NULL, &old) == 0 && old.ss_sp == stack && old.ss_size == sizeof stack);
  CHECK(hits == 1);
}
static sigjmp_buf jump;
static void jump_out(int n) { siglongjmp(jump, n); }
static int recurse(int n) {
  volatile char big[4096];
  big[0] = (char)n;
  return recurse(n + 1) + big[0];
}
static void stack_overflow(void) {
  static char stack[65536];
  stack_t s = {.ss_sp = stack, .ss_size = sizeof stack};
  CHECK(sigaltstack(&s, NULL) == 0);
  on(SIGSEGV, jump_out, SA_ONSTACK);
  struct rlimit limit = {1 << 20, RLIM_INFINITY};
  setrlimit(RLIMIT_STACK, &limit);
  if (!sigsetjmp(jump, 1)) recurse(0);
  say("caught\n");
}
static void segv_handler(void) {
  on(SIGSEGV, jump_out, 0);
  on(SIGFPE, jump_out, 0);
  on(SIGILL, jump_out, 0);
  on(SIGTRAP, jump_out, 0);
  on(SIGBUS, jump_out, 0);
  volatile int zero = 0;
  if (!sigsetjmp(jump, 1)) *(volatile int *)16 = 1;
  if (!sigsetjmp(jump, 1)) zero = 1 / zero;
  if (!sigsetjmp(jump, 1)) __asm__ volatile("ud2");
  if (!sigsetjmp(jump, 1)) __asm__ volatile("int3");
  if (!sigsetjmp(jump, 1)) ((void (*)(void))0)();
  say("all caught\n");
}
static void fixup(int n, siginfo_t *s, void *u) {
  (void)n;
  ucontext_t *c = u;
  printf("si_code %d addr %p\n", s->si_code, s->si_addr);
  fflush(stdout);
  c->uc_mcontext.gregs[REG_RAX] = (long)(intptr_t)&hits;
  hits++;
}
static void segv_fixes_register(void) {
  struct sigaction action = {.sa_sigaction = fixup, .sa_flags = SA_SIGINFO};
  CHECK(sigaction(SIGSEGV, &action, NULL) == 0);
  __asm__ volatile("mov $24, %%rax\n movl $5, (%%rax)" ::: "rax", "memory");
  CHECK(hits == 5);
}
static void queued(void) {
  on_info(SIGRTMIN, 0);
  sigset_t set, old;
  sigemptyset(&set), sigaddset(&set, SIGRTMIN);
  sigprocmask(SIG_BLOCK, &set, &old);
  for (int i = 1; i <= 3; i++) CHECK(sigqueue(getpid(), SIGRTMIN, (union sigval){.sival_int = i * 11}) == 0);
  CHECK(sigpending(&set) == 0 && sigismember(&set, SIGRTMIN));
  siginfo_t si;
  sigemptyset(&set), sigaddset(&set, SIGRTMIN);
  CHECK(sigwaitinfo(&set, &si) == SIGRTMIN && si.si_value.sival_int == 11 && si.si_code == SI_QUEUE);
  sigprocmask(SIG_SETMASK, &old, NULL);
  CHECK(hits == 2 && last_value == 33);
}
static void timed_wait(void) {
  sigset_t set;
  sigemptyset(&set), sigaddset(&set, SIGUSR1);
  sigprocmask(SIG_BLOCK, &set, NULL);
  struct timespec t = {0, 3000000};
  CHECK(sigtimedwait(&set, NULL, &t) == -1 && errno == EAGAIN);
  raise(SIGUSR1);
  int n = 0;
  CHECK(sigwait(&set, &n) == 0 && n == SIGUSR1);
}
static void signal_fd(void) {
  sigset_t set;
  sigemptyset(&set), sigaddset(&set, SIGUSR1), sigaddset(&set, SIGCHLD);
  sigprocmask(SIG_BLOCK, &set, NULL);
  int fd = signalfd(-1, &set, SFD_CLOEXEC);
  CHECK(fd >= 0);
  pid_t child = fork();
  if (!child) kill(getppid(), SIGUSR1), _exit(0);
  struct signalfd_siginfo s;
  int seen = 0;
  while (seen != 3) {
    CHECK(read(fd, &s, sizeof s) == sizeof s && s.ssi_pid == (unsigned)child);
    seen |= s.ssi_signo == SIGUSR1 ? 1 : 2;
  }
  finish_of(child);
}
static void suspend_mask(void) {
  on(SIGUSR1, count, 0);
  sigset_t set, old;
  sigemptyset(&set), sigaddset(&set, SIGUSR1);
  sigprocmask(SIG_BLOCK, &set, &old);
  pid_t child = fork();
  if (!child) nap_ms(3), kill(getppid(), SIGUSR1), _exit(0);
  sigdelset(&old, SIGUSR1);
  CHECK(sigsuspend(&old) == -1 && errno == EINTR && hits == 1);
  finish_of(child);
  raise(SIGUSR1);
  CHECK(hits == 1);
  struct timespec t = {2, 0};
  CHECK(pselect(0, NULL, NULL, NULL, &t, &old) == -1 && errno == EINTR && hits == 2);
  sigprocmask(SIG_BLOCK, NULL, &set);
  CHECK(sigismember(&set, SIGUSR1));
}
static volatile int depth, deepest;
static void nested_handler(int n) {
  if (++depth > deepest) deepest = depth;
  if (n == SIGUSR1) raise(SIGUSR2);
  if (n == SIGUSR2) raise(SIGURG);
  depth--, hits++;
}
static void nested(void) {
  on(SIGUSR1, nested_handler, 0), on(SIGUSR2, nested_handler, 0), on(SIGURG, nested_handler, 0);
  raise(SIGUSR1);
  CHECK(hits == 3 && deepest == 3);
}
static void many_pending(void) {
  for (int i = 1; i < 32; i++)
    if (i != SIGKILL && i != SIGSTOP) on(i, count, 0);
  sigset_t all, old;
  sigfillset(&all), sigprocmask(SIG_BLOCK, &all, &old);
  for (int i = 1; i < 32; i++)
    if (i != SIGKILL && i != SIGSTOP && i != SIGCONT && i != SIGTSTP && i != SIGTTIN && i != SIGTTOU) raise(i), raise(i);
  sigprocmask(SIG_SETMASK, &old, NULL);
  CHECK(hits == 25);
}
static void self_storm(void) {
  on(SIGUSR1, count, 0);
  for (int i = 0; i < 300; i++) kill(getpid(), SIGUSR1);
  CHECK(hits == 300);
}
static void parent_storm(void) {
  on(SIGUSR1, count, SA_RESTART);
  pid_t child = fork();
  if (!child) {
    for (int i = 0; i < 50; i++) kill(getppid(), SIGUSR1), sched_yield();
    _exit(0);
  }
  CHECK(finish_of(child) == 0);
  CHECK(hits > 0);
}
static void reset_hand(void) {
  on(SIGUSR1, count, SA_RESETHAND | SA_NODEFER);
  raise(SIGUSR1);
  struct sigaction now;
  sigaction(SIGUSR1, NULL, &now);
  CHECK(now.sa_handler == SIG_DFL && hits == 1);
}
static void killed_by(int number) {
  fflush(stdout);
  pid_t child = fork();
  if (!child) raise(number), _exit(0);
  int status = finish_of(child);
  printf("signal %d: %d\n", number, WIFSIGNALED(status) ? WTERMSIG(status) : -1);
  fflush(stdout);
}
static void deaths(void) {
  const int numbers[] = {SIGTERM, SIGKILL, SIGSEGV, SIGABRT, SIGPIPE, SIGALRM, SIGRTMIN, SIGQUIT, SIGXCPU, SIGSYS};
  for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) killed_by(numbers[i]);
}
static void die_abort(void) { say("before\n"); abort(); }
static void die_segv(void) { say("before\n"); *(volatile int *)8 = 1; }
static void die_kill(void) { say("before\n"); kill(getpid(), SIGKILL); }
static void die_fpe(void) { volatile int z = 0; say("before\n"); z = 3 / z; }
static void die_bus(void) {
  int fd = open("f", O_RDWR | O_CREAT, 0600);
  char *p = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
  say("before\n");
  if (*(volatile char *)p) say("?");
}
static void bad_stack_segv(void) {
  on(SIGUSR1, count, 0);
  say("before\n");
  __asm__ volatile("mov $16, %%rsp\n push %%rax" ::: "memory");
}
static void sigpipe_ignored(void) {
  int p[2];
  CHECK(pipe(p) == 0);
  close(p[0]);
  signal(SIGPIPE, SIG_IGN);
  CHECK(write(p[1], "x", 1) == -1 && errno == EPIPE);
  signal(SIGPIPE, count);
  CHECK(write(p[1], "x", 1) == -1 && errno == EPIPE && hits == 1);
}
static void stop_and_continue(void) {
  pid_t child = fork();
  if (!child) {
    raise(SIGSTOP);
    _exit(5);
  }
  int status;
  CHECK(waitpid(child, &status, WUNTRACED) == child && WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP);
  kill(child, SIGCONT);
  CHECK(waitpid(child, &status, WCONTINUED) == child && WIFCONTINUED(status));
  CHECK(WEXITSTATUS(finish_of(child)) == 5);
}
static void stop_while_sleeping(void) {
  pid_t child = fork();
  if (!child) {
    for (int i = 0; i < 4; i++) nap_ms(10);
    _exit(6);
  }
  int status;
  nap_ms(5), kill(child, SIGSTOP);
  CHECK(waitpid(child, &status, WUNTRACED) == child && WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP);
  kill(child, SIGCONT);
  CHECK(WEXITSTATUS(finish_of(child)) == 6);
}
static void stopped_then_killed(void) {
  pid_t child = fork();
  if (!child) raise(SIGSTOP), _exit(5);
  int status;
  CHECK(waitpid(child, &status, WUNTRACED) == child && WIFSTOPPED(status));
  kill(child, SIGKILL);
  CHECK(WTERMSIG(finish_of(child)) == SIGKILL);
}
static void sigcont_handler(void) {
  on(SIGCONT, count, 0);
  pid_t parent = getpid(), child = fork();
  if (!child) nap_ms(3), kill(parent, SIGCONT), _exit(0);
  while (!hits) usleep(1000);
  finish_of(child);
}
static void handler_forks(int n) {
  (void)n;
  pid_t child = fork();
  if (!child) _exit(4);
  CHECK(WEXITSTATUS(finish_of(child)) == 4);
  hits++;
}
static void fork_in_handler(void) {
  on(SIGUSR1, handler_forks, 0);
  raise(SIGUSR1), raise(SIGUSR1);
  CHECK(hits == 2);
}
static void mask_kept_over_exec(void) {
  sigset_t set;
  sigemptyset(&set), sigaddset(&set, SIGUSR2);
  sigprocmask(SIG_BLOCK, &set, NULL);
  pid_t child = fork();
  if (!child) execlp("sh", "sh", "-c", "grep SigBlk /proc/self/status", NULL), _exit(9);
  CHECK(finish_of(child) == 0);
}
static void async_in_computation(void) {
  on(SIGUSR1, count, 0);
  pid_t parent = getpid(), child = fork();
  if (!child) nap_ms(10), kill(parent, SIGUSR1), _exit(0);
  volatile double x = 1;
  for (long i = 0; i < 60000000 && !hits; i++) x = x * 1.0000001 + 0.5;
  CHECK(finish_of(child) == 0 && hits == 1);
}
static void tgkill_self(void) {
  on_info(SIGUSR1, 0);
  CHECK(syscall(SYS_tgkill, getpid(), gettid(), SIGUSR1) == 0 && hits == 1 && last_code == SI_TKILL);
  CHECK(syscall(SYS_tgkill, getpid(), 1, SIGUSR1) == -1 && errno == ESRCH);
  CHECK(kill(getpid(), 0) == 0 && kill(getpid(), 99) == -1 && errno == EINVAL);
}
static void float_state(int n) { volatile double y = 2.0 / 3; (void)n; hits += y > 0.5; }
static void handler_keeps_fpu(void) {
  on(SIGUSR1, float_state, 0);
  double a = 1.25;
  for (int i = 0; i < 20; i++) a = a * 1.1, raise(SIGUSR1);
  printf("%.12f %d\n", a, (int)hits);
  fflush(stdout);
}
static void handler_changes_context(void) {
  ucontext_t here, back;
  static char stack[32768];
  CHECK(getcontext(&here) == 0);
  here.uc_stack.ss_sp = stack, here.uc_stack.ss_size = sizeof stack, here.uc_link = &back;
  makecontext(&here, (void (*)(void))count, 1, 0);
  CHECK(swapcontext(&back, &here) == 0 && hits == 1);
}

MAIN(C(alarm_pause), C(itimer_loop), C(itimer_virtual), C(spin_with_calls), C(posix_timer), C(posix_timer_thread), C(sleep_restart),
     C(absolute_sleep), C(read_restart), C(read_no_restart), C(poll_interrupted), C(ignored_does_not_interrupt),
     C(wait_interrupted_by_sigchld), C(altstack), C(stack_overflow), C(segv_handler), C(segv_fixes_register), C(queued),
     C(timed_wait), C(signal_fd), C(suspend_mask), C(nested), C(many_pending), C(self_storm), C(parent_storm), C(reset_hand),
     C(deaths), C(die_abort), C(die_segv), C(die_kill), C(die_fpe), C(die_bus), C(bad_stack_segv), C(sigpipe_ignored),
     C(stop_and_continue), C(stop_while_sleeping), C(stopped_then_killed), C(sigcont_handler), C(fork_in_handler),
     C(mask_kept_over_exec), C(async_in_computation), C(tgkill_self), C(handler_keeps_fpu), C(handler_changes_context))
