"""Every variant compiles for every architecture, without spilling registers. Needs NVRTC, no GPU."""

import itertools
import multiprocessing
import os

import pytest

from matgptq.kernels import nvrtc
from matgptq.kernels.hopper import HopperConfig
from matgptq.kernels.many import ManyConfig
from matgptq.kernels.problem import Problem
from matgptq.kernels.stream import few_choice, linear_choice
from matgptq.kernels.tiles import Gate, Norm, architecture, choose, defines, gate_follows

SHAPES = [(2048, 2048), (8192, 8192), (28672, 4096), (16384, 16384)]
# All shapes where the tiles were measured, one elsewhere: about 1600 variants at 0.2 s each.
ARCHITECTURES = {
    "sm_80": (80, SHAPES[1:2]),
    "sm_86": (86, SHAPES[1:2]),
    "sm_89": (89, SHAPES[1:2]),
    "sm_90a": (90, SHAPES),
}
KINDS = [
    {},
    {"resident": True},
    {"resident": True, "rule": "prefix"},
    {"zeros": True},
    {"group_size": 16, "zeros": True},
]
FEW_KINDS = [*KINDS[:4], {"group_size": -1}, {"group_size": 64}, {"group_size": 64, "zeros": True, "resident": True}]
NO_SPILLS = ", 0 bytes spill stores, 0 bytes spill loads"


@pytest.fixture(autouse=True)
def _needs_nvrtc():
    try:
        nvrtc._nvrtc()
    except nvrtc.CompileError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI must have NVRTC: {error}")
        pytest.skip(str(error))


def compiler_log(variant):
    macros, arch = variant
    return nvrtc.compile_cubin(dict(macros), arch)[1]


@pytest.fixture(scope="module")
def compilers():
    """Processes, as NVRTC compiles one program at a time in each."""
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, 16)) as pool:
        yield pool


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_variants_compile_without_spills(arch, compilers):
    sm, shapes = ARCHITECTURES[arch]
    variants = {}
    for bits, M, (N, K), dtype, kind in itertools.product(
        range(2, 9), (1, 4, 16, 64), shapes, ("float16", "bfloat16"), KINDS
    ):
        problem = Problem(M, N, K, bits, dtype, sm=sm, **kind)
        variants.setdefault((tuple(defines(problem, linear_choice(problem)).items()), arch), problem)
    check_logs(variants, compilers)


def test_tiles_of_models_compile_without_spills(compilers):
    variants = {}
    shapes = [(1024, 3072), (8192, 2048), (10240, 8192), (5120, 25600), (34816, 5120)]
    for bits, M, (N, K), dtype, kind in itertools.product(
        (2, 4, 8), (1, 2, 4, 8), shapes, ("float16", "bfloat16"), KINDS[:4:3]
    ):
        problem = Problem(M, N, K, bits, dtype, **kind)
        config = choose(problem)
        variants.setdefault((tuple(defines(problem, config).items()), architecture(problem, config)), problem)
    check_logs(variants, compilers)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_few_variants_compile_without_spills(arch, compilers):
    sm, shapes = ARCHITECTURES[arch]
    variants = {}
    for bits, M, (N, K), dtype, kind in itertools.product(
        range(2, 9), (1, 2), (*shapes, (4096, 4096), (6144, 4096)), ("float16", "bfloat16"), FEW_KINDS
    ):
        problem = Problem(M, N, K, bits, dtype, sm=sm, **kind)
        config = few_choice(problem)
        if config:
            variants.setdefault((tuple(defines(problem, config).items()), arch), problem)
    assert variants
    check_logs(variants, compilers)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gated_variants_compile_without_spills(arch, compilers):
    sm, _ = ARCHITECTURES[arch]
    variants = {}
    for bits, M, (N, K), dtype, kind in itertools.product(
        (2, 3, 4, 8), (1, 4, 16), ((1024, 1024), (14336, 4096)), ("float16", "bfloat16"), KINDS[:4:3]
    ):
        problem = Problem(M, N, K, bits, dtype, sm=sm, gated=True, **kind)
        config = choose(problem)
        kernel = Gate() if gate_follows(problem, config) else config
        variants.setdefault((tuple(defines(problem, kernel).items()), architecture(problem, kernel)), problem)
    assert len(variants) > 25
    check_logs(variants, compilers)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_variants_around_a_norm_compile_without_spills(arch, compilers):
    sm, _ = ARCHITECTURES[arch]
    places = ({"summed": True}, {"scaled": True}, {"scaled": True, "gated": True})
    variants = {}
    for bits, M, (N, K), kind, place in itertools.product(
        (2, 3, 4, 8), (1, 2), ((6144, 4096), (4096, 14336), (14336, 4096)), KINDS, places
    ):
        problem = Problem(M, N, K, bits, "bfloat16", sm=sm, **place, **kind)
        kernel = choose(problem)
        variants.setdefault((tuple(defines(problem, kernel).items()), architecture(problem, kernel)), problem)
    for dtype in ("float16", "bfloat16"):
        problem = Problem(3, 64, 64, 4, dtype, sm=sm, summed=True)
        variants[(tuple(defines(problem, Norm()).items()), architecture(problem, Norm()))] = problem
    assert len(variants) > 60
    check_logs(variants, compilers)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_100", "sm_120"])
