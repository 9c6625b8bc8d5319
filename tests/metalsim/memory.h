// Checked builds: who touched which byte, and the hooks clang's instrumentation calls.
#pragma once
#include "lanes.h"

// ------------------------------------------------- checked build: the memory
struct Region {
  uintptr_t lo, hi;
  int kind;
  std::string name;
  std::vector<struct Cell> cells;
};
struct Cell {
  uint wtg = 0, wlane = 0, wep = 0, wsep = 0;
  uint rtg = 0, rlane = 0, rep = 0, rsep = 0;
};                                   // lane + 1; ~0 many
static std::vector<Region> regions;  // 0 input, 1 output, 2 threadgroup
static uintptr_t image_lo, image_hi;

static inline uint64_t pc_of(void* ra) { return (uint64_t)ra - 1 - image_base; }
// Two threads writing one place is reported only if they write different values,
// which shows after the store: it is kept here until the thread's next step.
static struct {
  uintptr_t at;
  uint size;
  unsigned char was[16];
  uint64_t pc;
  std::string text;
} pending;
static void settle() {
  if (pending.size && memcmp((void*)pending.at, pending.was, pending.size))
    report(0, pending.pc, pending.text);
  pending.size = 0;
}
static void touch(uintptr_t p, uint size, bool write, void* ra) {
  if (!checking || !running) return;
  settle();
  for (auto& r : regions) {
    if (p < r.lo || p >= r.hi) continue;
    if (p + size > r.hi)
      die(0, pc_of(ra), std::string(write ? "write" : "read") + " past the end of " + r.name);
    if (r.kind == 0) {
      if (write) die(0, pc_of(ra), "write to input " + r.name);
      return;
    }
    uint me = cur->lane.thread_index_in_threadgroup + 1, ep = r.kind == 2 ? epoch_tg : epoch_dev;
    uint sg = (me - 1) / 32, sep = groups[sg].epoch;
    auto ordered = [&](uint tg, uint lane, uint e, uint se) {
      if (!lane) return true;
      if (tg != tg_serial) return r.kind == 2;  // other threadgroups have their own memory
      if (lane == me) return true;
      if (e < ep) return true;
      return lane != ~0u && (lane - 1) / 32 == sg && se < sep;
    };
    for (uintptr_t b = p; b < p + size; b++) {
      Cell& c = r.cells[b - r.lo];
      if (!ordered(c.wtg, c.wlane, c.wep, c.wsep)) {
        std::string text =
            "data race on " + r.name + ": " +
            (write ? "two threads write different values" : "one thread writes, another reads") +
            " without a barrier between" +
            (c.wtg != tg_serial         ? " (different threadgroups)"
             : (c.wlane - 1) / 32 == sg ? " (same simdgroup)"
                                        : " (different simdgroups)");
        if (write && size <= 16) {
          pending = {p, size, {}, pc_of(ra), text};
          memcpy(pending.was, (void*)p, size);
        } else report(0, pc_of(ra), text);
        break;
      }
      if (write && !ordered(c.rtg, c.rlane, c.rep, c.rsep)) {
        report(0, pc_of(ra),
               std::string("data race on ") + r.name +
                   ": one thread reads, another writes without a barrier between");
        break;
      }
    }
    for (uintptr_t b = p; b < p + size; b++) {
      Cell& c = r.cells[b - r.lo];
      if (write) {
        c.wtg = tg_serial;
        c.wlane = me;
        c.wep = ep;
        c.wsep = sep;
        c.rlane = 0;
      } else {
        bool others =
            c.rlane && c.rlane != me && c.rtg == tg_serial && c.rep == ep && c.rsep == sep;
        c.rtg = tg_serial;
        c.rlane = others ? ~0u : me;
        c.rep = ep;
        c.rsep = sep;
      }
    }
    return;
  }
  if (p >= image_lo && p + size <= image_hi) return;  // constants
  uintptr_t s = (uintptr_t)cur->stack;
  if (p >= s && p < s + kStack) return;
  die(0, pc_of(ra),
      std::string(write ? "write" : "read") + " outside every buffer, " + where(*cur));
}

extern "C" {
#define HOOK(n)                                                                                \
  void __tsan_read##n(void* p) { touch((uintptr_t)p, n, false, __builtin_return_address(0)); } \
  void __tsan_write##n(void* p) { touch((uintptr_t)p, n, true, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##n(void* p) {                                                     \
    touch((uintptr_t)p, n, false, __builtin_return_address(0));                                \
  }                                                                                            \
  void __tsan_unaligned_write##n(void* p) {                                                    \
    touch((uintptr_t)p, n, true, __builtin_return_address(0));                                 \
  }
HOOK(1) HOOK(2) HOOK(4) HOOK(8) HOOK(16) void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void* __tsan_memcpy(void* d, const void* s, size_t n) {
  touch((uintptr_t)s, n, false, __builtin_return_address(0));
  touch((uintptr_t)d, n, true, __builtin_return_address(0));
  return memcpy(d, s, n);
}
void* __tsan_memmove(void* d, const void* s, size_t n) {
  touch((uintptr_t)s, n, false, __builtin_return_address(0));
  touch((uintptr_t)d, n, true, __builtin_return_address(0));
  return memmove(d, s, n);
}
void* __tsan_memset(void* d, int c, size_t n) {
  touch((uintptr_t)d, n, true, __builtin_return_address(0));
  return memset(d, c, n);
}

struct SrcLoc {
  const char* file;
  uint line, col;
};
#define UB(name, text)                                                     \
  void __ubsan_handle_##name(SrcLoc* l, ...) { report(l->line, 0, text); } \
  void __ubsan_handle_##name##_abort(SrcLoc* l, ...) { die(l->line, 0, text); }
UB(out_of_bounds, "index outside a fixed-size array")
UB(shift_out_of_bounds, "shift by a negative or too large amount")
    UB(divrem_overflow, "integer division by zero or overflow")
        UB(add_overflow, "signed integer overflow (+)")
            UB(sub_overflow, "signed integer overflow (-)")
                UB(mul_overflow, "signed integer overflow (*)")
                    UB(negate_overflow, "signed integer overflow (unary -)")
                        UB(float_cast_overflow, "float does not fit the integer it is cast to")
                            UB(type_mismatch_v1, "misaligned or null pointer")
                                UB(builtin_unreachable, "unreachable code reached")
                                    UB(load_invalid_value, "invalid bool or enum value")
                                        UB(missing_return, "no return value")
                                            UB(pointer_overflow, "pointer overflow")
                                                UB(invalid_builtin, "clz or ctz of zero")

    // old libgcc has no float -> bfloat16 conversion
    __attribute__((weak)) __bf16 __truncsfbf2(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  uint16_t h =
      (u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  __bf16 b;
  memcpy(&b, &h, 2);
  return b;
}
}

static void on_signal(int sig) {
  if (!running) {
    signal(sig, SIG_DFL);
    raise(sig);
    return;
  }
  report(0, 0,
         std::string(sig == SIGFPE    ? "integer division by zero"
                     : sig == SIGALRM ? "timed out"
                                      : "memory access outside every mapping") +
             ", " + where(*cur));
  fatal = true;
  siglongjmp(crash, 1);
}
