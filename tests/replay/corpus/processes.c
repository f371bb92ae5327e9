#include "corpus.h"
#include <linux/futex.h>
#include <linux/sched.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>

extern char **environ;
static volatile int *shared;
static void share(void) {
  shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  CHECK(shared != MAP_FAILED);
}

static void fork_storm(void) {
  int sum = 0;
  pid_t pids[24];
  for (int i = 0; i < 24; i++)
    if (!(pids[i] = fork())) _exit(i);
  for (int i = 0; i < 24; i++) sum += WEXITSTATUS(finish_of(pids[i]));
  printf("%d\n", sum), fflush(stdout);
  CHECK(wait(NULL) == -1 && errno == ECHILD);
}
static void fork_tree(void) {
  for (int depth = 0; depth < 4; depth++) {
    pid_t a = fork();
    if (a) {
      CHECK(WEXITSTATUS(finish_of(a)) == 0);
      if (depth) _exit(0);
      return;
    }
  }
  _exit(0);
}
static void vforks(void) {
  volatile int touched = 0;
  for (int i = 0; i < 5; i++) {
    pid_t child = vfork();
    if (!child) touched++, _exit(3);
    CHECK(WEXITSTATUS(finish_of(child)) == 3);
  }
  CHECK(touched == 5);
}
static void vfork_exec(void) {
  pid_t child = vfork();
  if (!child) execlp("sh", "sh", "-c", "exit 9", NULL), _exit(1);
  CHECK(WEXITSTATUS(finish_of(child)) == 9);
}
static void spawns(void) {
  pid_t child;
  char *argv[] = {"echo", "spawned", NULL};
  CHECK(posix_spawnp(&child, "echo", NULL, NULL, argv, environ) == 0);
  CHECK(finish_of(child) == 0);
  CHECK(posix_spawnp(&child, "/nonexistent/program", NULL, NULL, argv, environ) == ENOENT);
}
static void systems(void) {
  CHECK(WEXITSTATUS(system("exit 5")) == 5);
  FILE *f = popen("echo from popen", "r");
  char line[64];
  CHECK(fgets(line, sizeof line, f)), say(line);
  CHECK(pclose(f) == 0);
}
static int clone_body(void *p) { *(volatile int *)p += 1; return 6; }
static void clone_share(void) {
  static char stack[65536];
  static volatile int n;
  pid_t child = clone(clone_body, stack + sizeof stack, CLONE_VM | CLONE_FS | CLONE_FILES | SIGCHLD, (void *)&n);
  CHECK(child > 0 && WEXITSTATUS(finish_of(child)) == 6 && n == 1);
  child = clone(clone_body, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD, (void *)&n);
  CHECK(child > 0 && WEXITSTATUS(finish_of(child)) == 6 && n == 2);
  child = clone(clone_body, stack + sizeof stack, SIGCHLD, (void *)&n);
  CHECK(child > 0 && WEXITSTATUS(finish_of(child)) == 6 && n == 2);
}
static void clone_no_signal(void) {
  static char stack[65536];
  static volatile int n;
  pid_t child = clone(clone_body, stack + sizeof stack, CLONE_VM, (void *)&n);
  int status;
  CHECK(child > 0 && waitpid(child, &status, __WALL) == child && WEXITSTATUS(status) == 6);
}
static void clone3_plain(void) {
  struct clone_args args = {.exit_signal = SIGCHLD};
  pid_t child = (pid_t)syscall(SYS_clone3, &args, sizeof args);
  if (!child) _exit(11);
  CHECK(child > 0 && WEXITSTATUS(finish_of(child)) == 11);
  args.flags = 1ull << 60;
  CHECK(syscall(SYS_clone3, &args, sizeof args) == -1 && errno == EINVAL);
}
static void clone_pidfd(void) {
  int fd = -1;
  struct clone_args args = {.exit_signal = SIGCHLD, .flags = CLONE_PIDFD, .pidfd = (uint64_t)(uintptr_t)&fd};
  pid_t child = (pid_t)syscall(SYS_clone3, &args, sizeof args);
  if (!child) pause(), _exit(1);
  CHECK(child > 0 && fd >= 0);
  CHECK(syscall(SYS_pidfd_send_signal, fd, SIGTERM, NULL, 0) == 0);
  struct pollfd p = {fd, POLLIN, 0};
  CHECK(poll(&p, 1, -1) == 1);
  siginfo_t si;
  CHECK(waitid(P_PIDFD, (id_t)fd, &si, WEXITED) == 0 && si.si_status == SIGTERM);
}
static void ids_in_memory(void) {
  pid_t tid = 0, ctid = 0;
  pid_t child = (pid_t)syscall(SYS_clone, CLONE_PARENT_SETTID | CLONE_CHILD_SETTID | SIGCHLD, 0, &tid, &ctid, 0);
  if (!child) _exit(ctid == getpid() ? 0 : 1);
  CHECK(tid == child && finish_of(child) == 0);
}
static void wait_variants(void) {
  int status;
  struct rusage usage;
  pid_t child = fork();
  if (!child) _exit(1);
  siginfo_t si;
  CHECK(waitid(P_PID, (id_t)child, &si, WEXITED | WNOWAIT) == 0 && si.si_pid == child && si.si_code == CLD_EXITED && si.si_status == 1);
  CHECK(wait4(child, &status, 0, &usage) == child && WEXITSTATUS(status) == 1);
  child = fork();
  if (!child) pause();
  CHECK(waitpid(child, &status, WNOHANG) == 0);
  memset(&si, 0, sizeof si);
  CHECK(waitid(P_ALL, 0, &si, WEXITED | WNOHANG) == 0 && si.si_pid == 0);
  kill(child, SIGKILL);
  CHECK(waitid(P_PGID, (id_t)getpgrp(), &si, WEXITED) == 0 && si.si_code == CLD_KILLED && si.si_status == SIGKILL);
  CHECK(waitpid(12345678, &status, 0) == -1 && errno == ECHILD);
}
static void auto_reaped(void) {
  signal(SIGCHLD, SIG_IGN);
  pid_t child = fork();
  if (!child) _exit(0);
  CHECK(wait(NULL) == -1 && errno == ECHILD);
}
static void exec_chain(void) {
  pid_t child = fork();
  if (!child) {
    char *argv[] = {"sh", "-c", "exec sh -c 'exec sh -c \"echo deep; exit 4\"'", NULL};
    execvp("sh", argv), _exit(1);
  }
  CHECK(WEXITSTATUS(finish_of(child)) == 4);
}
static void exec_fails(void) {
  char *argv[] = {"x", NULL};
  int fd = open("not-a-program", O_CREAT | O_WRONLY, 0755);
  CHECK(write(fd, "\x7f" "ELFjunk", 8) == 8), close(fd);
  CHECK(execv("/nonexistent", argv) == -1 && errno == ENOENT);
  CHECK(execv("not-a-program", argv) == -1 && errno == ENOEXEC);
  CHECK(execv(".", argv) == -1 && errno == EACCES);
  fd = open("script", O_CREAT | O_WRONLY, 0755);
  CHECK(write(fd, "#!/nonexistent/interpreter\n", 27) == 27), close(fd);
  CHECK(execv("script", argv) == -1 && errno == ENOENT);
}
static void exec_script(void) {
  int fd = open("script", O_CREAT | O_WRONLY, 0755);
  CHECK(write(fd, "#!/bin/sh\necho script $1\n", 25) == 25), close(fd);
  pid_t child = fork();
  if (!child) execl("./script", "script", "arg", NULL), _exit(1);
  CHECK(finish_of(child) == 0);
}
static void exec_by_fd(void) {
  int fd = open("/bin/true", O_RDONLY);
  char *argv[] = {"true", NULL};
  pid_t child = fork();
  if (!child) fexecve(fd, argv, environ), _exit(1);
  CHECK(finish_of(child) == 0);
}
static void exec_self_link(void) {
  pid_t child = fork();
  if (!child) execl("/proc/self/exe", "self", "no-such-case", NULL), _exit(1);
  CHECK(WEXITSTATUS(finish_of(child)) == 98);
}
static void *exec_body(void *p) {
  execlp("sh", "sh", "-c", "echo from thread; exit 12", NULL);
  return p;
}
static void exec_from_thread(void) {
  pid_t child = fork();
  if (!child) {
    pthread_t t;
    pthread_create(&t, NULL, exec_body, NULL);
    pause();
  }
  CHECK(WEXITSTATUS(finish_of(child)) == 12);
}
static void *idle_body(void *p) { pause(); return p; }
static void exec_with_threads(void) {
  pid_t child = fork();
  if (!child) {
    pthread_t t;
    for (int i = 0; i < 3; i++) pthread_create(&t, NULL, idle_body, NULL);
    execlp("sh", "sh", "-c", "exit 13", NULL), _exit(1);
  }
  CHECK(WEXITSTATUS(finish_of(child)) == 13);
}
static void orphan(void) {
  int p[2];
  CHECK(pipe(p) == 0);
  pid_t child = fork();
  if (!child) {
    if (!fork()) {
      nap_ms(20);
      dprintf(p[1], "orphan");
      say("orphan speaks\n");
      _exit(0);
    }
    _exit(0);
  }
  CHECK(finish_of(child) == 0);
  char b[16];
  CHECK(read(p[0], b, sizeof b) == 6);
  nap_ms(10);
}
static void background_daemon(void) {
  pid_t child = fork();
  if (!child) {
    CHECK(setsid() == getpid());
    if (fork()) _exit(0);
    nap_ms(30), say("daemon ends\n"), _exit(0);
  }
  CHECK(finish_of(child) == 0);
  nap_ms(60);
}
static void groups_and_sessions(void) {
  pid_t child = fork();
  if (!child) {
    CHECK(setpgid(0, 0) == 0 && getpgrp() == getpid());
    CHECK(setsid() == -1 && errno == EPERM);
    pause();
  }
  setpgid(child, child);
  nap_ms(3);
  CHECK(getpgid(child) == child && getsid(child) == getsid(0));
  CHECK(kill(-child, SIGTERM) == 0 && WTERMSIG(finish_of(child)) == SIGTERM);
}
static void death_signal(void) {
  share();
  pid_t child = fork();
  if (!child) {
    pid_t grandchild = fork();
    if (!grandchild) {
      prctl(PR_SET_PDEATHSIG, SIGUSR1);
      sigset_t set;
      sigemptyset(&set), sigaddset(&set, SIGUSR1), sigprocmask(SIG_BLOCK, &set, NULL);
      shared[0] = 1;
      int n;
      sigwait(&set, &n), shared[1] = n, _exit(0);
    }
    while (!shared[0]) nap_ms(1);
    _exit(0);
  }
  finish_of(child);
  while (!shared[1]) nap_ms(1);
  CHECK(shared[1] == SIGUSR1);
}
static void subreaper(void) {
  CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
  int value = 0;
  CHECK(prctl(PR_GET_CHILD_SUBREAPER, &value) == 0 && value == 1);
  pid_t child = fork();
  if (!child) {
    if (!fork()) nap_ms(3), _exit(21);
    _exit(22);
  }
  int status, sum = 0;
  for (int i = 0; i < 2; i++) CHECK(wait(&status) > 0), sum += WEXITSTATUS(status);
  CHECK(sum == 43);
}
static void prctls(void) {
  char name[16] = {0};
  CHECK(prctl(PR_SET_NAME, "renamed") == 0 && prctl(PR_GET_NAME, name) == 0 && !strcmp(name, "renamed"));
  CHECK(prctl(PR_SET_DUMPABLE, 0) == 0 && prctl(PR_GET_DUMPABLE) == 0 && prctl(PR_SET_DUMPABLE, 1) == 0);
  CHECK(prctl(PR_GET_TIMERSLACK) > 0 && prctl(PR_SET_TIMERSLACK, 12345) == 0 && prctl(PR_GET_TIMERSLACK) == 12345);
  CHECK(prctl(PR_CAPBSET_READ, 0) >= 0 && prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) >= 0);
  CHECK(prctl(PR_SET_KEEPCAPS, 1) == 0 && prctl(PR_GET_KEEPCAPS) == 1);
  int sig = -1;
  CHECK(prctl(PR_SET_PDEATHSIG, SIGHUP) == 0 && prctl(PR_GET_PDEATHSIG, &sig) == 0 && sig == SIGHUP);
  CHECK(prctl(99999) == -1 && errno == EINVAL);
  CHECK(prctl(PR_GET_SECCOMP) >= 0);
}
static void limits(void) {
  struct rlimit r, old;
  CHECK(getrlimit(RLIMIT_NOFILE, &old) == 0);
  r = old, r.rlim_cur = 20;
  CHECK(setrlimit(RLIMIT_NOFILE, &r) == 0);
  int fd = -1, n = 0;
  while ((fd = dup(1)) >= 0) n++;
  CHECK(errno == EMFILE && n > 0);
  CHECK(prlimit(0, RLIMIT_NOFILE, &old, &r) == 0 && r.rlim_cur == 20);
  r = (struct rlimit){100, 100};
  CHECK(setrlimit(RLIMIT_FSIZE, &r) == 0);
  signal(SIGXFSZ, SIG_IGN);
  int f = open("big", O_CREAT | O_RDWR, 0600);
  char block[200] = {0};
  CHECK(write(f, block, 200) == 100 && write(f, block, 200) == -1 && errno == EFBIG);
  r = (struct rlimit){1 << 20, 1 << 20};
  CHECK(setrlimit(RLIMIT_AS, &r) == 0);
  CHECK(mmap(NULL, 1 << 24, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED && errno == ENOMEM);
}
static void cpu_limit(void) {
  pid_t child = fork();
  if (!child) {
    struct rlimit r = {1, 1};
    setrlimit(RLIMIT_CPU, &r);
    signal(SIGXCPU, SIG_DFL);
    for (;;) getppid();
  }
  int status = finish_of(child);
  CHECK(WIFSIGNALED(status) && (WTERMSIG(status) == SIGXCPU || WTERMSIG(status) == SIGKILL));
}
static void user_ids(void) {
  CHECK(geteuid() == getuid());
  uid_t r, e, s;
  CHECK(getresuid(&r, &e, &s) == 0 && r == getuid());
  if (!geteuid()) {
    gid_t groups[2] = {7, 8}, got[8];
    CHECK(setgroups(2, groups) == 0 && getgroups(8, got) == 2 && got[1] == 8);
    CHECK(setresgid(5, 5, 5) == 0 && getgid() == 5);
    CHECK(setreuid(1000, 1000) == 0 && getuid() == 1000 && setuid(0) == -1 && errno == EPERM);
    CHECK(getresuid(&r, &e, &s) == 0 && s == 1000);
  }
}
static void exit_with_running_threads(void) {
  pid_t child = fork();
  if (!child) {
    pthread_t t;
    for (int i = 0; i < 4; i++) pthread_create(&t, NULL, idle_body, NULL);
    exit(31);
  }
  CHECK(WEXITSTATUS(finish_of(child)) == 31);
}
static void *exit_body(void *p) { exit((int)(intptr_t)p); }
static void exit_from_thread(void) {
  pid_t child = fork();
  if (!child) {
    pthread_t t;
    pthread_create(&t, NULL, exit_body, (void *)(intptr_t)32);
    pause();
  }
  CHECK(WEXITSTATUS(finish_of(child)) == 32);
}
static void *late_body(void *p) { nap_ms(10), say("late thread\n"), (void)p, exit(0); }
static void leader_exits_first(void) {
  pid_t child = fork();
  if (!child) {
    pthread_t t;
    pthread_create(&t, NULL, late_body, NULL);
    pthread_exit(NULL);
  }
  CHECK(finish_of(child) == 0);
}
static void *crash_body(void *p) { *(volatile int *)p = 1; return p; }
static void crash_in_thread(void) {
  pid_t child = fork();
  if (!child) {
    pthread_t t;
    pthread_create(&t, NULL, crash_body, (void *)8);
    pause();
  }
  CHECK(WTERMSIG(finish_of(child)) == SIGSEGV);
}
static void shared_futex(void) {
  share();
  pid_t child = fork();
  if (!child) {
    nap_ms(3), shared[0] = 1;
    syscall(SYS_futex, shared, FUTEX_WAKE, 1, NULL, NULL, 0), _exit(0);
  }
  while (!shared[0]) syscall(SYS_futex, shared, FUTEX_WAIT, 0, NULL, NULL, 0);
  CHECK(finish_of(child) == 0);
}
static void shared_spin(void) {
  share();
  pid_t child = fork();
  if (!child) {
    for (int i = 0; i < 20; i++) {
      while (shared[0] != 2 * i + 1) sched_yield();
      shared[0] = 2 * i + 2;
    }
    _exit(0);
  }
  for (int i = 0; i < 20; i++) {
    shared[0] = 2 * i + 1;
    while (shared[0] != 2 * i + 2) sched_yield();
  }
  CHECK(finish_of(child) == 0);
}
static void shared_pure_spin(void) {
  share();
  pid_t child = fork();
  if (!child) {
    while (!shared[0]) {}
    shared[1] = 1, _exit(0);
  }
  nap_ms(5), shared[0] = 1;
  while (!shared[1]) {}
  CHECK(finish_of(child) == 0);
}
static void clock_spin(void) {
  share();
  pid_t child = fork();
  if (!child) nap_ms(2), shared[0] = 1, _exit(0);
  struct timespec t;
  while (!shared[0]) clock_gettime(CLOCK_MONOTONIC, &t);
  CHECK(finish_of(child) == 0);
}
static void ptrace_child(void) {
  pid_t child = fork();
  if (!child) ptrace(PTRACE_TRACEME, 0, 0, 0), raise(SIGSTOP), _exit(3);
  int status;
  CHECK(waitpid(child, &status, 0) == child && WIFSTOPPED(status));
  CHECK(ptrace(PTRACE_CONT, child, 0, 0) == 0 && WEXITSTATUS(finish_of(child)) == 3);
}
static void namespaces(void) {
  if (geteuid() == 0) {
    CHECK(unshare(CLONE_NEWUTS) == 0 && sethostname("inside", 6) == 0);
    char name[64];
    CHECK(gethostname(name, sizeof name) == 0), say(name), say("\n");
    CHECK(unshare(CLONE_NEWNS | CLONE_NEWIPC) == 0);
  }
}
static void pid_namespace(void) {
  if (geteuid()) return;
  CHECK(unshare(CLONE_NEWPID) == 0);
  pid_t child = fork();
  if (!child) {
    printf("inside %d\n", getpid()), fflush(stdout);
    pid_t inner = fork();
    if (!inner) _exit(getppid() == 1 ? 2 : 3);
    CHECK(inner == 2 && WEXITSTATUS(finish_of(inner)) == 2);
    _exit(0);
  }
  CHECK(finish_of(child) == 0);
}
static void chrooted(void) {
  if (geteuid()) return;
  pid_t child = fork();
  if (!child) {
    CHECK(mkdir("jail", 0755) == 0 && chroot("jail") == 0 && chdir("/") == 0);
    CHECK(access("/etc/passwd", F_OK) == -1);
    char b[100];
    CHECK(getcwd(b, sizeof b) && !strcmp(b, "/"));
    _exit(0);
  }
  CHECK(finish_of(child) == 0);
}
static void pidfds(void) {
  pid_t child = fork();
  if (!child) pause();
  int fd = (int)syscall(SYS_pidfd_open, child, 0);
  CHECK(fd >= 0);
  int copy = (int)syscall(SYS_pidfd_getfd, fd, 1, 0);
  CHECK(copy >= 0 && write(copy, "copied\n", 7) == 7);
  CHECK(syscall(SYS_pidfd_send_signal, fd, SIGKILL, NULL, 0) == 0);
  CHECK(WTERMSIG(finish_of(child)) == SIGKILL);
}
static void at_exit_handlers(void);
static void farewell(void) { say("at exit\n"); }
static void at_exit_handlers(void) {
  pid_t child = fork();
  if (!child) atexit(farewell), exit(8);
  CHECK(WEXITSTATUS(finish_of(child)) == 8);
}
static void kill_newborn(void) {
  for (int i = 0; i < 20; i++) {
    pid_t child = fork();
    if (!child) _exit(0);
    kill(child, SIGKILL);
    int status = finish_of(child);
    CHECK(WIFSIGNALED(status) || WIFEXITED(status));
  }
}

MAIN(C(fork_storm), C(fork_tree), C(vforks), C(vfork_exec), C(spawns), C(systems), C(clone_share), C(clone_no_signal),
     C(clone3_plain), C(clone_pidfd), C(ids_in_memory), C(wait_variants), C(auto_reaped), C(exec_chain), C(exec_fails),
     C(exec_script), C(exec_by_fd), C(exec_self_link), C(exec_from_thread), C(exec_with_threads), C(orphan), C(background_daemon),
     C(groups_and_sessions), C(death_signal), C(subreaper), C(prctls), C(limits), C(cpu_limit), C(user_ids),
     C(exit_with_running_threads), C(exit_from_thread), C(leader_exits_first), C(crash_in_thread), C(shared_futex),
     C(shared_spin), C(shared_pure_spin), C(clock_spin), C(ptrace_child), C(namespaces), C(pid_namespace), C(chrooted),
     C(pidfds), C(at_exit_handlers), C(kill_newborn))
