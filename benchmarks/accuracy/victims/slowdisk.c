/*
 * A disk of known speed: one file in a FUSE mount, to put a loop device on. Serves one request at a time.
 *
 * usage: slowdisk MOUNTPOINT BACKING CONTROL
 *
 * CONTROL is a file of one 64-bit number, mapped: the microseconds that each read, write or flush takes, changeable at
 * any time. Prints "ready" when mounted; the mount ends with the process (lazily, by the kernel).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define BUFFER (2u << 20)

static int dev, backing;
static volatile int64_t *delay_us;
static char *in, *data;

static void reply(uint64_t unique, int error, const void *body, size_t bytes)
{
	struct fuse_out_header head = {.len = sizeof head + (error ? 0 : bytes), .error = error, .unique = unique};
	struct iovec v[2] = {{&head, sizeof head}, {(void *)body, error ? 0 : bytes}};
	if (writev(dev, v, 2) < 0 && errno != ENOENT)
		perror("slowdisk: reply");
}

static void serve_time(void)
{
	int64_t us = *delay_us;
	struct timespec t = {us / 1000000, us % 1000000 * 1000};
	if (us > 0)
		nanosleep(&t, NULL);
}

static struct fuse_attr attributes(uint64_t node)
{
	struct fuse_attr a = {.ino = node, .nlink = 1, .blksize = 4096};
	struct stat st;
	fstat(backing, &st);
	a.mode = node == 1 ? S_IFDIR | 0755 : S_IFREG | 0600;
	a.size = node == 1 ? 0 : st.st_size;
	a.blocks = a.size / 512;
	return a;
}

static void handle_meta(struct fuse_in_header *h, void *arg)
{
	struct fuse_init_in *init = arg;
	if (h->opcode == FUSE_INIT) {
		struct fuse_init_out out = {.major = FUSE_KERNEL_VERSION,
					    .minor = FUSE_KERNEL_MINOR_VERSION,
					    .max_readahead = init->max_readahead,
					    .flags = FUSE_BIG_WRITES | FUSE_MAX_PAGES,
					    .max_background = 64,
					    .congestion_threshold = 48,
					    .max_write = 1u << 20,
					    .time_gran = 1,
					    .max_pages = 256};
		reply(h->unique, 0, &out, sizeof out);
	} else if (h->opcode == FUSE_LOOKUP) {
		struct fuse_entry_out out = {.nodeid = 2, .entry_valid = 3600, .attr_valid = 3600, .attr = attributes(2)};
		reply(h->unique, strcmp(arg, "disk") ? -ENOENT : 0, &out, sizeof out);
	} else if (h->opcode == FUSE_GETATTR || h->opcode == FUSE_SETATTR) {
		struct fuse_attr_out out = {.attr_valid = 3600, .attr = attributes(h->nodeid)};
		reply(h->unique, 0, &out, sizeof out);
	} else if (h->opcode == FUSE_OPEN || h->opcode == FUSE_OPENDIR) {
		struct fuse_open_out out = {.open_flags = h->opcode == FUSE_OPEN ? FOPEN_DIRECT_IO : 0};
		reply(h->unique, 0, &out, sizeof out);
	} else if (h->opcode == FUSE_STATFS) {
		struct fuse_statfs_out out = {.st = {.bsize = 4096, .namelen = 255}};
		reply(h->unique, 0, &out, sizeof out);
	} else if (h->opcode == FUSE_FLUSH || h->opcode == FUSE_RELEASE || h->opcode == FUSE_RELEASEDIR || h->opcode == FUSE_ACCESS) {
		reply(h->unique, 0, NULL, 0);
	} else if (h->opcode != FUSE_FORGET && h->opcode != FUSE_BATCH_FORGET && h->opcode != FUSE_INTERRUPT) {
		reply(h->unique, -ENOSYS, NULL, 0);
	}
}

static void handle(ssize_t length)
{
	struct fuse_in_header *h = (void *)in;
	void *arg = in + sizeof *h;
	(void)length;
	if (h->opcode == FUSE_READ) {
		struct fuse_read_in *r = arg;
		serve_time();
		ssize_t n = pread(backing, data, r->size, r->offset);
		reply(h->unique, n < 0 ? -errno : 0, data, n < 0 ? 0 : n);
	} else if (h->opcode == FUSE_WRITE) {
		struct fuse_write_in *w = arg;
		serve_time();
		ssize_t n = pwrite(backing, (char *)arg + sizeof *w, w->size, w->offset);
		struct fuse_write_out out = {.size = n < 0 ? 0 : n};
		reply(h->unique, n < 0 ? -errno : 0, &out, sizeof out);
	} else if (h->opcode == FUSE_FSYNC) {
		serve_time();
		reply(h->unique, 0, NULL, 0);
	} else if (h->opcode == FUSE_FALLOCATE) {
		reply(h->unique, -EOPNOTSUPP, NULL, 0);
	} else {
		handle_meta(h, arg);
	}
}

int main(int argc, char **argv)
{
	char options[128];
	if (argc != 4)
		return 2;
	backing = open(argv[2], O_RDWR);
	int control = open(argv[3], O_RDWR);
	dev = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	delay_us = mmap(NULL, 8, PROT_READ | PROT_WRITE, MAP_SHARED, control, 0);
	in = malloc(BUFFER);
	data = malloc(BUFFER);
	if (backing < 0 || dev < 0 || delay_us == MAP_FAILED || !in || !data) {
		perror("slowdisk");
		return 1;
	}
	snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0", dev);
	if (mount("slowdisk", argv[1], "fuse", 0, options)) {
		perror("slowdisk: mount");
		return 1;
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		ssize_t n = read(dev, in, BUFFER);
		if (n > 0)
			handle(n);
		else if (errno == ENODEV)
			return 0;
	}
}
