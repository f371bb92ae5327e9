/*
 * A process whose threads do exactly what the benchmark tells them, and say when they did it.
 *
 * usage: actor FD...      one thread a file descriptor (one end of a socket pair); the first is the main thread's
 *
 * A thread reads one line, runs its steps in order (separated by ';'), and answers with one line a result. Answers:
 *   op ID TYPE TID START_MONO_NS END_MONO_NS DEADLINE_NS OUTCOME RUN_DELAY_NS   at `end` of an operation
 *   mark NAME MONO_NS           at `mark NAME`
 *   fail STEP ERRNO             when a step failed (the steps up to `end` are then left out)
 *   done MONO_NS                after the last step of every line
 * RUN_DELAY_NS is the growth of /proc/thread-self/schedstat's second number over the operation: the kernel's own count.
 * Truth about time comes from here (CLOCK_MONOTONIC read in the thread itself), never from the tool under test.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 64
#define STEPS 256
#define CHUNK (1u << 20)

int fds[SLOTS];
static char *regions[SLOTS];
static size_t region_bytes[SLOTS];
static pthread_mutex_t mutexes[SLOTS];
static pthread_rwlock_t rwlocks[SLOTS];
static pthread_mutex_t cond_mutexes[SLOTS];
static pthread_cond_t conds[SLOTS];
static int cond_flags[SLOTS];
static double loops_per_us;

int do_primitives(char **w, int n); /* primitives.c: more steps */
void prepare_primitives(void);

struct op {
	int open;
	char id[96], type[48];
	long long deadline_ns, start_ns, delay_ns;
};

static long long now_ns(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static __attribute__((noinline)) uint64_t spin(uint64_t n)
{
	uint64_t x = 88172645463325252ULL;
	while (n--) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		__asm__ volatile("" : "+r"(x));
	}
	return x;
}

static void calibrate(void)
{
	double best = 1e30;
	for (int round = 0; round < 5; round++) {
		long long a = now_ns(CLOCK_THREAD_CPUTIME_ID);
		spin(400000);
		long long b = now_ns(CLOCK_THREAD_CPUTIME_ID);
		if (b - a > 0 && b - a < best)
			best = b - a;
	}
	loops_per_us = 400000.0 / (best / 1000.0);
}

static long long run_delay_ns(void)
{
	char text[128];
	long long ran = 0, delay = 0;
	int fd = open("/proc/thread-self/schedstat", O_RDONLY);
	if (fd < 0)
		return 0;
	ssize_t n = read(fd, text, sizeof text - 1);
	close(fd);
	if (n <= 0)
		return 0;
	text[n] = 0;
	sscanf(text, "%lld %lld", &ran, &delay);
	return delay;
}

/* The kernel's count and the time at which it is true, read together: again if the thread was held up in between. */
static long long delay_now(long long *at_ns)
{
	for (int i = 0;; i++) {
		long long before = now_ns(CLOCK_MONOTONIC), delay = run_delay_ns();
		*at_ns = now_ns(CLOCK_MONOTONIC);
		if (*at_ns - before < 150000 || i == 20)
			return delay;
	}
}

static void nap(long us)
{
	struct timespec t = {us / 1000000, us % 1000000 * 1000};
	while (clock_nanosleep(CLOCK_MONOTONIC, 0, &t, &t) == EINTR)
		;
}

static void answer(int fd, const char *text)
{
	size_t left = strlen(text);
	while (left) {
		ssize_t n = write(fd, text, left);
		if (n <= 0)
			exit(0);
		text += n;
		left -= n;
	}
}

static char *block_of(void)
{
	static __thread char *block;
	if (!block && posix_memalign((void **)&block, 4096, CHUNK))
		exit(3);
	return block;
}

/* Moves `bytes` through `fd`; whole chunks; 0 or -1 with errno (a closed peer is ECONNRESET). */
static int move(int fd, long bytes, int writing, long offset)
{
	char *block = block_of();
	while (bytes > 0) {
		size_t part = bytes < (long)CHUNK ? (size_t)bytes : CHUNK;
		ssize_t n;
		if (offset >= 0)
			n = writing ? pwrite(fd, block, part, offset) : pread(fd, block, part, offset);
		else
			n = writing ? write(fd, block, part) : read(fd, block, part);
		if (n < 0)
			return -1;
		if (n == 0) {
			errno = EPIPE;
			return -1;
		}
		bytes -= n;
		if (offset >= 0)
			offset += n;
	}
	return 0;
}

