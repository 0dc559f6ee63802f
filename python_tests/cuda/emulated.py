"""The backend "cuda" on CPU tensors: its extension's entry points replaced by the emulator's."""

import ctypes

from nlora_kernels.backends import TABLE, cuda
from nlora_kernels.backends.cuda import group, launch, nystrom
from python_tests.cuda.emulator import Matrix, call, emulator, nystrom_case, run_case


class LinearCase(ctypes.Structure):
    _fields_ = [("ampere", ctypes.c_int32), ("scaling", ctypes.c_float), ("matrices", Matrix * 12)]


class Extension:
    """Stands in for `_C`. `launches` are the operations that ran; every run has another seed."""

    def __init__(self, ampere=False, **options):
        self.ampere, self.options, self.launches = ampere, options, []

    def cuda_forward_bytes(self, *sizes):
        function = emulator().linear_forward_bytes
        function.restype = ctypes.c_int64
        return function(*map(ctypes.c_int64, sizes))

    def cuda_backward_bytes(self, queue, m, k, n, r, *wanted):
        function = emulator().linear_backward_bytes
        function.restype = ctypes.c_int64
        sizes = (ctypes.c_int64(size) for size in (m, k, n, r))
        return function(int(self.ampere), *sizes, *map(ctypes.c_bool, wanted))

    def cuda_forward(self, queue, *arguments):
        *tensors, scaling = arguments
        self._run("run_linear_forward", [tensors], [scaling])

    def cuda_backward(self, queue, *arguments):
        *tensors, scaling = arguments
        self._run("run_linear_backward", [tensors], [scaling])

    def cuda_forward_group(self, queue, x, *arguments):
        *members, workspace, scalings = arguments
        layers = [(x, *tensors, workspace) for tensors in zip(*members, strict=True)]
        self._run("run_linear_forward", layers, scalings)

    def cuda_backward_group(self, queue, dy, x, T, weight, A, B, core, dx, dA, dB, dcore, workspace, scalings):
        members = zip(dy, T, weight, A, B, core, dA, dB, dcore, strict=True)
        layers = [(each[0], x, *each[1:6], dx, *each[6:], workspace) for each in members]
        self._run("run_linear_backward", layers, scalings)

    def cuda_lora2_core(self, queue, *tensors):
        self._report("lora2_core", run_case("run_adapter", 1, *tensors, **self.options))

    def cuda_lora2_core_backward(self, queue, *tensors):
        self._report("lora2_core_backward", run_case("run_adapter", 2, *tensors, **self.options))

    def cuda_gather(self, queue, weight, rows, cols, *parts):
        case = nystrom_case(weight[0][None], *(part[0][None] for part in parts))
        (case.rows,), (case.cols,) = rows, cols
        self._report("gather", call(emulator().run_gather, ctypes.byref(case), **self.options))

    def cuda_residual_bytes(self, weight, A, layers):
        return 4

    def cuda_residual(self, queue, weight, A, core, B, terms, scaling):
        parts = A[0][None], core[0][None] if core else None, B[0][None]
        case = nystrom_case(weight[0][None], *parts, scaling)
        self._report("residual", call(emulator().run_residual, ctypes.byref(case), **self.options))

    def _run(self, entry, layers, scalings):
        """One call of the tensors of some layers."""
        cases = (LinearCase * len(layers))()
        for case, tensors, scaling in zip(cases, layers, scalings, strict=True):
            case.ampere, case.scaling, case.matrices = self.ampere, scaling, (Matrix * 12)(*map(Matrix.of, tensors))
        result = call(getattr(emulator(), entry), cases, len(cases), seed=len(self.launches), **self.options)
        self._report(entry, result)

    def _report(self, operation, result):
        self.launches.append(operation)
        assert not result.rule, result.text


def install(monkeypatch, **options):
    """Lets backend="cuda" take CPU tensors for the rest of a test; returns the stand-in."""
    extension = Extension(**options)
    for module in (cuda, group, launch, nystrom):
        monkeypatch.setattr(module, "_C", extension)
    monkeypatch.setattr(launch, "queue", lambda t: None)
    monkeypatch.setattr(TABLE["cuda"], "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "misplaced", lambda name, t: None)
    return extension
