// Which tokens go through which experts: a place for each (token, expert), those of one expert side by side.
#pragma once
#include "model.h"

class Routing {
  public:
    Routing(int64_t max_rows, int64_t max_experts, int64_t max_chosen);
    ~Routing();
    Routing(const Routing &) = delete;
    Routing &operator=(const Routing &) = delete;

    // One token's experts, in ascending order, with their weights. Rows are independent of each other.
    void choose(const Experts &, const Kernels &, int64_t row, const float *hidden, int64_t width);
    // Places for the choices of all rows, in the order of experts, then of rows.
    void arrange(const Experts &, int64_t num_rows);

    struct Choice {
        int64_t expert, place;
        float weight;
    };
    struct Group {  // the places of one expert that somebody has chosen
        int64_t expert, first, count;
    };
    Choice *choices_of(int64_t row) { return choices_ + row * max_chosen_; }
    const Group &group(int64_t index) const { return groups_[index]; }
    int64_t row_at(int64_t place) const { return rows_[place]; }
    int64_t num_groups = 0;

  private:
    const int64_t max_experts_, max_chosen_;
    float *odds_;
    Choice *choices_;
    Group *groups_;
    int64_t *rows_;
};
