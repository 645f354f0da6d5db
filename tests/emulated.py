"""A GPU for `matgptq.kernels.launch`: what it launches is compiled to PTX and run by `ptx`, on tensors of the CPU."""

import ctypes
import struct
from functools import cache
from types import SimpleNamespace

import ptx
import torch

from matgptq.kernels import launch, nvrtc
from matgptq.kernels.launch import make_launcher
from matgptq.kernels.matmul import _check_operands
from matgptq.kernels.packing import pack_codes, pack_scales
from matgptq.kernels.tiles import choose
from matgptq.slicing import slice_codes

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@cache
def kernel(macros, arch):
    return ptx.Kernel(nvrtc.compile_cubin(dict(macros), arch.replace("sm_", "compute_"))[0].rstrip(b"\0").decode())


class Configuration:
    """CUlaunchConfig, found again by its address."""

    def __init__(self):
        self.attrs = []

    def getPtr(self):
        return id(self)


class Gpu:
    """The driver's calls that launches make, with ``sms`` multiprocessors; ``races`` also looks for those."""

    def __init__(self, monkeypatch, sms=3):
        self.memory, self.kernels, self.launched = ptx.Memory(), [], []
        self.races = False
        driver = SimpleNamespace(
            CUfunction_attribute=SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8),
            cuFuncSetAttribute=lambda function, attribute, value: (0,),
            cuFuncGetAttribute=lambda attribute, function: (0, 0),
            CUlaunchConfig=self.configuration,
            CUlaunchAttribute=lambda: SimpleNamespace(id=None, value=SimpleNamespace(clusterDim=SimpleNamespace(x=1))),
            CUlaunchAttributeID=SimpleNamespace(
                CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION=4, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6
            ),
        )
        self.configurations = {}
        monkeypatch.setattr(launch, "_driver", lambda: driver)
        monkeypatch.setattr(launch, "_load", self.load)
        monkeypatch.setattr(launch, "_launch_function", lambda: self.launch)
        monkeypatch.setattr(launch, "_tensor_map", lambda x, M, K, tokens: struct.pack("4Q96x", x, K, M, tokens))
        monkeypatch.setattr(
            launch, "_room", lambda size, device: self.tensor(torch.full((size,), -1, dtype=torch.int8))
        )
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=sms)
        )

    def configuration(self):
        made = Configuration()
        self.configurations[made.getPtr()] = made
        return made

    def load(self, macros, arch, device):
        self.kernels.append((macros, arch))
        return len(self.kernels) - 1

    def launch(self, address, function, arguments, options):
        made = self.configurations[address]
        start = ctypes.c_uint64.from_address(arguments).value
        params = ctypes.string_at(start, max(launch._WITH_NORM.size, launch._HOPPER.size))
        clusters = [attribute.value.clusterDim.x for attribute in made.attrs if attribute.id == 4]
        grid = (made.gridDimX, made.gridDimY, made.gridDimZ)
        self.launched.append(dict(self.kernels[function][0])["KERNEL"])
        ptx.Run(
            kernel(*self.kernels[function]),
            self.memory,
            grid,
            made.blockDimX,
            made.sharedMemBytes,
            params,
            *clusters,
            races=self.races,
        )

    def tensor(self, tensor):
        """Lets kernels use a tensor's memory."""
        self.memory.add(tensor.view(torch.uint8).numpy())
        return tensor


class Layer:
    """A random layer for a `Problem`, and its float64 weights."""

    def __init__(self, problem, bias=False, seed=0):
        p = self.problem = problem
        make = torch.Generator().manual_seed(seed)
        N, dtype = p.layer.N, DTYPES[p.dtype]
        codes = torch.randint(0, 256, (N, p.K), dtype=torch.uint8, generator=make)
        scales = (torch.rand((N, p.groups), generator=make) * 0.01 + 0.002).to(dtype)
        zeros = torch.rand((N, p.groups), generator=make) * 60 + 98 if p.zeros else torch.full((N, p.groups), 128.0)
        slices = slice_codes(codes, p.bits, p.rule)
        self.planes = pack_codes(codes, 8) if p.resident else pack_codes(slices, p.bits)
        self.scales, self.zeros = pack_scales(scales), pack_scales(zeros) if p.zeros else None
        self.bias = torch.randn(N, generator=make).to(dtype) if bias else None
        levels = slices.double() * 2 ** (8 - p.bits) + p.level_offset
        scales, zeros = (v.double().repeat_interleave(p.K // p.groups, 1) for v in (scales, zeros))
        self.weight = (levels - zeros) * scales

    def reference(self, x):
        """The result in float64."""
        y = x.double() @ self.weight.T
        y = y if self.bias is None else y + self.bias.double()
        if self.problem.gated:
            gate, up = y.chunk(2, -1)
            y = torch.nn.functional.silu(gate) * up
        return y

    def run(self, gpu, x, config=None, *, rest=()):
        """The kernels' result, by the tile that `choose` takes, or by another; ``rest`` ends what is launched."""
        p = self.problem
        operands = [x.clone(), self.planes, self.scales, self.zeros, self.bias]
        _check_operands(*operands, p)
        launcher = make_launcher(p, config or choose(p), 0)
        y = torch.full((p.M, p.N), float("nan"), dtype=x.dtype)
        for tensor in (*operands, y, *rest):
            if isinstance(tensor, torch.Tensor):
                gpu.tensor(tensor)
        given = (v.data_ptr() if isinstance(v, torch.Tensor) else v or 0 for v in (*operands, y, *rest))
        launcher(0, p.M, *given)
        return y


def tokens(problem, seed=1):
    make = torch.Generator().manual_seed(seed)
    return torch.randn((problem.M, problem.K), generator=make).to(DTYPES[problem.dtype])
