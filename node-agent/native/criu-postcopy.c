/*
 * Post-copy: CRIU's page daemon serves pages that are not all there yet.
 *
 * GODWIT_PAGES, for the daemon: its image directory. For a process N of which pages are missing,
 * the agent (hostops/pages/marks.py) has made there
 *
 *   missing-N   one byte for each page of the address space: 1 while the page is missing
 *   wanted      a FIFO: this daemon writes (N, address), 8 bytes each, of a page that is faulted on
 *   arrived     a FIFO: the agent writes any byte after it has cleared marks
 *
 * and writes a page into pages-N.img before it clears its mark. The daemon never waits for one
 * page: a copy ends before the first that is missing, as if the process were changing its layout
 * (criu-shim.c), and CRIU keeps the rest for later. A thread that faults on a missing page goes on
 * sleeping; when the page has come it is woken (UFFDIO_WAKE), faults again and is served. So any
 * number of threads wait at a time, and whoever needs what is there gets it meanwhile. What is
 * wanted is asked for again every second: an agent may have been restarted.
 *
 * At its end the daemon writes its exit status to the file `ended`: an agent that is not its
 * parent must know whether pages were lost with it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/ioctl.h>
#include <linux/userfaultfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "criu-postcopy.h"

#define PAGE_BYTES 4096UL
#define ASK_AGAIN_MS 1000

struct image {
	dev_t device;
	ino_t inode;
	uint64_t process;
	int marks; /* -1: nothing of it is missing */
};

struct wait {
	int uffd;
	uint64_t address; /* where the thread sleeps: the mapping may have moved since the dump */
	struct image image;
	off64_t offset;
};

static struct image *images;
static size_t image_count;
static struct wait *waiting;
static size_t waiting_count;
static int wanted = -1, arrived = -1;
static int stalled;
static struct {
	int uffd;
	uint64_t address;
} fault = { .uffd = -1 };

static const char *directory(void)
{
	static const char *answer;
	static int known;
	if (!known)
		answer = getenv("GODWIT_PAGES");
	known = 1;
	return answer;
}

static int open_in(const char *name, int flags)
{
	char path[4096];
	snprintf(path, sizeof(path), "%s/%s", directory(), name);
	return (int)syscall(SYS_openat, AT_FDCWD, path, flags | O_CLOEXEC, 0600);
}

static void leave(const char *text)
{
	fputs(text, stderr);
	exit(1);
}

static void *grow(void *list, size_t bytes)
{
	list = realloc(list, bytes);
	if (!list)
		leave("post-copy: no memory\n");
	return list;
}

static struct image image_of(int fd)
{
	struct image found = { .marks = -1 };
	struct stat about;
	char link[64], path[4096] = "";
	if (fstat(fd, &about))
		return found;
	for (size_t at = 0; at < image_count; at++)
		if (images[at].inode == about.st_ino && images[at].device == about.st_dev)
			return images[at];
	found.device = about.st_dev;
	found.inode = about.st_ino;
	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	if (readlink(link, path, sizeof(path) - 1) > 0) {
		const char *name = strrchr(path, '/');
		unsigned long number;
		if (name && sscanf(name, "/pages-%lu.img", &number) == 1) {
			char marks[64];
			snprintf(marks, sizeof(marks), "missing-%lu", number);
			found.process = number;
			found.marks = open_in(marks, O_RDONLY);
		}
	}
	if (found.marks >= 0 && wanted < 0) {
		/* both ends: what was asked stays when an agent ends, and no write meets a closed FIFO */
		wanted = open_in("wanted", O_RDWR | O_NONBLOCK);
		arrived = open_in("arrived", O_RDWR | O_NONBLOCK);
		if (wanted < 0 || arrived < 0)
			leave("post-copy: no way to ask for pages\n");
	}
	images = grow(images, (image_count + 1) * sizeof(*images));
	images[image_count++] = found;
	return found;
}

static void ask(const struct wait *one)
{
	uint64_t record[2] = { one->image.process, one->offset };
	/* a full FIFO: asked again later */
	(void)!syscall(SYS_write, wanted, record, sizeof(record));
}

