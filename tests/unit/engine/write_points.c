/* Preloaded into a process: counts its calls that change files, and ends the process, or fills the
 * disk, at one of them. Calls are counted while armed; standard streams do not count. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, CRASH, FULL };
#define MAX_POINTS 4096

static int mode = OFF, at = 0, num_points = 0, is_full = 0;
static const char *names[MAX_POINTS];

void arm(int new_mode, int point) {
    mode = new_mode;
    at = point;
    num_points = 0;
    is_full = 0;
}
void disarm(void) { mode = OFF; }
int points(void) { return num_points; }
const char *point_name(int index) { return names[index]; }

/* Returns 1 where this call is the chosen one; a call that needs room fails once the disk is full. */
static int reached(const char *name) {
    if (mode == OFF) return 0;
    if (num_points < MAX_POINTS) names[num_points] = name;
    return ++num_points == at;
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define NO_ROOM(value) do { errno = ENOSPC; return value; } while (0)

static int stop(const char *name, int needs_room) {
    if (reached(name)) {
        if (mode == CRASH) _exit(9);
        is_full = 1;
    }
    return mode == FULL && is_full && needs_room;
}

ssize_t write(int fd, const void *bytes, size_t count) {
    if (mode == OFF || fd <= 2) return REAL(write)(fd, bytes, count);
    if (is_full) NO_ROOM(-1);
    if (reached("write")) {
        ssize_t half = REAL(write)(fd, bytes, count / 2);
        if (mode == CRASH) _exit(9);
        is_full = 1;
        if (half == 0) NO_ROOM(-1);
        return half;
    }
    return REAL(write)(fd, bytes, count);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (fd > 2 && stop("writev", 1)) NO_ROOM(-1);
    return REAL(writev)(fd, parts, count);
}
ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t offset) {
    if (fd > 2 && stop("pwrite", 1)) NO_ROOM(-1);
    return REAL(pwrite64)(fd, bytes, count, offset);
}
int fsync(int fd) {
    if (stop("fsync", 1)) NO_ROOM(-1);
    return REAL(fsync)(fd);
}
int fdatasync(int fd) {
    if (stop("fdatasync", 1)) NO_ROOM(-1);
    return REAL(fdatasync)(fd);
}
int ftruncate64(int fd, off64_t length) {
    if (stop("ftruncate", 1)) NO_ROOM(-1);
    return REAL(ftruncate64)(fd, length);
}
int rename(const char *from, const char *to) {
    stop("rename", 0);
    return REAL(rename)(from, to);
}
int mkdir(const char *path, mode_t bits) {
    if (stop("mkdir", 1)) NO_ROOM(-1);
    return REAL(mkdir)(path, bits);
}
int unlink(const char *path) {
    stop("unlink", 0);
    return REAL(unlink)(path);
}
int unlinkat(int folder, const char *path, int flags) {
    stop("unlinkat", 0);
    return REAL(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) {
    stop("rmdir", 0);
    return REAL(rmdir)(path);
}

#define OPEN(name)                                                        \
    int name(const char *path, int flags, ...) {                          \
        va_list rest;                                                     \
        va_start(rest, flags);                                            \
        mode_t bits = flags & O_CREAT ? va_arg(rest, mode_t) : 0;         \
        va_end(rest);                                                     \
        if (flags & O_CREAT && stop("create", 1)) NO_ROOM(-1);            \
        return REAL(name)(path, flags, bits);                             \
    }
OPEN(open)
OPEN(open64)
