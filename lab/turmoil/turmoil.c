/*
 * A process that never stops changing the layout of its memory while others read it: drops pages
 * (madvise), unmaps and maps, splits mappings (mprotect), moves them (mremap) and forks. What must
 * be there is checked word by word all the time, in the children too.
 *
 * turmoil DIRECTORY [THREAD...]: DIRECTORY/passes counts complete checks, DIRECTORY/wrong names
 * the first difference; THREAD is any of drop, purge, split, move, fork (all without one).
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define KEPT (24576UL) /* pages: 96 MiB that must stay as they are */
#define CHUNK 16UL     /* pages that move together */
#define BLOCKS 48      /* of what comes and goes */
#define BLOCK (256UL)  /* pages */

static const char *directory;
static pid_t itself;
static uint64_t *place[KEPT / CHUNK];
static pthread_rwlock_t lock[KEPT / CHUNK];

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
static void wrong(const char *text)
{
	tell("wrong", text);
	if (getpid() != itself)
		_exit(2);
	for (;;)
		pause();
}

static uint64_t word(uint64_t page, uint64_t at)
{
	return (page + 1) * 0x9E3779B97F4A7C15UL ^ at;
}

static void fill(uint64_t *memory, uint64_t page)
{
	for (uint64_t at = 0; at < PAGE / 8; at++)
		memory[at] = word(page, at);
}

static void check(const uint64_t *memory, uint64_t page, const char *who)
{
	for (uint64_t at = 0; at < PAGE / 8; at++)
		if (memory[at] != word(page, at)) {
			char text[200];
			snprintf(text, sizeof(text), "%s: page %lu, word %lu is %lx, not %lx\n", who,
				 page, at, memory[at], word(page, at));
			wrong(text);
		}
}

static void *map(void *at, unsigned long pages)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | (at ? MAP_FIXED : 0);
	void *memory = mmap(at, pages * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
	if (memory == MAP_FAILED)
		wrong("mmap\n");
	return memory;
}

static void check_chunk(unsigned long chunk, const char *who)
{
	pthread_rwlock_rdlock(&lock[chunk]);
	for (unsigned long i = 0; i < CHUNK; i++)
		check(place[chunk] + i * PAGE / 8, chunk * CHUNK + i, who);
	pthread_rwlock_unlock(&lock[chunk]);
}

static void *drop(void *nothing)
{
	uint64_t *block[BLOCKS];
	for (unsigned long i = 0; i < BLOCKS; i++) {
		block[i] = map(NULL, BLOCK);
		for (unsigned long page = 0; page < BLOCK; page++)
			fill(block[i] + page * PAGE / 8, page);
	}
	for (;;)
		for (unsigned long i = 0; i < BLOCKS; i++) {
			for (unsigned long page = 0; page < BLOCK; page += 4) {
				check(block[i] + (page + 1) * PAGE / 8, page + 1, "a block");
				madvise(block[i] + page * PAGE / 8, PAGE, MADV_DONTNEED);
			}
			madvise(block[i], BLOCK * PAGE, MADV_DONTNEED);
			munmap(block[i], BLOCK * PAGE);
			block[i] = map(NULL, BLOCK);
			for (unsigned long page = 0; page < BLOCK; page++)
				fill(block[i] + page * PAGE / 8, page);
		}
	return nothing;
}

/* In place: what a garbage collector or an allocator's purge does. */
static void *purge(void *nothing)
{
	uint64_t *memory = map(NULL, BLOCK);
	for (unsigned long page = 0; page < BLOCK; page++)
		fill(memory + page * PAGE / 8, page);
	for (;;)
		for (unsigned long page = 0; page < BLOCK; page++) {
			uint64_t *at = memory + page * PAGE / 8;
			check(at, page, "purged");
			madvise(at, PAGE, MADV_DONTNEED);
			if (*at)
				wrong("not purged\n");
			fill(at, page);
		}
	return nothing;
}

static void *split(void *nothing)
{
	unsigned seed = 1;
	for (;; usleep(200)) {
		unsigned long chunk = rand_r(&seed) % (KEPT / CHUNK);
		pthread_rwlock_rdlock(&lock[chunk]);
		mprotect(place[chunk] + 5 * PAGE / 8, PAGE, PROT_READ);
		check(place[chunk] + 6 * PAGE / 8, chunk * CHUNK + 6, "split");
		pthread_rwlock_unlock(&lock[chunk]);
	}
	return nothing;
}

static void *move(void *nothing)
{
	unsigned seed = 2;
	for (;; usleep(500)) {
		unsigned long chunk = rand_r(&seed) % (KEPT / CHUNK);
		pthread_rwlock_wrlock(&lock[chunk]);
		mprotect(place[chunk], CHUNK * PAGE, PROT_READ | PROT_WRITE);
		char *from = (char *)place[chunk], *to = map(NULL, CHUNK);
		/* one by one: they may lie in several mappings, which mremap(2) refuses */
		for (unsigned long at = 0; at < CHUNK * PAGE; at += PAGE)
			if (mremap(from + at, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to + at) ==
			    MAP_FAILED)
				wrong("mremap\n");
		place[chunk] = (uint64_t *)to;
		pthread_rwlock_unlock(&lock[chunk]);
		check_chunk(chunk, "moved");
	}
	return nothing;
}

static void *forks(void *nothing)
{
	unsigned seed = 3;
	for (;; usleep(2000)) {
		unsigned long chunk = rand_r(&seed) % (KEPT / CHUNK);
		pthread_rwlock_rdlock(&lock[chunk]);
		pid_t child = fork();
		if (!child) {
			for (unsigned long i = 0; i < CHUNK; i++)
				check(place[chunk] + i * PAGE / 8, chunk * CHUNK + i, "a child");
			_exit(0);
		}
		pthread_rwlock_unlock(&lock[chunk]);
		int status = 0;
		if (child < 0 || waitpid(child, &status, 0) != child || status)
			wrong("a child\n");
	}
	return nothing;
}

static void start(const char *name, void *(*work)(void *), int count, char **names)
{
	pthread_t thread;
	int wanted = !count;
	for (int i = 0; i < count; i++)
		wanted |= !strcmp(names[i], name);
	if (wanted && pthread_create(&thread, NULL, work, NULL))
		_exit(3);
}

int main(int count, char **argument)
{
	if (count < 2)
		return 1;
	directory = argument[1];
	itself = getpid();
	uint64_t *kept = map(NULL, KEPT);
	for (unsigned long page = 0; page < KEPT; page++)
		fill(kept + page * PAGE / 8, page);
	for (unsigned long chunk = 0; chunk < KEPT / CHUNK; chunk++) {
		place[chunk] = kept + chunk * CHUNK * PAGE / 8;
		pthread_rwlock_init(&lock[chunk], NULL);
	}
	start("drop", drop, count - 2, argument + 2);
	start("purge", purge, count - 2, argument + 2);
	start("split", split, count - 2, argument + 2);
	start("move", move, count - 2, argument + 2);
	start("fork", forks, count - 2, argument + 2);
	for (unsigned long passes = 1;; passes++) {
		char text[32];
		for (unsigned long i = 0; i < KEPT / CHUNK; i++)
			check_chunk(i * 769 % (KEPT / CHUNK), "kept");
		snprintf(text, sizeof(text), "%lu\n", passes);
		tell("passes", text);
	}
}
