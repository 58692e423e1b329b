/* Breaks a process's file operations, or writes them down: preloaded by the dynamic linker, told what to do through a
 * page of shared memory that `breaking.py` writes.
 *
 *     LD_PRELOAD=breaking.so BREAKING=control python ...
 *
 * Every operation on a path that contains `match` counts. The first `after` of them pass, the next `times` meet
 * `action`. Operations that succeeded on a path that contains `recorded` are appended to `control`.log, with data.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum operation { OPEN, WRITE, SYNC, RENAME, REMOVE, MKDIR, TRUNCATE, MEMORY, EXCHANGE, LINK };
enum action { KILL = -1, KILL_PARENT = -2, SHORTEN = -3, STOP = -4, DELAY = -5, KILL_AFTER = -6, KILL_BOTH = -7 };

struct control {
    int32_t action, after, times, hits;
    uint32_t operations, delay_ms;
    char match[256], recorded[256];
};

static struct control *control;
static int log_descriptor = -1;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("BREAKING");
    char log[PATH_MAX];
    int descriptor = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (descriptor < 0)
        return;
    void *page = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    close(descriptor);
    snprintf(log, sizeof log, "%s.log", path);
    log_descriptor = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (page != MAP_FAILED)
        control = page;
}

/* The absolute path of a name relative to an open folder; of the open file itself where the name is NULL. */
static void resolve(int folder, const char *name, char *out) {
    out[0] = 0;
    if (name && name[0] == '/') {
        snprintf(out, PATH_MAX, "%s", name);
        return;
    }
    char link[64];
    snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, out, PATH_MAX - 1);
    if (length < 0)
        length = 0;
    out[length] = 0;
    if (name)
        snprintf(out + length, PATH_MAX - length, "/%s", name);
}

/* What happens to this operation now: 0, an error number, SHORTEN or KILL_AFTER. Other actions are done here. */
static int fate(enum operation operation, const char *path) {
    struct control *c = control;
    if (!c || !c->action || !(c->operations >> operation & 1) || !strstr(path, c->match))
        return 0;
    if (__atomic_sub_fetch(&c->after, 1, __ATOMIC_SEQ_CST) >= 0)
        return 0;
    int action = c->action;
    if (__atomic_sub_fetch(&c->times, 1, __ATOMIC_SEQ_CST) < 0) {
        if (action == KILL_PARENT)
            usleep(1000 * c->delay_ms); /* what the death sets off is slow, so that it overlaps with what was going on */
        return 0;
    }
    __atomic_add_fetch(&c->hits, 1, __ATOMIC_SEQ_CST);
    if (action == KILL_PARENT || action == KILL_BOTH)
        kill(getppid(), SIGKILL);
    if (action == KILL || action == KILL_BOTH)
        kill(getpid(), SIGKILL);
    if (action == STOP)
        kill(getpid(), SIGSTOP);
    if (action == KILL_PARENT || action == DELAY)
        usleep(1000 * c->delay_ms);
    return action > 0 || action == SHORTEN || action == KILL_AFTER ? action : 0;
}

