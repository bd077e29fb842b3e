#include "team.h"

#include <limits.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
static void pause_briefly() { _mm_pause(); }
#else
static void pause_briefly() {}
#endif

constexpr int SPINS = 2000;  // 30 to 80 microseconds

// Sleep in the kernel while the value is `old`; may return early. Not std::atomic::wait on Linux: that yields first, and
// who yields a core that others want gets it back after their time slices, milliseconds later, some 250 times a step.
#if defined(__linux__)
static void sleep_while(std::atomic<uint32_t> &value, uint32_t old) {
    syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
}
static void wake_all(std::atomic<uint32_t> &value) {
    syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}
#else
static void sleep_while(std::atomic<uint32_t> &value, uint32_t old) { value.wait(old); }
static void wake_all(std::atomic<uint32_t> &value) { value.notify_all(); }
#endif

void Signal::wait_while(uint32_t old) {
    for (int i = 0; i < SPINS; i++) {
        if (value_.load(std::memory_order_acquire) != old) return;
        pause_briefly();
    }
    sleepers_.fetch_add(1);
    while (value_.load() == old) sleep_while(value_, old);
    sleepers_.fetch_sub(1);
}

void Signal::advance() {
    value_.fetch_add(1);
    if (sleepers_.load()) wake_all(value_);
}

Team::Team(int size, int64_t max_phases)
    : size(size), max_phases_(max_phases), counters_(new Counter[max_phases]), starts_(new Start[size]),
      threads_(new pthread_t[size]) {}

Team::~Team() {
    if (process_ == getpid()) {
        ending_.store(true);
        generation_.advance();
        for (int i = 1; i < size; i++) pthread_join(threads_[i], nullptr);
    }
    delete[] counters_;
    delete[] starts_;
    delete[] threads_;
}

void Team::hire() {
    process_ = getpid();
    arrived_.store(0);
    generation_.forget_sleepers();
    meetings_.forget_sleepers();
    for (int i = 1; i < size; i++) {
        starts_[i] = {this, i};
        if (pthread_create(&threads_[i], nullptr, live, &starts_[i])) size = i;
    }
}

void *Team::live(void *start) {
    Team &team = *static_cast<Start *>(start)->team;
    const int member = static_cast<Start *>(start)->member;
    // `run` cannot end without this thread, so it has missed no generation: the first is the one under way.
    for (uint32_t seen = team.first_generation_;;) {
        team.generation_.wait_while(seen);
        seen++;
        if (team.ending_.load()) return nullptr;
        team.work_(team.argument_, member);
        team.meet();
    }
}

void Team::run(void (*work)(void *, int), void *argument) {
    if (size > 1 && process_ != getpid()) {
        first_generation_ = generation_.now();
        hire();
    }
    for (int64_t i = 0; i < max_phases_; i++) counters_[i].next.store(0, std::memory_order_relaxed);
    work_ = work;
    argument_ = argument;
    generation_.advance();
    work(argument, 0);
    meet();
}

void Team::meet() {
    if (size == 1) return;
    const uint32_t meeting = meetings_.now();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(size)) {
        arrived_.store(0, std::memory_order_relaxed);
        meetings_.advance();
    } else {
        meetings_.wait_while(meeting);
    }
}
