// Host entry points of the kernels. Each returns nullptr, or the reason why it could not run.
#pragma once

#include "csrc/cuda/conv/plan.h"
#include "csrc/cuda/conv/step_tiles.h"

namespace ck::cuda {

// One template per family and direction, instantiated per type in instantiate/.
template <class T>
struct PlainFamily {
  static const char* forward(const Forward& p, const Plan& plan, Stream stream);
  static const char* backward(const Backward& p, const Plan& plan, Stream stream);
  static const char* step(const Step& p, const StepTiles& tiles, Stream stream);
};

// Not for float64.
template <class T>
struct StreamFamily {
  static const char* forward(const Forward& p, const Plan& plan, Stream stream);
  static const char* backward(const Backward& p, const Plan& plan, Stream stream);
};

// Not for float64, and not with a state.
template <class T>
struct TimeFamily {
  static const char* forward(const Forward& p, const Plan& plan, Stream stream);
  static const char* backward(const Backward& p, const Plan& plan, Stream stream);
};

template <class T>
struct RowsFamily {
  static const char* forward(const Forward& p, const Plan& plan, Stream stream);
  static const char* backward(const Backward& p, const Plan& plan, Stream stream);
};

// bfloat16 and float16.
template <class T>
struct BandFamily {
  static const char* forward(const Forward& p, const Plan& plan, Stream stream);
  static const char* backward(const Backward& p, const Plan& plan, Stream stream);
};

// The sums that end every backward pass; C is the accumulation type.
template <class C>
struct Reduce {
  static const char* weight(const Backward& p, int64_t pieces, bool finished, Stream stream);
  static const char* bias(const Backward& p, int64_t rows, Stream stream);
};

// grad_weight of filters per position, from sums over pieces of their heads.
const char* add_pieces(const Backward& p, int64_t pieces, Stream stream);

// What the choice of kernels depends on.
Facts facts_of(const Forward& p);
Facts facts_of(const Backward& p);

const char* forward(Forward p, Stream stream);

// The kernels of a backward pass, and the bytes that they need besides their arguments.
struct Launch {
  Plan plan;
  int64_t workspace_bytes;
};
Launch prepare(Backward& p);
const char* backward(Backward p, const Launch& launch, void* workspace, Stream stream);

const char* step(Step p, Stream stream);

}  // namespace ck::cuda
