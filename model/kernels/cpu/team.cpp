#include "team.h"

#if defined(__x86_64__)
#include <immintrin.h>
static void pause_briefly() { _mm_pause(); }
#else
static void pause_briefly() {}
#endif

constexpr int SPINS = 2000;  // 30 to 80 microseconds

static void wait_while(const std::atomic<uint32_t> &value, uint32_t old) {
    for (int i = 0; i < SPINS; i++) {
        if (value.load(std::memory_order_acquire) != old) return;
        pause_briefly();
    }
    value.wait(old, std::memory_order_acquire);  // a futex
}

Team::Team(int size, int64_t max_phases)
    : size(size), max_phases_(max_phases), counters_(new Counter[max_phases]), starts_(new Start[size]),
      threads_(new pthread_t[size]) {}

Team::~Team() {
    if (process_ == getpid()) {
        ending_.store(true);
        generation_.fetch_add(1);
        generation_.notify_all();
        for (int i = 1; i < size; i++) pthread_join(threads_[i], nullptr);
    }
    delete[] counters_;
    delete[] starts_;
    delete[] threads_;
}

void Team::hire() {
    process_ = getpid();
    arrived_.store(0);
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
        wait_while(team.generation_, seen);
        seen++;
        if (team.ending_.load()) return nullptr;
        team.work_(team.argument_, member);
        team.meet();
    }
}

void Team::run(void (*work)(void *, int), void *argument) {
    if (size > 1 && process_ != getpid()) {
        first_generation_ = generation_.load();
        hire();
    }
    for (int64_t i = 0; i < max_phases_; i++) counters_[i].next.store(0, std::memory_order_relaxed);
    work_ = work;
    argument_ = argument;
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    work(argument, 0);
    meet();
}

void Team::meet() {
    if (size == 1) return;
    const uint32_t meeting = meetings_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(size)) {
        arrived_.store(0, std::memory_order_relaxed);
        meetings_.store(meeting + 1, std::memory_order_release);
        meetings_.notify_all();
    } else {
        wait_while(meetings_, meeting);
    }
}
