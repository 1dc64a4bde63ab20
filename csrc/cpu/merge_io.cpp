#include "cpu/merge_io.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#if defined(_WIN32)
#define NOMINMAX
#include <windows.h>

#include <io.h>
#else
#include <unistd.h>
#endif

namespace tb {
namespace {

constexpr int64_t kMost = 1 << 30;  // bytes that systems move in one call

#if defined(_WIN32)

HANDLE handle_of(int64_t file) {
  return reinterpret_cast<HANDLE>(_get_osfhandle(static_cast<int>(file)));
}

OVERLAPPED position(int64_t offset) {
  OVERLAPPED where{};
  where.Offset = static_cast<DWORD>(offset);
  where.OffsetHigh = static_cast<DWORD>(offset >> 32);
  return where;
}

int64_t failed() {
  if (GetLastError() == ERROR_HANDLE_EOF) return 0;
  errno = GetLastError() == ERROR_DISK_FULL ? ENOSPC : EIO;
  return -1;
}

int64_t read_some(int64_t file, int64_t offset, int64_t bytes, char* to) {
  OVERLAPPED where = position(offset);
  DWORD done = 0;
  const BOOL worked = ReadFile(handle_of(file), to, static_cast<DWORD>(bytes), &done, &where);
  return worked ? static_cast<int64_t>(done) : failed();
}

int64_t write_some(int64_t file, int64_t offset, int64_t bytes, const char* from) {
  OVERLAPPED where = position(offset);
  DWORD done = 0;
  const BOOL worked = WriteFile(handle_of(file), from, static_cast<DWORD>(bytes), &done, &where);
  return worked ? static_cast<int64_t>(done) : failed();
}

#else

template <typename Call>
int64_t uninterrupted(Call call) {
  for (;;) {
    const ssize_t done = call();
    if (done >= 0 || errno != EINTR) return done;
  }
}

int64_t read_some(int64_t file, int64_t offset, int64_t bytes, char* to) {
  return uninterrupted([=] {
    return pread(static_cast<int>(file), to, static_cast<size_t>(bytes),
                 static_cast<off_t>(offset));
  });
}

int64_t write_some(int64_t file, int64_t offset, int64_t bytes, const char* from) {
  return uninterrupted([=] {
    return pwrite(static_cast<int>(file), from, static_cast<size_t>(bytes),
                  static_cast<off_t>(offset));
  });
}

#endif

}  // namespace

int read_at(const Place& place, int64_t from, int64_t bytes, char* to) {
  if (place.memory != nullptr) {
    std::memcpy(to, place.memory + from, static_cast<size_t>(bytes));
    return 0;
  }
  for (int64_t done = 0; done < bytes;) {
    const int64_t now =
        read_some(place.file, place.offset + from + done, std::min(kMost, bytes - done), to + done);
    if (now < 0) return errno;
    if (now == 0) return kEndOfFile;
    done += now;
  }
  return 0;
}

int write_at(const Place& place, int64_t at, int64_t bytes, const char* from) {
  for (int64_t done = 0; done < bytes;) {
    const int64_t now = write_some(place.file, place.offset + at + done,
                                   std::min(kMost, bytes - done), from + done);
    if (now < 0) return errno;
    if (now == 0) return ENOSPC;
    done += now;
  }
  return 0;
}

void read_input(const Merge& what, int64_t tensor, size_t input, int64_t from, int64_t bytes,
                char* to) {
  const auto number = static_cast<int64_t>(input);
  const int code = read_at(what.input(input).place, from, bytes, to);
  if (code == kEndOfFile) throw MergeFault("file ends early", tensor, number, 0);
  if (code != 0) throw MergeFault("cannot read", tensor, number, code);
}

}  // namespace tb
