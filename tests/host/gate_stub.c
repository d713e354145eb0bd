/* Stand-in for godwit-hook's gate, as docs/architecture.md has it; for host tests only. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv) {
	char *gate = getenv("GODWIT_GATE"), path[512], word;
	unsigned char head[8];
	if (gate && argc > 2 && !strcmp(argv[1], "swrk")) {
		ssize_t got = recv(atoi(argv[2]), head, sizeof head, MSG_PEEK);
		if (got > 1 && head[0] == 8 && (head[1] == 1 || head[1] == 2)) {
			snprintf(path, sizeof path, "%s/waiting", gate);
			close(open(path, O_CREAT | O_WRONLY, 0600));
			int bell = open("/run/godwit/doorbell", O_WRONLY | O_NONBLOCK);
			if (bell >= 0) { (void)!write(bell, "!", 1); close(bell); }
			snprintf(path, sizeof path, "%s/gate", gate);
			int fifo = open(path, O_RDONLY);
			if (read(fifo, &word, 1) != 1 || word != 'g') return 1;
			close(fifo);
		}
	}
	execv("/opt/godwit/criu/criu", argv);
	return 127;
}