/* A mark that cannot be read counts as missing. */
static size_t before_the_first_missing(const struct image *image, off64_t offset, size_t size)
{
	char marks[1024];
	const size_t pages = (size + PAGE_BYTES - 1) / PAGE_BYTES;
	for (size_t done = 0; done < pages;) {
		size_t part = pages - done < sizeof(marks) ? pages - done : sizeof(marks);
		ssize_t got = syscall(SYS_pread64, image->marks, marks, part,
				      offset / (off64_t)PAGE_BYTES + done);
		if (got < 0)
			return done * PAGE_BYTES;
		if (!got)
			break;
		const char *mark = memchr(marks, 1, got);
		if (mark)
			return (done + (mark - marks)) * PAGE_BYTES;
		done += got;
	}
	return size;
}

static void sleep_on(const struct image *image, off64_t offset)
{
	struct wait one = { fault.uffd, fault.address, *image, offset };
	ask(&one);
	for (size_t at = 0; at < waiting_count; at++)
		if (waiting[at].uffd == one.uffd && waiting[at].address == one.address)
			return;
	waiting = grow(waiting, (waiting_count + 1) * sizeof(*waiting));
	waiting[waiting_count++] = one;
}

void postcopy_fault(int uffd, uint64_t address)
{
	fault.uffd = uffd;
	fault.address = address & ~(PAGE_BYTES - 1);
}

size_t postcopy_there(int fd, off64_t offset, size_t size)
{
	if (!directory())
		return size;
	struct image image = image_of(fd);
	if (image.marks < 0)
		return size;
	size_t there = before_the_first_missing(&image, offset, size);
	if (!there && fault.uffd >= 0)
		sleep_on(&image, offset);
	else if (!there)
		stalled = 1;
	fault.uffd = -1;
	return there;
}

/* A range that has been unmapped meanwhile has nobody to wake: that is no error. */
static void wake(void)
{
	size_t kept = 0;
	for (size_t at = 0; at < waiting_count; at++) {
		struct wait *one = &waiting[at];
		struct uffdio_range page = { one->address, PAGE_BYTES };
		if (before_the_first_missing(&one->image, one->offset, PAGE_BYTES))
			(void)syscall(SYS_ioctl, one->uffd, UFFDIO_WAKE, &page);
		else
			waiting[kept++] = *one;
	}
	waiting_count = kept;
}

int postcopy_stalled(void)
{
	return stalled;
}

int postcopy_wait(int fd, int timeout)
{
	char bell[512];
	fault.uffd = -1;
	if (wanted < 0)
		return timeout;
	for (;;) {
		struct pollfd both[] = { { fd, POLLIN, 0 }, { arrived, POLLIN, 0 } };
		int idle = timeout || stalled;
		int ready = poll(both, 2, idle ? ASK_AGAIN_MS : 0);
		if (ready < 0 && errno != EINTR)
			return timeout;
		if (ready > 0 && both[1].revents)
			while (syscall(SYS_read, arrived, bell, sizeof(bell)) == sizeof(bell))
				;
		if ((ready > 0 && both[1].revents) || (!ready && idle)) {
			stalled = 0;
			wake();
		}
		if (!ready && idle)
			for (size_t at = 0; at < waiting_count; at++)
				ask(&waiting[at]);
		if ((ready > 0 && both[0].revents) || (!timeout && !stalled))
			return 0;
	}
}

static pid_t itself;

static void tell_end(int status, void *unused)
{
	char text[16];
	(void)unused;
	if (getpid() != itself)
		return;
	int fd = open_in("ended", O_WRONLY | O_CREAT | O_TRUNC);
	int length = snprintf(text, sizeof(text), "%d\n", status);
	if (fd >= 0)
		(void)!syscall(SYS_write, fd, text, length);
}

__attribute__((constructor)) static void watch_the_end(void)
{
	if (!directory())
		return;
	itself = getpid();
	on_exit(tell_end, NULL);
}
