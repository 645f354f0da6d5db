"""Graphs that may have a kernel which loads nothing, and so does not wait for the one before."""

from types import SimpleNamespace

import pytest
import torch
from torch._inductor import config
from torch.fx.experimental.proxy_tensor import make_fx

from matgptq.overlap import OPTION, SCHEDULER_OPTION, WaitFirst, fills


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


def test_the_options_are_those_of_inductor():
    with config.patch({OPTION: True, SCHEDULER_OPTION: WaitFirst()}):
        assert config.triton.enable_pdl


def test_no_kernel_follows_one_that_the_scheduler_knows():
    class Scheduler:
        previous_node = None

    first, other = Scheduler(), Scheduler()
    nodes = [SimpleNamespace(scheduler=first)] * 2
    assert WaitFirst()(nodes) is nodes
    first.previous_node = other.previous_node = "a kernel"
    assert first.previous_node is None
    assert other.previous_node == "a kernel"
    with config.patch({OPTION: True}):
        WaitFirst()([SimpleNamespace(scheduler=SimpleNamespace())])
        assert not config.triton.enable_pdl
