/*
 * Processes that share memory in every way there is, and know what each page of it must hold.
 *
 * sharer DIRECTORY [MEBIBYTES]: three processes write to the same objects of so many MiB each
 * (4): an anonymous mapping, two memfds (one through its descriptor too, with holes punched), and
 * a SysV segment that one of them attaches for each write only. A third memfd grows and shrinks, a
 * fourth is sealed, another segment is attached by nobody. One process moves its mappings, one
 * forks children that write and end. Which process has written what, and how often, each keeps
 * in memory of its own. DIRECTORY/passes counts complete checks, DIRECTORY/wrong names the first
 * difference.
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
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define WORDS (PAGE / 8)
#define PROCESSES 3
#define ELASTIC 64UL /* pages, at most */

enum { ANONYMOUS, MEMFD, CLOSED, SEGMENT, OBJECTS };

static const char *directory;
static unsigned long pages;
static int me;
static char *mapped[OBJECTS];
static int memfd, elastic, sealed, segment, detached;
static uint32_t *times[OBJECTS]; /* each of my pages was written */
static uint64_t state;

static void tell(const char *name, const char *text)
{
	char path[512];
	snprintf(path, sizeof(path), "%s/%s", directory, name);
	int fd = open(path, O_WRONLY | O_CREAT, 0644);
	if (fd < 0 || pwrite(fd, text, strlen(text), 0) < 0)
		_exit(3);
	close(fd);
}

/* Stays, so that what it has said can be read. */
static void wrong(const char *what, unsigned long page)
{
	char text[160];
	snprintf(text, sizeof(text), "process %d: %s, page %lu (%s)\n", me, what, page,
		 strerror(errno));
	tell("wrong", text);
	for (;;)
		pause();
}

static uint64_t any(uint64_t below)
{
	state = state * 6364136223846793005UL + 1442695040888963407UL;
	return (state >> 33) % below;
}

static uint64_t word(int object, unsigned long page, uint32_t time, unsigned long at)
{
	uint64_t seed = ((page + 1) * 0x9E3779B97F4A7C15UL + time) * 0xD1B54A32D192ED03UL;
	return time ? seed + object * WORDS + at : 0;
}

static void fill(uint64_t *to, int object, unsigned long page, uint32_t time)
{
	for (unsigned long at = 0; at < WORDS; at++)
		to[at] = word(object, page, time, at);
}

static void check(const uint64_t *from, int object, unsigned long page, uint32_t time)
{
	static const char *names[] = {"anonymous", "memfd", "closed memfd", "segment"};
	errno = 0;
	for (unsigned long at = 0; at < WORDS; at++)
		if (from[at] != word(object, page, time, at))
			wrong(names[object], page);
}

static char *attach(void)
{
	char *at = shmat(segment, NULL, 0);
	if (at == (char *)-1)
		wrong("shmat", 0);
	return at;
}

