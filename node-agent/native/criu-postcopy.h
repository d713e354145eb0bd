/* What the shim asks about pages that have not come yet (criu-postcopy.c). */
#include <stdint.h>
#include <sys/types.h>

/* The daemon is about to answer the fault at ADDRESS, told by UFFD. */
void postcopy_fault(int uffd, uint64_t address);
/* It is about to read SIZE bytes at OFFSET of FD: as many of them, from the first on, are there.
 * What a fault wants and is not there is asked for. */
size_t postcopy_there(int fd, off64_t offset, size_t size);
/* In place of a wait for events of the epoll descriptor FD: the time that is left to wait. */
int postcopy_wait(int fd, int timeout);
/* Whether nothing can be sent unasked before another page has come. */
int postcopy_stalled(void);
