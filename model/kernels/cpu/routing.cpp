#include "routing.h"

Routing::Routing(int64_t max_rows, int64_t max_experts, int64_t max_chosen)
    : max_experts_(max_experts), max_chosen_(max_chosen), odds_(new float[max_rows * max_experts]),
      choices_(new Choice[max_rows * max_chosen]), groups_(new Group[max_experts]),
      rows_(new int64_t[max_rows * max_chosen]) {}

Routing::~Routing() {
    delete[] odds_;
    delete[] choices_;
    delete[] groups_;
    delete[] rows_;
}

void Routing::choose(const Experts &experts, const Kernels &k, int64_t row, const float *hidden, int64_t width) {
    float *odds = odds_ + row * max_experts_;
    Choice *choices = choices_of(row);
    k.route(hidden, experts.router, width, experts.count, odds);
    float total = 0.0f;
    for (int64_t i = 0; i < experts.num_chosen; i++) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts.count; e++) {
            bool taken = false;
            for (int64_t j = 0; j < i; j++) taken |= choices[j].expert == e;
            if (!taken && (best < 0 || odds[best] < odds[e])) best = e;
        }
        choices[i] = {best, 0, odds[best]};
        total += odds[best];
    }
    for (int64_t i = 0; i < experts.num_chosen; i++) {
        if (experts.normalize) choices[i].weight /= total;
        for (int64_t j = i; j > 0 && choices[j].expert < choices[j - 1].expert; j--) {
            const Choice later = choices[j];
            choices[j] = choices[j - 1];
            choices[j - 1] = later;
        }
    }
}

void Routing::arrange(const Experts &experts, int64_t num_rows) {
    num_groups = 0;
    int64_t place = 0;
    for (int64_t e = 0; e < experts.count; e++) {
        const int64_t first = place;
        for (int64_t row = 0; row < num_rows; row++)
            for (int64_t i = 0; i < experts.num_chosen; i++)
                if (choices_of(row)[i].expert == e) {
                    choices_of(row)[i].place = place;
                    rows_[place++] = row;
                }
        if (place > first) groups_[num_groups++] = {e, first, place - first};
    }
}
