// What a CPU kernel is asked to do.
#pragma once

#include "../common/attention.h"
#include "../common/poison.h"
#include "../common/problem.h"

namespace ck::cpu {

// Runs body(begin, end, context) over disjoint ranges that cover [0, n), possibly on several threads.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t n, ParallelBody body, void* context);

struct Workers {
  ParallelFor parallel_for = nullptr;
  int64_t threads = 1;
};

struct Problem : ck::Problem, Workers {
  const int64_t* offsets = nullptr;  // sequences+1 packed offsets, nullptr: every batch row is one sequence
  uint64_t seed = 0;
  int64_t dropout_batch = 0;  // batch coordinate of the first filter in the dropout counter
};

struct Forward : Problem {
  Rows y;
  bool resident_output = false;  // the pages of y are mapped already
};

struct Backward : Problem, Gradients {};

struct AttentionProblem : ck::Attention, Workers {
  // sequences+1 packed offsets of queries and of keys, nullptr: every batch row is one sequence
  const int64_t *query_offsets = nullptr, *key_offsets = nullptr;
  uint64_t seed = 0;
};

struct AttentionForward : AttentionProblem {
  HeadRows out;
  HeadScalars lse;
};

struct AttentionBackward : AttentionProblem, AttentionGradients {};

// Entry points of one instruction set. They return nullptr, or the reason why they could not run.
struct Kernels {
  const char* name;
  const char* (*forward)(const Forward&);
  const char* (*backward)(const Backward&);
  // After a step of one position: drops the oldest row of each state and appends the (gated) x.
  const char* (*shift_state)(const Forward&, void* state);
  const char* (*attention)(const AttentionForward&);
  const char* (*attention_grad)(const AttentionBackward&);
};

}  // namespace ck::cpu
