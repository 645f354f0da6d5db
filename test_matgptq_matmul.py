"""Check the linear layer against float64, for both 16-bit types, every width, many shapes, group and batch sizes.

    python test_matgptq_matmul.py

Says plainly when it ran on the CPU op for want of a GPU. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import sys
from itertools import product

import torch
from tqdm import tqdm

from matgptq.bench import Case, prepare, random_layer, verify


def cases(gpu: bool) -> list[Case]:
    """What is checked: every width, type and mode at many batch sizes, then shapes and group sizes."""
    every = [
        Case(m, 320, 512, bits, dtype, 64, mode)
        for m, bits, dtype, mode in product(
            range(1, 71) if gpu else (1, 9),
            range(2, 9),
            ("float16", "bfloat16"),
            ("packed", "resident"),
        )
    ]
    shapes = [(192, 576), (576, 576), (1536, 576), (576, 1536), (1, 64), (17, 128), (130, 1600)]
    if gpu:
        shapes += [(4096, 4096), (6144, 4096), (4096, 14336)]
    ragged = [
        Case(m, n, k, bits, group_size=64)
        for (n, k), bits, m in product(shapes, (2, 3, 4, 6, 8), (1, 5, 33) if gpu else (5,))
    ]
    groups = [
        Case(m, 200, 384, bits, group_size=g)
        for g, bits, m in product((-1, 16, 32, 48, 64, 128), range(2, 9), (1, 9) if gpu else (1,))
    ]
    many = [
        Case(m, n, k, bits, dtype)
        for m, (n, k), bits, dtype in product(
            (96, 128, 200, 512, 1000, 4096, 8192), ((320, 512), (1300, 1024)), (2, 3, 4, 6, 8), ("float16", "bfloat16")
        )
    ]
    return every + ragged + groups + (many if gpu else [])


def main() -> int:
    """Run the checks; returns the exit status."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    print(f"checking the kernels on {torch.cuda.get_device_name()}" if gpu else "no GPU here: checking the CPU op")
    torch.manual_seed(0)
    worst: dict[str, float] = {}
    failures: list[str] = []
    every = cases(gpu)
    if not gpu:
        torch.set_num_threads(1)  # pieces this small are done before a second thread is awake
    prepare(every, device)
    with torch.inference_mode():
        for case in tqdm(every, unit="case"):
            stored, packed = random_layer(case, device, seed=case.M)
            try:
                worst[case.dtype] = max(worst.get(case.dtype, 0.0), verify(case, stored, packed))
            except ArithmeticError as error:
                failures.append(str(error))
    for failure in failures[:20]:
        print("FAILED", failure)
    for dtype, error in worst.items():
        print(f"{dtype}: largest relative error {error:.1e}")
    print(f"{len(every) - len(failures)} passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