static void done(int fated, enum operation operation, const char *path, const char *other, int64_t offset,
                 const void *data, int64_t length) {
    int saved = errno;
    if (control && control->recorded[0] && strstr(path, control->recorded)) {
        uint32_t lengths[3] = {operation, strlen(path), other ? strlen(other) : 0};
        int64_t numbers[2] = {offset, data ? length : 0};
        struct iovec parts[] = {{lengths, sizeof lengths}, {numbers, sizeof numbers}, {(void *)path, lengths[1]},
                                {(void *)other, lengths[2]}, {(void *)data, numbers[1]}};
        if (writev(log_descriptor, parts, 5) < 0)
            abort();
    }
    if (fated == KILL_AFTER)
        kill(getpid(), SIGKILL);
    errno = saved;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define MEET(operation, path)                \
    int fated = fate(operation, path);       \
    if (fated > 0) {                         \
        errno = fated;                       \
        return -1;                           \
    }

static int opened(const char *symbol, int folder, const char *name, int flags, mode_t mode) {
    int (*real)(int, const char *, int, ...) = dlsym(RTLD_NEXT, symbol);
    char path[PATH_MAX];
    if (!(flags & (O_CREAT | O_TRUNC)))
        return real(folder, name, flags, mode);
    resolve(folder, name, path);
    MEET(OPEN, path)
    int descriptor = real(folder, name, flags, mode);
    if (descriptor >= 0)
        done(fated, OPEN, path, NULL, !!(flags & O_TRUNC), NULL, 0);
    return descriptor;
}

#define MODE                                \
    mode_t mode = 0;                        \
    if (flags & (O_CREAT | O_TMPFILE)) {    \
        va_list rest;                       \
        va_start(rest, flags);              \
        mode = va_arg(rest, mode_t);        \
        va_end(rest);                       \
    }

int open(const char *name, int flags, ...) { MODE return opened("openat", AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE return opened("openat64", AT_FDCWD, name, flags, mode); }
int openat(int folder, const char *name, int flags, ...) { MODE return opened("openat", folder, name, flags, mode); }
int openat64(int folder, const char *name, int flags, ...) { MODE return opened("openat64", folder, name, flags, mode); }

ssize_t write(int descriptor, const void *data, size_t length) {
    char path[PATH_MAX];
    resolve(descriptor, NULL, path);
    MEET(WRITE, path)
    off_t offset = lseek(descriptor, 0, SEEK_CUR);
    ssize_t written = REAL(write)(descriptor, data, fated == SHORTEN ? (length + 1) / 2 : length);
    if (written >= 0)
        done(fated, WRITE, path, NULL, offset, data, written);
    return written;
}

ssize_t pwrite64(int descriptor, const void *data, size_t length, off64_t offset) {
    char path[PATH_MAX];
    resolve(descriptor, NULL, path);
    MEET(WRITE, path)
    ssize_t written = REAL(pwrite64)(descriptor, data, length, offset);
    if (fated == SHORTEN && written > 1)
        written -= written / 3; /* more is there than we say: what the caller writes again must fit it */
    if (written >= 0)
        done(fated, WRITE, path, NULL, offset, data, written);
    return written;
}

ssize_t pwritev64(int descriptor, const struct iovec *parts, int count, off64_t offset) {
    ssize_t total = 0;
    for (int part = 0; part < count; part++) {
        ssize_t written = pwrite64(descriptor, parts[part].iov_base, parts[part].iov_len, offset + total);
        if (written < 0)
            return total ? total : -1;
        total += written;
        if ((size_t)written < parts[part].iov_len)
            break;
    }
    return total;
}

ssize_t pwritev64v2(int descriptor, const struct iovec *parts, int count, off64_t offset, int flags) {
    return pwritev64(descriptor, parts, count, offset);
}

static int synced(const char *symbol, int descriptor) {
    int (*real)(int) = dlsym(RTLD_NEXT, symbol);
    char path[PATH_MAX];
    resolve(descriptor, NULL, path);
    MEET(SYNC, path)
    int result = real(descriptor);
    if (!result)
        done(fated, SYNC, path, NULL, 0, NULL, 0);
    return result;
}

int fsync(int descriptor) { return synced("fsync", descriptor); }
int fdatasync(int descriptor) { return synced("fdatasync", descriptor); }

int ftruncate64(int descriptor, off64_t length) {
    char path[PATH_MAX];
    resolve(descriptor, NULL, path);
    MEET(TRUNCATE, path)
    int result = REAL(ftruncate64)(descriptor, length);
    if (!result)
        done(fated, TRUNCATE, path, NULL, length, NULL, 0);
    return result;
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    enum operation operation = flags & RENAME_EXCHANGE ? EXCHANGE : RENAME;
    char path[PATH_MAX], other[PATH_MAX];
    resolve(from_folder, from, path);
    resolve(to_folder, to, other);
    MEET(operation, path)
    int result = REAL(renameat2)(from_folder, from, to_folder, to, flags);
    if (!result)
        done(fated, operation, path, other, 0, NULL, 0);
    return result;
}

int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int a, const char *from, int b, const char *to) { return renameat2(a, from, b, to, 0); }

int unlinkat(int folder, const char *name, int flags) {
    char path[PATH_MAX];
    resolve(folder, name, path);
    MEET(REMOVE, path)
    int result = REAL(unlinkat)(folder, name, flags);
    if (!result)
        done(fated, REMOVE, path, NULL, 0, NULL, 0);
    return result;
}

int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int mkdirat(int folder, const char *name, mode_t mode) {
    char path[PATH_MAX];
    resolve(folder, name, path);
    MEET(MKDIR, path)
    int result = REAL(mkdirat)(folder, name, mode);
    if (!result)
        done(fated, MKDIR, path, NULL, 0, NULL, 0);
    return result;
}

int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    char path[PATH_MAX], other[PATH_MAX];
    resolve(from_folder, from, path);
    resolve(to_folder, to, other);
    MEET(LINK, path)
    int result = REAL(linkat)(from_folder, from, to_folder, to, flags);
    if (!result)
        done(fated, LINK, path, other, 0, NULL, 0);
    return result;
}

int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int memfd_create(const char *name, unsigned flags) {
    MEET(MEMORY, name)
    return REAL(memfd_create)(name, flags);
}

int posix_fallocate64(int descriptor, off64_t offset, off64_t length) {
    char path[PATH_MAX];
    resolve(descriptor, NULL, path);
    int fated = fate(MEMORY, path);
    return fated > 0 ? fated : REAL(posix_fallocate64)(descriptor, offset, length);
}
