/*
 * Shared memory (memfd, MAP_SHARED|MAP_ANONYMOUS, SysV) that the agent copies itself.
 *
 * GODWIT_SHARED, for a dump: a file of lines "DEVICE INODE", the objects whose content the agent
 * sends (hostops/pages/sharedmemory.py). CRIU asks for the parts that hold data (lseek(2), SEEK_DATA:
 * criu/shmem.c, next_data_segment) and hears that there are none. Of a SysV segment the inode is
 * the identifier (ipc/shm.c, newseg).
 *
 * For a restore: if the directory of images holds a socket named shared.sock, the content of each
 * object is asked for there by the number in the name of its page map, at the moment when CRIU
 * opens that (criu/shmem.c, do_restore_shmem_content). CRIU has just made the object, empty; the
 * answer is a descriptor of one that holds everything, a memfd as CRIU's own, and it takes the
 * place of CRIU's: nothing is copied. A SysV segment cannot be replaced, so it is filled.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "criu-shared.h"

#define SOCKET "shared.sock"

struct object {
	uint64_t device, inode;
};

/* What the agent sends itself. */
static struct {
	int known;
	size_t count;
	struct object *objects;
} left_out;

/* What CRIU has made last, to be filled. */
static struct {
	int fd;
	char *attached;
} made = {.fd = -1};

static void read_list(void)
{
	const char *path = getenv("GODWIT_SHARED");
	FILE *file = path ? fopen(path, "re") : NULL;
	unsigned long device, inode;
	left_out.known = 1;
	while (file && fscanf(file, "%lu %lu\n", &device, &inode) == 2) {
		size_t size = (left_out.count + 1) * sizeof(struct object);
		struct object *more = realloc(left_out.objects, size);
		if (!more)
			break;
		left_out.objects = more;
		left_out.objects[left_out.count++] = (struct object){device, inode};
	}
	if (file)
		fclose(file);
}

static int is_left_out(int fd)
{
	struct stat about;
	if (!left_out.known)
		read_list();
	if (!left_out.count || fstat(fd, &about) || !S_ISREG(about.st_mode))
		return 0;
	for (size_t at = 0; at < left_out.count; at++)
		if (left_out.objects[at].device == about.st_dev &&
		    left_out.objects[at].inode == about.st_ino)
			return 1;
	return 0;
}

off64_t lseek64(int fd, off64_t offset, int whence)
{
	if (whence == SEEK_DATA && is_left_out(fd)) {
		errno = ENXIO;
		return -1;
	}
	return syscall(SYS_lseek, fd, offset, whence);
}

int memfd_create(const char *name, unsigned int flags)
{
	made.attached = NULL;
	made.fd = (int)syscall(SYS_memfd_create, name, flags);
	return made.fd;
}

void *shmat(int id, const void *address, int flags)
{
	made.fd = -1;
	made.attached = (char *)syscall(SYS_shmat, id, address, flags);
	return made.attached;
}

/* The directory is of another mount namespace, so its socket has no path here. */
static int call(int directory)
{
	struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = SOCKET};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int here = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
	int failed = fd < 0 || here < 0 || fchdir(directory) ||
		     connect(fd, (struct sockaddr *)&name, sizeof(name));
	int error = errno;
	if (here >= 0) {
		failed |= fchdir(here);
		close(here);
	}
	if (!failed)
		return fd;
	if (fd >= 0)
		close(fd);
	errno = error;
	return -1;
}

/* Descriptor of the whole object and its size; -1 for one that is in CRIU's images; -2. */
static int ask(int directory, uint64_t number, uint64_t *size)
{
	struct {
		uint64_t there, size;
	} reply;
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec part = {&reply, sizeof(reply)};
	struct msghdr message = {.msg_iov = &part,
				 .msg_iovlen = 1,
				 .msg_control = &control,
				 .msg_controllen = sizeof(control)};
	int fd = call(directory), got = -2;
	if (fd < 0)
		return -2;
	if (write(fd, &number, sizeof(number)) == sizeof(number) &&
	    recvmsg(fd, &message, MSG_CMSG_CLOEXEC | MSG_WAITALL) == sizeof(reply)) {
		struct cmsghdr *head = CMSG_FIRSTHDR(&message);
		*size = reply.size;
		if (!reply.there)
			got = -1;
		else if (head && head->cmsg_type == SCM_RIGHTS)
			memcpy(&got, CMSG_DATA(head), sizeof(got));
	}
	close(fd);
	return got;
}

/* Into a memfd of CRIU's, or to where a segment is attached. */
static int fill(int from, uint64_t size)
{
	off64_t at = 0;
	while ((at = syscall(SYS_lseek, from, at, SEEK_DATA)) >= 0) {
		off64_t end = syscall(SYS_lseek, from, at, SEEK_HOLE);
		if (end < 0 || (uint64_t)end > size)
			return -1;
		char *to = made.attached ? made.attached + at : NULL;
		if (made.fd >= 0) {
			to = mmap(NULL, end - at, PROT_READ | PROT_WRITE, MAP_SHARED, made.fd, at);
			if (to == MAP_FAILED)
				return -1;
		}
		for (off64_t done = 0; done < end - at;) {
			ssize_t got = syscall(SYS_pread64, from, to + done, end - at - done, at + done);
			if (got <= 0)
				return -1;
			done += got;
		}
		if (made.fd >= 0)
			munmap(to, end - at);
		at = end;
	}
	return errno == ENXIO ? 0 : -1;
}

/* Whether one memfd can stand for the other: what was said when it was made is the same. */
static int same_kind(int one, int other)
{
	int seals = fcntl(one, F_GET_SEALS);
	return seals >= 0 && seals == fcntl(other, F_GET_SEALS);
}

int shared_restore(int directory, const char *path)
{
	struct stat about;
	unsigned long number;
	uint64_t size = 0;
	int length = 0;
	if (sscanf(path, "pagemap-shmem-%lu.img%n", &number, &length) != 1 || !length ||
	    path[length] || fstatat(directory, SOCKET, &about, AT_SYMLINK_NOFOLLOW))
		return 0;
	int whole = ask(directory, number, &size), result = -1;
	if (whole == -1)
		return 0;
	if (whole >= 0) {
		if (made.fd < 0 && made.attached && made.attached != (char *)-1)
			result = fill(whole, size);
		else if (made.fd >= 0 && !fstat(made.fd, &about) && (uint64_t)about.st_size == size) {
			int keep = fcntl(made.fd, F_GETFD) & FD_CLOEXEC ? O_CLOEXEC : 0;
			if (same_kind(whole, made.fd))
				result = dup3(whole, made.fd, keep) < 0 ? -1 : 0;
			else
				result = fill(whole, size);
		}
		close(whole);
	}
	made.fd = -1;
	made.attached = NULL;
	if (result)
		errno = EIO;
	return result;
}