static void change(void)
{
	static uint64_t buffer[WORDS];
	int object = any(OBJECTS);
	unsigned long page = any(pages / PROCESSES) * PROCESSES + me;
	uint32_t time = ++times[object][page];
	uint64_t *place = (uint64_t *)(mapped[object] + page * PAGE);
	if (object == SEGMENT && me == 1) {
		char *at = attach();
		fill((uint64_t *)(at + page * PAGE), object, page, time);
		shmdt(at);
	} else if (object == MEMFD && any(3) == 0) {
		fill(buffer, object, page, time);
		if (pwrite(memfd, buffer, PAGE, page * PAGE) != (ssize_t)PAGE)
			wrong("pwrite", page);
	} else if (object == MEMFD && any(8) == 0) {
		times[object][page] = 0;
		if (fallocate(memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page * PAGE, PAGE))
			wrong("fallocate", page);
	} else if (object == ANONYMOUS && me == 2 && any(64) == 0) {
		pid_t child = fork();
		if (!child) {
			fill(place, object, page, time);
			_exit(0);
		}
		while (child > 0 && waitpid(child, NULL, 0) < 0 && errno == EINTR)
			continue;
	} else {
		fill(place, object, page, time);
	}
	if (object == CLOSED && me == 0 && any(256) == 0) {
		char *room = mmap(NULL, pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		char *moved = mremap(mapped[object], pages * PAGE, pages * PAGE,
				     MREMAP_MAYMOVE | MREMAP_FIXED, room);
		if (moved == MAP_FAILED)
			wrong("mremap", 0);
		mapped[object] = moved;
	}
}

/* Grows and shrinks; what it holds are the numbers of its pages, as far as it reaches. */
static void stretch(void)
{
	static unsigned long length;
	uint64_t number;
	for (uint64_t page = 0; page < length; page++)
		if (pread(elastic, &number, 8, page * PAGE) != 8 || number != page + 1)
			wrong("elastic memfd", page);
	length = any(ELASTIC);
	if (ftruncate(elastic, 0) || ftruncate(elastic, length * PAGE + any(PAGE)))
		wrong("ftruncate", length);
	for (uint64_t page = 0; page < length; page++) {
		number = page + 1;
		if (pwrite(elastic, &number, 8, page * PAGE) != 8)
			wrong("elastic memfd", page);
	}
}

static void check_sealed(void)
{
	static uint64_t buffer[WORDS];
	if (fcntl(sealed, F_GET_SEALS) != (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW))
		wrong("seals", 0);
	if (fcntl(memfd, F_GET_SEALS) != F_SEAL_SEAL)
		wrong("seals of another", 0);
	for (unsigned long page = 0; page < pages; page += 7) {
		if (pread(sealed, buffer, PAGE, page * PAGE) != (ssize_t)PAGE)
			wrong("pread", page);
		check(buffer, MEMFD, page, 99);
	}
	uint64_t *at = shmat(detached, NULL, SHM_RDONLY);
	if (at == (void *)-1)
		wrong("detached segment", 0);
	for (unsigned long page = 0; page < pages; page += 5)
		check(at + page * WORDS, SEGMENT, page, 98);
	shmdt(at);
}

static void run(void)
{
	char text[32];
	state = me + 1;
	for (int object = 0; object < OBJECTS; object++)
		times[object] = calloc(pages, sizeof(uint32_t));
	for (unsigned long pass = 1;; pass++) {
		for (int step = 0; step < 200; step++) {
			change();
			usleep(500);
		}
		for (int object = 0; object < OBJECTS; object++) {
			char *from = object == SEGMENT && me == 1 ? attach() : mapped[object];
			for (unsigned long page = me; page < pages; page += PROCESSES)
				check((uint64_t *)(from + page * PAGE), object, page, times[object][page]);
			if (from != mapped[object])
				shmdt(from);
		}
		if (me == 0) {
			stretch();
			check_sealed();
			snprintf(text, sizeof(text), "%lu\n", pass);
			tell("passes", text);
		}
	}
}

static int make(const char *name, int flags)
{
	int fd = memfd_create(name, flags);
	if (fd < 0 || ftruncate(fd, pages * PAGE))
		wrong("memfd_create", 0);
	return fd;
}

int main(int count, char **argument)
{
	static uint64_t buffer[WORDS];
	directory = count > 1 ? argument[1] : ".";
	pages = (count > 2 ? strtoul(argument[2], NULL, 10) : 4) * 256;
	int both = PROT_READ | PROT_WRITE;
	int closed = make("closed", MFD_ALLOW_SEALING);
	memfd = make("with a descriptor", 0);
	elastic = make("elastic", 0);
	sealed = make("sealed", MFD_ALLOW_SEALING);
	for (unsigned long page = 0; page < pages; page++) {
		fill(buffer, MEMFD, page, 99);
		if (pwrite(sealed, buffer, PAGE, page * PAGE) != (ssize_t)PAGE)
			wrong("pwrite", page);
	}
	if (ftruncate(elastic, 0) ||
	    fcntl(sealed, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW))
		wrong("seals", 0);
	mapped[ANONYMOUS] = mmap(NULL, pages * PAGE, both, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	mapped[MEMFD] = mmap(NULL, pages * PAGE, both, MAP_SHARED, memfd, 0);
	mapped[CLOSED] = mmap(NULL, pages * PAGE, both, MAP_SHARED, closed, 0);
	close(closed);
	segment = shmget(IPC_PRIVATE, pages * PAGE, IPC_CREAT | 0600);
	detached = shmget(IPC_PRIVATE, pages * PAGE, IPC_CREAT | 0600);
	uint64_t *at = shmat(detached, NULL, 0);
	if (segment < 0 || at == (void *)-1)
		wrong("shmget", 0);
	for (unsigned long page = 0; page < pages; page++)
		fill(at + page * WORDS, SEGMENT, page, 98);
	shmdt(at);
	for (int child = 1; child < PROCESSES; child++)
		if (!fork()) {
			me = child;
			break;
		}
	if (me != 1)
		mapped[SEGMENT] = attach();
	run();
}
