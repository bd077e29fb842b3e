// A few threads that take a step together: they share out the pieces of each phase, and the next phase begins when all
// pieces are done. Phases form lanes, which a thread goes through one after another; all lanes have the same phases.
//
// Not when all threads have arrived: one that has lost its core to another process holds up the piece it was at, and
// the others do the rest of its work until it is back. Who waits spins for some microseconds, then sleeps in the kernel.
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

struct Range {
    int64_t first, count;
};

class Team {
  public:
    Team(int size, int num_lanes, int64_t phases_a_lane);
    ~Team();
    Team(const Team &) = delete;
    Team &operator=(const Team &) = delete;

    // Call work(argument, member) on every member, the caller being the first. Returns when all phases of the first
    // `num_lanes` are done, which `work` goes through in any order; a member without a core may not have noticed yet:
    // it finds nothing left to do.
    void run(int num_lanes, void (*work)(void *, class Member &), void *argument);
    void dismiss();  // end the threads

    int size;  // fewer than asked for where the system gives no more threads

  private:
    friend class Member;
    // next: the run's number in the upper half, and the next piece in the lower; CLOSED once all pieces are done.
    struct alignas(64) Phase {
        std::atomic<uint64_t> next{0};
        std::atomic<int64_t> done{0};
    };
    struct Lane {
        Phase *phases;
        Signal progress;
    };
    struct Start {
        Team *team;
        int member;
    };
    static constexpr uint32_t CLOSED = UINT32_MAX;
    static constexpr int64_t NOTHING = -1;

    static void *live(void *start);
    void hire();
    int64_t take(Phase &phase, uint32_t run, int64_t count);
    void finish(Lane &lane, Phase &phase, uint32_t run, int64_t count);
    void close_empty(Phase &phase, uint32_t run);
    void wait_for(Lane &lane, Phase &phase, uint32_t run);

    Phase lanes_begun_;
    const int num_lanes_;
    const int64_t phases_a_lane_;
    Lane *lanes_;
    Start *starts_;
    pthread_t *threads_;
    pid_t process_ = 0;  // of the threads: a fork leaves them behind
    uint32_t first_run_ = 0;
    std::atomic<void (*)(void *, class Member &)> work_{nullptr};
    std::atomic<void *> argument_{nullptr};
    Signal run_;
    std::atomic<bool> ending_{false};
};

// One member's view of a run. All that enter a lane share out the same phases in the same order.
class Member {
  public:
    Member(Team &team, int index, uint32_t run) : index(index), team_(team), run_(run) {}

    // Begin with the first phase of a lane. crew: how many members work there, for the size of pieces.
    void enter(int64_t lane, int64_t crew) {
        lane_ = &team_.lanes_[lane];
        this->crew = crew;
        phase_ = 0;
    }

    // A lane that nobody has begun, in order, or none. Counted up to `count`, which may be more than there are lanes.
    int64_t begin_one_of(int64_t count) { return team_.take(team_.lanes_begun_, run_, count); }
    static constexpr int64_t NOTHING = Team::NOTHING;

    // Wait until the phase that this member has just been through is over in another lane, too.
    void wait_for_lane(int64_t lane) { team_.wait_for(team_.lanes_[lane], team_.lanes_[lane].phases[phase_ - 1], run_); }

    void skip() { phase_++; }  // a phase that the lane does without

    // Call work(i, after) for every i in [0, count), each on one member; `after` is what the same member takes next
    // (`count` if nothing). Returns when all are done, whoever did them: a member that has lost its core holds up no
    // more than the pieces it has taken.
    template <class Work>
    void share(int64_t count, Work work) {
        Team::Phase &phase = lane_->phases[phase_++];
        if (count == 0) return team_.close_empty(phase, run_);
        int64_t i = team_.take(phase, run_, count);
        while (i != Team::NOTHING) {
            const int64_t after = team_.take(phase, run_, count);
            work(i, after == Team::NOTHING ? count : after);
            team_.finish(*lane_, phase, run_, count);
            i = after;
        }
        team_.wait_for(*lane_, phase, run_);
    }

    // The same for the many small pieces of a range: several are taken at a time.
    template <class Work>
    void share_rows(Range range, Work work) {
        const int64_t grain = 1 + range.count / (8 * crew), end = range.first + range.count;
        share((range.count + grain - 1) / grain, [&](int64_t i, int64_t) {
            const int64_t first = range.first + i * grain;
            for (int64_t row = first; row < end && row < first + grain; row++) work(row);
        });
    }

    const int index;
    int64_t crew = 1;

  private:
    Team &team_;
    const uint32_t run_;
    Team::Lane *lane_ = nullptr;
    int64_t phase_ = 0;
};
