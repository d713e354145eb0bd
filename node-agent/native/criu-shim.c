/*
 * What CRIU 4.2 does differently for Godwit. Linked into the CRIU that Godwit ships
 * (scripts/bundle-criu); the first two without effect unless GODWIT_DIRTY_ONLY or
 * GODWIT_INIT_PID is set.
 *
 * GODWIT_DIRTY_ONLY, for a dump: two questions, answered faster, and a copy of nothing left out.
 *
 * Which pages are there? (PAGEMAP_SCAN, criu/pagemap-cache.c) The agent tracks writes with
 * userfaultfd and has sent all that is clean to the target long before. With one more category
 * in the question CRIU hears of written pages only, and neither maps nor pipes the rest. Memory
 * that nobody tracks counts as written. The target knows from the agent what memory there is and
 * checks that it has all of it. With the value "untracked", of a post-copy, whose process may have
 * written everything, CRIU does not hear of tracked memory at all: it would map and pipe what
 * nobody takes from it (2 GiB: 0.4 s and more).
 *
 * Which connections does the firewall track? (criu/net.c, dump_nf_ct) Twice a walk of the whole
 * machine's table, 10 ms each, also for a namespace that has none of them. When its own count is
 * zero the question becomes one whose answer is empty.
 *
 * The table of pages to take (criu/mem.c, __parasite_dump_pages_seized) has 16 bytes for every page
 * that there could be, 20 MB for 4 GiB, and all of it is copied into memory that the process
 * shares: 5000 page faults on each side, half of what a dump costs there. Hardly any of it was
 * ever written. Of a large copy the pages that are there are copied.
 *
 * GODWIT_INIT_PID, for a restore: the number that the container's first process gets on the node.
 * The runtime was told it long before there was a process (hooks/internal/gate). CRIU names the
 * number within the new PID namespace only (criu/clone-noasan.c); one more level names both
 * (clone3(2), set_tid). A number that is taken makes the restore fail.
 *
 * How large is a page that is restored? (criu/mem.c, maybe_disable_thp) Pages that are brought
 * (hotpages.py) are read into memory that the page daemon fills later. Where huge pages are given
 * unasked ("always"), the first of them would bring 2 MiB of zeros, which nobody fills any more.
 * CRIU turns them off for images with a parent only, where it mixes the two itself. Here they are
 * off for every restore. Not earlier than at the clone: CRIU tries the switch when it starts.
 *
 * Which limits does a process have? (criu/cr-dump.c, dump_task_rlimits) prlimit(2) tells a
 * process of another user only to CAP_SYS_RESOURCE, which some nodes withhold from root;
 * /proc/PID/limits says the same to everybody.
 *
 * Where does a cgroup namespace begin? (criu/proc_parse.c, parse_thread_cgroup) The guard keeps the
 * processes in a cgroup outside of their namespace's root, which their own /proc/self/cgroup shows
 * as a path that begins with "/.." (cgroup_namespaces(7)). CRIU looks for that path at the end of
 * the one it sees itself, and refuses. Nobody uses what it wants to know, since cgroups are not
 * restored (--manage-cgroups-mode ignore); so the namespace begins where the process is.
 *
 * How does the page daemon serve a process that changes its memory meanwhile? (criu/uffd.c)
 * - A copy that the kernel refuses because the layout is being changed (EAGAIN) is tried again
 *   from the image. --auto-dedup frees the pages when they are read, so the second time they are
 *   zero. Here they are freed when they have been copied, and no longer once there is a child.
 * - A copy that crosses the border of a mapping split since (mprotect, mremap) is refused whole,
 *   for ever. Here it shrinks until it fits.
 * - After madvise(MADV_DONTNEED) the daemon unregisters the range, at a time when the process may
 *   have unmapped it already (EINVAL: the daemon ends, and what it still had reads as zero) or have
 *   moved other memory there, whose pages then read as zero. Here the range stays registered; what
 *   is touched there is answered with a zero page.
 * - Faults come before what is sent unasked; a process that faults all the time never gets the
 *   rest. Here every eighth turn is for the rest.
 * - A signal, even SIGCONT, ends epoll_wait(2) and with it the daemon. Here it waits again.
 *
 * How does it serve pages that are still on the source? criu-postcopy.c.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/ioctl.h>
#include <linux/sched.h>
#include <linux/netlink.h>
#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "criu-postcopy.h"

#define PAGE_BYTES 4096UL

/* linux/fs.h, 6.7 */
#define PAGEMAP_SCAN 0xc0606610UL
#define PAGE_IS_WPALLOWED (1ULL << 0) /* tracked: of the mapping, not of the page */
#define PAGE_IS_WRITTEN (1ULL << 1)
#define PAGE_IS_FILE (1ULL << 2)
#define PAGE_IS_PRESENT (1ULL << 3)
#define PAGE_IS_SWAPPED (1ULL << 4)
#define PAGE_IS_PFNZERO (1ULL << 5)

/* linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h */
#define CTNETLINK_GET 0x101
#define CTNETLINK_GET_UNCONFIRMED 0x107

struct pagemap_scan {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t inverted, mask, any_of, returned;
};

static int wanted(void)
{
	static int answer = -1;
	if (answer < 0)
		answer = getenv("GODWIT_DIRTY_ONLY") != NULL;
	return answer;
}

/* linux/pagemap: bit 63 present, bit 62 swapped; neither: a private page that was never written. */
#define THERE (3ULL << 62)

/* Both sides are zero where they were never touched: private memory by its page table, shared
 * memory by what its file has. */
static void copy_what_is_there(char *to, const char *from, size_t size, int pagemap)
{
	enum { PAGES = 4096 };
	static uint64_t source[PAGES];
	static unsigned char target[PAGES + 1];
	while (size) {
		size_t skew = (uintptr_t)from % PAGE_BYTES;
		size_t part = PAGES * PAGE_BYTES - skew;
		part = part < size ? part : size;
		size_t pages = (skew + part + PAGE_BYTES - 1) / PAGE_BYTES;
		uintptr_t first = (uintptr_t)to / PAGE_BYTES, last = ((uintptr_t)to + part - 1) / PAGE_BYTES;
		int known = syscall(SYS_pread64, pagemap, source, pages * 8,
				    (uintptr_t)from / PAGE_BYTES * 8) == (ssize_t)(pages * 8) &&
			    !syscall(SYS_mincore, first * PAGE_BYTES, (last - first + 1) * PAGE_BYTES,
				     target);
		for (size_t page = 0, at = 0, end; at < part; page++, at = end) {
			end = (page + 1) * PAGE_BYTES - skew;
			end = end < part ? end : part;
			size_t low = ((uintptr_t)to + at) / PAGE_BYTES - first;
			size_t high = ((uintptr_t)to + end - 1) / PAGE_BYTES - first;
			if (!known || (source[page] & THERE) || (target[low] & 1) || (target[high] & 1))
				memmove(to + at, from + at, end - at);
		}
		to += part;
		from += part;
		size -= part;
	}
}

