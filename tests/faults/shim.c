// Preloaded into a run: counts the file operations of one process below one folder, and at the n-th one stops the
// process or fails. It sees what Python's audit hooks do not: writes of TensorStore, Orbax, riegeli and TensorFlow.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, BEFORE, DURING, AFTER, FAIL };
enum { WRITE = 1, NAME = 2, OPEN = 4, READ = 8, SYNC = 16 };

static char below[4096];
static long left, seen[5];  // seen: of each kind
static int mode, number, kinds, times;
static pid_t armed;

// n: which operation, 0 to count only. kinds: a sum of the constants above. times: how many operations fail from then on.
void shim_arm(const char *folder, long n, int mode_, int errno_, int kinds_, int times_) {
  strncpy(below, folder, sizeof below - 1);
  left = n, mode = mode_, number = errno_, kinds = kinds_, times = times_, armed = getpid();
}

long shim_seen(int kind) { return seen[kind]; }

static int inside(int fd, const char *path) {
  char link[64], real[4200], full[8400];
  if (armed != getpid()) return 0;
  if (path && path[0] == '/') return strncmp(path, below, strlen(below)) == 0;
  if (path && fd == AT_FDCWD) {
    if (!getcwd(real, sizeof real)) return 0;
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, real, sizeof real - 1);
    if (size < 0) return 0;
    real[size] = 0;
  }
  snprintf(full, sizeof full, "%s/%s", real, path ? path : "");
  return strncmp(full, below, strlen(below)) == 0;
}

static void stop(const char *what) {
  char text[100];
  static ssize_t (*real)(int, const void *, size_t);
  if (!real) real = dlsym(RTLD_NEXT, "write");
  int size = snprintf(text, sizeof text, "stopped at a %s\n", what);
  if (real(2, text, size) < 0) abort();
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

// What to do with this operation.
static int turn(int kind, int fd, const char *path, const char *what) {
  if (!armed || !(kinds & kind) || !inside(fd, path)) return NOTHING;
  __atomic_add_fetch(&seen[__builtin_ctz(kind)], 1, __ATOMIC_SEQ_CST);
  long now = __atomic_sub_fetch(&left, 1, __ATOMIC_SEQ_CST);
  if (mode == FAIL) return now <= 0 && now > -times ? FAIL : NOTHING;
  if (now) return NOTHING;
  if (mode == BEFORE) stop(what);
  return mode;
}

#define REAL(result, name, ...)                              \
  static result (*real)(__VA_ARGS__);                        \
  if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name);

// Passes the call on, between the two moments at which a run may stop.
#define PASS(kind, fd, path, what, call, failure)            \
  int how = turn(kind, fd, path, what);                      \
  if (how == FAIL) return errno = number, failure;           \
  __typeof__(call) result = call;                            \
  if (how == DURING || how == AFTER) stop(what);             \
  return result;

