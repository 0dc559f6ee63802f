// Order of work and choice of tile of the CUDA products, over thousands of sizes: every tile and every item of P once,
// P before its consumers, no deadlock however the blocks are interleaved, flags inside the state, sizes checked.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <queue>
#include <random>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cuda/common/current.h"
#include "cuda/sm90/plan.h"
#include "cuda/common/remembered.h"
#include "cuda/common/splits.h"
#include "cuda/common/states.h"

namespace {

using namespace nlora::cuda;
using namespace nlora::cuda::sm90;

int failures = 0;

#define EXPECT(condition, ...)                                                \
  do {                                                                        \
    if (!(condition) && ++failures <= 20) {                                   \
      std::printf("%s:%d: not so: %s, for ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                               \
      std::printf("\n");                                                      \
    }                                                                         \
  } while (false)

struct Totals {
  uint64_t sizes = 0, items = 0, pieces = 0, flags = 0, runs = 0;
};

struct Problem {
  uint32_t m, n, w, slices, tall;
  TileShape tile;

  Schedule schedule() const { return Schedule(m, n, w, tile.rows(), uint32_t(tile.block_n), slices, tall); }
};

#define SIZES "m %u, n %u, w %u, %u slices, P %u tall, tile %dx%d, cluster %d"
#define SIZES_OF(p) (p).m, (p).n, (p).w, (p).slices, (p).tall, (p).tile.block_m, (p).tile.block_n, (p).tile.cluster

// Words of the flags of a piece of P: one for each 64 rows.
template <class Visit>
void for_flags(uint32_t first, uint32_t last, uint32_t piece, Visit visit) {
  const State state{nullptr};
  for (uint32_t i = first; i < last; i += 64) visit(uint64_t(state.flag(i, piece) - state.words));
}

// Those that an item of P raises, and the rows of P whose flags a tile or a slice waits for.
struct Rows {
  uint32_t first, last;

  Rows(const Problem& p, const Schedule::Item& item) : first(item.m), last(item.m + item.tall * p.tile.rows()) {
    const uint32_t steps = ceil_div(p.m, 64);
    if (item.makes_slice) first = steps * item.n / p.slices * 64, last = steps * (item.n + 1) / p.slices * 64;
  }
};

void check_order(const Problem& p, Totals& totals) {
  const Schedule schedule = p.schedule();
  const uint32_t count = schedule.count();
  const uint32_t grid = count - p.slices;
  // Full bands first: no more items of P than its rows need, a last one of a band apart.
  const uint32_t p_rows = ceil_div(schedule.rows, p.tall);
  EXPECT(grid == schedule.rows * schedule.columns + p_rows * schedule.pieces, SIZES, SIZES_OF(p));
  std::vector<int64_t> tiles(size_t(schedule.rows) * schedule.columns, -1), pieces(schedule.rows * schedule.pieces, -1);
  for (uint32_t ticket = 0; ticket < count; ++ticket) {
    const Schedule::Item item = schedule.at(ticket);
    // Slices come last, in their order: after all of P.
    EXPECT(item.makes_slice == (ticket >= grid), "ticket %u, " SIZES, ticket, SIZES_OF(p));
    if (item.makes_slice) {
      EXPECT(!item.makes_p && item.m == 0 && item.n == ticket - grid, "ticket %u, " SIZES, ticket, SIZES_OF(p));
      continue;
    }
    EXPECT(item.m % p.tile.rows() == 0 && item.n % uint32_t(p.tile.block_n) == 0, SIZES, SIZES_OF(p));
    EXPECT(item.m < p.m && item.n < (item.makes_p ? p.w : p.n), "ticket %u, " SIZES, ticket, SIZES_OF(p));
    EXPECT(item.tall == 1 || (item.makes_p && item.tall <= p.tall), "ticket %u, " SIZES, ticket, SIZES_OF(p));
    const uint32_t columns = item.makes_p ? schedule.pieces : schedule.columns;
    std::vector<int64_t>& taken = item.makes_p ? pieces : tiles;
    for (uint32_t row = 0; row < item.tall; ++row) {
      const size_t at = size_t(item.m / p.tile.rows() + row) * columns + item.n / uint32_t(p.tile.block_n);
      if (at >= taken.size()) {
        EXPECT(at < taken.size(), SIZES, SIZES_OF(p));
        return;
      }
      EXPECT(taken[at] == -1, "ticket %u twice, " SIZES, ticket, SIZES_OF(p));
      taken[at] = ticket;
    }
  }
  for (uint32_t row = 0; row < schedule.rows; ++row) {
    for (uint32_t column = 0; column < schedule.columns; ++column) {
      const int64_t tile = tiles[size_t(row) * schedule.columns + column];
      EXPECT(tile >= 0, "row %u, column %u, " SIZES, row, column, SIZES_OF(p));
      for (uint32_t piece = 0; piece < schedule.pieces; ++piece) {
        const int64_t made = pieces[row * schedule.pieces + piece];
        EXPECT(made >= 0 && made < tile, "row %u, column %u, " SIZES, row, column, SIZES_OF(p));
      }
    }
  }
  ++totals.sizes;
  totals.items += count;
  totals.pieces += pieces.size();
}

void check_flags(const Problem& p, Totals& totals) {
  const Schedule schedule = p.schedule();
  const State state{nullptr};
  const uint64_t size = State::size(p.m);
  std::set<uint64_t> words = {uint64_t(state.ticket() - state.words), uint64_t(state.epoch() - state.words)};
  EXPECT(words.size() == 2, SIZES, SIZES_OF(p));
  for (uint32_t row = 0; row < schedule.rows; ++row) {
    for (uint32_t piece = 0; piece < schedule.pieces; ++piece) {
      for_flags(row * p.tile.rows(), (row + 1) * p.tile.rows(), piece, [&](uint64_t word) {
        EXPECT(words.insert(word).second, "row %u, piece %u, " SIZES, row, piece, SIZES_OF(p));
        EXPECT(word + State::kWord <= size && word % State::kWord == 0, "word %u, " SIZES, unsigned(word), SIZES_OF(p));
        ++totals.flags;
      });
    }
  }
}

// Clusters take tickets one at a time, the next one while the last is still being worked on, and finish in any order
// that the flags allow. Fails if at some moment nobody can go on.
void run(const Problem& p, uint32_t resident, uint64_t seed, Totals& totals) {
  const Schedule schedule = p.schedule();
  const uint32_t count = schedule.count();
  std::mt19937_64 random(seed);
  std::vector<uint8_t> raised(State::size(p.m), 0);
  struct Cluster {
    std::vector<uint32_t> held;
  };
  std::vector<Cluster> clusters(resident);
  uint32_t next = 0, finished = 0;
  const auto ready = [&](uint32_t ticket) {
    const Schedule::Item item = schedule.at(ticket);
    bool all = true;
    const Rows rows(p, item);
    for (uint32_t piece = 0; !item.makes_p && piece < schedule.pieces; ++piece)
      for_flags(rows.first, rows.last, piece, [&](uint64_t word) { all &= raised[word] != 0; });
    return all;
  };
  while (finished < count) {
    // In random order until one can do something: draw a ticket, or finish the first that it holds.
    bool moved = false;
    const size_t begin = random() % resident;
    for (size_t i = 0; i < resident && !moved; ++i) {
      Cluster& cluster = clusters[(begin + i) % resident];
      const bool draw = cluster.held.size() < 2 && next < count && (cluster.held.empty() || random() % 2);
      if (draw) {
        cluster.held.push_back(next++);
        moved = true;
      } else if (!cluster.held.empty() && ready(cluster.held[0])) {
        const Schedule::Item item = schedule.at(cluster.held[0]);
        const Rows rows(p, item);
        if (item.makes_p)
          for_flags(rows.first, rows.last, item.n / uint32_t(p.tile.block_n), [&](uint64_t word) { raised[word] = 1; });
        cluster.held.erase(cluster.held.begin());
        ++finished;
        moved = true;
      }
    }
    // A cluster that preferred not to draw may still do so.
    bool possible = next < count;
    for (const Cluster& cluster : clusters) possible |= !cluster.held.empty() && ready(cluster.held[0]);
    if (!moved && !possible) {
      EXPECT(moved, "deadlock after %u of %u items, %u resident, seed %u, " SIZES, finished, count, resident,
             unsigned(seed), SIZES_OF(p));
      return;
    }
  }
  ++totals.runs;
}

bool refused(int64_t m, int64_t n, int64_t k, int64_t r, int64_t w) {
  try {
    checked_sizes(m, n, k, r, w);
    return false;
  } catch (const std::invalid_argument&) {
    return true;
  }
}

void check_refusals() {
  const int64_t largest = (int64_t(1) << 31) - 256, beyond = int64_t(1) << 32;
  EXPECT(!refused(1, 8, 8, 0, 0) && !refused(largest, 8, 8, 0, 0) && !refused(8, largest, largest, 256, 256), "-");
  for (int64_t bad : {int64_t(0), int64_t(-8), largest + 8, beyond, beyond + 8}) {
    EXPECT(refused(bad, 8, 8, 0, 0) && refused(8, bad, 8, 0, 0) && refused(8, 8, bad, 0, 0), "%ld", long(bad));
  }
  EXPECT(refused(8, 12, 8, 0, 0) && refused(8, 8, 12, 0, 0), "-");
  EXPECT(refused(8, 8, 8, 4, 8) && refused(8, 8, 8, 8, 12) && refused(8, 8, 8, 264, 264), "-");
  EXPECT(refused(8, 8, 8, 16, 8) && refused(8, 8, 8, -8, 0) && refused(8, 8, 8, 0, 264), "-");
  // 2^32 tiles of 128 × 128, and the tickets that are drawn beyond them.
  EXPECT(refused(int64_t(1) << 23, int64_t(1) << 23, 8, 0, 0), "-");
  EXPECT(refused(int64_t(1) << 23, (int64_t(1) << 23) - 8, 8, 0, 0), "-");
  EXPECT(!refused(int64_t(1) << 22, int64_t(1) << 23, 8, 0, 0), "-");
}

// At the largest sizes that are taken, items near both ends are where they should be: nothing has wrapped round.
void check_largest() {
  for (const TileShape& tile : kTiles) {
    const Problem p{(1u << 31) - 256, 8, 256, 0, 2, tile};
    const Schedule schedule = p.schedule();
    const uint64_t items = uint64_t(schedule.rows) * schedule.columns + (schedule.rows + 1) / 2 * schedule.pieces;
    EXPECT(items == schedule.count(), SIZES, SIZES_OF(p));
    const Schedule::Item last = schedule.at(schedule.count() - 1);
    EXPECT(!last.makes_p && last.n == 0 && last.m == (schedule.rows - 1) * tile.rows(), SIZES, SIZES_OF(p));
    const uint64_t flag = (2 + uint64_t(last.m + tile.rows() - 64) / 64 * State::kMaxPieces + 1) * State::kWord;
    EXPECT(flag + State::kWord <= State::size(p.m), SIZES, SIZES_OF(p));
  }
}

// Control words: zero at first, kept by their owner, shared with nobody, and few allocations.
void check_states() {
  std::vector<std::vector<uint32_t>> memory;
  const auto allocate = [&](size_t bytes) {
    memory.emplace_back(bytes / 4);
    return static_cast<void*>(memory.back().data());
  };
  States states;
  std::map<nlora::cuda::Sequence, std::pair<uint32_t*, size_t>> given;
  std::mt19937_64 random(1);
  uint32_t mark = 0;
  for (int call = 0; call < 3000; ++call) {
    const nlora::cuda::Sequence sequence{reinterpret_cast<void*>(random() % 20), random() % 8 ? 0 : random() % 5,
                                         random() % 4 ? 0 : random() % 300};
    const size_t count = nlora::cuda::State::size(uint32_t(1 + random() % (call % 100 ? 9000 : 200000)));
    uint32_t* words = states.words(sequence, count, allocate);
    auto& mine = given[sequence];
    if (mine.first == words) {
      EXPECT(std::all_of(words, words + mine.second, [&](uint32_t w) { return w == words[0]; }), "call %d", call);
    } else {
      EXPECT(std::all_of(words, words + count, [](uint32_t w) { return w == 0; }), "call %d", call);
      EXPECT(mine.second < count, "call %d: moved without need", call);
    }
    mine = {words, std::max(count, mine.first == words ? mine.second : 0)};
    std::fill(words, words + mine.second, ++mark);
  }
  EXPECT(given.size() > 300 && memory.size() < 20, "%zu owners, %zu allocations", given.size(), memory.size());
}

// The contexts of a thread as a driver keeps them: a stack, which another's push or a failing one leaves as it was.
struct FakeDriver {
  mutable std::vector<int> stack;
  bool fails = false;

  int current() const { return stack.empty() ? 0 : stack.back(); }
  void push(int context) const {
    if (fails) throw std::runtime_error("cuCtxPushCurrent failed");
    stack.push_back(context);
  }
  void pop() const { stack.pop_back(); }
};

void check_current() {
  for (const std::vector<int>& before : {std::vector<int>{}, {1}, {2}, {1, 2}, {2, 1}, {3, 3}}) {
    FakeDriver driver{before};
    {
      const nlora::cuda::Current<FakeDriver, int> outer(driver, 1);
      EXPECT(driver.current() == 1, "%zu contexts", before.size());
      const nlora::cuda::Current<FakeDriver, int> inner(driver, 2);
      EXPECT(driver.current() == 2, "%zu contexts", before.size());
    }
    EXPECT(driver.stack == before, "%zu contexts before, %zu after", before.size(), driver.stack.size());
    driver.fails = true;
    try {
      const nlora::cuda::Current<FakeDriver, int> failing(driver, 4);
      EXPECT(false, "a failing push is an error");
    } catch (const std::runtime_error&) {
    }
    EXPECT(driver.stack == before, "%zu contexts before a failure, %zu after", before.size(), driver.stack.size());
  }
  std::set<uint64_t> numbers = {0, nlora::cuda::thread_number()};
  for (int i = 0; i < 20; ++i) std::thread([&] { numbers.insert(nlora::cuda::thread_number()); }).join();
  EXPECT(numbers.size() == 22 && numbers.count(nlora::cuda::thread_number()), "%zu threads", numbers.size());
}

struct Layer {
  const char* name;
  uint32_t in, out;
};

// Cycles until the last item is done when free clusters take items in the order of their tickets, and a tile of C that
// has come to the end of K waits for its rows of P, those of all products.
double simulated(const GroupSizes& sizes, const TileShape& tile, uint32_t tall, uint32_t processors,
                 const TileCosts& costs = {}) {
  const Schedule schedule = sizes.schedule(tile, tall);
  const GroupSizes::Columns columns = sizes.columns(uint32_t(tile.block_n));
  const double wide = costs.wide(tile, sizes);
  const double summed = costs.summed(tile, sizes);
  std::priority_queue<double, std::vector<double>, std::greater<double>> free;
  for (uint32_t cluster = 0; cluster < processors / uint32_t(tile.cluster); ++cluster) free.push(0);
  std::vector<double> made(schedule.rows, 0);
  double end = 0;
  for (uint32_t ticket = 0; ticket < schedule.count(); ++ticket) {
    const Schedule::Item item = schedule.at(ticket);
    const uint32_t row = item.m / tile.rows();
    double done = free.top() + summed;
    if (item.makes_p) {
      uint32_t product = 0;
      for (uint32_t i = 1; i < sizes.count; ++i) product = sizes.products[i].w && columns.p[i] <= item.n ? i : product;
      const uint32_t width = sizes.p_width(product, uint32_t(tile.block_n));
      const double piece = costs.piece(tile, width, sizes.products[product].k);
      for (uint32_t i = 0; i < item.tall; ++i) {
        done = free.top() + TileCosts::kStart + (i + 1) * piece;
        made[row + i] = std::max(made[row + i], done);
      }
      free.pop();
    } else {
      free.pop();
      done = std::max(done, made[row]) + wide - summed;
    }
    free.push(done);
    end = std::max(end, done);
  }
  return end;
}

// The model agrees with the simulation to the cost of one item, and no plan beats the chosen one by more than that:
// 5 %, or 15 % where a layer is narrower than its adapter.
void check_plans() {
  std::set<std::pair<uint32_t, uint32_t>> chosen;
  double worst = 1, narrowest = 1;
  for (uint32_t processors : {1u, 2u, 16u, 78u, 114u, 132u, 148u}) {
    for (uint32_t m : {1u, 128u, 300u, 2048u, 8192u, 16384u}) {
      for (uint32_t n : {8u, 768u, 3072u, 4096u, 11008u}) {
        for (uint32_t k : {8u, 768u, 4096u, 11008u}) {
          for (uint32_t r : {0u, 8u, 64u, 128u, 256u}) {
            const ProductSizes sizes{m, n, k, r, r};
            const Plan plan = plan_product(sizes, processors);
            const TileShape tile = kTiles[plan.tile];
            chosen.insert({plan.tile, plan.tall});
            EXPECT(uint32_t(tile.cluster) <= processors && plan.tall <= kTallest, "%u processors", processors);
            const double real = simulated(sizes, tile, plan.tall, processors);
            const double wide = TileCosts().wide(tile, sizes);
            const double item = std::max(wide, r ? TileCosts().narrow(tile, sizes, plan.tall) : 0);
            // Where K is short, tiles of every band wait for P.
            EXPECT(std::fabs(plan.cycles - real) <= item * (k < 64 ? 2 : 1),
                   "m %u, n %u, k %u, r %u, %u processors: %.0f, simulated %.0f", m, n, k, r, processors, plan.cycles,
                   real);
            double& of_kind = std::min(n, k) < 256 ? narrowest : worst;
            for (const TileShape& other : kTiles) {
              for (uint32_t tall = 1; uint32_t(other.cluster) <= processors && tall <= kTallest; ++tall)
                of_kind = std::max(of_kind, real / simulated(sizes, other, tall, processors));
            }
          }
        }
      }
    }
  }
  EXPECT(chosen.size() == kTallest * std::size(kTiles), "%zu plans are ever chosen", chosen.size());
  std::printf("\nthe chosen plan takes at most %.3f times as long as the best, by simulation\n", worst);
  EXPECT(worst < 1.05 && narrowest < 1.15, "%f, %f", worst, narrowest);
}

// What the adapter adds to a product on 132 processors, by simulation: items of P two tiles high leave no wave of their
// own, and cost less than two of one tile.
void check_ratios() {
  struct {
    const char* name;
    uint32_t m, n, k, r;
    double one, planned;   // with items of P one tile high, and as planned: at most
  } const cases[] = {
      {"4096 -> 4096", 8192, 4096, 4096, 16, 1.075, 1.019},  {"4096 -> 4096", 8192, 4096, 4096, 64, 1.075, 1.019},
      {"4096 -> 4096", 8192, 4096, 4096, 128, 1.106, 1.059}, {"4096 -> 4096", 8192, 4096, 4096, 256, 1.186, 1.186},
      {"4096 -> 4096", 2048, 4096, 4096, 64, 1.224, 1.029},  {"11008 -> 4096", 8192, 4096, 11008, 64, 1.067, 1.007}};
  std::printf("\n%-14s%7s%5s%12s%12s%20s\n", "layer", "M", "r", "one tile", "as planned", "at 55 bytes/cycle");
  for (const auto& c : cases) {
    const ProductSizes sizes{c.m, c.n, c.k, c.r, c.r}, plain{c.m, c.n, c.k, 0, 0};
    const auto one_high = [](const ProductSizes& sizes, const TileCosts& costs) {
      double least = std::numeric_limits<double>::infinity();
      for (const TileShape& tile : kTiles) least = std::min(least, simulated(sizes, tile, 1, 132, costs));
      return least;
    };
    const auto planned = [&](const TileCosts& costs) {
      const Plan plan = plan_product(sizes, 132, costs);
      return simulated(sizes, kTiles[plan.tile], plan.tall, 132, costs) / one_high(plain, costs);
    };
    const TileCosts faster{55};
    const double one = one_high(sizes, {}) / one_high(plain, {});
    std::printf("%-14s%7u%5u%12.3f%12.3f%20.3f\n", c.name, c.m, c.r, one, planned({}), planned(faster));
    EXPECT(std::fabs(one - c.one) < 0.001, "%s, M %u, r %u: %.4f", c.name, c.m, c.r, one);
    EXPECT(planned({}) < c.planned + 0.0005, "%s, M %u, r %u: %.4f", c.name, c.m, c.r, planned({}));
    EXPECT(planned(faster) < one, "%s, M %u, r %u: %.4f", c.name, c.m, c.r, planned(faster));
  }
}

GroupSizes group_of(const std::vector<ProductSizes>& products, bool sums) {
  return checked_sizes(products.data(), uint32_t(products.size()), sums);
}

// Products of one launch: every column of each C and P belongs to one item's columns, none to two products but where
// tiles of P are shared, and then 64 at a time; pieces have flags.
void check_groups() {
  std::mt19937_64 random(5);
  for (int round = 0; round < 3000; ++round) {
    const bool sums = round % 2;
    std::vector<ProductSizes> products(1 + random() % kMostProducts);
    const uint32_t m = 1 + random() % 3000, n = 8 + random() % 100 * 8;
    for (ProductSizes& q : products) {
      const uint32_t r = random() % 4 ? uint32_t(8 + random() % 16 * 8) : 0;
      const uint32_t own = 8 + random() % 100 * 8, k = 8 + random() % 50 * 8;
      q = {m, sums ? n : own, sums ? k : 64, r, r ? std::min(256u, r * uint32_t(1 + random() % 2)) : 0};
    }
    const GroupSizes sizes = group_of(products, sums);
    for (const TileShape& tile : kTiles) {
      const auto block_n = uint32_t(tile.block_n);
      const GroupSizes::Columns columns = sizes.columns(block_n);
      const Schedule schedule = sizes.schedule(tile, 1 + random() % kTallest);
      uint32_t c = 0, p = 0;
      for (uint32_t i = 0; i < sizes.count; ++i) {
        EXPECT(columns.p[i] == p && p % (sums ? block_n : 64) == 0, "round %d, product %u", round, i);
        EXPECT(columns.c[i] == (sums && i ? columns.all_c : c) && columns.c[i] % block_n == 0, "round %d", round);
        p += ceil_div(products[i].w, sums ? block_n : 64) * (sums ? block_n : 64);
        c = sums ? columns.all_c : c + ceil_div(products[i].n, block_n) * block_n;
        const uint32_t width = sizes.p_width(i, block_n);
        EXPECT(width <= block_n && width >= std::min(block_n, sums ? products[i].w : p), "round %d: %u", round, width);
      }
      EXPECT(schedule.columns * block_n == c && schedule.pieces == ceil_div(p, block_n), "round %d", round);
      EXPECT(schedule.pieces <= State::kMaxPieces, "round %d: %u pieces", round, schedule.pieces);
    }
    const Plan plan = plan_product(sizes, 132);
    const double real = simulated(sizes, kTiles[plan.tile], plan.tall, 132);
    EXPECT(plan.cycles > 0 && real > 0, "round %d", round);
  }
  const ProductSizes largest = checked_sizes(8, (int64_t(1) << 31) - 256, 8, 0, 0);
  try {
    group_of({largest, largest}, false);
    EXPECT(false, "columns of C beyond an int32 are refused");
  } catch (const std::invalid_argument&) {
  }
}

// Bytes a cycle that one processor gets from memory when all ask, at 4.3 TB/s where all multiply 788 TFLOP/s together,
// which an H200 does by the library.
constexpr double kMemoryBytes = 22;

// Cycles of a launch of narrow gradients, each of wide (m, n) and w columns, some of which may be several matrices of r
// columns: blocks one after the other on whichever processor is free. Wide comes from memory, all else from the cache.
double gradient_cycles(uint32_t m, uint32_t r, const std::vector<std::pair<uint32_t, uint32_t>>& gradients,
                       uint32_t processors) {
  std::priority_queue<double, std::vector<double>, std::greater<double>> free;
  for (uint32_t i = 0; i < processors; ++i) free.push(0);
  double end = 0;
  for (const auto& [n, w] : gradients) {
    const uint32_t splits = GradientSplits::choose(m, n, r, processors), steps = ceil_div(m, GradientSplits::kRows);
    const uint32_t width = piece_width(w, 256);
    for (uint32_t split = 0; split < splits; ++split) {
      const uint32_t own = first_step(split + 1, splits, steps) - first_step(split, splits, steps);
      for (uint32_t tile = 0; tile < ceil_div(n, GradientSplits::kWide); ++tile) {
        const double loads = std::max(128 * 128 / kMemoryBytes, 128 * (128 + width) / TileCosts().bytes);
        const double step = std::max(loads, TileCosts::kColumn * width);
        free.push(free.top() + (own + 4) * step + 1024 * w / TileCosts().bytes);
        free.pop();
      }
    }
  }
  for (; !free.empty(); free.pop()) end = free.top();
  return end;
}

// What q, k and v of one x take, all with adapters, as a ratio to their products with W alone, by simulation on 132
// processors: what docs/cuda.md says. Folds, sums of slices and dN's slices, which fill idle processors, are left out.
void check_group_ratios() {
  struct {
    const char* name;
    uint32_t m, k, r;
    std::vector<uint32_t> outs;
    double ratios[5];   // forward, backward and that of IntTune; these beside products and additions
  } const cases[] = {{"Llama-2-7B", 8192, 4096, 64, {4096, 4096, 4096}, {1.016, 1.107, 1.023, 1.019, 0.942}},
                     {"Llama-3-8B", 8192, 4096, 64, {4096, 1024, 1024}, {1.097, 1.140, 1.019, 0.976, 0.873}}};
  std::printf("\n%-14s%7s%5s%12s%12s%12s%20s\n", "q, k, v", "M", "r", "forward", "backward", "IntTune",
              "with additions");
  for (const auto& c : cases) {
    const auto best = [&](const GroupSizes& sizes) {
      const Plan plan = plan_product(sizes, 132);
      return simulated(sizes, kTiles[plan.tile], plan.tall, 132);
    };
    double plain_forward = 0, plain_backward = 0;
    std::vector<ProductSizes> beside, summed;
    std::vector<std::pair<uint32_t, uint32_t>> gradients;
    for (uint32_t n : c.outs) {
      plain_forward += best(ProductSizes{c.m, n, c.k, 0, 0});
      plain_backward += best(ProductSizes{c.m, c.k, n, 0, 0});
      beside.push_back({c.m, n, c.k, c.r, c.r});
      summed.push_back({c.m, c.k, n, c.r, 2 * c.r});
      gradients.push_back({n, c.r});
    }
    const std::vector<std::pair<uint32_t, uint32_t>> of_x = {{c.k, uint32_t(c.outs.size()) * c.r}};
    // An addition of autograd's reads two gradients of x and writes one.
    const double additions = (double(c.outs.size()) - 1) * 3 * 2 * c.m * c.k / kMemoryBytes / 132;
    const double dx = best(group_of(summed, true));
    const double full = dx + gradient_cycles(c.m, c.r, of_x, 132) + gradient_cycles(c.m, c.r, gradients, 132);
    const double forward = best(group_of(beside, false)), added = plain_backward + additions;
    const double found[] = {forward / plain_forward, full / plain_backward, dx / plain_backward, full / added,
                            dx / added};
    for (int i = 0; i < 5; ++i) {
      EXPECT(std::fabs(found[i] - c.ratios[i]) < 0.001, "%s, ratio %d: %.4f", c.name, i, found[i]);
    }
    std::printf("%-14s%7u%5u%12.3f%12.3f%12.3f%13.3f, %.3f\n", c.name, c.m, c.r, found[0], found[1], found[2], found[3],
                found[4]);
  }
}

// What is remembered is what was made, whichever keys share a place; keys that come again are not made again.
void check_remembered() {
  Remembered<double, 3> values;
  std::mt19937_64 random(7);
  int made = 0;
  const auto get = [&](double a, double b, double c) {
    return values.get({a, b, c}, [&] { return ++made, a * 1e8 + b * 1e4 + c; });
  };
  for (int i = 0; i < 100000; ++i) {
    const double a = random() % 16, b = random() % 16, c = random() % 16;
    EXPECT(get(a, b, c) == a * 1e8 + b * 1e4 + c, "%g, %g, %g", a, b, c);
  }
  made = 0;
  for (int i = 0; i < 30; ++i) get(4096, i % 3 * 64, 0.5);
  EXPECT(made <= 6, "%d", made);
  EXPECT(get(1, 1, 40) != get(1, 1, 40.5), "fractions");
}

void print_plans() {
  const Layer layers[] = {{"llama2-7b q", 4096, 4096},      {"llama2-7b gate", 4096, 11008},
                          {"llama2-7b down", 11008, 4096},  {"mistral-7b k", 4096, 1024},
                          {"mistral-7b gate", 4096, 14336}, {"deberta q", 768, 768},
                          {"deberta ffn", 768, 3072}};
  std::printf("\n%-18s%7s%5s  %-14s%10s   (132 processors)\n", "layer", "M", "r", "tile, P", "of floor");
  for (const Layer& layer : layers) {
    for (uint32_t m : {2048u, 8192u}) {
      for (uint32_t r : {0u, 64u, 256u}) {
        const ProductSizes sizes{m, layer.out, layer.in, r, r};
        const Plan plan = plan_product(sizes, 132);
        const TileShape tile = kTiles[plan.tile];
        // What the products with W alone would take if every processor multiplied all the time.
        const double floor = TileCosts::kColumn / 128 / 64 * m * layer.out * layer.in / 132;
        std::printf("%-18s%7u%5u  %dx%dx%d, %-3u%10.3f\n", layer.name, m, r, tile.block_m, tile.block_n, tile.cluster,
                    plan.tall, plan.cycles / floor);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool long_run = argc > 1 && !std::strcmp(argv[1], "--long");
  const std::vector<uint32_t> edges = {1, 8, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 511, 513, 1000, 2049, 5000};
  const std::vector<uint32_t> widths = {0, 8, 64, 120, 128, 136, 248, 256};
  std::vector<TileShape> tiles(std::begin(kTiles), std::end(kTiles));
  // Tiles for tests alone, and any that may come.
  tiles.push_back({128, 64, 2, 2, 1});
  tiles.push_back({128, 192, 3, 1, 3});
  std::printf("%-14s%8s%10s%9s%9s%9s\n", "tile", "sizes", "items", "P", "flags", "runs");
  uint64_t seed = 0;
  for (const TileShape& tile : tiles) {
    Totals totals;
    for (uint32_t m : edges) {
      for (uint32_t n : edges) {
        if (n % 8) continue;
        for (uint32_t w : widths) {
          if (w > State::kMaxPieces * uint32_t(tile.block_n)) continue;
          // With P there may be slices of its gradient, no more than steps of 64 rows.
          const Problem p{m, n, w, w ? std::min(ceil_div(m, 64), w / 8) : 0, 1 + (m + n) / 8 % 2, tile};
          check_order(p, totals);
          check_flags(p, totals);
          const uint32_t count = p.schedule().count();
          if (count <= (long_run ? 2000u : 200u))
            for (uint32_t resident : {1u, 2u, 3u, 7u, 33u, 66u, 132u}) run(p, resident, seed++, totals);
        }
      }
    }
    std::printf("%3dx%3dx%d%*s%8lu%10lu%9lu%9lu%9lu\n", tile.block_m, tile.block_n, tile.cluster, 5, "",
                (unsigned long)totals.sizes, (unsigned long)totals.items, (unsigned long)totals.pieces,
                (unsigned long)totals.flags, (unsigned long)totals.runs);
  }
  check_refusals();
  check_largest();
  check_states();
  check_current();
  check_plans();
  check_ratios();
  check_groups();
  check_group_ratios();
  check_remembered();
  print_plans();
  if (failures) std::printf("\n%d failures\n", failures);
  return failures != 0;
}
