// Lanes as fibers: a stack each, and the switch between them.
#pragma once
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <vector>
#include <sys/mman.h>

typedef unsigned uint;

// ------------------------------------------------------------------- fibers
extern "C" void msl_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl msl_switch
msl_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
// The frame msl_switch pops when a lane starts: it returns into `start`.
static void* first_frame(char* top, void (*start)()) {
  void** sp = (void**)top;
  *--sp = nullptr;  // keeps the stack aligned as after a call
  *--sp = (void*)start;
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl msl_switch
msl_switch:
  sub sp, sp, #160
  stp x29, x30, [sp, #0]
  stp x27, x28, [sp, #16]
  stp x25, x26, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x21, x22, [sp, #64]
  stp x19, x20, [sp, #80]
  stp d14, d15, [sp, #96]
  stp d12, d13, [sp, #112]
  stp d10, d11, [sp, #128]
  stp d8, d9, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x29, x30, [sp, #0]
  ldp x27, x28, [sp, #16]
  ldp x25, x26, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x21, x22, [sp, #64]
  ldp x19, x20, [sp, #80]
  ldp d14, d15, [sp, #96]
  ldp d12, d13, [sp, #112]
  ldp d10, d11, [sp, #128]
  ldp d8, d9, [sp, #144]
  add sp, sp, #160
  ret
)");
static void* first_frame(char* top, void (*start)()) {
  void** sp = (void**)top - 20;
  for (int i = 0; i < 20; i++) sp[i] = nullptr;
  sp[1] = (void*)start;  // x30
  return sp;
}
#else
#error "write msl_switch for this CPU"
#endif

struct uint3 {
  uint x, y, z;
};
struct Lane {  // what the generated entry function reads; keep in step with text.py
  uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  uint3 threads_per_threadgroup, dispatch_threads_per_threadgroup, threads_per_grid,
      threadgroups_per_grid;
  uint thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  uint simdgroups_per_threadgroup;
};
struct Met {
  const char* all;
  char* result;
  uint mask;
  int first;
};

enum State { READY, AT_SIMD, AT_BARRIER, DONE };
struct Fiber {
  void* sp;
  char* stack;
  State state;
  int op, line;
  uint flags;
  Lane lane;
};
struct Group {  // one simdgroup
  alignas(64) char box[2][32][64];
  alignas(64) char result[2][64];
  uint mask;
  int turn;
  bool fresh;
  uint epoch;
};

constexpr size_t kStack = 128 * 1024;
static std::vector<Fiber> fibers;
static std::vector<Group> groups;
static Fiber* cur;
static void* main_sp;
static void (*entry)(void**, const Lane*);
static void** buffers;
static sigjmp_buf crash;
static volatile int running;
