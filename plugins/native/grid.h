// A product of rows with panels of outputs as tasks: parts of the rows times parts of the panels, all of about the same size.
#pragma once

#include <algorithm>
#include <cstdint>

namespace trimtab {

struct Grid {
  int64_t panels, rows, columns;

  // `panel`: outputs in one.
  Grid(int64_t count, int64_t in_features, int64_t out_features, int64_t panel)
      : panels((out_features + panel - 1) / panel), rows((count + kRows - 1) / kRows) {
    const int64_t products = (count + rows - 1) / rows * in_features * out_features;
    columns = std::clamp<int64_t>(products / kProducts, 1, std::max<int64_t>(1, std::min<int64_t>(panels / 2, 16)));
  }

  // The first panel of part i; pairs of them stay together.
  int64_t first(int64_t i) const { return i == columns ? panels : panels / 2 * i / columns * 2; }

 private:
  static constexpr int64_t kProducts = 1 << 17;  // that are worth a task of their own
  static constexpr int64_t kRows = 48;           // that read a panel while it is in the first cache
};

}  // namespace trimtab
