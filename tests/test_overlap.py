"""What has Inductor's kernels wait before they touch memory."""

from types import SimpleNamespace

from torch._inductor import config

from matgptq.overlap import OPTION, SCHEDULER_OPTION, WaitFirst


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
