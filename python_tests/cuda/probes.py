"""What each probe kernel is run with and what it must write: computed here, without the layer's own formulas."""

import ctypes
import dataclasses
import itertools

import numpy as np

from python_tests.cuda.emulator import call, emulator

SWIZZLES = {"none": (0, 16), "128B": (1, 128), "64B": (2, 64), "32B": (3, 32)}  # descriptor mode, bytes of a row


class MapShape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint32) for name in ("rows", "columns", "row_bytes", "box_rows", "box_columns", "swizzle")
    ]


class ProbeCase(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 32),
        ("input", ctypes.c_void_p),
        ("input_bytes", ctypes.c_uint64),
        ("output", ctypes.c_void_p),
        ("output_bytes", ctypes.c_uint64),
        ("a", MapShape),
        ("b", MapShape),
        ("offset_b", ctypes.c_uint64),
        ("column", ctypes.c_int32),
        ("row", ctypes.c_int32),
        *((name, ctypes.c_uint32) for name in ("bytes_a", "bytes_b")),
        *((name, ctypes.c_uint64) for name in ("descriptor_a", "descriptor_b")),
        *((name, ctypes.c_uint32) for name in ("step_a", "step_b", "options", "grid", "block", "cluster")),
    ]


@dataclasses.dataclass
class Probe:
    name: str
    expected: np.ndarray
    input: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint32))
    grid: int = 1
    block: int = 128
    cluster: int = 1
    fields: dict = dataclasses.field(default_factory=dict)

    def run(self, library=None, **options):
        """(bytes written, Result)"""
        data = np.ascontiguousarray(self.input)
        output = np.zeros(self.expected.nbytes, np.uint8)
        case = ProbeCase(
            name=self.name.encode(),
            input=data.ctypes.data,
            input_bytes=data.nbytes,
            output=output.ctypes.data,
            output_bytes=output.nbytes,
            grid=self.grid,
            block=self.block,
            cluster=self.cluster,
            **self.fields,
        )
        result = call((library or emulator()).run_probe, ctypes.byref(case), **options)
        return output, result

    def expected_bytes(self):
        return np.ascontiguousarray(self.expected).view(np.uint8).reshape(-1)


def swizzle(offset, span):
    """Bits 4 and up, one fewer than log2(span / 8), xor-ed with those 3 places higher: Swizzle<b, 4, 3> of CuTe."""
    mask = span // 16 - 1
    return offset ^ (((offset >> 7) & mask) << 4)


