/*
 * What flags do the mappings have? (criu/proc_parse.c, parse_smaps) They stand in
 * /proc/PID/smaps only, for which the kernel looks at every page of the process: 11 ms per GiB.
 *
 * GODWIT_FLAGS, for a dump: a directory in which a file PID holds the agent's own reading of
 * smaps from right before the freeze: the line VmLck of status, then each mapping's line and its
 * VmFlags. Here CRIU gets today's mappings (/proc/PID/maps, which costs nothing) with those flags,
 * if each of them is one that was read, the same or grown: the kernel only joins mappings of the
 * same flags. If there is any other, or other memory is locked now, CRIU reads smaps itself.
 * What this cannot see is an madvise(2) of exactly one whole mapping in the moment between.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "criu-shared.h"

/* Whole file with a final zero; NULL if it cannot be read. */
static char *load(int directory, const char *name)
{
	char *text = NULL;
	size_t size = 0, room = 0;
	int fd = (int)syscall(SYS_openat, directory, name, O_RDONLY | O_CLOEXEC, 0);
	if (fd < 0)
		return text;
	for (;;) {
		if (room - size < 65536) {
			char *more = realloc(text, room += 1 << 18);
			if (!more)
				break;
			text = more;
		}
		ssize_t got = syscall(SYS_read, fd, text + size, room - size - 1);
		if (got <= 0) {
			text[size] = 0;
			close(fd);
			return text;
		}
		size += got;
	}
	free(text);
	close(fd);
	return NULL;
}

static char *next_line(char *line)
{
	char *end = strchr(line, '\n');
	return end ? end + 1 : line + strlen(line);
}

/* "start-end rest": rest up to the end of the line. */
static char *range(char *line, unsigned long *start, unsigned long *end)
{
	char *rest;
	*start = strtoul(line, &rest, 16);
	if (*rest != '-')
		return NULL;
	*end = strtoul(rest + 1, &rest, 16);
	return *rest == ' ' ? rest : NULL;
}

static int same_rest(const char *one, const char *other)
{
	size_t length = strcspn(one, "\n");
	return length == strcspn(other, "\n") && !strncmp(one, other, length);
}

/* The lines of maps with the flags that were read for them; 0 if one has none. */
static int merge(char *maps, char *known, FILE *out)
{
	unsigned long start, end, from, to, following;
	char *unused;
	for (; *maps; maps = next_line(maps)) {
		char *rest = range(maps, &start, &end);
		if (!rest)
			return 0;
		char *flags = NULL, *found = NULL;
		for (; *known; known = next_line(flags)) {
			found = range(known, &from, &to);
			flags = next_line(known);
			if (!found || strncmp(flags, "VmFlags:", 8))
				return 0;
			if (to > start)
				break;
		}
		if (!*known || !found || !same_rest(rest, found))
			return 0;
		char *after = next_line(flags);
		following = *after ? strtoul(after, &unused, 16) : ~0UL;
		int anonymous = strstr(rest, " 00:00 0") != NULL;
		int stack = anonymous && !strncmp(rest + strcspn(rest, "[\n"), "[stack]", 7);
		int same = start == from && end == to;
		int grown = anonymous && start == from && end > to && end <= following;
		int deeper = stack && start < from && end == to;
		if (!same && !grown && !deeper)
			return 0;
		fwrite(maps, 1, next_line(maps) - maps, out);
		fwrite(flags, 1, next_line(flags) - flags, out);
		known = next_line(flags);
	}
	return 1;
}

static int locked_as_before(int process, const char *known)
{
	char *status = load(process, "status");
	char *now = status ? strstr(status, "\nVmLck:") : NULL;
	int same = now && same_rest(now + 1, known);
	free(status);
	return same;
}

/* A file that reads as smaps does, or -1. */
static int known_flags(int process)
{
	char link[64], path[128], name[32];
	const char *directory = getenv("GODWIT_FLAGS");
	snprintf(link, sizeof(link), "/proc/self/fd/%d", process);
	ssize_t length = directory ? readlink(link, path, sizeof(path) - 1) : -1;
	if (length < 0)
		return -1;
	path[length] = 0;
	char *pid = strrchr(path, '/');
	if (!pid || strspn(pid + 1, "0123456789") != strlen(pid + 1) || !pid[1])
		return -1;
	snprintf(name, sizeof(name), "%.20s", pid + 1);
	int place = open(directory, O_PATH | O_DIRECTORY | O_CLOEXEC);
	char *known = load(place, name), *maps = load(process, "maps");
	if (place >= 0)
		close(place);
	int fd = -1;
	if (known && maps && locked_as_before(process, known)) {
		char *all = NULL;
		size_t size = 0;
		FILE *out = open_memstream(&all, &size);
		int good = out && merge(maps, next_line(known), out);
		if (out)
			fclose(out);
		if (good)
			fd = memfd_create("smaps", MFD_CLOEXEC);
		if (fd >= 0 && (write(fd, all, size) != (ssize_t)size || lseek(fd, 0, SEEK_SET))) {
			close(fd);
			fd = -1;
		}
		free(all);
	}
	free(known);
	free(maps);
	return fd;
}

int openat64(int directory, const char *path, int flags, ...)
{
	va_list list;
	va_start(list, flags);
	int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, int) : 0;
	va_end(list);
	int fd = strcmp(path, "smaps") ? -1 : known_flags(directory);
	if (!(flags & O_CREAT) && shared_restore(directory, path))
		return -1;
	return fd >= 0 ? fd : (int)syscall(SYS_openat, directory, path, flags, mode);
}
