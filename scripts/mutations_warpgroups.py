"""The faults that mutations.py seeds in the kernels for warpgroups."""

from mutations_table import Mutation

WARPGROUPS = "csrc/cuda/attention/forward_warpgroups.cuh"
TILES, RELATIVE = "csrc/cuda/attention/warpgroup_tiles.cuh", "csrc/cuda/attention/relative.cuh"

WARPGROUP_MUTATIONS = [
    Mutation(
        "attention: warpgroups, a turn left out",
        WARPGROUPS,
        "          turn.begin();\n          multiply_values();",
        "          multiply_values();",
    ),
    Mutation(
        "attention: warpgroups, a turn not given back",
        WARPGROUPS,
        "    turn.finish();\n",
        "",
    ),
    Mutation(
        "attention: warpgroups, keys not waited for",
        WARPGROUPS,
        "          mbarrier_wait(key_full(place.stage), place.parity());\n",
        "",
    ),
    Mutation(
        "attention: warpgroups, keys waited for in the wrong phase",
        WARPGROUPS,
        "mbarrier_wait(key_full(place.stage), place.parity());",
        "mbarrier_wait(key_full(place.stage), place.parity() ^ 1);",
    ),
    Mutation(
        "attention: warpgroups, values not waited for",
        WARPGROUPS,
        "          mbarrier_wait(value_full(place.stage), place.parity());\n",
        "",
    ),
    Mutation(
        "attention: warpgroups, queries waited for in one phase",
        WARPGROUPS,
        "mbarrier_wait(&signals->own_full, loads++ & 1);",
        "mbarrier_wait(&signals->own_full, loads++ & 0);",
    ),
    Mutation(
        "attention: warpgroups, keys overwritten before their products are done",
        WARPGROUPS,
        "          wgmma_wait<0>();\n          keep_registers(s);\n          keep_registers(out);\n"
        "          if (n > 0) release(value_free(place.before()));\n"
        "          if (p.key_rel.data == nullptr) release(key_free(place.stage));\n",
        "          if (p.key_rel.data == nullptr) release(key_free(place.stage));\n          wgmma_wait<0>();\n"
        "          keep_registers(s);\n          keep_registers(out);\n"
        "          if (n > 0) release(value_free(place.before()));\n",
    ),
    Mutation(
        "attention: warpgroups, values overwritten before their products are done",
        WARPGROUPS,
        "          wgmma_wait<0>();\n          keep_registers(s);\n          keep_registers(out);\n"
        "          if (n > 0) release(value_free(place.before()));\n",
        "          if (n > 0) release(value_free(place.before()));\n"
        "          wgmma_wait<0>();\n          keep_registers(s);\n          keep_registers(out);\n",
    ),
    Mutation(
        "attention: warpgroups, queries overwritten after the first tile of keys",
        WARPGROUPS,
        "if (n == count - 1) release(&signals->own_free);",
        "if (n == 0) release(&signals->own_free);",
    ),
    Mutation(
        "attention: warpgroups, products not waited for",
        WARPGROUPS,
        "          wgmma_wait<0>();\n          keep_registers(s);",
        "          keep_registers(s);",
    ),
    Mutation(
        "attention: warpgroups, the last products not waited for",
        WARPGROUPS,
        "        wgmma_wait<0>();\n        keep_registers(out);\n        release(",
        "        release(",
    ),
    Mutation(
        "attention: warpgroups, no fence before products of keys",
        WARPGROUPS,
        "          wgmma_fence();\n          start_pairs",
        "          start_pairs",
    ),
    Mutation(
        "attention: warpgroups, no fence before products of values",
        WARPGROUPS,
        "          keep_registers(out);\n          wgmma_fence();\n",
        "          keep_registers(out);\n",
    ),
    Mutation(
        "attention: warpgroups, values cleared without a fence",
        WARPGROUPS,
        "          fence_async_proxy();\n          turn.meet();",
        "          turn.meet();",
    ),
    Mutation(
        "attention: warpgroups, values read before all are cleared",
        WARPGROUPS,
        "          turn.meet();\n",
        "",
    ),
    Mutation(
        "attention: warpgroups, more bytes expected of boxes",
        WARPGROUPS,
        "mbarrier_arrive_expect(full, bytes);",
        "mbarrier_arrive_expect(full, bytes + 128);",
    ),
    Mutation(
        "attention: warpgroups, rows of rel_query read before all are there",
        WARPGROUPS,
        "          cp_async_wait<0>();\n          turn.meet_own();\n",
        "          cp_async_wait<0>();\n",
    ),
    Mutation(
        "attention: warpgroups, a tile of queries left out in the last round",
        WARPGROUPS,
        "if (n >= tiles * units) return false;",
        "if (n >= tiles * units - 1) return false;",
    ),
    Mutation(
        "attention: warpgroups, a part of a tile taken to be on one side, one key early",
        RELATIVE,
        "(other >= right.first && other",
        "(other >= right.first - 1 && other",
    ),
    Mutation(
        "attention: warpgroups, a part of a tile taken to be left, one key late",
        RELATIVE,
        "((other >= left.first && other < left.end + kOther - kPart) ||",
        "((other >= left.first && other < left.end + kOther - kPart + 1) ||",
    ),
    Mutation(
        "attention: warpgroups, a hidden key taken to be seen in a part of a tile",
        RELATIVE,
        "return other >= left.first && other < right.end + kOther - kPart;",
        "return other >= left.first && other < right.end + kOther - kPart + 1;",
    ),
    Mutation(
        "attention: warpgroups, rows stored past the last one",
        TILES,
        "        if (row + r < count)\n",
        "",
    ),
    Mutation(
        "attention: warpgroups, a strip's later columns begin where the first ones do",
        RELATIVE,
        "min(column + 8 * x, static_cast<int>(W) - 1)",
        "min(column, static_cast<int>(W) - 1)",
    ),
]