static int open_flags(const char *letters)
{
	int flags = strchr(letters, 'w') ? (strchr(letters, 'r') ? O_RDWR : O_WRONLY) : O_RDONLY;
	flags |= strchr(letters, 'c') ? O_CREAT : 0;
	flags |= strchr(letters, 't') ? O_TRUNC : 0;
	flags |= strchr(letters, 'd') ? O_DIRECT : 0;
	flags |= strchr(letters, 's') ? O_DSYNC : 0;
	flags |= strchr(letters, 'a') ? O_APPEND : 0;
	return flags;
}

static int inet_open(const char *verb, int slot, int port, const char *ip)
{
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
	int one = 1, s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	inet_pton(AF_INET, ip[0] ? ip : "127.0.0.1", &a.sin_addr);
	setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	fds[slot] = s;
	if (verb[0] == 'l') {
		setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
		return bind(s, (struct sockaddr *)&a, sizeof a) || listen(s, 16) ? -1 : 0;
	}
	return connect(s, (struct sockaddr *)&a, sizeof a);
}

int work(const char *what, long us)
{
	if (!strcmp(what, "cpu"))
		return spin((uint64_t)(us * loops_per_us)) == 0;
	nap(us);
	return 0;
}

static int child(const char *what, long us)
{
	int status;
	pid_t pid = fork();
	if (pid < 0)
		return -1;
	if (pid == 0)
		_exit(work(what, us));
	return waitpid(pid, &status, 0) < 0 ? -1 : 0;
}

