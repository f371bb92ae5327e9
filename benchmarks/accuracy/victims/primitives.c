/*
 * More ways to wait: the steps of `actor.c` that stand for other programs' habits. Each is one library or system call.
 *
 *   sempost N, semwait N                POSIX semaphore
 *   pilock N, piunlock N                mutex with priority inheritance
 *   barrier N                           pthread barrier of two
 *   join cpu|sleep US                   a new thread, joined
 *   run cpu|sleep US                    a program started with posix_spawn, awaited
 *   flock FD, unflock FD                whole-file lock
 *   setlk FD, unlk FD                   record lock of one byte (fcntl)
 *   usleep US, pollsleep US, selectsleep US, epollsleep US
 *   pollin FD, epollin FD               waits until FD is readable
 *   fallocate FD MB, truncate FD MB, sendfile FD FROM BYTES, renames DIR COUNT
 *   sigwait SIG                         waits for a signal that was blocked at the start (SIGUSR1, SIGUSR2)
 *   echo PATH TEXT                      writes a kernel file
 *   trace PID US                        attaches as a tracer, which stops PID, and detaches after a while
 *   decline                             fails for a reason that only the program knows
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/ptrace.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/wait.h>
#include <unistd.h>

#define SLOTS 64

extern int fds[SLOTS];
int work(const char *what, long us);

static sem_t semaphores[SLOTS];
static pthread_mutex_t pi_mutexes[SLOTS];
static pthread_barrier_t barriers[SLOTS];

struct job {
	const char *what;
	long us;
};

void prepare_primitives(void)
{
	pthread_mutexattr_t inherit;
	pthread_mutexattr_init(&inherit);
	pthread_mutexattr_setprotocol(&inherit, PTHREAD_PRIO_INHERIT);
	for (int i = 0; i < SLOTS; i++) {
		sem_init(&semaphores[i], 0, 0);
		pthread_mutex_init(&pi_mutexes[i], &inherit);
		pthread_barrier_init(&barriers[i], NULL, 2);
	}
}

static void *do_job(void *arg)
{
	struct job *job = arg;
	work(job->what, job->us);
	return NULL;
}

static int join_one(const char *what, long us)
{
	pthread_t thread;
	struct job job = {what, us};
	errno = pthread_create(&thread, NULL, do_job, &job);
	return errno ? -1 : pthread_join(thread, NULL);
}

static int spawn_one(const char *what, const char *us)
{
	extern char **environ;
	char *argv[] = {"/proc/self/exe", "--work", (char *)what, (char *)us, NULL};
	char self[512];
	pid_t pid;
	int status;
	ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
	if (n < 0)
		return -1;
	self[n] = 0;
	errno = posix_spawn(&pid, self, NULL, NULL, argv, environ);
	return errno || waitpid(pid, &status, 0) < 0 ? -1 : 0;
}

static int record_lock(int fd, short type)
{
	struct flock range = {.l_type = type, .l_whence = SEEK_SET, .l_start = 0, .l_len = 1};
	return fcntl(fd, F_SETLKW, &range);
}

static int doze(const char *how, long us)
{
	struct timeval t = {us / 1000000, us % 1000000};
	if (how[0] == 'u')
		return usleep(us);
	if (how[0] == 'p')
		return poll(NULL, 0, us / 1000);
	if (how[0] == 's')
		return select(0, NULL, NULL, NULL, &t);
	struct epoll_event event;
	int ep = epoll_create1(EPOLL_CLOEXEC), got = epoll_wait(ep, &event, 1, us / 1000);
	close(ep);
	return got;
}

static int readable(int fd, int with_epoll)
{
	struct pollfd one = {fd, POLLIN, 0};
	if (!with_epoll)
		return poll(&one, 1, -1) == 1 ? 0 : -1;
	struct epoll_event event = {.events = EPOLLIN};
	int ep = epoll_create1(EPOLL_CLOEXEC);
	int bad = epoll_ctl(ep, EPOLL_CTL_ADD, fd, &event) || epoll_wait(ep, &event, 1, -1) != 1;
	close(ep);
	return bad ? -1 : 0;
}

static int renames(const char *dir, long count)
{
	char a[512], b[512];
	snprintf(a, sizeof a, "%s/r%d", dir, (int)gettid());
	snprintf(b, sizeof b, "%s/s%d", dir, (int)gettid());
	int fd = open(a, O_CREAT | O_WRONLY, 0600);
	if (fd < 0 || close(fd))
		return -1;
	for (long i = 0; i < count; i++)
		if (i & 1 ? rename(b, a) : rename(a, b))
			return -1;
	return 0;
}

static int await_signal(int number)
{
	sigset_t set;
	int got;
	sigemptyset(&set);
	sigaddset(&set, number);
	return sigwait(&set, &got);
}

static int echo(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	int bad = fd < 0 || write(fd, text, strlen(text)) < 0;
	close(fd);
	return bad ? -1 : 0;
}

static int trace(int pid, long us)
{
	int status;
	if (ptrace(PTRACE_ATTACH, pid, NULL, NULL) || waitpid(pid, &status, __WALL) < 0)
		return -1;
	work("sleep", us);
	return ptrace(PTRACE_DETACH, pid, NULL, NULL);
}

int do_primitives(char **w, int n)
{
	long a = n > 1 ? atol(w[1]) : 0, b = n > 2 ? atol(w[2]) : 0;
	if (!strcmp(w[0], "sempost"))
		return sem_post(&semaphores[a]);
	if (!strcmp(w[0], "semwait"))
		return sem_wait(&semaphores[a]);
	if (!strcmp(w[0], "pilock"))
		return pthread_mutex_lock(&pi_mutexes[a]);
	if (!strcmp(w[0], "piunlock"))
		return pthread_mutex_unlock(&pi_mutexes[a]);
	if (!strcmp(w[0], "barrier"))
		return pthread_barrier_wait(&barriers[a]) > 0 ? -1 : 0;
	if (!strcmp(w[0], "join"))
		return join_one(w[1], b);
	if (!strcmp(w[0], "run"))
		return spawn_one(w[1], w[2]);
	if (!strcmp(w[0], "flock") || !strcmp(w[0], "unflock"))
		return flock(fds[a], w[0][0] == 'f' ? LOCK_EX : LOCK_UN);
	if (!strcmp(w[0], "setlk") || !strcmp(w[0], "unlk"))
		return record_lock(fds[a], w[0][0] == 's' ? F_WRLCK : F_UNLCK);
	if (strstr(w[0], "sleep") && strlen(w[0]) > 5)
		return doze(w[0], a);
	if (!strcmp(w[0], "pollin") || !strcmp(w[0], "epollin"))
		return readable(fds[a], w[0][0] == 'e');
	if (!strcmp(w[0], "fallocate"))
		return fallocate(fds[a], 0, 0, b << 20);
	if (!strcmp(w[0], "truncate"))
		return ftruncate(fds[a], b << 20);
	if (!strcmp(w[0], "sendfile"))
		return sendfile(fds[a], fds[b], NULL, n > 3 ? atol(w[3]) : 0) < 0 ? -1 : 0;
	if (!strcmp(w[0], "renames"))
		return renames(w[1], b);
	if (!strcmp(w[0], "sigwait"))
		return await_signal(a);
	if (!strcmp(w[0], "echo"))
		return echo(w[1], w[2]);
	if (!strcmp(w[0], "trace"))
		return trace(a, b);
	errno = !strcmp(w[0], "decline") ? ECANCELED : ENOSYS;
	return -1;
}
