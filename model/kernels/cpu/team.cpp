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

Team::Team(int size, int num_lanes, int64_t phases_a_lane)
    : size(size), num_lanes_(num_lanes), phases_a_lane_(phases_a_lane), lanes_(new Lane[num_lanes]),
      starts_(new Start[size]), threads_(new pthread_t[size]) {
    for (int i = 0; i < num_lanes; i++) lanes_[i].phases = new Phase[phases_a_lane];
}

Team::~Team() {
    dismiss();
    for (int i = 0; i < num_lanes_; i++) delete[] lanes_[i].phases;
    delete[] lanes_;
    delete[] starts_;
    delete[] threads_;
}

void Team::dismiss() {
    if (process_ != getpid()) return;
    ending_.store(true);
    run_.advance();
    for (int i = 0; i < num_lanes_; i++) lanes_[i].progress.advance();
    for (int i = 1; i < size; i++) pthread_join(threads_[i], nullptr);
    process_ = 0;
}

void Team::hire() {
    process_ = getpid();
    first_run_ = run_.now();
    run_.forget_sleepers();
    for (int i = 0; i < num_lanes_; i++) lanes_[i].progress.forget_sleepers();
    for (int i = 1; i < size; i++) {
        starts_[i] = {this, i};
        if (pthread_create(&threads_[i], nullptr, live, &starts_[i])) size = i;
    }
}

void *Team::live(void *start) {
    Team &team = *static_cast<Start *>(start)->team;
    for (uint32_t seen = team.first_run_;;) {
        team.run_.wait_while(seen);
        seen = team.run_.now();
        if (team.ending_.load()) return nullptr;
        Member me(team, static_cast<Start *>(start)->member, seen);
        team.work_.load()(team.argument_.load(), me);
    }
}

void Team::run(int num_lanes, void (*work)(void *, Member &), void *argument) {
    if (size > 1 && process_ != getpid()) hire();
    const uint32_t run = run_.now() + 1;
    // Who is still on its way through the run before finds these phases to be none of its own.
    for (int i = 0; i < num_lanes; i++)
        for (int64_t j = 0; j < phases_a_lane_; j++) {
            lanes_[i].phases[j].done.store(0);
            lanes_[i].phases[j].next.store(static_cast<uint64_t>(run) << 32);
        }
    lanes_begun_.next.store(static_cast<uint64_t>(run) << 32);
    work_.store(work);
    argument_.store(argument);
    for (int i = 0; i < num_lanes_; i++) lanes_[i].progress.advance();
    run_.advance();
    Member me(*this, 0, run);
    work(argument, me);
}

int64_t Team::take(Phase &phase, uint32_t run, int64_t count) {
    uint64_t next = phase.next.load(std::memory_order_acquire);
    for (;;) {
        const uint32_t piece = static_cast<uint32_t>(next);
        if (next >> 32 != run || piece == CLOSED || piece >= count) return NOTHING;
        if (phase.next.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) return piece;
    }
}

void Team::finish(Lane &lane, Phase &phase, uint32_t run, int64_t count) {
    if (phase.done.fetch_add(1, std::memory_order_acq_rel) + 1 != count) return;
    phase.next.store(static_cast<uint64_t>(run) << 32 | CLOSED, std::memory_order_release);
    lane.progress.advance();
}

void Team::close_empty(Phase &phase, uint32_t run) {
    uint64_t untouched = static_cast<uint64_t>(run) << 32;
    phase.next.compare_exchange_strong(untouched, untouched | CLOSED);
}

void Team::wait_for(Lane &lane, Phase &phase, uint32_t run) {
    for (;;) {
        const uint32_t before = lane.progress.now();
        const uint64_t next = phase.next.load(std::memory_order_acquire);
        if (next >> 32 != run || static_cast<uint32_t>(next) == CLOSED) return;
        lane.progress.wait_while(before);
    }
}
