// Runs one kernel over a grid on one CPU thread: a fiber per lane, 32 lanes to a
// simdgroup, lanes meeting at simd operations and barriers.
//
// In a checked build the kernel is compiled with clang's thread and undefined
// behaviour instrumentation and calls the __tsan_* and __ubsan_* hooks below,
// which look for data races between barriers and for accesses outside buffers.
#include "memory.h"

extern "C" char __start_msl_tg[] __attribute__((weak));
extern "C" char __stop_msl_tg[] __attribute__((weak));

// What one call of msl_run needs; execute.py fills it.
struct Launch {
  void (*fn)(void**, const Lane*);
  void** buffers;
  int count;
  const size_t* sizes;
  const int* kinds;  // 0 input, 1 output, 3 output that starts out initialised
  const char* const* names;
  uint grid[3], threadgroup[3];
  int order, checked, strict_divergence, timeout;
  uintptr_t image_lo, image_hi;
  char *tg_lo, *tg_hi;
};

static void begin(const Launch& l) {
  entry = l.fn;
  buffers = l.buffers;
  seed_order = l.order;
  strict_divergence = l.strict_divergence;
  checking = l.checked;
  image_base = image_lo = l.image_lo;
  image_hi = l.image_hi;
  findings.clear();
  regions.clear();
  fatal = false;
  tg_serial = 0;
  epoch_tg = epoch_dev = 1;
  if (!checking) return;
  for (int i = 0; i < l.count; i++) {
    if (!l.sizes[i]) continue;
    uintptr_t lo = (uintptr_t)l.buffers[i];
    regions.push_back({lo, lo + l.sizes[i], l.kinds[i], l.names[i], {}});
    if (l.kinds[i]) regions.back().cells.resize(l.sizes[i]);
  }
  if (l.tg_hi > l.tg_lo) {
    regions.push_back({(uintptr_t)l.tg_lo, (uintptr_t)l.tg_hi, 2, "threadgroup memory", {}});
    regions.back().cells.resize(l.tg_hi - l.tg_lo);
  }
}

static char* stacks_for(uint n) {
  static char* stacks;
  static uint have;
  if (have < n) {
    if (stacks) munmap(stacks, have * kStack);
    stacks = (char*)mmap(nullptr, n * kStack, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    have = n;
  }
  return stacks;
}

static void one_threadgroup(const Launch& l, const uint* t, uint3 count, uint3 at, char* stacks) {
  uint3 size{std::min(t[0], l.grid[0] - at.x * t[0]), std::min(t[1], l.grid[1] - at.y * t[1]),
             std::min(t[2], l.grid[2] - at.z * t[2])};
  uint m = size.x * size.y * size.z;
  tg_serial++;
  epoch_tg++;
  epoch_dev++;
  if (l.tg_hi > l.tg_lo) memset(l.tg_lo, 0xff, l.tg_hi - l.tg_lo);  // NaN until written
  for (auto& g : groups) {
    g.turn = 0;
    g.mask = 0;
    g.epoch = 1;
  }
  uint3 wanted{t[0], t[1], t[2]}, grid{l.grid[0], l.grid[1], l.grid[2]};
  for (uint i = 0; i < m; i++) {
    Fiber& f = fibers[i];
    uint3 p{i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    uint3 q{at.x * t[0] + p.x, at.y * t[1] + p.y, at.z * t[2] + p.z};
    f.lane = {q, p, at, size, wanted, grid, count, i, i % 32, i / 32, (m + 31) / 32};
    f.stack = stacks + i * kStack;
    f.state = READY;
    f.sp = first_frame(f.stack + kStack - 64, lane_main);
  }
  run_threadgroup(m);
}

static void whole_grid(const Launch& l) {
  uint t[3];
  for (int i = 0; i < 3; i++) t[i] = std::min(l.threadgroup[i], l.grid[i]);
  uint n = t[0] * t[1] * t[2];
  char* stacks = stacks_for(n);
  fibers.assign(n, Fiber{});
  groups.assign((n + 31) / 32, Group{});
  uint3 count{(l.grid[0] + t[0] - 1) / t[0], (l.grid[1] + t[1] - 1) / t[1],
              (l.grid[2] + t[2] - 1) / t[2]};
  for (uint z = 0; z < count.z; z++)
    for (uint y = 0; y < count.y; y++)
      for (uint x = 0; x < count.x; x++) one_threadgroup(l, t, count, {x, y, z}, stacks);
}

static void look_for_unwritten() {
  for (auto& r : regions) {
    if (r.kind != 1) continue;
    size_t n = 0;
    for (auto& c : r.cells) n += !c.wlane;
    if (!n) continue;
    std::string all = std::to_string(r.cells.size());
    report(0, 0, std::to_string(n) + " of " + all + " bytes of " + r.name + " were never written");
  }
}

// Runs a launch; the number of findings, or -1 if it could not be finished.
extern "C" int msl_run(const Launch* l) {
  begin(*l);
  static char alternative[65536];
  stack_t ss{};
  ss.ss_sp = alternative;
  ss.ss_size = sizeof alternative;
  sigaltstack(&ss, nullptr);
  struct sigaction sa{}, old[4];
  sa.sa_handler = on_signal;
  sa.sa_flags = SA_ONSTACK | SA_NODEFER;
  int sigs[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGALRM};
  for (int i = 0; i < 4; i++) sigaction(sigs[i], &sa, &old[i]);
  if (!sigsetjmp(crash, 1)) {
    running = 1;
    if (l->timeout) alarm(l->timeout);
    whole_grid(*l);
  }
  running = 0;
  alarm(0);
  if (checking && !fatal) look_for_unwritten();
  for (int i = 0; i < 4; i++) sigaction(sigs[i], &old[i], nullptr);
  return fatal ? -1 : (int)findings.size();
}

extern "C" int msl_findings() { return findings.size(); }
extern "C" const char* msl_finding(int i, int* line, uint64_t* pc, long* count) {
  *line = findings[i].line;
  *pc = findings[i].pc;
  *count = findings[i].count;
  return findings[i].text.c_str();
}
