// A pool of threads that sleep between calls: no spinning, so a busy neighbour costs its share of
// the machine and no more.
#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#if defined(_WIN32)
#include <process.h>
#else
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

#include "kernels.h"

namespace tb {
namespace {

// One call of parallel_for: whoever takes part draws the next index until none is left.
struct Job {
  int64_t count;
  const std::function<void(int64_t)>* task;
  std::atomic<int64_t> next{0};
  std::mutex lock;
  std::exception_ptr failure;

  void work() {
    try {
      for (int64_t i = next++; i < count; i = next++) (*task)(i);
    } catch (...) {
      next = count;
      const std::lock_guard<std::mutex> guard(lock);
      if (!failure) failure = std::current_exception();
    }
  }
};

thread_local bool inside = false;  // a task may call parallel_for: it then runs in place

class Pool {
 public:
  void run(Job& job, int helpers) {
    const std::lock_guard<std::mutex> one_job_at_a_time(busy_);
    {
      const std::lock_guard<std::mutex> guard(lock_);
      for (; size_ < helpers; ++size_) std::thread(&Pool::serve, this, size_).detach();
      job_ = &job;
      wanted_ = running_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    inside = true;
    job.work();
    inside = false;
    std::unique_lock<std::mutex> guard(lock_);
    done_.wait(guard, [this] { return running_ == 0; });
  }

 private:
  void serve(int index) {
    inside = true;
    std::unique_lock<std::mutex> guard(lock_);
    for (uint64_t seen = 0;;) {
      wake_.wait(guard, [&] { return generation_ != seen && index < wanted_; });
      seen = generation_;
      Job* job = job_;
      guard.unlock();
      job->work();
      guard.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_, lock_;
  std::condition_variable wake_, done_;
  uint64_t generation_ = 0;
  int size_ = 0, wanted_ = 0, running_ = 0;
  Job* job_ = nullptr;
};

int process() {
#if defined(_WIN32)
  return _getpid();
#else
  return static_cast<int>(getpid());
#endif
}

// Never destroyed: its threads may outlive static objects. A forked child has the object but not
// the threads, and gets a pool of its own.
Pool& pool() {
  static std::mutex lock;
  static Pool* current = nullptr;
  static int owner = -1;
  const std::lock_guard<std::mutex> guard(lock);
  if (owner != process()) {
    current = new Pool;
    owner = process();
  }
  return *current;
}

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task) {
  const int64_t helpers = std::min<int64_t>(threads, count) - 1;
  if (helpers <= 0 || inside) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  Job job;
  job.count = count;
  job.task = &task;
  pool().run(job, static_cast<int>(helpers));
  if (job.failure) std::rethrow_exception(job.failure);
}

int num_threads() {
  const char* text = std::getenv("TBFAST_NUM_THREADS");
  if (text != nullptr && *text != '\0') {
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    if (*end != '\0' || value < 1 || value > 4096) {
      throw std::invalid_argument("TBFAST_NUM_THREADS must be a number from 1 to 4096, got '" +
                                  std::string(text) + "'");
    }
    return static_cast<int>(value);
  }
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return std::max(1, CPU_COUNT(&allowed));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace tb