// Half of the bytes is written where a run stops during a write.
#define WRITES(name, parameters, types, arguments, half)     \
  ssize_t name parameters {                                  \
    REAL(ssize_t, name, types)                               \
    int how = turn(WRITE, fd, NULL, #name);                  \
    if (how == FAIL) return errno = number, -1;              \
    if (how == DURING) {                                     \
      if (size > 1 && real half < 0) abort();                \
      stop("half " #name);                                   \
    }                                                        \
    ssize_t result = real arguments;                         \
    if (how == AFTER) stop(#name);                           \
    return result;                                           \
  }
#define COMMA ,
WRITES(write, (int fd, const void *data, size_t size), int COMMA const void * COMMA size_t, (fd, data, size),
       (fd, data, size / 2))
WRITES(pwrite, (int fd, const void *data, size_t size, off_t at), int COMMA const void * COMMA size_t COMMA off_t,
       (fd, data, size, at), (fd, data, size / 2, at))
WRITES(pwrite64, (int fd, const void *data, size_t size, off64_t at), int COMMA const void * COMMA size_t COMMA off64_t,
       (fd, data, size, at), (fd, data, size / 2, at))
WRITES(writev, (int fd, const struct iovec *data, int size), int COMMA const struct iovec * COMMA int, (fd, data, size),
       (fd, data, size / 2))

size_t fwrite(const void *data, size_t size, size_t n, FILE *file) {
  REAL(size_t, fwrite, const void *, size_t, size_t, FILE *)
  PASS(WRITE, fileno(file), NULL, "fwrite", real(data, size, n, file), 0)
}

#define READS(name, parameters, types, arguments)            \
  ssize_t name parameters {                                  \
    REAL(ssize_t, name, types)                               \
    PASS(READ, fd, NULL, #name, real arguments, -1)          \
  }
READS(read, (int fd, void *data, size_t size), int COMMA void * COMMA size_t, (fd, data, size))
READS(pread, (int fd, void *data, size_t size, off_t at), int COMMA void * COMMA size_t COMMA off_t, (fd, data, size, at))
READS(pread64, (int fd, void *data, size_t size, off64_t at), int COMMA void * COMMA size_t COMMA off64_t,
      (fd, data, size, at))

#define OPENS(name, at)                                      \
  {                                                          \
    REAL(int, name, OPEN_TYPES)                              \
    mode_t access = 0;                                       \
    if (flags & (O_CREAT | O_TMPFILE)) {                     \
      va_list more;                                          \
      va_start(more, flags);                                 \
      access = va_arg(more, mode_t);                         \
      va_end(more);                                          \
    }                                                        \
    int kind = flags & (O_WRONLY | O_RDWR | O_CREAT) ? OPEN : READ; \
    PASS(kind, at, path, #name, OPEN_CALL, -1)               \
  }
#define OPEN_TYPES const char *, int, mode_t
#define OPEN_CALL real(path, flags, access)
int open(const char *path, int flags, ...) OPENS(open, AT_FDCWD)
int open64(const char *path, int flags, ...) OPENS(open64, AT_FDCWD)
#undef OPEN_TYPES
#undef OPEN_CALL
#define OPEN_TYPES int, const char *, int, mode_t
#define OPEN_CALL real(fd, path, flags, access)
int openat(int fd, const char *path, int flags, ...) OPENS(openat, fd)
int openat64(int fd, const char *path, int flags, ...) OPENS(openat64, fd)

#define NAMES(kind, name, parameters, types, arguments, fd, path) \
  int name parameters {                                      \
    REAL(int, name, types)                                   \
    PASS(kind, fd, path, #name, real arguments, -1)          \
  }
NAMES(NAME, rename, (const char *a, const char *b), const char * COMMA const char *, (a, b), AT_FDCWD, b)
NAMES(NAME, renameat, (int fa, const char *a, int fb, const char *b), int COMMA const char * COMMA int COMMA const char *,
      (fa, a, fb, b), fb, b)
NAMES(NAME, renameat2, (int fa, const char *a, int fb, const char *b, unsigned flags),
      int COMMA const char * COMMA int COMMA const char * COMMA unsigned, (fa, a, fb, b, flags), fb, b)
NAMES(NAME, link, (const char *a, const char *b), const char * COMMA const char *, (a, b), AT_FDCWD, b)
NAMES(NAME, linkat, (int fa, const char *a, int fb, const char *b, int flags),
      int COMMA const char * COMMA int COMMA const char * COMMA int, (fa, a, fb, b, flags), fb, b)
NAMES(NAME, unlink, (const char *path), const char *, (path), AT_FDCWD, path)
NAMES(NAME, unlinkat, (int fd, const char *path, int flags), int COMMA const char * COMMA int, (fd, path, flags), fd, path)
NAMES(NAME, remove, (const char *path), const char *, (path), AT_FDCWD, path)
NAMES(NAME, rmdir, (const char *path), const char *, (path), AT_FDCWD, path)
NAMES(NAME, mkdir, (const char *path, mode_t access), const char * COMMA mode_t, (path, access), AT_FDCWD, path)
NAMES(NAME, mkdirat, (int fd, const char *path, mode_t access), int COMMA const char * COMMA mode_t, (fd, path, access), fd,
      path)
NAMES(SYNC, fsync, (int fd), int, (fd), fd, NULL)
NAMES(SYNC, fdatasync, (int fd), int, (fd), fd, NULL)
NAMES(SYNC, ftruncate, (int fd, off_t size), int COMMA off_t, (fd, size), fd, NULL)
NAMES(SYNC, ftruncate64, (int fd, off64_t size), int COMMA off64_t, (fd, size), fd, NULL)
