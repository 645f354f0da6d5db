"""Graphs that may have a kernel which loads nothing, and so does not wait for the one before."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from matgptq.overlap import OPTION, fills


@pytest.mark.parametrize(
    ("function", "may"),
    [
        (lambda x: x + torch.full((8,), 2.0), False),
        (lambda x: (x + torch.arange(8).expand(4, 8)).sum(), False),
        (lambda x: torch.cat([x, torch.empty(2, 8)]), False),
        (lambda x: sum(x.split(4, 1)), False),
        (lambda x: x @ torch.ones(8, 3), True),
        (lambda x: x @ (torch.arange(8.0) * 2).view(8, 1), True),
        (lambda x: x @ torch.zeros_like(x).t(), True),
        (lambda x: (x, torch.zeros(3)), True),
        (lambda x: x.copy_(torch.zeros(8)), True),
    ],
)
def test_what_may_be_filled(function, may):
    graph = make_fx(function, tracing_mode="fake")(torch.randn(4, 8)).graph
    assert fills(graph) is may


def test_the_option_is_one_of_inductor():
    from torch._inductor import config

    with config.patch({OPTION: True}):
        assert config.triton.enable_pdl
