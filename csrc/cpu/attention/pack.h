// The inputs of attention in the compute type, as the kernels read them: keys and values in rows and in panels, tables,
// and which keys the mask hides.
#pragma once

#include "csrc/cpu/attention/tables.h"
#include "csrc/cpu/parallel.h"

namespace ck::cpu::CK_ISA {

// The keys or the values of one group, padding replaced by zeros, which also fill the last panel.
template <class C>
class PackedRows {
 public:
  // factor: multiplies the panels. watch: `load` finds the rows that are not finite. measure: and their lengths.
  PackedRows(const Attention& p, const HeadRows& source, bool rows, bool panels, C factor, bool watch, bool measure)
      : p_(p),
        source_(source),
        width_(round_up(p.channels, V)),
        pitch_(row_pitch<C>(width_)),
        padded_(round_up(p.keys, P)),
        factor_(factor),
        rows_((rows ? padded_ : P) * pitch_),
        panels_(panels ? padded_ * width_ : 0),
        nonfinite_(padded_),
        tiny_(padded_),
        squared_lengths_(measure ? padded_ : 0),
        keep_rows_(rows),
        fill_panels_(panels),
        watch_(watch),
        measure_(measure) {}

  void load(int64_t b, int64_t g) {
    for (int64_t j = 0; j < padded_; j += P) {
      C* const rows = rows_.get() + (keep_rows_ ? j * pitch_ : 0);
      for (int64_t n = 0; n < P; ++n) {
        if (j + n + P < p_.keys) prefetch_row(p_, source_, b, j + n + P, g, p_.channels);
        const bool real =
            j + n < p_.keys && (p_.key_mask == nullptr || p_.key_mask[b * p_.mask_batch + (j + n) * p_.mask_key]);
        if (real)
          read_row<C>(p_, source_, b, j + n, g, p_.channels, 1, rows + n * pitch_);
        else
          clear(rows + n * pitch_, width_);
        if (watch_) nonfinite_[j + n] = !is_finite(rows + n * pitch_, width_);
      }
      if (fill_panels_) fill_panel(rows, panels_.get() + j * width_, squared_lengths_.get() + (measure_ ? j : 0));
    }
  }

  const C* row(int64_t j) const { return rows_.get() + j * pitch_; }

  // Finds rows with a NaN or an infinity, which a weight of 0 would spread.
  void find_nonfinite() const {
    for (int64_t j = 0; j < padded_; ++j) nonfinite_[j] = !is_finite(row(j), width_);
  }
  const bool* nonfinite(int64_t first) const { return nonfinite_.get() + first; }
  // Finds rows with elements that are nearly 0 but not 0.
  void find_tiny(C limit) const {
    for (int64_t j = 0; j < padded_; ++j) tiny_[j] = is_tiny(row(j), width_, limit);
  }
  bool has_tiny(int64_t first, int64_t n) const { return any(tiny_.get() + first, n); }
  // Of rows of panels; infinity where something is not finite.
  bool has_lengths() const { return measure_; }
  const C* squared_lengths_from(int64_t j) const { return squared_lengths_.get() + j; }
  bool has_nonfinite(int64_t first, int64_t n) const { return any(nonfinite(first), n); }

  // s[r][j] = factor * dot(row r of a, row first + j) for j < n; first and n are whole panels.
  void dot_rows(int64_t first, int64_t n, int64_t rows, const C* a, C* s) const {
    if (!fill_panels_) {
      for (int64_t j = 0; j < n; ++j)
        for (int64_t r = 0; r < rows; ++r)
          s[r * kScorePitch<C> + j] = dot(a + r * pitch_, row(first + j), width_) * factor_;
      return;
    }
    for (int64_t j = 0; j < n; j += P)
      multiply<false>(rows, P, p_.channels, Factor<C>{a, pitch_, 1}, {panels_.get() + (first + j) * width_, P},
                      Vectors<C>{s + j, kScorePitch<C>});
  }

 private:
  static constexpr int64_t V = kLanes<C>, P = kPanel<C>;

  void fill_panel(const C* rows, C* panel, C* squared_lengths) const {
    for (int64_t n = 0; n < P; n += V) {
      Vec<C> squares = {};
      for (int64_t d = 0; d < width_; d += V) {
        Vec<C> square[V];
        CK_UNROLL for (int64_t i = 0; i < V; ++i) square[i] = load_bytes<Vec<C>>(rows + (n + i) * pitch_ + d) * factor_;
        transpose<C>(square);
        CK_UNROLL for (int64_t i = 0; i < V; ++i) {
          store_bytes(panel + (d + i) * P + n, square[i]);
          squares += square[i] * square[i];
        }
      }
      if (measure_) store_bytes(squared_lengths + n, or_infinity<C>(squares));
    }
  }