def test_many_variants_compile_without_spills(arch, compilers):
    variants = {}
    for bits, M, N, dtype, kind in itertools.product(
        (2, 4, 7, 8), (65, 200, 1000), (4096, 28672), ("float16", "bfloat16"), KINDS
    ):
        problem = Problem(M, N, 4096, bits, dtype, sm=int(arch[3:]), **kind)
        config = choose(problem)
        if isinstance(config, ManyConfig):
            variants.setdefault((tuple(defines(problem, config).items()), arch), problem)
    assert len(variants) > 30
    check_logs(variants, compilers)


def test_hopper_variants_compile_without_spills(compilers):
    variants = {}
    for bits, M, (N, K), dtype, kind in itertools.product(
        (2, 4, 7, 8),
        (8, 12, 24, 32, 48, 64, 96, 128, 192, 256, 384, 1024),
        ((2048, 2048), (4096, 4096), (8192, 8192), (28672, 4096), (16384, 16384), (1024, 4096)),
        ("float16", "bfloat16"),
        KINDS,
    ):
        problem = Problem(M, N, K, bits, dtype, **kind)
        config = choose(problem)
        if isinstance(config, HopperConfig):
            variants.setdefault((tuple(defines(problem, config).items()), architecture(problem, config)), problem)
    check_logs(variants, compilers)


def test_stream_k_variants_compile_without_spills(compilers):
    variants = {}
    for bits, M, (N, K), dtype, kind in itertools.product(
        (2, 4, 7, 8),
        (12, 24, 32, 48, 64, 96, 128, 192, 256, 640),
        ((5120, 8192), (34816, 5120)),
        ("float16", "bfloat16"),
        (KINDS[0], KINDS[3], KINDS[4]),
    ):
        problem = Problem(M, N, K, bits, dtype, **kind)
        config = choose(problem)
        if isinstance(config, HopperConfig) and config.stream_k:
            variants.setdefault((tuple(defines(problem, config).items()), architecture(problem, config)), problem)
    assert len(variants) > 100
    check_logs(variants, compilers)


def test_gated_hopper_variants_compile_without_spills(compilers):
    variants = {}
    for bits, M, (N, K), kind in itertools.product(
        (2, 4, 8),
        (12, 24, 32, 48, 64, 96, 128, 192, 256, 1024, 4096),
        ((14336, 4096), (17408, 5120)),
        (KINDS[0], KINDS[3]),
    ):
        problem = Problem(M, N, K, bits, "bfloat16", gated=True, **kind)
        config = choose(problem)
        if isinstance(config, HopperConfig) and config.gated:
            variants.setdefault((tuple(defines(problem, config).items()), architecture(problem, config)), problem)
    assert len(variants) > 50
    check_logs(variants, compilers)


def check_logs(variants, compilers):
    """No spills, and no wgmma that the compiler waits for before the next (its C75.. warnings)."""
    logs = compilers.imap(compiler_log, variants, chunksize=4)
    bad = [
        (problem, log)
        for problem, log in zip(variants.values(), logs, strict=True)
        if NO_SPILLS not in log or "serialized" in log
    ]
    assert not bad, "\n".join([f"NVRTC {nvrtc._version()}", *(f"{problem}\n{log}" for problem, log in bad)])


def test_cache_is_shared_and_survives(tmp_path, monkeypatch):
    monkeypatch.setenv("MATGPTQ_CACHE", str(tmp_path))
    nvrtc._cache_folder.cache_clear()
    try:
        variants = [(defines(p, choose(p)), "sm_90") for p in (Problem(1, 64, 128, 2), Problem(1, 64, 128, 3))]
        first = nvrtc.load_cubins(variants)
        assert len(list(tmp_path.glob("*.cubin"))) == 2
        monkeypatch.setattr(nvrtc, "compile_cubin", None)
        assert nvrtc.load_cubins(variants) == first
    finally:
        nvrtc._cache_folder.cache_clear()


def test_a_full_disk_is_left_as_it_was(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(nvrtc.os, "replace", full)
    nvrtc._write(tmp_path / "a.cubin", b"cubin")
    assert not list(tmp_path.iterdir())


def test_errors_carry_the_log():
    with pytest.raises(nvrtc.CompileError, match="FORMAT"):
        nvrtc.compile_cubin({"KERNEL": "linear", "FORMAT": "Nothing"}, "sm_90")