void *memcpy(void *to, const void *from, size_t size)
{
	enum { LARGE = 1 << 20 };
	int pagemap = -1;
	if (size >= LARGE && wanted())
		pagemap = (int)syscall(SYS_openat, AT_FDCWD, "/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (pagemap < 0)
		return memmove(to, from, size);
	copy_what_is_there(to, from, size, pagemap);
	close(pagemap);
	return to;
}

static int untracked_only(void)
{
	const char *value = getenv("GODWIT_DIRTY_ONLY");
	return value && !strcmp(value, "untracked");
}

/* What the page daemon has read last, whether more was asked for that is not there yet
 * (criu-postcopy.c), and whether a page may be needed once more: by a child. */
static struct {
	int fd;
	const void *buffer;
	off64_t offset;
	size_t size;
	int cut;
	int forked;
} served;

ssize_t pread64(int fd, void *buffer, size_t size, off64_t offset)
{
	size_t there = postcopy_there(fd, offset, size);
	ssize_t got = there ? syscall(SYS_pread64, fd, buffer, there, offset) : 0;
	served.fd = fd;
	served.buffer = buffer;
	served.offset = offset;
	served.size = got > 0 ? got : 0;
	served.cut = there < size && got == (ssize_t)there;
	return served.cut ? (ssize_t)size : got;
}

ssize_t read(int fd, void *buffer, size_t size)
{
	ssize_t got = syscall(SYS_read, fd, buffer, size);
	if (got == sizeof(struct uffd_msg)) {
		const struct uffd_msg *message = buffer;
		if (message->event == UFFD_EVENT_FORK)
			served.forked = 1;
		if (message->event == UFFD_EVENT_PAGEFAULT)
			postcopy_fault(fd, message->arg.pagefault.address);
	}
	return got;
}

int epoll_wait(int fd, struct epoll_event *events, int most, int timeout)
{
	static unsigned calls;
	const int unasked = !timeout;
	timeout = postcopy_wait(fd, timeout);
	if (unasked && !postcopy_stalled() && ++calls % 8 == 0)
		return 0;
	int count;
	do
		count = (int)syscall(SYS_epoll_pwait, fd, events, most, timeout, NULL, 8);
	while (count < 0 && errno == EINTR);
	return count;
}

/* A range that is no longer within one mapping is refused as a whole (ENOENT): less of it may do.
 * What was copied before a refusal is reported with EAGAIN, as the kernel does it; so is what is
 * copied before a page that is not there yet. */
static int copy_what_fits(int fd, struct uffdio_copy *copy)
{
	const uint64_t asked = copy->len;
	const uint64_t end = (uintptr_t)served.buffer + served.size;
	if (served.cut && copy->src >= end) {
		copy->copy = -EAGAIN;
		errno = EAGAIN;
		return -1;
	}
	if (served.cut && copy->len > end - copy->src)
		copy->len = end - copy->src;
	int result = (int)syscall(SYS_ioctl, fd, UFFDIO_COPY, copy);
	while (result && copy->copy == -ENOENT && copy->len > PAGE_BYTES) {
		copy->len = copy->len / 2 & ~(PAGE_BYTES - 1);
		result = (int)syscall(SYS_ioctl, fd, UFFDIO_COPY, copy);
	}
	int error = !result && copy->len < asked ? EAGAIN : errno;
	if (copy->copy > 0 && !served.forked && copy->src == (uintptr_t)served.buffer &&
	    (uint64_t)copy->copy <= served.size)
		fallocate(served.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, served.offset,
			  copy->copy);
	result = result || copy->len < asked ? -1 : 0;
	copy->len = asked;
	errno = error;
	return result;
}

/*
 * Whether a page is one of a file the kernel learns from the page itself, of which each costs a
 * cache miss: 11 ms per GiB, for each page that is there. Whether it was written stands in the
 * page table: 2 ms. So that is asked first, and the rest of what was written only.
 */
static int scan_written(int fd, struct pagemap_scan *scan)
{
	enum { MOST = 4096 };
	static struct {
		uint64_t start, end, categories;
	} written[MOST];
	const uint64_t gap = 256 * PAGE_BYTES, region = sizeof(written[0]);
	struct pagemap_scan first = {
		.size = sizeof(first),
		.start = scan->start,
		.end = scan->end,
		.vec = (uintptr_t)written,
		.vec_len = MOST,
		.mask = PAGE_IS_WRITTEN, /* nothing else: the kernel has a shorter way for exactly this */
		.returned = PAGE_IS_WRITTEN,
	};
	if (untracked_only()) {
		first.mask |= PAGE_IS_WPALLOWED;
		first.inverted |= PAGE_IS_WPALLOWED;
		scan->mask |= PAGE_IS_WPALLOWED;
		scan->inverted |= PAGE_IS_WPALLOWED;
	}
	long count = syscall(SYS_ioctl, fd, PAGEMAP_SCAN, &first);
	scan->mask |= PAGE_IS_WRITTEN;
	if (count < 0 || count == MOST || first.walk_end != scan->end || scan->flags ||
	    scan->max_pages)
		return (int)syscall(SYS_ioctl, fd, PAGEMAP_SCAN, scan);
	uint64_t used = 0;
	for (long at = 0, next; at < count; at = next) {
		struct pagemap_scan part = *scan;
		part.start = written[at].start;
		for (next = at + 1; next < count && written[next].start - written[next - 1].end < gap;)
			next++;
		part.end = written[next - 1].end;
		part.vec = scan->vec + used * region;
		part.vec_len = scan->vec_len - used;
		if (!part.vec_len) {
			scan->walk_end = part.start;
			return (int)used;
		}
		long got = syscall(SYS_ioctl, fd, PAGEMAP_SCAN, &part);
		if (got < 0)
			return (int)got;
		used += got;
		if (part.walk_end < part.end) {
			scan->walk_end = part.walk_end;
			return (int)used;
		}
	}
	scan->walk_end = scan->end;
	return (int)used;
}

int ioctl(int fd, unsigned long request, ...)
{
	va_list list;
	va_start(list, request);
	void *argument = va_arg(list, void *);
	va_end(list);
	if ((request & 0xffffffffUL) == PAGEMAP_SCAN && wanted()) {
		struct pagemap_scan *scan = argument;
		const uint64_t absent = PAGE_IS_FILE | PAGE_IS_PFNZERO;
		/* Of nothing: that is CRIU finding out what the kernel knows (criu/kerndat.c). */
		const int something = scan->end > scan->start;
		if (something && (scan->any_of & PAGE_IS_PRESENT) && (scan->mask & absent) == absent &&
		    (scan->inverted & absent) == absent)
			return scan_written(fd, scan);
	}
	if (request == UFFDIO_COPY)
		return copy_what_fits(fd, argument);
	if (request == UFFDIO_UNREGISTER)
		return 0;
	return (int)syscall(SYS_ioctl, fd, request, argument);
}

/* Of the network namespace this thread is in; CRIU is in the container's when it asks. */
static int nothing_is_tracked(void)
{
	char text[16] = "";
	int fd = open("/proc/sys/net/netfilter/nf_conntrack_count", O_RDONLY);
	if (fd < 0)
		return 0;
	ssize_t got = read(fd, text, sizeof(text) - 1);
	close(fd);
	return got >= 2 && text[0] == '0' && text[1] == '\n';
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
	if (wanted() && message->msg_iovlen == 1 &&
	    message->msg_iov[0].iov_len >= sizeof(struct nlmsghdr)) {
		int domain = 0, protocol = 0;
		socklen_t size = sizeof(int);
		struct nlmsghdr *head = message->msg_iov[0].iov_base;
		if (!getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) && domain == AF_NETLINK &&
		    !getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &size) &&
		    protocol == NETLINK_NETFILTER && head->nlmsg_type == CTNETLINK_GET &&
		    (head->nlmsg_flags & NLM_F_DUMP) == NLM_F_DUMP && nothing_is_tracked())
			head->nlmsg_type = CTNETLINK_GET_UNCONFIRMED;
	}
	return syscall(SYS_sendmsg, fd, message, flags);
}

