// The schedule: where lanes meet, who waits, what is reported.
#pragma once
#include "fibers.h"

// ------------------------------------------------------------------ findings
struct Finding {
  int line;
  std::string text;
  long count;
  uint64_t pc;
};
static std::vector<Finding> findings;
static bool fatal;
static uint64_t image_base;

static void report(int line, uint64_t pc, const std::string& text) {
  for (auto& f : findings)
    if (f.line == line && f.pc == pc && f.text == text) {
      f.count++;
      return;
    }
  if (findings.size() < 64) findings.push_back({line, text, 1, pc});
}
[[noreturn]] static void die(int line, uint64_t pc, const std::string& text) {
  report(line, pc, text);
  fatal = true;
  siglongjmp(crash, 1);
}
static std::string where(const Fiber& f) {
  char s[96];
  auto& t = f.lane.threadgroup_position_in_grid;
  snprintf(s, sizeof s, "threadgroup (%u,%u,%u) thread %u", t.x, t.y, t.z,
           f.lane.thread_index_in_threadgroup);
  return s;
}

// ------------------------------------------------------------------ schedule
static int seed_order;  // 0 forward, 1 backward, else shuffled
static uint tg_serial, epoch_tg, epoch_dev;
static bool strict_divergence, checking;

static void settle();
static void yield_to_main() {
  Fiber* me = cur;
  settle();
  msl_switch(&me->sp, main_sp);
}
static void lane_main() {
  entry(buffers, &cur->lane);
  cur->state = DONE;
  for (;;) yield_to_main();
}
static Group& my_group() { return groups[cur->lane.simdgroup_index_in_threadgroup]; }

extern "C" {
uint msl_lane() { return cur->lane.thread_index_in_simdgroup; }
void msl_undefined(int line, const char* what) { report(line, 0, std::string(what)); }
void msl_simd_sync(int op, int line, const void* v, uint size, Met* m) {
  Group& g = my_group();
  int turn = g.turn;
  memcpy(g.box[turn][cur->lane.thread_index_in_simdgroup], v, size);
  cur->state = AT_SIMD;
  cur->op = op;
  cur->line = line;
  yield_to_main();
  m->all = g.box[turn][0];
  m->result = g.result[turn];
  m->mask = g.mask;
  m->first = g.fresh;
  g.fresh = false;
}
void msl_simd_barrier(int flags, int line) {
  cur->state = AT_SIMD;
  cur->op = 1000 + flags;
  cur->line = line;
  yield_to_main();
}
void msl_tg_barrier(int flags, int line) {
  cur->state = AT_BARRIER;
  cur->flags = flags;
  cur->line = line;
  yield_to_main();
}
}

static void release_simd(int s, int op, int line, uint lo, uint hi) {
  Group& g = groups[s];
  g.mask = 0;
  g.turn ^= 1;
  g.fresh = true;
  for (uint i = lo; i < hi; i++)
    if (fibers[i].state == AT_SIMD && fibers[i].op == op && fibers[i].line == line) {
      fibers[i].state = READY;
      g.mask |= 1u << (i - lo);
    }
  if (op >= 1000 && (op - 1000) & 3) g.epoch++;
}

static const char* op_name(int op) {
  static const char* names[] = {"?",
                                "simd_sum",
                                "simd_product",
                                "simd_max",
                                "simd_min",
                                "simd_and",
                                "simd_or",
                                "simd_xor",
                                "?",
                                "?",
                                "simd_shuffle",
                                "simd_broadcast",
                                "simd_broadcast_first",
                                "simd_shuffle_xor",
                                "simd_shuffle_down",
                                "simd_shuffle_up"};
  if (op >= 1000) return "simdgroup_barrier";
  if (op == 40) return "simdgroup_multiply_accumulate";
  return op < 16 ? names[op] : "simd operation";
}

static void run_threadgroup(uint n) {
  uint ns = (n + 31) / 32;
  std::vector<uint> gorder(ns), order(n);
  for (uint i = 0; i < ns; i++) gorder[i] = i;
  for (uint i = 0; i < n; i++) order[i] = i;
  if (seed_order == 1) {
    std::reverse(gorder.begin(), gorder.end());
    for (uint s = 0; s < ns; s++)
      std::reverse(order.begin() + s * 32, order.begin() + std::min(n, s * 32 + 32));
  }
  if (seed_order > 1) {
    std::mt19937 r(seed_order);
    std::shuffle(gorder.begin(), gorder.end(), r);
    for (uint s = 0; s < ns; s++)
      std::shuffle(order.begin() + s * 32, order.begin() + std::min(n, s * 32 + 32), r);
  }

  for (;;) {
    uint done = 0;
    for (uint s : gorder) {
      uint lo = s * 32, hi = std::min(n, lo + 32);
      for (;;) {
        for (uint k = lo; k < hi; k++) {
          Fiber& f = fibers[order[k]];
          if (f.state == READY) {
            cur = &f;
            msl_switch(&main_sp, f.sp);
          }
        }
        uint waiting = 0, over = 0, barred = 0;
        int op = 0, line = 1 << 30;
        bool same = true;
        for (uint i = lo; i < hi; i++) {
          Fiber& f = fibers[i];
          if (f.state == AT_SIMD) {
            if (waiting++ && (f.op != op || f.line != line)) same = false;
            if (f.line < line || (f.line == line && f.op < op)) {
              op = f.op;
              line = f.line;
            }
          } else if (f.state == DONE) over++;
          else barred++;
        }
        if (!waiting) {
          done += over;
          break;
        }
        // not all live lanes are here: the group nearest the top goes first, as
        // hardware reconverges. It is legal, but shuffles and barriers care.
        if (!same || barred) {
          char s_[256];
          snprintf(s_, sizeof s_,
                   "%s in divergent control flow: only some live lanes of the simdgroup reach it",
                   op_name(op));
          if (strict_divergence || op >= 1000) die(line, 0, s_);
          report(line, 0, s_);
        } else if (over && checking)
          report(line, 0,
                 std::string(op_name(op)) + ": some lanes of the simdgroup have already returned");
        release_simd(s, op, line, lo, hi);
      }
    }
    if (done == n) return;
    // every live lane is at a threadgroup barrier
    Fiber* a = nullptr;
    for (uint i = 0; i < n; i++) {
      Fiber& f = fibers[i];
      if (f.state == DONE) continue;
      if (a && f.line != a->line)
        die(std::min(a->line, f.line), 0,
            "threadgroup_barrier: threads wait at different barriers, lines " +
                std::to_string(a->line) + " and " + std::to_string(f.line));
      a = &f;
    }
    if (done)
      die(a->line, 0,
          "threadgroup_barrier: " + std::to_string(done) + " of " + std::to_string(n) +
              " threads returned before it");
    if (a->flags & 2) epoch_tg++;
    if (a->flags & 1) epoch_dev++;
    for (uint i = 0; i < n; i++) fibers[i].state = READY;
  }
}
