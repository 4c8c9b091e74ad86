// The test harness of the torch-free C++ tests: one executable per file, registered with CTest.
//
//     CK_TEST(window_of_even_width) {
//         CK_EQUAL(left(4), 2);
//         CK_CLOSE(total, 1.0, 1e-12);
//     }
//     CK_TEST_MAIN()
//
// A failed check prints the file, the line, the expression and both values, and the test goes on, so that one run shows
// every difference. An exception that leaves a test fails it. Arguments of the executable select tests by name.
#pragma once

#include <cmath>
#include <cstdio>
#include <exception>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace ck::test {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> list;
  return list;
}

inline int& failures() {
  static int count = 0;
  return count;
}

inline bool add(const char* name, void (*body)()) {
  tests().push_back({name, body});
  return true;
}

template <class T>
std::string show(const T& value) {
  if constexpr (std::is_enum_v<T>) {
    return show(static_cast<std::underlying_type_t<T>>(value));
  } else {
    std::ostringstream out;
    out.precision(17);
    out << std::boolalpha << +value;
    return out.str();
  }
}

inline std::string show(const std::string& value) { return value; }
inline std::string show(const char* value) { return value; }
inline std::string show(bool value) { return value ? "true" : "false"; }

inline void fail(const char* file, int line, const std::string& what) {
  std::printf("%s:%d: %s\n", file, line, what.c_str());
  ++failures();
}

template <class A, class B>
bool equal(const A& got, const B& expected) {
  if constexpr (std::is_integral_v<A> && std::is_integral_v<B> && !std::is_same_v<A, bool> &&
                !std::is_same_v<B, bool>) {
    return std::cmp_equal(got, expected);
  } else {
    return got == expected;
  }
}

template <class A, class B>
void check_equal(const char* file, int line, const char* text, const A& got, const B& expected) {
  if (!equal(got, expected))
    fail(file, line, std::string(text) + ": expected " + show(expected) + ", got " + show(got));
}

// Written so that NaN fails.
inline void check_close(const char* file, int line, const char* text, double got, double expected, double tolerance) {
  if (!(std::fabs(got - expected) <= tolerance)) {
    fail(file, line,
         std::string(text) + ": expected " + show(expected) + " within " + show(tolerance) + ", got " + show(got));
  }
}

inline int run(int argc, char** argv) {
  int failed = 0, ran = 0;
  for (const Test& test : tests()) {
    bool selected = argc < 2;
    for (int i = 1; i < argc; ++i) selected = selected || std::string(argv[i]) == test.name;
    if (!selected) continue;
    const int before = failures();
    try {
      test.body();
    } catch (const std::exception& error) {
      fail(test.name, 0, std::string("left by an exception: ") + error.what());
    }
    const bool good = failures() == before;
    std::printf("%s %s\n", good ? "ok  " : "FAIL", test.name);
    ++ran;
    failed += good ? 0 : 1;
  }
  std::printf("%d passed, %d failed\n", ran - failed, failed);
  return failed == 0 && ran > 0 ? 0 : 1;
}

}  // namespace ck::test

#define CK_TEST(name)                                                              \
  static void name();                                                              \
  [[maybe_unused]] static const bool name##_added = ::ck::test::add(#name, &name); \
  static void name()

#define CK_TRUE(condition) \
  ((condition) ? void() : ::ck::test::fail(__FILE__, __LINE__, "expected to be true: " #condition))

#define CK_EQUAL(got, expected) ::ck::test::check_equal(__FILE__, __LINE__, #got, (got), (expected))

#define CK_CLOSE(got, expected, tolerance) \
  ::ck::test::check_close(__FILE__, __LINE__, #got, (got), (expected), (tolerance))

#define CK_THROWS(expression)                                                             \
  do {                                                                                    \
    bool thrown = false;                                                                  \
    try {                                                                                 \
      (void)(expression);                                                                 \
    } catch (const std::exception&) {                                                     \
      thrown = true;                                                                      \
    }                                                                                     \
    if (!thrown) ::ck::test::fail(__FILE__, __LINE__, "expected to throw: " #expression); \
  } while (false)

#define CK_TEST_MAIN() \
  int main(int argc, char** argv) { return ::ck::test::run(argc, argv); }
