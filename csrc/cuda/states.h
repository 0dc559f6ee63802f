// Control words for the products of one device. Plain C++: its tests need no device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>

namespace hopper {

// Launches on one stream share words, for they run one after another and leave them ready for the next. Those that are
// captured into a graph have words of that graph and stream alone, for it may be replayed beside anything else. Nothing
// is ever given back: an owner keeps a few kilobytes.
class States {
public:
    // At least `count` words of this stream and this capture, 0 for none. allocate(bytes) gives zeroed memory.
    template <class Allocate>
    uint32_t* words(const void* stream, uint64_t capture, size_t count, Allocate allocate) {
        Owned& owned = owners_[{stream, capture}];
        if (owned.count < count) {
            size_t size = kLeast;
            while (size < count) {
                size *= 2;
            }
            if (left_ < size) {
                const size_t chunk = std::max(kChunk, size);
                next_ = static_cast<uint32_t*>(allocate(chunk * sizeof(uint32_t)));
                left_ = chunk;
            }
            owned = {next_, size};
            next_ += size;
            left_ -= size;
        }
        return owned.words;
    }

private:
    static constexpr size_t kLeast = 1024, kChunk = 1 << 19;   // words: 4 KiB, 2 MiB

    struct Owned {
        uint32_t* words;
        size_t count;
    };
    std::map<std::pair<const void*, uint64_t>, Owned> owners_;
    uint32_t* next_ = nullptr;
    size_t left_ = 0;
};

}  // namespace hopper