def operand_layout(rows, k_size, major, mode):
    """(offset(row, k) in bytes, leading, stride, bytes, step): one way to lay out a canonical wgmma operand."""
    span = SWIZZLES[mode][1]
    wide = span // 2
    if mode == "none" and major == "K":
        leading, stride = rows * 16, 128
        return (
            lambda r, k: r % 8 * 16 + r // 8 * stride + k // 8 * leading + k % 8 * 2,
            leading,
            stride,
            rows * k_size * 2,
            2 * leading,
        )
    if mode == "none":
        leading, stride = 128, k_size * 16
        return (
            lambda r, k: r % 8 * 2 + r // 8 * stride + k % 8 * 16 + k // 8 * leading,
            leading,
            stride,
            rows * k_size * 2,
            2 * leading,
        )
    if major == "K":
        block = rows * span  # columns beyond one swizzled row begin a new block
        return (
            lambda r, k: swizzle(k % wide * 2 + r * span + k // wide * block, span),
            16,
            8 * span,
            block * -(-k_size // wide),
            32 if wide > 16 else block,
        )
    leading = k_size * span
    return (
        lambda r, k: swizzle(r % wide * 2 + r // wide * leading + k * span, span),
        leading,
        8 * span,
        leading * -(-rows // wide),
        16 * span,
    )


def descriptor(leading, stride, mode):
    return leading >> 4 << 16 | stride >> 4 << 32 | SWIZZLES[mode][0] << 62


def small_integers(shape, seed, fp16=False):
    """Integers from -4 to 4 and their bits in bf16 or fp16."""
    values = np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)
    bits = values.astype(np.float16).view(np.uint16) if fp16 else (values.view(np.uint32) >> 16).astype(np.uint16)
    return values, bits


def accumulators(product):
    """(128, N / 2) registers that hold a 64 × N product, thread by thread, from CuTe's CLayout_64xN."""
    columns = product.shape[1]
    out = np.zeros((128, columns // 2), np.float32)
    for t0, t1, t2, v0, v1, v2 in itertools.product(
        range(4), range(8), range(4), range(2), range(2), range(columns // 8)
    ):
        index = t0 * 128 + t1 + t2 * 16 + v0 * 64 + v1 * 8 + v2 * 512  # column-major in 64 × N
        out[t0 + 4 * t1 + 32 * t2, v0 + 2 * v1 + 4 * v2] = product[index % 64, index // 64]
    return out


def wgmma_probe(n, major_a="K", major_b="K", mode="128B", fp16=False):
    a, a_bits = small_integers((64, 32), 1, fp16)
    b, b_bits = small_integers((n, 32), 2, fp16)
    image, fields = [], {}
    for side, bits, major in (("a", a_bits, major_a), ("b", b_bits, major_b)):
        offset, leading, stride, size, step = operand_layout(len(bits), 32, major, mode)
        data = np.zeros(size // 2, np.uint16)
        for row, k in itertools.product(range(len(bits)), range(32)):
            data[offset(row, k) // 2] = bits[row, k]
        image.append(data)
        fields |= {
            f"bytes_{side}": size,
            f"descriptor_{side}": descriptor(leading, stride, mode),
            f"step_{side}": step,
        }
    fields["options"] = n | fp16 << 16 | (major_a == "MN") << 17 | (major_b == "MN") << 18
    return Probe("wgmma", accumulators(a @ b.T), np.concatenate(image), fields=fields)


def tma_wgmma_probe(major_a="K", major_b="K", map_mode="128B", descriptor_mode="128B", stride=1024):
    """K-major operands are (64, K) matrices, MN-major ones (K, 64); boxes of 64 × 64 with 128-byte rows."""
    a, a_bits = small_integers((64, 64), 3)
    b, b_bits = small_integers((64, 64), 4)
    data = [(bits if major == "K" else bits.T).reshape(-1) for bits, major in ((a_bits, major_a), (b_bits, major_b))]
    shape = MapShape(64, 64, 128, 64, 64, SWIZZLES[map_mode][0])
    fields = {
        "a": shape,
        "b": shape,
        "offset_b": 8192,
        "bytes_a": 8192,
        "bytes_b": 8192,
        "descriptor_a": descriptor(8192, stride, descriptor_mode),
        "descriptor_b": descriptor(8192, stride, descriptor_mode),
        "step_a": 32 if major_a == "K" else 2048,
        "step_b": 32 if major_b == "K" else 2048,
        "options": (major_a == "MN") << 17 | (major_b == "MN") << 18,
    }
    return Probe("tma_wgmma", a @ b.T, np.concatenate(data), fields=fields)


def box_in_shared(matrix, row, column, box_rows, box_columns, mode):
    """Bytes of a TMA box in shared memory: zero outside the matrix, swizzled."""
    padded = np.zeros((box_rows, box_columns), np.uint16)
    for r, c in itertools.product(range(box_rows), range(box_columns)):
        if 0 <= row + r < matrix.shape[0] and 0 <= column + c < matrix.shape[1]:
            padded[r, c] = matrix[row + r, column + c]
    out = np.zeros(padded.size, np.uint16)
    for i, value in enumerate(padded.reshape(-1)):
        out[swizzle(2 * i, SWIZZLES[mode][1]) // 2] = value
    return out


def box_columns(mode):
    return 64 if mode == "none" else SWIZZLES[mode][1] // 2


def tma_load_probe(mode, column, row):
    matrix = np.arange(20 * 72, dtype=np.uint16).reshape(20, 72)
    columns = box_columns(mode)
    fields = {
        "a": MapShape(20, 72, 144, 16, columns, SWIZZLES[mode][0]),
        "bytes_a": 32 * columns,
        "column": column,
        "row": row,
    }
    return Probe("tma_load", box_in_shared(matrix, row, column, 16, columns, mode), matrix, fields=fields)


def tma_store_probe(mode, column, row):
    columns = box_columns(mode)
    box = np.arange(1, 16 * columns + 1, dtype=np.uint16).reshape(16, columns)
    expected = np.full((20, 72), 0xFFFF, np.uint16)
    for r, c in itertools.product(range(16), range(columns)):
        if 0 <= row + r < 20 and 0 <= column + c < 72:
            expected[row + r, column + c] = box[r, c]
    fields = {
        "a": MapShape(20, 72, 144, 16, columns, SWIZZLES[mode][0]),
        "bytes_a": 32 * columns,
        "column": column,
        "row": row,
    }
    return Probe("tma_store", expected, box_in_shared(box, 0, 0, 16, columns, mode), fields=fields)


def multicast_probe():
    matrix = np.arange(32 * 64, dtype=np.uint16).reshape(32, 64)
    tile = np.concatenate([box_in_shared(matrix, row, 0, 16, 64, "128B") for row in (0, 16)])
    fields = {"a": MapShape(32, 64, 128, 16, 64, 1), "bytes_a": 2048}
    return Probe("multicast", np.concatenate([tile, tile]), matrix, grid=2, cluster=2, fields=fields)


def identity_probe():
    rows = []
    for block, thread in itertools.product(range(4), range(64)):
        rows.append([thread, thread % 32, thread // 32, block, 4, block % 2, 1, 0])
    return Probe("identity", np.array(rows, np.uint32), grid=4, block=64, cluster=2)


def shuffle_probe():
    value = 3 * np.arange(32) + 1
    lane = np.arange(32)
    columns = [
        value[31 - lane],
        value[lane ^ 5],
        value[np.where(lane >= 3, lane - 3, lane)],
        value[np.where(lane < 28, lane + 4, lane)],
        value[lane ^ 1],
    ]
    return Probe("shuffle", np.stack(columns, 1).astype(np.uint32), block=32)


def shared_probe():
    t = np.arange(128, dtype=np.uint32)
    images = []
    for mode in ("none", "128B", "64B", "32B"):
        image = np.zeros((128, 4), np.uint32)
        for i in range(128):
            image[swizzle(16 * i, SWIZZLES[mode][1]) // 16] = [i, i + 1000, i + 2000, i + 3000]
        images.append(image)
    reversed_128 = images[1][127 - t]
    last = reversed_128[:, 0] + reversed_128[:, 3]
    return Probe("shared", np.concatenate([*(i.reshape(-1) for i in images), last]))


def cp_async_probe():
    data = np.arange(1, 2049, dtype=np.uint32).astype(np.uint8)
    expected = data.copy().reshape(128, 16)
    for t in range(64):
        expected[t, t % 17 :] = 0
    first = expected.view(np.uint32)[:64, 0]
    return Probe("cp_async", np.concatenate([expected.view(np.uint32).reshape(-1), first]), data, block=64)


def ldmatrix_probe():
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((32, 2, 4, 2), np.uint16)
    for lane, j, half in itertools.product(range(32), range(4), range(2)):
        row, column = lane // 4, 2 * (lane % 4) + half
        out[lane, 0, j, half] = matrices[j, row, column]
        out[lane, 1, j, half] = matrices[j, column, row]
    return Probe("ldmatrix", out, matrices, block=32)


def stmatrix_probe():
    registers = np.arange(256, dtype=np.uint16).reshape(32, 4, 2)
    out = np.zeros((2, 4, 8, 8), np.uint16)
    for lane, j, half in itertools.product(range(32), range(4), range(2)):
        row, column = lane // 4, 2 * (lane % 4) + half
        out[0, j, row, column] = out[1, j, column, row] = registers[lane, j, half]
    return Probe("stmatrix", out, registers, block=32)


def mma_probe(fp16):
    a, a_bits = small_integers((16, 16), 5, fp16)
    b, b_bits = small_integers((8, 16), 6, fp16)
    start = np.zeros((16, 8), np.float32)
    for lane, e in itertools.product(range(32), range(4)):
        start[lane // 4 + 8 * (e // 2), lane % 4 * 2 + e % 2] = e
    data = np.concatenate([a_bits.reshape(-1), b_bits.reshape(-1)])
    return Probe("mma_fp16" if fp16 else "mma_bf16", start + a @ b.T, data, block=32)


def mbarrier_probe():
    token, seen = 1, []
    for _, warp in itertools.product(range(3), range(4)):
        seen.append(token)
        token = token * 3 + warp
    return Probe("mbarrier", np.array(seen, np.uint32))


def named_barrier_probe():
    rows = [[100 * r + 127 - t for t in range(64, 128)] for r in range(3)]
    return Probe("named_barrier", np.array(rows, np.uint32))


def publish_probe(store, tiles=5):
    first = np.arange(256, dtype=np.uint32)
    fields = {"a": MapShape(8 * tiles, 64, 128, 8, 64, 0), "bytes_a": 1024, "options": int(store)}
    return Probe("publish", np.stack([first + t for t in range(tiles)]), grid=tiles, block=64, fields=fields)


def cluster_probe():
    expected = np.stack([2000 + np.arange(64), 1000 + np.arange(64)])
    return Probe("cluster", expected.astype(np.uint32), grid=2, block=64, cluster=2)


def setmaxnreg_probe():
    return Probe("setmaxnreg", np.repeat(np.array([40, 232, 232], np.uint32), 128), block=384)


def convert_probe():
    special = [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 1e-40, 6e-8, 3e-8, 65504.0, 65519.0, 65520.0, 1e39, 3.4e38]
    special += [np.inf, -np.inf, 2049.0, 2051.0, 5.9604645e-8, 1.1754944e-38]
    values = np.array(special + list(np.random.default_rng(7).normal(size=109)), np.float64)
    with np.errstate(over="ignore"):
        values = values.astype(np.float32).repeat(2)
        values[1::2] = -values[1::2]
        as_fp16 = values.astype(np.float16)
    # Round to nearest even by way of the exact integer value of the mantissa.
    bits = values.view(np.uint32).astype(np.uint64)
    as_bf16 = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    columns = [
        as_bf16.view(np.uint32),
        as_fp16.view(np.uint32),
        as_bf16[::2].astype(np.uint32) << 16,
        as_fp16[::2].astype(np.float32).view(np.uint32),
    ]
    return Probe("convert", np.stack(columns, 1), values.view(np.uint32), fields={"options": len(values) // 2})


def catalogue():
    """All probes by a readable name."""
    probes = {
        "identity": identity_probe(),
        "shuffle": shuffle_probe(),
        "shared": shared_probe(),
        "cp_async": cp_async_probe(),
        "ldmatrix": ldmatrix_probe(),
        "stmatrix": stmatrix_probe(),
        "mma_bf16": mma_probe(False),
        "mma_fp16": mma_probe(True),
        "multicast": multicast_probe(),
        "mbarrier": mbarrier_probe(),
        "named_barrier": named_barrier_probe(),
        "setmaxnreg": setmaxnreg_probe(),
        "publish": publish_probe(store=False),
        "publish-store": publish_probe(store=True),
        "cluster": cluster_probe(),
        "convert": convert_probe(),
    }
    for mode in SWIZZLES:
        for column, row in ((0, 0), (-8, -4), (56, 12)):
            probes[f"tma_load-{mode}-at{column},{row}"] = tma_load_probe(mode, column, row)
            probes[f"tma_store-{mode}-at{column},{row}"] = tma_store_probe(mode, column, row)
        for major_a, major_b in itertools.product(("K", "MN"), repeat=2):
            name = f"wgmma-64-{mode}-{major_a}-{major_b}"
            probes[name] = wgmma_probe(64, major_a, major_b, mode)
    for n in (16, 32, 96, 128, 192, 256):
        probes[f"wgmma-{n}"] = wgmma_probe(n)
        probes[f"wgmma-{n}-MN"] = wgmma_probe(n, "MN", "MN")
    probes["wgmma-64-fp16"] = wgmma_probe(64, fp16=True)
    probes["wgmma-64-fp16-MN"] = wgmma_probe(64, "MN", "MN", fp16=True)
    for major_a, major_b in itertools.product(("K", "MN"), repeat=2):
        probes[f"tma_wgmma-{major_a}-{major_b}"] = tma_wgmma_probe(major_a, major_b)
    return probes