  const Attention& p_;
  const HeadRows& source_;
  int64_t width_, pitch_, padded_;
  C factor_;
  Scratch<C> rows_, panels_;
  Scratch<bool> nonfinite_, tiny_;
  Scratch<C> squared_lengths_;
  bool keep_rows_, fill_panels_, watch_, measure_;
};

// Scores and their exponentials are taken to base 2: what makes scores carries this factor.
constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// Positions and masks, which all tasks share.
template <class C>
struct AttentionData {
  const AttentionProblem& p;
  bool threads;
  int64_t width, pitch;  // of a row of channels: whole vectors, and the distance to the next
  int64_t rank_pitch;    // rows of rel_query (of q, where there is none)
  int64_t padded;        // keys, in whole panels
  QueryPositions positions;
  bool clips;             // outermost columns reach keys outside the window
  Scratch<C> hidden;      // [batch][padded]: not 0 where the mask hides a key
  Scratch<int64_t> real;  // [batch][keys + 1]: how many keys before a position the mask does not hide

  explicit AttentionData(const AttentionProblem& problem)
      : p(problem),
        threads(p.batch * p.heads * p.queries * p.keys * p.channels >= 1 << 15),
        width(round_up(p.channels, kLanes<C>)),
        pitch(row_pitch<C>(width)),
        rank_pitch(p.rel_query.data != nullptr ? row_pitch<C>(p.rank) : pitch),
        padded(round_up(p.keys, kPanel<C>)),
        positions(p),
        clips(p.clips() && positions.leave_window()),
        hidden(p.key_mask != nullptr ? p.batch * padded : 0),
        real(p.key_mask != nullptr ? p.batch * (p.keys + 1) : 0) {
    if (p.key_mask != nullptr) read_mask();
  }

  // How many of the keys from first to end the mask does not hide.
  int64_t count_real(int64_t b, int64_t first, int64_t end) const {
    if (p.key_mask == nullptr) return end - first;
    const int64_t* const before = real.get() + b * (p.keys + 1);
    return before[end] - before[first];
  }
  bool is_real(int64_t b, int64_t j) const { return count_real(b, j, j + 1) > 0; }
  bool sees_something(int64_t b, const Range& visible) const {
    return !visible.empty() && count_real(b, visible.first, visible.end) > 0;
  }
  C score_scale() const { return static_cast<C>(p.scale * kLog2e); }
  bool has_edges() const { return p.key_rel.data != nullptr && clips; }
  // Blocks of queries of one head.
  int64_t blocks() const { return ceil_div(p.queries, kQueryRows); }

  // to += a * b, element by element
  void multiply_add(C* to, const C* a, const C* b) const {
    for (int64_t i = 0; i < width; i += kLanes<C>)
      store_bytes(to + i, load_bytes<Vec<C>>(to + i) + load_bytes<Vec<C>>(a + i) * load_bytes<Vec<C>>(b + i));
  }

 private:
  void read_mask() {
    for (int64_t b = 0; b < p.batch; ++b) {
      int64_t* const before = real.get() + b * (p.keys + 1);
      before[0] = 0;
      for (int64_t j = 0; j < padded; ++j) {
        const bool there = j < p.keys && p.key_mask[b * p.mask_batch + j * p.mask_key];
        hidden[b * padded + j] = there ? C{0} : C{1};
        if (j < p.keys) before[j + 1] = before[j] + (there ? 1 : 0);
      }
    }
  }
};

// The tables of one head.
template <class C>
struct HeadTables {
  PackedTable<C> bias, query_rel, key_rel;                       // base 2; the latter two by channel, in panels
  PackedTable<C> query_columns, key_columns;                     // by column, for gradients; the first times rel_scale
  PackedTable<C> value_conv, value_conv_bias, value_conv_scale;  // by tap

