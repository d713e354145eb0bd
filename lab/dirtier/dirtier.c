/*
 * A server that writes to its memory at a given rate and knows what every page must hold.
 *
 * dirtier PORT MEBIBYTES [shared]: the memory is private, or shared (a memfd as databases' buffers
 * are). Speaks the Redis protocol: SET and INCR as Redis (one number, whatever the key), PING,
 * RATE n (MiB/s from now on; pages are written in order, each as a whole, so that no page is
 * written twice before all others), WRITTEN (pages written so far) and VERIFY (how many pages do
 * not hold what was written to them last).
 * TELL address port: from now on a number, one more each time, goes there in a datagram about every
 * 2 ms, as long as the process lives: what two copies of it send has the same numbers.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define WORDS 512UL
#define SLICE_NS 2000000L /* of writing, so that a rate is met in small portions */
#define TELL_NS 2000000L

static uint64_t pages;
static uint64_t *memory;
static uint32_t *generation; /* of each page */
static uint64_t written;
static long rate; /* pages per second */
static long long number;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static uint64_t word(uint64_t page, uint32_t of, uint64_t at)
{
	return ((page + 1) * 0x9E3779B97F4A7C15UL + of) * 0xD1B54A32D192ED03UL ^ at << 40;
}

static void write_page(uint64_t page)
{
	uint32_t of = ++generation[page];
	for (uint64_t at = 0; at < WORDS; at++)
		memory[page * WORDS + at] = word(page, of, at);
}

static int wrong(uint64_t page)
{
	for (uint64_t at = 0; at < WORDS; at++)
		if (memory[page * WORDS + at] != word(page, generation[page], at))
			return 1;
	return 0;
}

static double now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static void *writer(void *nothing)
{
	double last = now(), owed = 0;
	for (uint64_t next = 0;;) {
		nanosleep(&(struct timespec){0, SLICE_NS}, NULL);
		double at = now();
		pthread_mutex_lock(&lock);
		owed += (at - last) * rate;
		/* what a freeze has kept from being written is not made up for */
		if (owed > rate / 20.0)
			owed = rate / 20.0;
		for (; owed >= 1; owed--, written++, next = (next + 1) % pages)
			write_page(next);
		pthread_mutex_unlock(&lock);
		last = at;
	}
	return nothing;
}

static uint64_t verify(void)
{
	uint64_t count = 0;
	for (uint64_t page = 0; page < pages; page++) {
		pthread_mutex_lock(&lock);
		count += wrong(page);
		pthread_mutex_unlock(&lock);
	}
	return count;
}

static void *teller(void *given)
{
	struct sockaddr_in there = *(struct sockaddr_in *)given;
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	char text[32];
	for (unsigned long next = 1;; next++) {
		int length = snprintf(text, sizeof(text), "%lu", next);
		/* nobody there, or a closed door: the number is used up all the same */
		(void)!sendto(fd, text, length, 0, (struct sockaddr *)&there, sizeof(there));
		nanosleep(&(struct timespec){0, TELL_NS}, NULL);
	}
	return given;
}

static int tell(const char *address, const char *port)
{
	static struct sockaddr_in there;
	static int telling;
	pthread_t thread;
	if (__atomic_exchange_n(&telling, 1, __ATOMIC_SEQ_CST))
		return -1;
	there.sin_family = AF_INET;
	there.sin_port = htons(atoi(port));
	if (inet_pton(AF_INET, address, &there.sin_addr) != 1)
		return -1;
	return pthread_create(&thread, NULL, teller, &there);
}

static void answer(FILE *to, int count, char **words)
{
	const char *command = words[0];
	if (!strcasecmp(command, "INCR"))
		fprintf(to, ":%lld\r\n", __atomic_add_fetch(&number, 1, __ATOMIC_SEQ_CST));
	else if (!strcasecmp(command, "VERIFY"))
		fprintf(to, ":%lu\r\n", verify());
	else if (!strcasecmp(command, "WRITTEN"))
		fprintf(to, ":%lu\r\n", __atomic_load_n(&written, __ATOMIC_SEQ_CST));
	else if (!strcasecmp(command, "PING"))
		fprintf(to, "+PONG\r\n");
	else if (!strcasecmp(command, "SET") && count == 3) {
		__atomic_store_n(&number, atoll(words[2]), __ATOMIC_SEQ_CST);
		fprintf(to, "+OK\r\n");
	} else if (!strcasecmp(command, "RATE") && count == 2) {
		pthread_mutex_lock(&lock);
		rate = atol(words[1]) * 256;
		pthread_mutex_unlock(&lock);
		fprintf(to, "+OK\r\n");
	} else if (!strcasecmp(command, "TELL") && count == 3)
		fprintf(to, tell(words[1], words[2]) ? "-ERR telling\r\n" : "+OK\r\n");
	else
		fprintf(to, "-ERR unknown\r\n");
	fflush(to);
}

/* One connection; arrays of short words only. */
static void *serve(void *given)
{
	int fd = (int)(intptr_t)given;
	FILE *from = fdopen(fd, "r"), *to = fdopen(dup(fd), "w");
	char text[8][256], line[64], *words[8];
	int count, length;
	while (fgets(line, sizeof(line), from) && sscanf(line, "*%d", &count) == 1 && count > 0 &&
	       count <= 8) {
		for (int i = 0; i < count; i++) {
			if (!fgets(line, sizeof(line), from) || sscanf(line, "$%d", &length) != 1 ||
			    length < 0 || length > 250 ||
			    fread(text[i], 1, length + 2, from) != (size_t)length + 2)
				goto end;
			text[i][length] = 0;
			words[i] = text[i];
		}
		answer(to, count, words);
	}
end:
	fclose(from);
	fclose(to);
	return NULL;
}

int main(int count, char **argument)
{
	if (count < 3)
		return 1;
	pages = strtoul(argument[2], NULL, 10) * 256;
	int shared = count > 3 && !strcmp(argument[3], "shared");
	int fd = shared ? memfd_create("dirtier", MFD_CLOEXEC) : -1;
	if (shared && ftruncate(fd, pages * 4096))
		return 1;
	memory = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE,
		      shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, fd, 0);
	generation = calloc(pages, sizeof(*generation));
	if (memory == MAP_FAILED || !generation)
		return 1;
	for (uint64_t page = 0; page < pages; page++)
		write_page(page);
	pthread_t thread;
	if (pthread_create(&thread, NULL, writer, NULL))
		return 1;
	int server = socket(AF_INET, SOCK_STREAM, 0), on = 1;
	struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(atoi(argument[1]))};
	setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(server, (struct sockaddr *)&here, sizeof(here)) || listen(server, 64))
		return 1;
	for (int peer; (peer = accept(server, NULL, NULL)) >= 0;) {
		setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
		if (pthread_create(&thread, NULL, serve, (void *)(intptr_t)peer))
			return 1;
		pthread_detach(thread);
	}
}
