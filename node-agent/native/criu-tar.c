/*
 * The `tar` that Godwit's CRIU calls for the content of a tmpfs (criu/filesystems.c, tmpfs_dump
 * and tmpfs_restore, v4.2), three times on each side of a container's freeze. GNU tar with gzip
 * costs 5 ms each time, for an empty directory or a handful of device nodes.
 *
 * Directories, links, devices, pipes and small files are written as plain, uncompressed ustar
 * (POSIX.1-1988). Anything else, and every archive that is not ours, is left to GNU tar.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define BLOCK 512
#define MAX_BYTES (4 << 20)
#define MAX_NAME 99
#define MAX_ID 07777777
#define GNU_TAR "/opt/godwit/criu/bin/gnu-tar"

struct header {
	char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], sum[8], type, link[100];
	char magic[6], version[2], owner[32], group[32], major[8], minor[8], prefix[155], pad[12];
};

static char buffer[MAX_BYTES];
static size_t used;
static char **arguments;

static void gnu_tar(void)
{
	execv(GNU_TAR, arguments);
	execvp("gnu-tar", arguments);
	_exit(127);
}

static void fail(const char *what)
{
	dprintf(2, "criu-tar: %s: %s\n", what, strerror(errno));
	_exit(2);
}

static unsigned checksum(const struct header *head)
{
	const unsigned char *bytes = (const void *)head;
	unsigned sum = 0;
	for (size_t i = 0; i < BLOCK; i++)
		sum += i >= 148 && i < 156 ? ' ' : bytes[i];
	return sum;
}

static void *reserve(size_t bytes)
{
	size_t whole = (bytes + BLOCK - 1) / BLOCK * BLOCK;
	if (used + whole > sizeof(buffer) - 2 * BLOCK)
		gnu_tar();
	void *at = buffer + used;
	memset(at, 0, whole);
	used += whole;
	return at;
}

static void pack(int directory, const char *name, const char *path, dev_t device)
{
	struct stat about;
	if (fstatat(directory, name, &about, AT_SYMLINK_NOFOLLOW | (*name ? 0 : AT_EMPTY_PATH)))
		gnu_tar();
	int is_directory = S_ISDIR(about.st_mode);
	if (S_ISSOCK(about.st_mode))
		return; /* as GNU tar: CRIU makes the names of sockets itself */
	if (strlen(path) > MAX_NAME - 1 || about.st_uid > MAX_ID || about.st_gid > MAX_ID ||
	    about.st_mtime < 0 || (!is_directory && about.st_nlink > 1) ||
	    (S_ISREG(about.st_mode) && about.st_size > MAX_BYTES))
		gnu_tar();

	struct header *head = reserve(BLOCK);
	snprintf(head->name, sizeof(head->name), "%s%s", path, is_directory ? "/" : "");
	snprintf(head->mode, sizeof(head->mode), "%07o", about.st_mode & 07777);
	snprintf(head->uid, sizeof(head->uid), "%07o", about.st_uid);
	snprintf(head->gid, sizeof(head->gid), "%07o", about.st_gid);
	snprintf(head->mtime, sizeof(head->mtime), "%011llo", (unsigned long long)about.st_mtime);
	snprintf(head->size, sizeof(head->size), "%011o", 0);
	memcpy(head->magic, "ustar", 6);
	memcpy(head->version, "00", 2);

	switch (about.st_mode & S_IFMT) {
	case S_IFDIR:
		head->type = '5';
		break;
	case S_IFLNK: {
		ssize_t length = readlinkat(directory, name, head->link, sizeof(head->link));
		if (length < 0 || length > MAX_NAME)
			gnu_tar();
		head->type = '2';
		break;
	}
	case S_IFCHR:
	case S_IFBLK:
		if (major(about.st_rdev) > MAX_ID || minor(about.st_rdev) > MAX_ID)
			gnu_tar();
		snprintf(head->major, sizeof(head->major), "%07o", major(about.st_rdev));
		snprintf(head->minor, sizeof(head->minor), "%07o", minor(about.st_rdev));
		head->type = S_ISCHR(about.st_mode) ? '3' : '4';
		break;
	case S_IFIFO:
		head->type = '6';
		break;
	default: {
		int fd = openat(directory, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
		char *content = reserve(about.st_size);
		if (fd < 0)
			gnu_tar();
		for (off_t done = 0; done < about.st_size;) {
			ssize_t got = read(fd, content + done, about.st_size - done);
			if (got <= 0)
				gnu_tar();
			done += got;
		}
		close(fd);
		snprintf(head->size, sizeof(head->size), "%011llo", (unsigned long long)about.st_size);
		head->type = '0';
	}
	}
	snprintf(head->sum, sizeof(head->sum), "%06o", checksum(head));
	if (!is_directory || about.st_dev != device)
		return;

	int inner = openat(directory, *name ? name : ".", O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
	DIR *list = inner < 0 ? NULL : fdopendir(inner);
	if (!list)
		gnu_tar();
	for (struct dirent *entry; (entry = readdir(list));) {
		char below[MAX_NAME + 258];
		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
			continue;
		snprintf(below, sizeof(below), "%s/%s", path, entry->d_name);
		pack(dirfd(list), entry->d_name, below, device);
	}
	closedir(list);
}

static void create(void)
{
	struct stat about;
	/* the directory is standard input, as CRIU hands it over */
	if (fstat(0, &about) || !S_ISDIR(about.st_mode))
		gnu_tar();
	pack(0, "", ".", about.st_dev);
	memset(buffer + used, 0, 2 * BLOCK);
	used += 2 * BLOCK;
	for (size_t done = 0; done < used;) {
		ssize_t put = write(1, buffer + done, used - done);
		if (put < 0)
			fail("write");
		done += put;
	}
}

static void times(const struct header *head, const char *path)
{
	struct timespec both[2] = { { .tv_nsec = UTIME_OMIT }, { 0 } };
	both[1].tv_sec = strtoll(head->mtime, NULL, 8);
	if (utimensat(AT_FDCWD, path, both, AT_SYMLINK_NOFOLLOW))
		fail(path);
}

static void unpack(const struct header *head, const char *content, size_t size)
{
	const char *path = head->name;
	mode_t mode = strtoul(head->mode, NULL, 8);
	dev_t device = makedev(strtoul(head->major, NULL, 8), strtoul(head->minor, NULL, 8));
	int failed = 0;
	switch (head->type) {
	case '5':
		failed = mkdir(path, 0700) && errno != EEXIST;
		break;
	case '2':
		failed = symlink(head->link, path);
		break;
	case '3':
		failed = mknod(path, S_IFCHR | 0600, device);
		break;
	case '4':
		failed = mknod(path, S_IFBLK | 0600, device);
		break;
	case '6':
		failed = mkfifo(path, 0600);
		break;
	case '0': {
		int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW, 0600);
		failed = fd < 0 || write(fd, content, size) != (ssize_t)size || close(fd);
		break;
	}
	default:
		errno = EINVAL;
		failed = 1;
	}
	if (!failed)
		failed = lchown(path, strtoul(head->uid, NULL, 8), strtoul(head->gid, NULL, 8));
	if (!failed && head->type != '2')
		failed = chmod(path, mode);
	if (failed)
		fail(path);
	if (head->type != '5')
		times(head, path);
}

