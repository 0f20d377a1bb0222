/* Has the C library refuse a call with an error, as some file systems do: REFUSE="call:errno[:from the nth on]". */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static int refused(const char *call) {
  static int count;
  const char *plan = getenv("REFUSE");
  size_t length = strlen(call);
  if (!plan || strncmp(plan, call, length) || plan[length] != ':') return 0;
  char *rest;
  int error = (int)strtol(plan + length + 1, &rest, 10);
  if (*rest == ':' && ++count < atoi(rest + 1)) return 0;
  errno = error;
  return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int is_folder(int fd) {
  struct stat status;
  return !fstat(fd, &status) && S_ISDIR(status.st_mode);
}

int fsync(int fd) {
  if (is_folder(fd) ? refused("fsync of a folder") : refused("fsync of a file")) return -1;
  return REAL(fsync)(fd);
}
int flock(int fd, int operation) {
  /* Unlocking a lock that was never given is not asked. */
  return refused("flock") ? -1 : REAL(flock)(fd, operation);
}
int symlink(const char *to, const char *at) { return refused("symlink") ? -1 : REAL(symlink)(to, at); }
int symlinkat(const char *to, int fd, const char *at) {
  return refused("symlink") ? -1 : REAL(symlinkat)(to, fd, at);
}
int link(const char *from, const char *to) { return refused("link") ? -1 : REAL(link)(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) {
  return refused("link") ? -1 : REAL(linkat)(a, from, b, to, flags);
}
int rename(const char *from, const char *to) { return refused("rename") ? -1 : REAL(rename)(from, to); }
int renameat(int a, const char *from, int b, const char *to) {
  return refused("rename") ? -1 : REAL(renameat)(a, from, b, to);
}
int mkdir(const char *path, mode_t mode) { return refused("mkdir") ? -1 : REAL(mkdir)(path, mode); }
int unlink(const char *path) { return refused("unlink") ? -1 : REAL(unlink)(path); }
int unlinkat(int fd, const char *path, int flags) { return refused("unlink") ? -1 : REAL(unlinkat)(fd, path, flags); }
int chmod(const char *path, mode_t mode) { return refused("chmod") ? -1 : REAL(chmod)(path, mode); }
int fchmod(int fd, mode_t mode) { return refused("chmod") ? -1 : REAL(fchmod)(fd, mode); }
int utimensat(int fd, const char *path, const struct timespec times[2], int flags) {
  return refused("utime") ? -1 : REAL(utimensat)(fd, path, times, flags);
}

static int writes(int flags) { return (flags & (O_CREAT | O_TRUNC)) != 0; }

int open64(const char *path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  mode_t mode = writes(flags) ? va_arg(list, mode_t) : 0;
  va_end(list);
  if (writes(flags) && refused("open to write")) return -1;
  return ((int (*)(const char *, int, mode_t))dlsym(RTLD_NEXT, "open64"))(path, flags, mode);
}
int open(const char *path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  mode_t mode = writes(flags) ? va_arg(list, mode_t) : 0;
  va_end(list);
  if (writes(flags) && refused("open to write")) return -1;
  return ((int (*)(const char *, int, mode_t))dlsym(RTLD_NEXT, "open"))(path, flags, mode);
}
