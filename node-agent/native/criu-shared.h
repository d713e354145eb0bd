/* criu-shared.c: before an image of a restore is opened; -1 and errno if it must not be. */
int shared_restore(int directory, const char *path);