static void extract(const char *directory)
{
	ssize_t got;
	unsigned char magic[2];
	/* without moving on: GNU tar wants to read from here */
	off_t start = lseek(0, 0, SEEK_CUR);
	if (start < 0 || pread(0, magic, 2, start) != 2 || magic[0] != '.' || magic[1] != '/')
		gnu_tar();
	while ((got = read(0, buffer + used, sizeof(buffer) - used)) > 0)
		used += got;
	if (got < 0 || chdir(directory))
		fail(directory);
	/* Links last, so that nothing is ever made through one. */
	for (int pass = 0; pass < 3; pass++) {
		for (size_t at = 0; at + BLOCK <= used && buffer[at];) {
			const struct header *head = (void *)(buffer + at);
			size_t size = strtoul(head->size, NULL, 8);
			if (checksum(head) != strtoul(head->sum, NULL, 8) || size > used - at - BLOCK ||
			    head->name[0] != '.' || head->name[1] != '/' || strstr(head->name, "/..")) {
				errno = EBADMSG;
				fail("archive");
			}
			if (pass == (head->type == '2'))
				unpack(head, buffer + at + BLOCK, size);
			else if (pass == 2 && head->type == '5') /* what came into it has changed its time */
				times(head, head->name);
			at += BLOCK + (size + BLOCK - 1) / BLOCK * BLOCK;
		}
	}
}

int main(int count, char **argv)
{
	int wants_create = 0, wants_extract = 0;
	const char *directory = NULL;
	arguments = argv;
	for (int i = 1; i < count; i++) {
		wants_create |= !strcmp(argv[i], "--create");
		wants_extract |= !strcmp(argv[i], "--extract");
		if (!strcmp(argv[i], "--directory") && i + 1 < count)
			directory = argv[i + 1];
	}
	if (wants_create && directory && !strcmp(directory, "/proc/self/fd/0"))
		create();
	else if (wants_extract && directory)
		extract(directory);
	else
		gnu_tar();
	return 0;
}
