// What every C entry point of the test libraries shares: options in, report or error out.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>

#include "../../cuda/context.cuh"

namespace hopper::tests {

// Ignored on a device.
struct Options {
    uint64_t seed;
    int32_t lanes, resident, skipped_line;
};

constexpr int kMaxLines = 256;

struct Outcome {
    char rule[64];
    char text[16384];
    int32_t line_count;
    int32_t lines[kMaxLines];   // of the synchronisation calls that ran
};

// 0: the run ended without a report; 1: it has one; 2: it could not run.
template <class Body>
int guarded(const Options& options, Outcome& outcome, Body body) {
    outcome = {};
    try {
        Context context;
#ifndef __CUDACC__
        context.setup.seed = options.seed;
        context.setup.lanes = options.lanes != 0;
        context.setup.resident = uint32_t(options.resident);
        context.setup.skipped_line = options.skipped_line;
        body(context);
        for (int line : context.report.synchronisation_lines) {
            outcome.lines[outcome.line_count++] = line;
        }
        std::snprintf(outcome.rule, sizeof(outcome.rule), "%s", context.report.rule.c_str());
        std::snprintf(outcome.text, sizeof(outcome.text), "%s", context.report.text.c_str());
        return context.report ? 1 : 0;
#else
        (void)options;
        body(context);
        return 0;
#endif
    } catch (const std::exception& error) {
        std::snprintf(outcome.rule, sizeof(outcome.rule), "error");
        std::snprintf(outcome.text, sizeof(outcome.text), "%s", error.what());
        return 2;
    }
}

}  // namespace hopper::tests
