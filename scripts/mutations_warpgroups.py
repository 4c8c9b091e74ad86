"""The faults that mutations.py seeds in the kernels for warpgroups."""

from mutations_table import Mutation

WARPGROUPS = "csrc/cuda/attention/forward_warpgroups.cuh"

WARPGROUP_MUTATIONS = [
    Mutation(
        "attention: warpgroups, a turn left out",
        WARPGROUPS,
        "          barrier_sync(own_turn, kTurnThreads);\n          multiply_values();",
        "          multiply_values();",
    ),
    Mutation(
        "attention: warpgroups, a turn not given back",
        WARPGROUPS,
        "    if (group == 0) barrier_sync(own_turn, kTurnThreads);  // as often",
        "    // as often",
    ),
    Mutation(
        "attention: warpgroups, keys not waited for",
        WARPGROUPS,
        "          mbarrier_wait(&signals->k_full[stage], round_trip & 1);\n",
        "",
    ),
    Mutation(
        "attention: warpgroups, keys waited for in the wrong phase",
        WARPGROUPS,
        "mbarrier_wait(&signals->k_full[stage], round_trip & 1);",
        "mbarrier_wait(&signals->k_full[stage], (round_trip & 1) ^ 1);",
    ),
    Mutation(
        "attention: warpgroups, values not waited for",
        WARPGROUPS,
        "          mbarrier_wait(&signals->v_full[stage], round_trip & 1);\n",
        "",
    ),
    Mutation(
        "attention: warpgroups, queries waited for in one phase",
        WARPGROUPS,
        "        mbarrier_wait(&signals->q_full, loads & 1);\n        ++loads;",
        "        mbarrier_wait(&signals->q_full, 0);\n        ++loads;",
    ),
    Mutation(
        "attention: warpgroups, keys overwritten before their products are done",
        WARPGROUPS,
        "          wgmma_wait<0>();\n          keep_registers(s);\n          keep_registers(out);\n"
        "          if (n > 0) free(&signals->v_free[stage == 0 ? stages - 1 : stage - 1]);\n"
        "          if (p.key_rel.data == nullptr) free(&signals->k_free[stage]);\n",
        "          if (p.key_rel.data == nullptr) free(&signals->k_free[stage]);\n          wgmma_wait<0>();\n"
        "          keep_registers(s);\n          keep_registers(out);\n"
        "          if (n > 0) free(&signals->v_free[stage == 0 ? stages - 1 : stage - 1]);\n",
    ),
    Mutation(
        "attention: warpgroups, values overwritten before their products are done",
        WARPGROUPS,
        "          wgmma_wait<0>();\n          keep_registers(s);\n          keep_registers(out);\n"
        "          if (n > 0) free(&signals->v_free[stage == 0 ? stages - 1 : stage - 1]);\n",
        "          if (n > 0) free(&signals->v_free[stage == 0 ? stages - 1 : stage - 1]);\n"
        "          wgmma_wait<0>();\n          keep_registers(s);\n          keep_registers(out);\n",
    ),
    Mutation(
        "attention: warpgroups, queries overwritten after the first tile of keys",
        WARPGROUPS,
        "if (n == count - 1) free(&signals->q_free);",
        "if (n == 0) free(&signals->q_free);",
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
        "        wgmma_wait<0>();\n        keep_registers(out);\n        free(",
        "        free(",
    ),
    Mutation(
        "attention: warpgroups, no fence before products of keys",
        WARPGROUPS,
        "          wgmma_fence();\n#pragma unroll\n          for (int k = 0; k < D / 16; ++k) {",
        "#pragma unroll\n          for (int k = 0; k < D / 16; ++k) {",
    ),
    Mutation(
        "attention: warpgroups, no fence before products of values",
        WARPGROUPS,
        "          keep_registers(weights);\n          wgmma_fence();\n",
        "          keep_registers(weights);\n",
    ),
    Mutation(
        "attention: warpgroups, values cleared without a fence",
        WARPGROUPS,
        "          fence_async_proxy();\n          barrier_sync(together",
        "          barrier_sync(together",
    ),
    Mutation(
        "attention: warpgroups, values read before all are cleared",
        WARPGROUPS,
        "          barrier_sync(together, kTurnThreads);\n",
        "",
    ),
    Mutation(
        "attention: warpgroups, more bytes expected of boxes",
        WARPGROUPS,
        "mbarrier_arrive_expect(full, bytes);",
        "mbarrier_arrive_expect(full, bytes + 128);",
    ),
    Mutation(
        "attention: warpgroups, rows of rel_query overwritten while others read them",
        WARPGROUPS,
        "          barrier_sync(in_group, 128);  // the rows of the last tile",
        "          // the rows of the last tile",
    ),
    Mutation(
        "attention: warpgroups, rows of rel_query read before all are there",
        WARPGROUPS,
        "          cp_async_wait<0>();\n          barrier_sync(in_group, 128);\n",
        "          cp_async_wait<0>();\n",
    ),
    Mutation(
        "attention: warpgroups, a tile of queries left out in the last round",
        WARPGROUPS,
        "if (n >= tiles * units) return false;",
        "if (n >= tiles * units - 1) return false;",
    ),
]
