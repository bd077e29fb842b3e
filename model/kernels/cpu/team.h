// A few threads that take a step together: they share out the work of each phase and meet at its end.
//
// Whoever is free takes the next piece, so a thread that lost its core to another process holds up one piece, not half
// of the phase. Who waits spins for some microseconds, then sleeps in the kernel: pure spinning collapses as soon as
// somebody else wants the core, and sleeping at once costs more than most phases take.
#pragma once
#include <pthread.h>
#include <stdint.h>
#include <unistd.h>

#include <atomic>

// A number that only grows, and that threads wait for.
class Signal {
  public:
    uint32_t now() const { return value_.load(std::memory_order_acquire); }
    void wait_while(uint32_t old);
    void advance();
    void forget_sleepers() { sleepers_.store(0); }  // a fork has left them behind

  private:
    alignas(64) std::atomic<uint32_t> value_{0};
    std::atomic<uint32_t> sleepers_{0};
};

class Team {
  public:
    Team(int size, int64_t max_phases);
    ~Team();
    Team(const Team &) = delete;
    Team &operator=(const Team &) = delete;

    // Call work(argument, member) on every member, the caller being member 0. Returns when all have returned.
    void run(void (*work)(void *, int), void *argument);

    int size;  // fewer than asked for where the system gives no more threads

  private:
    friend class Member;
    struct alignas(64) Counter {
        std::atomic<int64_t> next{0};
    };
    struct Start {
        Team *team;
        int member;
    };

    static void *live(void *start);
    void hire();
    void meet();

    const int64_t max_phases_;
    Counter *counters_;
    Start *starts_;
    pthread_t *threads_;
    uint32_t first_generation_ = 0;
    pid_t process_ = 0;  // of the threads: a fork leaves them behind
    void (*work_)(void *, int) = nullptr;
    void *argument_ = nullptr;
    Signal generation_, meetings_;
    alignas(64) std::atomic<uint32_t> arrived_{0};
    std::atomic<bool> ending_{false};
};

// One member's view of a run. All members share out the same phases in the same order.
class Member {
  public:
    Member(Team &team, int index) : index(index), team_(team) {}

    // Call work(i, after) for every i in [0, count), each on one member; `after` is what the same member takes next
    // (at least `count` if nothing). Returns when all are done.
    template <class Work>
    void share(int64_t count, Work work) {
        std::atomic<int64_t> &next = team_.counters_[phase_++].next;
        int64_t i = next.fetch_add(1, std::memory_order_relaxed);
        while (i < count) {
            const int64_t after = next.fetch_add(1, std::memory_order_relaxed);
            work(i, after);
            i = after;
        }
        team_.meet();
    }

    // The same for many small pieces: several are taken at a time.
    template <class Work>
    void share_rows(int64_t count, Work work) {
        const int64_t grain = 1 + count / (8 * team_.size);
        share((count + grain - 1) / grain, [&](int64_t i, int64_t) {
            for (int64_t row = i * grain; row < count && row < (i + 1) * grain; row++) work(row);
        });
    }

    const int index;

  private:
    Team &team_;
    int64_t phase_ = 0;
};
