// A product of rows with panels of outputs as tasks: parts of the rows times parts of the panels, all of about the same size.
#pragma once

#include <algorithm>
#include <cstdint>

#include "custom_op.h"

namespace trimtab {

// Runs task(row) for rows of `width` values each, shared out among the threads where they are many.
template <typename Task>
void each_row(const ort::Runtime& runtime, ort::KernelContext* context, int64_t rows, int64_t width, const Task& task) {
  constexpr int64_t kWorth = 1 << 15;  // values that are worth a task of their own
  const int64_t shares = std::clamp<int64_t>(rows * width / kWorth, 1, rows);
  auto share = [&](int64_t i) {
    for (int64_t row = rows * i / shares; row < rows * (i + 1) / shares; row++) task(row);
  };
  parallel(runtime, context, shares, share);
}

struct Grid {
  int64_t count, panels, rows, columns;

  // `panel`: outputs in one.
  Grid(int64_t count, int64_t in_features, int64_t out_features, int64_t panel)
      : count(count), panels((out_features + panel - 1) / panel), rows((count + kRows - 1) / kRows) {
    const int64_t products = (count + rows - 1) / rows * in_features * out_features;
    columns = std::clamp<int64_t>(products / kProducts, 1, std::max<int64_t>(1, std::min<int64_t>(panels / 2, 16)));
  }

  // Runs task(first row, last row, first panel, last panel) for all parts.
  template <typename Task>
  void each(const ort::Runtime& runtime, ort::KernelContext* context, const Task& task) const {
    auto part = [&](int64_t i) {
      const int64_t a = i / columns, b = i % columns;
      task(count * a / rows, count * (a + 1) / rows, first(b), first(b + 1));
    };
    parallel(runtime, context, rows * columns, part);
  }

 private:
  // The first panel of part i; pairs of them stay together.
  int64_t first(int64_t i) const { return i == columns ? panels : panels / 2 * i / columns * 2; }

  static constexpr int64_t kProducts = 1 << 17;  // that are worth a task of their own
  static constexpr int64_t kRows = 48;           // that read a panel while it is in the first cache
};

}  // namespace trimtab