static int do_network(char **w, int n)
{
	long a = n > 1 ? atol(w[1]) : 0, b = n > 2 ? atol(w[2]) : 0;
	if (!strcmp(w[0], "listen") || !strcmp(w[0], "connect"))
		return inet_open(w[0], a, b, n > 3 ? w[3] : "");
	if (!strcmp(w[0], "accept")) {
		int one = 1;
		fds[a] = accept4(fds[b], NULL, NULL, SOCK_CLOEXEC);
		setsockopt(fds[a], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
		return fds[a] < 0 ? -1 : 0;
	}
	if (!strcmp(w[0], "udp")) {
		struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(b)};
		inet_pton(AF_INET, w[3], &to.sin_addr);
		fds[a] = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
		return connect(fds[a], (struct sockaddr *)&to, sizeof to);
	}
	if (!strcmp(w[0], "timeout")) {
		struct timeval t = {b / 1000, b % 1000 * 1000};
		return setsockopt(fds[a], SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
	}
	if (!strcmp(w[0], "reset")) {
		struct linger l = {1, 0};
		setsockopt(fds[a], SOL_SOCKET, SO_LINGER, &l, sizeof l);
		return close(fds[a]);
	}
	errno = ENOSYS;
	return -1;
}

static int do_memory(char **w, int n)
{
	long a = n > 1 ? atol(w[1]) : 0, b = n > 2 ? atol(w[2]) : 0;
	if (!strcmp(w[0], "map")) {
		region_bytes[a] = (size_t)b << 20;
		regions[a] = mmap(NULL, region_bytes[a], PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (regions[a] != MAP_FAILED)
			madvise(regions[a], region_bytes[a], MADV_NOHUGEPAGE);
		return regions[a] == MAP_FAILED ? -1 : 0;
	}
	if (!strcmp(w[0], "mapfile")) {
		region_bytes[a] = (size_t)(n > 3 ? atol(w[3]) : 1) << 20;
		regions[a] = mmap(NULL, region_bytes[a], PROT_READ, MAP_SHARED, fds[b], 0);
		if (regions[a] != MAP_FAILED)
			madvise(regions[a], region_bytes[a], MADV_RANDOM);
		return regions[a] == MAP_FAILED ? -1 : 0;
	}
	if (!strcmp(w[0], "touch")) {
		for (size_t i = 0; i < region_bytes[a]; i += 4096)
			((volatile char *)regions[a])[i] += 1;
		return 0;
	}
	if (!strcmp(w[0], "peek")) {
		for (size_t i = 0; i < region_bytes[a]; i += 4096)
			(void)((volatile char *)regions[a])[i];
		return 0;
	}
	if (!strcmp(w[0], "unmap"))
		return munmap(regions[a], region_bytes[a]);
	if (!strcmp(w[0], "pageout"))
		return madvise(regions[a], region_bytes[a], 21 /* MADV_PAGEOUT */);
	if (!strcmp(w[0], "mprotect")) {
		for (long i = 0; i < b; i++)
			if (mprotect(regions[a], region_bytes[a], i & 1 ? PROT_READ | PROT_WRITE : PROT_READ))
				return -1;
		return 0;
	}
	if (!strcmp(w[0], "smallmaps")) {
		for (long i = 0; i < a; i++) {
			void *p = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			if (p == MAP_FAILED || munmap(p, 65536))
				return -1;
		}
		return 0;
	}
	errno = ENOSYS;
	return -1;
}

static int do_files(char **w, int n)
{
	long a = n > 1 ? atol(w[1]) : 0, b = n > 2 ? atol(w[2]) : 0;
	if (!strcmp(w[0], "open")) {
		fds[a] = open(w[2], open_flags(n > 3 ? w[3] : "r") | O_CLOEXEC, 0600);
		return fds[a] < 0 ? -1 : 0;
	}
	if (!strcmp(w[0], "use")) {
		fds[a] = b;
		return 0;
	}
	if (!strcmp(w[0], "close"))
		return close(fds[a]);
	if (!strcmp(w[0], "write") || !strcmp(w[0], "send"))
		return move(fds[a], b, 1, n > 3 ? atol(w[3]) : -1);
	if (!strcmp(w[0], "read") || !strcmp(w[0], "recv"))
		return move(fds[a], b, 0, n > 3 ? atol(w[3]) : -1);
	if (!strcmp(w[0], "fsync"))
		return fsync(fds[a]);
	if (!strcmp(w[0], "fdatasync"))
		return fdatasync(fds[a]);
	if (!strcmp(w[0], "bigwrite")) /* FD REGION: one system call */
		return pwrite(fds[a], regions[b], region_bytes[b], 0) < 0 ? -1 : 0;
	if (!strcmp(w[0], "dropcache"))
		return posix_fadvise(fds[a], 0, 0, POSIX_FADV_DONTNEED) ? -1 : 0;
	if (!strcmp(w[0], "creates")) { /* DIR COUNT: metadata work, joins journal transactions */
		char path[512];
		for (long i = 0; i < b; i++) {
			snprintf(path, sizeof path, "%s/f%d-%ld", w[1], (int)gettid(), i);
			int fd = open(path, O_CREAT | O_WRONLY, 0600);
			if (fd < 0 || write(fd, path, 64) < 0 || close(fd))
				return -1;
		}
		return 0;
	}
	errno = ENOSYS;
	return -1;
}

static int do_basic(char **w, int n)
{
	long a = n > 1 ? atol(w[1]) : 0;
	if (!strcmp(w[0], "cpu"))
		return spin((uint64_t)(a * loops_per_us)) == 0;
	if (!strcmp(w[0], "sleep"))
		return nap(a), 0;
	if (!strcmp(w[0], "lock"))
		return pthread_mutex_lock(&mutexes[a]);
	if (!strcmp(w[0], "unlock"))
		return pthread_mutex_unlock(&mutexes[a]);
	if (!strcmp(w[0], "rdlock"))
		return pthread_rwlock_rdlock(&rwlocks[a]);
	if (!strcmp(w[0], "wrlock"))
		return pthread_rwlock_wrlock(&rwlocks[a]);
	if (!strcmp(w[0], "rwunlock"))
		return pthread_rwlock_unlock(&rwlocks[a]);
	if (!strcmp(w[0], "child"))
		return child(w[1], atol(w[2]));
	if (!strcmp(w[0], "condwait")) {
		pthread_mutex_lock(&cond_mutexes[a]);
		while (!cond_flags[a])
			pthread_cond_wait(&conds[a], &cond_mutexes[a]);
		cond_flags[a] = 0;
		return pthread_mutex_unlock(&cond_mutexes[a]);
	}
	if (!strcmp(w[0], "condsignal")) {
		pthread_mutex_lock(&cond_mutexes[a]);
		cond_flags[a] = 1;
		pthread_cond_signal(&conds[a]);
		return pthread_mutex_unlock(&cond_mutexes[a]);
	}
	if (!strcmp(w[0], "kill"))
		return kill(a, atoi(w[2]));
	if (!strcmp(w[0], "exit"))
		_exit(a);
	if (!strcmp(w[0], "forever")) /* a storm: this thread burns until it is killed */
		for (;;)
			spin(100000);
	errno = ENOSYS;
	return -1;
}

static int step(char **w, int n)
{
	static int (*const tables[])(char **, int) = {do_basic, do_files, do_network, do_memory, do_primitives};
	for (int i = 0; i < 5; i++) {
		errno = 0;
		int bad = tables[i](w, n);
		if (!bad || errno != ENOSYS)
			return bad;
	}
	return -1;
}

static void finish(int fd, struct op *op, const char *outcome)
{
	char text[512];
	long long end, delay = delay_now(&end) - op->delay_ns;
	snprintf(text, sizeof text, "op %s %s %d %lld %lld %lld %s %lld\n", op->id, op->type, (int)gettid(), op->start_ns, end,
		 op->deadline_ns, outcome, delay);
	op->open = 0;
	answer(fd, text);
}

static int words(char *text, char **w, int max)
{
	int n = 0;
	char *save = NULL;
	for (char *p = strtok_r(text, " ", &save); p && n < max; p = strtok_r(NULL, " ", &save))
		w[n++] = p;
	return n;
}

static void run_line(int fd, char *line)
{
	char *steps[STEPS], *w[8], text[256], *save = NULL;
	int count = 0, failed = 0;
	long repeat = 1, from = 0;
	struct op op = {0};
	for (char *p = strtok_r(line, ";\n", &save); p && count < STEPS; p = strtok_r(NULL, ";\n", &save))
		steps[count++] = p;
	for (long i = 0; i < count; i++) {
		char copy[512];
		snprintf(copy, sizeof copy, "%s", steps[i]);
		int n = words(copy, w, 8);
		if (n == 0)
			continue;
		if (!strcmp(w[0], "op")) {
			snprintf(op.id, sizeof op.id, "%s", w[1]);
			snprintf(op.type, sizeof op.type, "%s", w[2]);
			op.deadline_ns = atoll(w[3]);
			op.open = 1;
			failed = 0;
			op.delay_ns = delay_now(&op.start_ns);
		} else if (!strcmp(w[0], "end")) {
			finish(fd, &op, failed ? "failed" : "ok");
			failed = 0;
		} else if (!strcmp(w[0], "repeat")) { /* the steps after it, N times; -1 without end */
			repeat = atol(w[1]);
			from = i;
		} else if (failed) {
			continue;
		} else if (!strcmp(w[0], "mark")) {
			snprintf(text, sizeof text, "mark %s %lld\n", w[1], now_ns(CLOCK_MONOTONIC));
			answer(fd, text);
		} else if (step(w, n)) {
			int error = errno;
			failed = 1;
			snprintf(text, sizeof text, "fail %s %d\n", w[0], error);
			if (!op.open)
				answer(fd, text);
		}
		if (i == count - 1 && repeat != 1 && !failed) {
			if (repeat > 0)
				repeat--;
			i = from;
		}
	}
	snprintf(text, sizeof text, "done %lld\n", now_ns(CLOCK_MONOTONIC));
	answer(fd, text);
}

static void *serve(void *arg)
{
	int fd = (int)(intptr_t)arg;
	size_t used = 0;
	char line[16384], hello[64];
	snprintf(hello, sizeof hello, "hello %d %d\n", (int)getpid(), (int)gettid());
	answer(fd, hello);
	for (;;) {
		ssize_t n = read(fd, line + used, sizeof line - 1 - used);
		if (n <= 0)
			exit(0);
		used += n;
		line[used] = 0;
		char *end;
		while ((end = strchr(line, '\n'))) {
			*end = 0;
			char one[16384];
			memcpy(one, line, end - line + 1);
			used -= end - line + 1;
			memmove(line, end + 1, used + 1);
			run_line(fd, one);
		}
	}
}

int main(int argc, char **argv)
{
	pthread_t thread;
	sigset_t awaited; /* for `sigwait`: in all threads, and in none of the programs they start */
	if (argc == 4 && !strcmp(argv[1], "--work")) {
		calibrate();
		return work(argv[2], atol(argv[3]));
	}
	sigemptyset(&awaited);
	sigaddset(&awaited, SIGUSR1);
	sigaddset(&awaited, SIGUSR2);
	pthread_sigmask(SIG_BLOCK, &awaited, NULL);
	signal(SIGPIPE, SIG_IGN);
	prepare_primitives();
	for (int i = 0; i < SLOTS; i++) {
		pthread_mutex_init(&mutexes[i], NULL);
		pthread_rwlock_init(&rwlocks[i], NULL);
		pthread_mutex_init(&cond_mutexes[i], NULL);
		pthread_cond_init(&conds[i], NULL);
	}
	calibrate();
	memset(block_of(), 'k', CHUNK);
	for (int i = 2; i < argc; i++)
		if (pthread_create(&thread, NULL, serve, (void *)(intptr_t)atoi(argv[i])))
			return 3;
	serve((void *)(intptr_t)atoi(argv[1]));
	return 0;
}