  HeadTables(const AttentionData<C>& d, bool gradients)
      : bias(d.p, d.p.bias, L::rows({1, 0}, columns(d, d.p.bias)), static_cast<C>(kLog2e)),
        query_rel(d.p, d.p.query_rel, L::panels({d.p.rank, d.p.query_rel.row}, columns(d, d.p.query_rel)),
                  static_cast<C>(d.p.rel_scale * kLog2e)),
        key_rel(d.p, d.p.key_rel, L::panels({d.p.channels, d.p.key_rel.row}, columns(d, d.p.key_rel)), d.score_scale()),
        query_columns(d.p, when(gradients, d.p.query_rel),
                      L::rows(columns(d, d.p.query_rel), {d.p.rank, d.p.query_rel.row}), static_cast<C>(d.p.rel_scale)),
        key_columns(d.p, when(gradients, d.p.key_rel),
                    L::rows(columns(d, d.p.key_rel), {d.p.channels, d.p.key_rel.row}), 1),
        value_conv(d.p, d.p.value_conv, L::rows(columns(d, d.p.value_conv), {d.p.channels, d.p.value_conv.row}), 1),
        value_conv_bias(d.p, d.p.value_conv_bias, L::rows({1, 0}, {d.p.channels, d.p.value_conv_bias.row}), 1),
        value_conv_scale(d.p, d.p.value_conv_scale, L::rows({1, 0}, {1, 0}), 1) {}

  void choose(int64_t h) {
    for (PackedTable<C>* table :
         {&bias, &query_rel, &key_rel, &query_columns, &key_columns, &value_conv, &value_conv_bias, &value_conv_scale})
      table->choose(h);
  }
  C conv_scale() const { return value_conv_scale.get() == nullptr ? C{1} : *value_conv_scale.get(); }

 private:
  using L = Layout<C>;
  static Axis columns(const AttentionData<C>& d, const HeadTable& t) { return {d.p.window(), t.column}; }
  static HeadTable when(bool wanted, const HeadTable& t) { return wanted ? t : HeadTable{}; }
};

// The keys and values of one group of heads, and what key_rel adds to the scores of one of its heads outside the
// window.
template <class C>
struct Keys {
  const AttentionData<C>& d;
  HeadTables<C> tables;
  PackedRows<C> k, v;
  Scratch<C> edges;  // [2][padded]: left and right of the window
  int64_t batch = 0, group = 0, head = -1;

  Keys(const AttentionData<C>& data, bool gradients)
      : d(data),
        tables(data, gradients),
        k(d.p, d.p.k, gradients || d.p.key_rel.data != nullptr || few(d.p), d.p.qk && (gradients || !few(d.p)),
          d.score_scale(), gradients, !gradients && d.p.qk && !few(d.p)),
        v(d.p, d.p.v, !gradients || d.p.value_conv.data != nullptr, gradients, 1, gradients, false),
        edges(d.has_edges() ? 2 * d.padded : 0) {}

  void load(int64_t b, int64_t g) {
    batch = b;
    group = g;
    head = -1;
    k.load(b, g);
    v.load(b, g);
  }

  void choose_head(int64_t h) {
    if (h == head) return;
    head = h;
    tables.choose(h);
    if (!d.has_edges()) return;
    Scratch<C> outer(2 * d.width);
    clear(outer.get(), 2 * d.width);
    for (int64_t c = 0; c < d.p.channels; ++c) {
      outer[c] = tables.key_rel.at(c, d.p.window() - 1);
      outer[d.width + c] = tables.key_rel.at(c, 0);
    }
    for (int64_t side = 0; side < 2; ++side)
      for (int64_t j = 0; j < d.padded; ++j)
        edges[side * d.padded + j] = dot(k.row(j), outer.get() + side * d.width, d.width);
  }

  static bool few(const Attention& p) { return p.queries <= kFewQueries; }
  const C* edge(int64_t side) const { return edges.get() + side * d.padded; }

  // u = value_conv_bias + sum over the taps of value_conv * v, before its scale.
  void convolve(const QueryPosition& position, C* u) const {
    if (d.p.value_conv_bias.data != nullptr)
      memcpy(static_cast<void*>(u), tables.value_conv_bias.get(), static_cast<size_t>(d.width) * sizeof(C));
    else
      clear(u, d.width);
    const Range taps = position.taps(d.p);
    for (int64_t c = taps.first; c < taps.end; ++c) {
      const int64_t j = position.at - d.p.left + c;
      if (d.is_real(batch, j)) d.multiply_add(u, tables.value_conv.get() + c * d.width, v.row(j));
    }
  }
};

}  // namespace ck::cpu::CK_ISA
