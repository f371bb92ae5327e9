#include "corpus.h"
#include <linux/futex.h>
#include <semaphore.h>
#include <sys/prctl.h>
#include <sys/resource.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static volatile long counter;
static volatile int flag;

static void run_threads(int n, void *(*body)(void *)) {
  pthread_t t[64];
  for (int i = 0; i < n; i++) CHECK(pthread_create(&t[i], NULL, body, (void *)(intptr_t)i) == 0);
  for (int i = 0; i < n; i++) CHECK(pthread_join(t[i], NULL) == 0);
}
static void *add_body(void *p) {
  for (int i = 0; i < 200; i++) pthread_mutex_lock(&mutex), counter++, pthread_mutex_unlock(&mutex);
  return p;
}
static void mutexes(void) { run_threads(8, add_body), CHECK(counter == 1600); }
static void *racy_body(void *p) {
  for (int i = 0; i < 2000; i++) {
    long seen = counter;
    if (i % 100 == 0) sched_yield();
    counter = seen + 1;
  }
  return p;
}
static void race(void) { run_threads(4, racy_body), CHECK(counter >= 2000 && counter <= 8000); }
static void *queue_body(void *p) {
  for (int i = 0; i < 50; i++) {
    pthread_mutex_lock(&mutex);
    while (flag != (int)(intptr_t)p) pthread_cond_wait(&cond, &mutex);
    flag = !flag, counter++;
    pthread_cond_broadcast(&cond), pthread_mutex_unlock(&mutex);
  }
  return p;
}
static void condvars(void) { run_threads(2, queue_body), CHECK(counter == 100); }
static void cond_timeout(void) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  t.tv_nsec += 5000000;
  if (t.tv_nsec >= 1000000000) t.tv_sec++, t.tv_nsec -= 1000000000;
  pthread_mutex_lock(&mutex);
  CHECK(pthread_cond_timedwait(&cond, &mutex, &t) == ETIMEDOUT);
  CHECK(pthread_mutex_timedlock(&mutex, &t) == ETIMEDOUT);
}
static pthread_barrier_t barrier;
static void *barrier_body(void *p) {
  for (int i = 0; i < 10; i++)
    if (pthread_barrier_wait(&barrier) == PTHREAD_BARRIER_SERIAL_THREAD) counter++;
  return p;
}
static void barriers(void) {
  pthread_barrier_init(&barrier, NULL, 5);
  run_threads(5, barrier_body), CHECK(counter == 10);
}
static pthread_rwlock_t rwlock = PTHREAD_RWLOCK_INITIALIZER;
static void *rw_body(void *p) {
  for (int i = 0; i < 50; i++) {
    if ((intptr_t)p % 3 == 0) pthread_rwlock_wrlock(&rwlock), counter++;
    else pthread_rwlock_rdlock(&rwlock);
    if (i % 10 == 0) sched_yield();
    pthread_rwlock_unlock(&rwlock);
  }
  return p;
}
static void rwlocks(void) { run_threads(6, rw_body), CHECK(counter == 100); }
static void *pi_body(void *p) {
  pthread_mutex_t *m = p;
  for (int i = 0; i < 30; i++) {
    CHECK(pthread_mutex_lock(m) == 0);
    counter++;
    if (i % 5 == 0) sched_yield();
    CHECK(pthread_mutex_unlock(m) == 0);
  }
  return NULL;
}
static void pi_mutex(void) {
  pthread_mutexattr_t attr;
  pthread_mutex_t m;
  pthread_mutexattr_init(&attr);
  CHECK(pthread_mutexattr_setprotocol(&attr, PTHREAD_PRIO_INHERIT) == 0);
  CHECK(pthread_mutex_init(&m, &attr) == 0);
  pthread_t t[4];
  for (int i = 0; i < 4; i++) pthread_create(&t[i], NULL, pi_body, &m);
  for (int i = 0; i < 4; i++) pthread_join(t[i], NULL);
  CHECK(counter == 120);
}
static void *dies_holding(void *p) { pthread_mutex_lock(p); return NULL; }
static void robust_mutex(void) {
  pthread_mutexattr_t attr;
  pthread_mutex_t m;
  pthread_mutexattr_init(&attr);
  pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
  pthread_mutex_init(&m, &attr);
  pthread_t t;
  pthread_create(&t, NULL, dies_holding, &m), pthread_join(t, NULL);
  CHECK(pthread_mutex_lock(&m) == EOWNERDEAD);
  CHECK(pthread_mutex_consistent(&m) == 0 && pthread_mutex_unlock(&m) == 0 && pthread_mutex_lock(&m) == 0);
}
static void robust_across_processes(void) {
  pthread_mutexattr_t attr;
  pthread_mutex_t *m = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  pthread_mutexattr_init(&attr);
  pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST), pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
  pthread_mutex_init(m, &attr);
  pid_t child = fork();
  if (!child) pthread_mutex_lock(m), nap_ms(5), kill(getpid(), SIGKILL);
  nap_ms(2);
  CHECK(pthread_mutex_lock(m) == EOWNERDEAD);
  finish_of(child);
}
static void *join_body(void *p) { nap_ms((long)(intptr_t)p % 3); return (void *)((intptr_t)p * 2); }
static void joins(void) {
  pthread_t t[16];
  long sum = 0;
  for (int i = 0; i < 16; i++) pthread_create(&t[i], NULL, join_body, (void *)(intptr_t)i);
  for (int i = 15; i >= 0; i--) {
    void *r;
    pthread_join(t[i], &r), sum += (intptr_t)r;
  }
  CHECK(sum == 240);
}
static void *tiny_body(void *p) { counter++; return p; }
static void thread_storm(void) {
  for (int i = 0; i < 10; i++) run_threads(10, tiny_body);
  CHECK(counter == 100);
}
static void *detached_body(void *p) { nap_ms(3), flag = 1; return p; }
static void detached(void) {
  pthread_attr_t a;
  pthread_t t;
  pthread_attr_init(&a), pthread_attr_setdetachstate(&a, PTHREAD_CREATE_DETACHED);
  CHECK(pthread_create(&t, &a, detached_body, NULL) == 0);
  while (!flag) nap_ms(1);
}
static void *endless_body(void *p) { for (;;) pause(); return p; }
static void cleanup(void *p) { *(volatile int *)p = 7; }
static void *cancel_body(void *p) {
  pthread_cleanup_push(cleanup, (void *)&flag);
  for (;;) nap_ms(1000);
  pthread_cleanup_pop(0);
  return p;
}
static void cancel(void) {
  pthread_t t;
  void *r;
  pthread_create(&t, NULL, cancel_body, NULL);
  nap_ms(3), pthread_cancel(t), pthread_join(t, &r);
  CHECK(r == PTHREAD_CANCELED && flag == 7);
}
static void thread_hit(int n) { (void)n; counter += gettid() != getpid(); }
static void thread_kill(void) {
  on(SIGUSR1, thread_hit, 0);
  pthread_t t;
  pthread_create(&t, NULL, endless_body, NULL);
  for (int i = 0; i < 5; i++) {
    long before = counter;
    pthread_kill(t, SIGUSR1);
    while (counter == before) sched_yield();
  }
  CHECK(counter == 5);
  pthread_cancel(t), pthread_join(t, NULL);
}
static void process_signal_to_unblocked_thread(void) {
  on(SIGUSR1, thread_hit, 0);
  pthread_t t;
  pthread_create(&t, NULL, endless_body, NULL);
  sigset_t set;
  sigemptyset(&set), sigaddset(&set, SIGUSR1), pthread_sigmask(SIG_BLOCK, &set, NULL);
  kill(getpid(), SIGUSR1);
  while (!counter) nap_ms(1);
  pthread_cancel(t), pthread_join(t, NULL);
}
static void *spin_body(void *p) { while (!flag) {} return p; }
static void spinning_thread(void) {
  pthread_t t;
  pthread_create(&t, NULL, spin_body, NULL);
  nap_ms(5), flag = 1;
  pthread_join(t, NULL);
}
static void *count_body(void *p) { while (!flag) counter++; return p; }
static void counting_thread(void) {
  pthread_t t;
  pthread_create(&t, NULL, count_body, NULL);
  nap_ms(2), flag = 1;
  pthread_join(t, NULL);
  CHECK(counter > 0);
}
static sem_t semaphore;
static void *post_body(void *p) {
  for (int i = 0; i < 10; i++) sem_post(&semaphore);
  return p;
}
static void semaphores(void) {
  sem_init(&semaphore, 0, 0);
  pthread_t t;
  pthread_create(&t, NULL, post_body, NULL);
  for (int i = 0; i < 10; i++) sem_wait(&semaphore);
  pthread_join(t, NULL);
  CHECK(sem_trywait(&semaphore) == -1 && errno == EAGAIN);
}
static _Thread_local int local = 5;
static void *local_body(void *p) { local += (int)(intptr_t)p; return (void *)(intptr_t)local; }
static void thread_local_storage(void) {
  pthread_t t;
  void *r;
  pthread_create(&t, NULL, local_body, (void *)3), pthread_join(t, &r);
  CHECK((intptr_t)r == 8 && local == 5);
}
static volatile int word = 0;
static void *waiter_body(void *p) {
  while (syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0) == 0 && !flag) {}
  __sync_fetch_and_add(&counter, 1);
  return p;
}
static void futex_requeue(void) {
  static volatile int other = 0;
  pthread_t t[4];
  for (int i = 0; i < 4; i++) pthread_create(&t[i], NULL, waiter_body, NULL);
  nap_ms(10), flag = 1;
  long woken = syscall(SYS_futex, &word, FUTEX_CMP_REQUEUE_PRIVATE, 1, (void *)3, &other, 0);
  CHECK(woken == 4);
  CHECK(syscall(SYS_futex, &other, FUTEX_WAKE_PRIVATE, 10, NULL, NULL, 0) == 3);
  for (int i = 0; i < 4; i++) pthread_join(t[i], NULL);
  CHECK(counter == 4);
}
static void futex_errors(void) {
  CHECK(syscall(SYS_futex, &word, FUTEX_WAIT, 1, NULL, NULL, 0) == -1 && errno == EAGAIN);
  struct timespec t = {0, 1000000};
  CHECK(syscall(SYS_futex, &word, FUTEX_WAIT, 0, &t, NULL, 0) == -1 && errno == ETIMEDOUT);
  CHECK(syscall(SYS_futex, &word, 77, 0, NULL, NULL, 0) == -1 && errno == ENOSYS);
  CHECK(syscall(SYS_futex, (char *)&word + 1, FUTEX_WAKE, 1, NULL, NULL, 0) == -1 && errno == EINVAL);
  CHECK(syscall(SYS_futex, &word, FUTEX_WAIT_BITSET, 0, &t, NULL, 4) == -1);
  CHECK(syscall(SYS_futex, &word, FUTEX_WAKE_OP, 1, (void *)1, &counter, FUTEX_OP(FUTEX_OP_SET, 5, FUTEX_OP_CMP_EQ, 0)) == 0);
  CHECK((int)counter == 5);
}
static void *open_body(void *p) {
  for (int i = 0; i < 20; i++) {
    int fd = open("/dev/null", O_RDONLY);
    CHECK(fd >= 0), sched_yield(), CHECK(close(fd) == 0);
  }
  return p;
}
static void descriptors_among_threads(void) { run_threads(6, open_body); }
static int pipe_fds[2];
static void *reader_body(void *p) {
  char c;
  while (read(pipe_fds[0], &c, 1) == 1) __sync_fetch_and_add(&counter, c);
  return p;
}
static void pipe_between_threads(void) {
  CHECK(pipe(pipe_fds) == 0);
  pthread_t t[3];
  for (int i = 0; i < 3; i++) pthread_create(&t[i], NULL, reader_body, NULL);
  for (char i = 1; i <= 50; i++) CHECK(write(pipe_fds[1], &i, 1) == 1);
  close(pipe_fds[1]);
  for (int i = 0; i < 3; i++) pthread_join(t[i], NULL);
  CHECK(counter == 50 * 51 / 2);
}
static void *fork_body(void *p) {
  pid_t child = fork();
  if (!child) _exit((int)(intptr_t)p);
  CHECK(WEXITSTATUS(finish_of(child)) == (int)(intptr_t)p);
  return p;
}
static void fork_in_threads(void) { run_threads(4, fork_body); }
static void *schedule_body(void *p) {
  struct sched_param sp = {0};
  int policy;
  CHECK(pthread_getschedparam(pthread_self(), &policy, &sp) == 0 && policy == SCHED_OTHER);
  cpu_set_t set;
  CHECK(sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) >= 1);
  CHECK(setpriority(PRIO_PROCESS, 0, 5) == 0 && getpriority(PRIO_PROCESS, 0) == 5);
  CHECK(sched_get_priority_max(SCHED_FIFO) == 99 && sched_getscheduler(0) == SCHED_OTHER);
  char name[16];
  pthread_setname_np(pthread_self(), "worker"), pthread_getname_np(pthread_self(), name, sizeof name);
  CHECK(!strcmp(name, "worker"));
  struct timespec t;
  CHECK(sched_rr_get_interval(0, &t) == 0);
  return p;
}
static void scheduling(void) { run_threads(2, schedule_body); }
static pthread_once_t once = PTHREAD_ONCE_INIT;
static void once_body(void) { counter++; }
static void *once_user(void *p) { pthread_once(&once, once_body); return p; }
static void once_only(void) { run_threads(6, once_user), CHECK(counter == 1); }
static void *deep_body(void *p) {
  volatile char big[200000];
  memset((char *)big, 1, sizeof big);
  return (void *)(intptr_t)(big[5] + (intptr_t)p);
}
static void big_stacks(void) { run_threads(5, deep_body); }
static void *usage_body(void *p) {
  struct rusage u;
  struct timespec t;
  for (volatile int i = 0; i < 100000; i++) {}
  CHECK(getrusage(RUSAGE_THREAD, &u) == 0 && clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t) == 0);
  clockid_t id;
  CHECK(pthread_getcpuclockid(pthread_self(), &id) == 0 && clock_gettime(id, &t) == 0);
  return p;
}
static void cpu_clocks(void) { run_threads(3, usage_body); }

MAIN(C(mutexes), C(race), C(condvars), C(cond_timeout), C(barriers), C(rwlocks), C(pi_mutex), C(robust_mutex),
     C(robust_across_processes), C(joins), C(thread_storm), C(detached), C(cancel), C(thread_kill),
     C(process_signal_to_unblocked_thread), C(spinning_thread), C(counting_thread), C(semaphores), C(thread_local_storage),
     C(futex_requeue), C(futex_errors), C(descriptors_among_threads), C(pipe_between_threads), C(fork_in_threads),
     C(scheduling), C(once_only), C(big_stacks), C(cpu_clocks))
