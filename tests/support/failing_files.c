// A disk that fails: of the calls that change files below a directory, the k-th fails, or all from the
// k-th on. Preloaded into a process (LD_PRELOAD); it does nothing until it is armed.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[PATH_MAX];  // "" while nothing fails
static long first_failing, calls;
static int error_number, stays_broken;
static char failed[64 + PATH_MAX];  // the first call that failed, and its file

// Start to count below a directory, a path without links. first 0: no call fails. stays_broken: all calls from that one on fail.
void failing_files_arm(const char* directory, long first, int error, int stays) {
    first_failing = first, calls = 0, error_number = error, stays_broken = stays, failed[0] = 0;
    snprintf(below, sizeof below, "%s", directory);
}

long failing_files_calls(void) { return calls; }

const char* failing_files_failed(void) { return failed; }

static int fails_at(const char* call, const char* path) {
    size_t length = strlen(below);
    if (strncmp(path, below, length) || (path[length] && path[length] != '/')) return 0;
    long number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (!first_failing || number < first_failing || (number > first_failing && !stays_broken)) return 0;
    if (!failed[0]) snprintf(failed, sizeof failed, "%s %s", call, path + length);
    errno = error_number;
    return 1;
}

// path may not exist yet: its directory is resolved.
static int path_fails(const char* call, int directory, const char* path) {
    char joined[PATH_MAX * 2], resolved[PATH_MAX + NAME_MAX + 2], link[64];
    if (!below[0] || !path) return 0;
    int before = errno;
    joined[0] = 0;
    if (path[0] != '/' && directory != AT_FDCWD) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t n = readlink(link, joined, PATH_MAX - 1);
        if (n < 0) n = 0;
        joined[n] = '/', joined[n + 1] = 0;
    }
    strncat(joined, path, PATH_MAX - 1);
    char* slash = strrchr(joined, '/');
    const char* name = slash ? slash + 1 : joined;
    const char* folder = slash ? (slash == joined ? "/" : joined) : ".";
    char last[NAME_MAX + 1] = "";
    strncat(last, name, NAME_MAX);
    if (slash && slash != joined) *slash = 0;
    int fails = 0;
    if (realpath(folder, resolved)) {
        strcat(resolved, "/");
        strncat(resolved, last, NAME_MAX);
        fails = fails_at(call, resolved);
    }
    if (!fails) errno = before;
    return fails;
}

static int file_fails(const char* call, int file) {
    char link[64], path[PATH_MAX];
    if (!below[0]) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t n = readlink(link, path, sizeof path - 1);
    errno = before;
    if (n < 0) return 0;
    path[n] = 0;
    return fails_at(call, path);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CHANGES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

#define OPEN(name)                                                           \
    int name(const char* path, int flags, ...) {                             \
        va_list rest;                                                        \
        va_start(rest, flags);                                               \
        mode_t mode = va_arg(rest, mode_t);                                  \
        va_end(rest);                                                        \
        if (CHANGES(flags) && path_fails("open", AT_FDCWD, path)) return -1; \
        return NEXT(name)(path, flags, mode);                                \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                          \
    int name(int directory, const char* path, int flags, ...) {               \
        va_list rest;                                                         \
        va_start(rest, flags);                                                \
        mode_t mode = va_arg(rest, mode_t);                                   \
        va_end(rest);                                                         \
        if (CHANGES(flags) && path_fails("open", directory, path)) return -1; \
        return NEXT(name)(directory, path, flags, mode);                      \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                  \
    FILE* name(const char* path, const char* mode) {                                 \
        if (strpbrk(mode, "wa+") && path_fails("open", AT_FDCWD, path)) return NULL; \
        return NEXT(name)(path, mode);                                               \
    }
FOPEN(fopen)
FOPEN(fopen64)

#define ON_FILE(result, name, call, parameters, ...) \
    result name parameters {                         \
        if (file_fails(call, file)) return -1;       \
        return NEXT(name)(__VA_ARGS__);              \
    }
ON_FILE(ssize_t, write, "write", (int file, const void* data, size_t n), file, data, n)
ON_FILE(ssize_t, writev, "write", (int file, const struct iovec* v, int n), file, v, n)
ON_FILE(ssize_t, pwrite, "write", (int file, const void* d, size_t n, off_t at), file, d, n, at)
ON_FILE(ssize_t, pwrite64, "write", (int file, const void* d, size_t n, off64_t at), file, d, n, at)
ON_FILE(int, ftruncate, "ftruncate", (int file, off_t size), file, size)
ON_FILE(int, ftruncate64, "ftruncate", (int file, off64_t size), file, size)
ON_FILE(int, fallocate, "fallocate", (int file, int mode, off_t at, off_t n), file, mode, at, n)
ON_FILE(int, fallocate64, "fallocate", (int file, int mode, off64_t at, off64_t n), file, mode, at, n)
ON_FILE(int, fsync, "fsync", (int file), file)
ON_FILE(int, fdatasync, "fsync", (int file), file)

int posix_fallocate(int file, off_t at, off_t size) {
    return file_fails("fallocate", file) ? error_number : NEXT(posix_fallocate)(file, at, size);
}

int rename(const char* from, const char* to) {
    return path_fails("rename", AT_FDCWD, to) ? -1 : NEXT(rename)(from, to);
}

int renameat(int from_directory, const char* from, int directory, const char* to) {
    return path_fails("rename", directory, to) ? -1 : NEXT(renameat)(from_directory, from, directory, to);
}

int mkdir(const char* path, mode_t mode) {
    return path_fails("mkdir", AT_FDCWD, path) ? -1 : NEXT(mkdir)(path, mode);
}

int mkdirat(int directory, const char* path, mode_t mode) {
    return path_fails("mkdir", directory, path) ? -1 : NEXT(mkdirat)(directory, path, mode);
}
