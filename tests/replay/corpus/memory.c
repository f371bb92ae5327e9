#include "corpus.h"
#include <sys/auxv.h>
#include <sys/ipc.h>
#include <sys/sem.h>
#include <sys/msg.h>
#include <sys/shm.h>
#include <sys/personality.h>
#include <cpuid.h>
#include <setjmp.h>

#define PAGE 4096ul
static sigjmp_buf jump;
static volatile int faults;
static void on_fault(int n) { faults++, siglongjmp(jump, n); }
static int touch_fails(volatile char *p, int write_it) {
  signal(SIGSEGV, on_fault), signal(SIGBUS, on_fault);
  int n = sigsetjmp(jump, 1);
  if (n) return n;
  if (write_it) *p = 1;
  else (void)*p;
  return 0;
}
static int make_file(const char *name, size_t size) {
  int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
  CHECK(fd >= 0);
  for (size_t i = 0; i < size; i++) {
    char c = (char)('a' + i / 1000 % 26);
    if (i % PAGE == 0 || i == size - 1) CHECK(pwrite(fd, &c, 1, (off_t)i) == 1);
  }
  return fd;
}
static void private_map(void) {
  int fd = make_file("f", 3 * PAGE);
  char *p = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
  CHECK(p[0] == 'a' && p[PAGE] == 'e');
  p[0] = 'Z';
  char c;
  CHECK(pread(fd, &c, 1, 0) == 1 && c == 'a');
  CHECK(pwrite(fd, "Q", 1, (off_t)PAGE * 2) == 1);
  CHECK(p[2 * PAGE] == 'Q');
  CHECK(munmap(p, 3 * PAGE) == 0 && touch_fails(p, 0) == SIGSEGV);
}
static void shared_map(void) {
  int fd = make_file("f", 2 * PAGE);
  char *p = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  char *q = mmap(NULL, 2 * PAGE, PROT_READ, MAP_SHARED, fd, 0);
  p[5] = 'x';
  CHECK(q[5] == 'x' && msync(p, 2 * PAGE, MS_SYNC) == 0);
  char c;
  CHECK(pread(fd, &c, 1, 5) == 1 && c == 'x');
  pid_t child = fork();
  if (!child) p[PAGE + 7] = 'y', _exit(0);
  CHECK(finish_of(child) == 0 && q[PAGE + 7] == 'y');
}
static void shared_map_written_by_call(void) {
  int fd = make_file("f", PAGE);
  char *p = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  CHECK(pwrite(fd, "hello", 5, 100) == 5);
  CHECK(!memcmp(p + 100, "hello", 5));
  printf("%.5s\n", p + 100), fflush(stdout);
}
static void file_grows_under_map(void) {
  int fd = make_file("f", PAGE);
  char *p = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  CHECK(touch_fails(p + PAGE, 0) == SIGBUS);
  CHECK(ftruncate(fd, 3 * (off_t)PAGE) == 0);
  CHECK(touch_fails(p + PAGE, 1) == 0);
  p[2 * PAGE] = 'g';
  char c;
  CHECK(pread(fd, &c, 1, 2 * PAGE) == 1 && c == 'g');
  CHECK(ftruncate(fd, PAGE) == 0 && touch_fails(p + 2 * PAGE, 0) == SIGBUS);
}
static void protections(void) {
  char *p = mmap(NULL, 4 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(touch_fails(p, 1) == SIGSEGV);
  CHECK(mprotect(p, PAGE, PROT_READ | PROT_WRITE) == 0 && touch_fails(p, 1) == 0 && touch_fails(p + PAGE, 1) == SIGSEGV);
  CHECK(mprotect(p, 4 * PAGE, PROT_NONE) == 0 && touch_fails(p, 0) == SIGSEGV);
  CHECK(mprotect(p + 1, PAGE, PROT_READ) == -1 && errno == EINVAL);
  CHECK(read(0, p, 1) <= 0 || 1);
}
static void code_in_memory(void) {
  unsigned char code[] = {0xb8, 42, 0, 0, 0, 0xc3};
  unsigned char *p = mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memcpy(p, code, sizeof code);
  CHECK(((int (*)(void))p)() == 42);
  p[1] = 43;
  CHECK(((int (*)(void))p)() == 43);
}
static void call_from_written_memory(void) {
  unsigned char code[] = {0xb8, 39, 0, 0, 0, 0x0f, 0x05, 0xc3};
  unsigned char *p = mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memcpy(p, code, sizeof code);
  CHECK(((int (*)(void))p)() == getpid());
}
static void remaps(void) {
  char *p = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  p[0] = 'r';
  char *q = mremap(p, 2 * PAGE, 64 * PAGE, MREMAP_MAYMOVE);
  CHECK(q != MAP_FAILED && q[0] == 'r');
  q[63 * PAGE] = 's';
  CHECK(mremap(q, 64 * PAGE, PAGE, 0) == q && touch_fails(q + 2 * PAGE, 0) == SIGSEGV);
  char *target = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(mremap(q, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target && target[0] == 'r');
  int fd = make_file("f", 4 * PAGE);
  char *s = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  s = mremap(s, PAGE, 4 * PAGE, MREMAP_MAYMOVE);
  CHECK(s != MAP_FAILED);
  s[3 * PAGE + 1] = 't';
  char c;
  CHECK(pread(fd, &c, 1, 3 * PAGE + 1) == 1 && c == 't');
  CHECK(mremap(s, 0, 4 * PAGE, MREMAP_MAYMOVE) != MAP_FAILED || errno == EINVAL);
}
static void fixed_maps(void) {
  char *p = mmap((void *)0x20000000, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  CHECK(p == (void *)0x20000000);
  p[PAGE] = 1;
  CHECK(mmap(p + PAGE, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p + PAGE && p[PAGE] == 0);
  CHECK(mmap(p, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == MAP_FAILED && errno == EEXIST);
  CHECK(mmap(NULL, 0, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED && errno == EINVAL);
  CHECK(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, 99, 0) == MAP_FAILED && errno == EBADF);
}
static void breaks(void) {
  char *p = sbrk(0);
  CHECK(sbrk(100000) == p);
  p[99999] = 1;
  CHECK(brk(p) == 0 && sbrk(0) == p);
  for (int i = 1; i < 200; i++) free(malloc((size_t)i * 1000));
}
static void advice(void) {
  char *p = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memset(p, 7, 8 * PAGE);
  CHECK(madvise(p, 4 * PAGE, MADV_DONTNEED) == 0 && p[0] == 0 && p[4 * PAGE] == 7);
  CHECK(madvise(p, PAGE, MADV_WILLNEED) == 0 && madvise(p, PAGE, MADV_SEQUENTIAL) == 0);
  CHECK(madvise(p, PAGE, 9999) == -1 && errno == EINVAL);
  CHECK(madvise(p, 8 * PAGE, MADV_WIPEONFORK) == 0 && madvise(p + 6 * PAGE, PAGE, MADV_DONTFORK) == 0);
  pid_t child = fork();
  if (!child) _exit(p[5 * PAGE] == 0 && touch_fails(p + 6 * PAGE, 0) == SIGSEGV ? 0 : 1);
  CHECK(finish_of(child) == 0 && p[5 * PAGE] == 7);
  unsigned char core[8];
  CHECK(mincore(p, 8 * PAGE, core) == 0 && (core[5] & 1));
}
static void locks(void) {
  char *p = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(mlock(p, PAGE) == 0 && munlock(p, PAGE) == 0);
  CHECK(mlock((void *)16, PAGE) == -1 && errno == ENOMEM);
}
static void memfd(void) {
  int fd = memfd_create("mem", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  CHECK(fd >= 0 && ftruncate(fd, 2 * (off_t)PAGE) == 0);
  char *p = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  strcpy(p, "in memfd");
  char b[16];
  CHECK(pread(fd, b, 9, 0) == 9 && !strcmp(b, "in memfd"));
  munmap(p, 2 * PAGE);
  CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_WRITE) == 0 && fcntl(fd, F_GET_SEALS) & F_SEAL_WRITE);
  CHECK(write(fd, "x", 1) == -1 && errno == EPERM);
}
static void posix_shm(void) {
  char name[64];
  snprintf(name, sizeof name, "/kprobe-case-%d", getpid());
  int fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
  CHECK(fd >= 0 && ftruncate(fd, PAGE) == 0);
  volatile int *p = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  pid_t child = fork();
  if (!child) {
    int other = shm_open(name, O_RDWR, 0);
    volatile int *q = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, other, 0);
    q[3] = 99, _exit(0);
  }
  CHECK(finish_of(child) == 0 && p[3] == 99 && shm_unlink(name) == 0);
}
static void sysv_shm(void) {
  int id = shmget(IPC_PRIVATE, 2 * PAGE, IPC_CREAT | 0600);
  CHECK(id >= 0);
  volatile int *p = shmat(id, NULL, 0);
  CHECK(p != (void *)-1);
  struct shmid_ds ds;
  CHECK(shmctl(id, IPC_STAT, &ds) == 0 && ds.shm_segsz == 2 * PAGE && ds.shm_nattch == 1);
  pid_t child = fork();
  if (!child) p[1] = 55, _exit(0);
  CHECK(finish_of(child) == 0 && p[1] == 55);
  volatile int *q = shmat(id, NULL, SHM_RDONLY);
  CHECK(q[1] == 55 && shmdt((void *)q) == 0 && touch_fails((void *)q, 0) == SIGSEGV);
  CHECK(shmctl(id, IPC_RMID, NULL) == 0 && shmdt((void *)p) == 0);
}
static void sysv_semaphores(void) {
  int id = semget(IPC_PRIVATE, 2, IPC_CREAT | 0600);
  union { int val; struct semid_ds *buf; unsigned short *array; } arg = {.val = 0};
  CHECK(id >= 0 && semctl(id, 0, SETVAL, arg) == 0);
  pid_t child = fork();
  if (!child) {
    struct sembuf up = {0, 1, 0};
    nap_ms(3), CHECK(semop(id, &up, 1) == 0), _exit(0);
  }
  struct sembuf down = {0, -1, 0};
  CHECK(semop(id, &down, 1) == 0 && finish_of(child) == 0);
  CHECK(semctl(id, 0, GETVAL) == 0);
  unsigned short values[2] = {4, 5}, got[2];
  arg.array = values, CHECK(semctl(id, 0, SETALL, arg) == 0);
  arg.array = got, CHECK(semctl(id, 0, GETALL, arg) == 0 && got[1] == 5);
  struct semid_ds ds;
  arg.buf = &ds, CHECK(semctl(id, 0, IPC_STAT, arg) == 0 && ds.sem_nsems == 2);
  struct timespec t = {0, 2000000};
  struct sembuf wait = {1, -9, 0};
  CHECK(semtimedop(id, &wait, 1, &t) == -1 && errno == EAGAIN);
  CHECK(semctl(id, 0, IPC_RMID) == 0);
}
static void sysv_messages(void) {
  struct { long type; char text[32]; } m = {3, "queued"}, got;
  int id = msgget(IPC_PRIVATE, IPC_CREAT | 0600);
  CHECK(id >= 0 && msgsnd(id, &m, 7, 0) == 0);
  CHECK(msgrcv(id, &got, 32, 3, 0) == 7 && !strcmp(got.text, "queued") && got.type == 3);
  CHECK(msgrcv(id, &got, 32, 0, IPC_NOWAIT) == -1 && errno == ENOMSG);
  struct msqid_ds ds;
  CHECK(msgctl(id, IPC_STAT, &ds) == 0 && ds.msg_qnum == 0 && msgctl(id, IPC_RMID, NULL) == 0);
}
static void sharing_after_fork(void) {
  volatile int *shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  volatile int *own = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  pid_t child = fork();
  if (!child) *shared = 1, *own = 1, _exit(0);
  CHECK(finish_of(child) == 0 && *shared == 1 && *own == 0);
}
static void dev_zero(void) {
  int fd = open("/dev/zero", O_RDWR);
  char *p = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
  volatile char *q = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  CHECK(p[10] == 0 && (p[10] = 3));
  pid_t child = fork();
  if (!child) q[0] = 9, _exit(0);
  CHECK(finish_of(child) == 0 && q[0] == 9);
}
static int grow(int n) {
  volatile char page[4096];
  page[0] = (char)n, page[4095] = (char)n;
  return n ? grow(n - 1) + page[0] - page[4095] : 0;
}
static void stack_grows(void) { CHECK(grow(1000) == 0); }
static void bad_pointers(void) {
  char *edge = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(munmap(edge + PAGE, PAGE) == 0);
  int p[2];
  CHECK(pipe(p) == 0 && write(p[1], "0123456789", 10) == 10);
  CHECK(read(p[0], (void *)16, 5) == -1 && errno == EFAULT);
  CHECK(write(p[1], (void *)16, 5) == -1 && errno == EFAULT);
  CHECK(open((char *)16, O_RDONLY) == -1 && errno == EFAULT);
  CHECK(stat(".", (struct stat *)16) == -1 && errno == EFAULT);
  ssize_t n = read(p[0], edge + PAGE - 4, 8);
  CHECK(n == -1 || n == 4);
  strcpy(edge + PAGE - 2, ".");
  CHECK(access(edge + PAGE - 2, F_OK) == 0);
  CHECK(syscall(SYS_clock_gettime, CLOCK_REALTIME, (void *)16) == -1 && errno == EFAULT);
  CHECK(syscall(SYS_nanosleep, (void *)16, NULL) == -1 && errno == EFAULT);
  CHECK(syscall(SYS_rt_sigprocmask, SIG_BLOCK, (void *)16, NULL, 8) == -1 && errno == EFAULT);
  CHECK(syscall(SYS_getrandom, (void *)16, 8, 0) == -1 && errno == EFAULT);
}
static void processor(void) {
  unsigned a, b, c, d;
  CHECK(__get_cpuid(0, &a, &b, &c, &d) && a > 0);
  unsigned long long t0 = __builtin_ia32_rdtsc(), t1;
  unsigned aux;
  t1 = __builtin_ia32_rdtscp(&aux);
  CHECK(t1 >= t0);
  unsigned cpu, node;
  CHECK(getcpu(&cpu, &node) == 0 && sched_getcpu() >= 0);
  CHECK(getauxval(AT_PAGESZ) == PAGE && getauxval(AT_RANDOM));
  printf("%llx\n", t0 & 0), fflush(stdout);
}
static void clocks(void) {
  struct timespec a, b;
  for (clockid_t id = 0; id < 12; id++)
    if (id != 10 && clock_gettime(id, &a) == 0) CHECK(clock_gettime(id, &b) == 0 && clock_getres(id, &a) == 0);
  struct timeval tv;
  struct timezone tz;
  CHECK(gettimeofday(&tv, &tz) == 0 && time(NULL) >= tv.tv_sec);
  CHECK(clock_gettime(99, &a) == -1 && errno == EINVAL);
  CHECK(clock() >= 0);
}
static void vsyscall_page(void) {
  time_t (*old_time)(time_t *) = (void *)0xffffffffff600400;
  if (touch_fails((void *)0xffffffffff600400, 0)) { say("no vsyscall page\n"); return; }
  CHECK(old_time(NULL) > 1000);
}
static void randomness(void) {
  unsigned char b[64] = {0};
  CHECK(syscall(SYS_getrandom, b, 64, 0) == 64);
  int fd = open("/dev/urandom", O_RDONLY), sum = 0;
  unsigned char c[64];
  CHECK(read(fd, c, 64) == 64);
  for (int i = 0; i < 64; i++) sum += b[i] + c[i];
  CHECK(sum > 0);
  void *p = malloc(10);
  CHECK(p);
}
static void random_is_replayed(void) {
  pid_t child = fork();
  if (!child) {
    int fd = open("/dev/urandom", O_RDONLY);
    unsigned x;
    CHECK(read(fd, &x, 4) == 4);
    _exit(0);
  }
  CHECK(finish_of(child) == 0);
}
static void persona(void) {
  int p = personality(0xffffffff);
  CHECK(p >= 0);
  CHECK(personality((unsigned)p | ADDR_COMPAT_LAYOUT) >= 0);
}
static void big_memory(void) {
  size_t size = 1ul << 36;
  char *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  CHECK(p != MAP_FAILED);
  for (size_t i = 0; i < size; i += size / 8) p[i] = 1;
  CHECK(munmap(p, size) == 0);
}
static void absent_calls(void) {
  char zero[256] = {0};
  CHECK(syscall(SYS_io_uring_setup, 4, zero) == -1 && errno == ENOSYS);
  CHECK(syscall(9999) == -1 && errno == ENOSYS);
}

MAIN(C(private_map), C(shared_map), C(shared_map_written_by_call), C(file_grows_under_map), C(protections), C(code_in_memory),
     C(call_from_written_memory), C(remaps), C(fixed_maps), C(breaks), C(advice), C(locks), C(memfd), C(posix_shm), C(sysv_shm),
     C(sysv_semaphores), C(sysv_messages), C(sharing_after_fork), C(dev_zero), C(stack_grows), C(bad_pointers), C(processor),
     C(clocks), C(vsyscall_page), C(randomness), C(random_is_replayed), C(persona), C(big_memory), C(absent_calls))