/* Lines of /proc/PID/cgroup, whose paths outside of the namespace become its root. */
static size_t within_namespace(char *text, size_t size)
{
	size_t from = 0, to = 0;
	while (from < size) {
		const char *end = memchr(text + from, '\n', size - from);
		const size_t length = end ? (size_t)(end - text) - from + 1 : size - from;
		char *path = memmem(text + from, length, ":/../", 5);
		size_t kept = path ? (size_t)(path - text) - from + 2 : length;
		memmove(text + to, text + from, kept);
		to += kept;
		if (path && end)
			text[to++] = '\n';
		from += length;
	}
	return to;
}

/* CRIU reads nothing else this way. */
FILE *fmemopen(void *buffer, size_t size, const char *mode)
{
	static FILE *(*next)(void *, size_t, const char *);
	if (!next)
		next = (FILE *(*)(void *, size_t, const char *))dlsym(RTLD_NEXT, "fmemopen");
	return next(buffer, within_namespace(buffer, size), mode);
}

static int init_pid(void)
{
	const char *text = getenv("GODWIT_INIT_PID");
	return text ? atoi(text) : 0;
}

/* The line of limit N is the N-th after the heading (fs/proc/base.c, proc_pid_limits): a name of
 * 25 columns, then soft and hard limit. */
static int limit_of(long pid, long resource, struct rlimit64 *limit)
{
	char path[64], line[256], soft[32], hard[32];
	snprintf(path, sizeof(path), "/proc/%ld/limits", pid);
	FILE *file = fopen(path, "re");
	if (!file)
		return -1;
	int found = 0;
	for (long at = -1; at <= resource && fgets(line, sizeof(line), file); at++)
		found = at == resource && strlen(line) > 26 &&
			sscanf(line + 26, "%31s %31s", soft, hard) == 2;
	fclose(file);
	if (!found)
		return -1;
	limit->rlim_cur = soft[0] == 'u' ? RLIM64_INFINITY : strtoull(soft, NULL, 10);
	limit->rlim_max = hard[0] == 'u' ? RLIM64_INFINITY : strtoull(hard, NULL, 10);
	return 0;
}

long syscall(long number, ...)
{
	static long (*next)(long, ...);
	va_list list;
	va_start(list, number);
	long a = va_arg(list, long), b = va_arg(list, long), c = va_arg(list, long);
	long d = va_arg(list, long), e = va_arg(list, long), f = va_arg(list, long);
	va_end(list);
	if (!next)
		next = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
	pid_t both[2];
	if (number == SYS_clone3) {
		struct clone_args *args = (struct clone_args *)a;
		if ((args->flags & CLONE_NEWPID) && args->set_tid_size == 1 && init_pid()) {
			both[0] = *(pid_t *)(uintptr_t)args->set_tid;
			both[1] = init_pid();
			args->set_tid = (uintptr_t)both;
			args->set_tid_size = 2;
			/* inherited by what is cloned here, until CRIU sets what each process had */
			prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
		}
	}
	long result = next(number, a, b, c, d, e, f);
	if (result == -1 && errno == EPERM && number == SYS_prlimit64 && !c && d) {
		result = limit_of(a, b, (struct rlimit64 *)d);
		if (result)
			errno = EPERM;
	}
	return result;
}
