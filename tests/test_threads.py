"""Passes run side by side with the bits, the errors and the surroundings of passes one after the other."""

from __future__ import annotations

import contextvars
import os
import subprocess
import sys
import threading

import pytest
import torch
from networks import picture, randomise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastroute
from fastroute import PatchRouter
from fastroute.backends import requested
from fastroute.models.carn import CARN
from fastroute.models.srresnet import SRResNet
from fastroute.patch import branches
from fastroute.runtime import threads
from fastroute.runtime.threads import side_by_side, workers

pytestmark = pytest.mark.usefixtures("quick_tuning")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def several():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    if threads.openmp() is None:
        pytest.skip("torch's threads are not those of an OpenMP that runs functions")
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_results_come_in_order_from_several_threads():
    seen, together = set(), threading.Barrier(3)

    def work(n):
        if n < 3:
            together.wait(20)  # three threads are here at a time
        seen.add(threading.get_ident())
        return n * n

    assert side_by_side(work, range(40)) == [n * n for n in range(40)]
    assert len(seen) == 3 and threading.get_ident() in seen
    assert side_by_side(work, []) == [] and side_by_side(lambda n: n, [7]) == [7]


def test_operators_within_are_not_shared():
    # A region within another would have its own threads.
    assert side_by_side(lambda _: workers(), range(6)) == [1] * 6 and workers() == 3


@pytest.mark.parametrize("error", [ValueError("third"), KeyboardInterrupt(), SystemExit(3)])
def test_the_first_exception_is_raised_and_the_rest_is_left(error):
    done = []

    def work(n):
        if n == 3:
            raise error
        if n > 3:
            threading.Event().wait(0.01)
        done.append(n)

    with pytest.raises(type(error)) as caught:
        side_by_side(work, range(1000))
    assert caught.value is error and len(done) < 100
    assert side_by_side(lambda n: n, range(9)) == list(range(9))


def test_modes_and_context_variables_are_those_of_the_caller():
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(5)

    def state(_):
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), variable.get(), requested()

    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with mode, fastroute.use_backend("reference"):
            expected = state(0)
            assert side_by_side(state, range(30)) == [expected] * 30 and expected[2] == 5
    assert torch.is_grad_enabled()


def test_who_observes_operators_sees_all():
    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.number += 1
            return func(*args, **(kwargs or {}))

    with Count() as count:
        side_by_side(lambda n: torch.ones(n + 1), range(8))
    assert count.number >= 8
    with torch.device("cpu"):  # a mode too
        assert workers() == 1


def test_a_call_from_another_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(side_by_side(lambda n: n + 1, range(20))))
    thread.start()
    thread.join()
    assert found == [list(range(1, 21))]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["carn", "srresnet"])
def test_bits_do_not_depend_on_the_number_of_threads(name, dtype):
    make = {"carn": lambda: CARN(16, 2), "srresnet": lambda: SRResNet(16, 2, blocks=2)}[name]
    router = PatchRouter([randomise(make(), 1)], None, patch=32, stride=28, scale=2, batch=2).to(dtype)
    image = picture(1, 3, 150, 130)
    results = []
    for number in (2, 3, 5, 8):
        torch.set_num_threads(number)
        assert router.networks.setting(0, CPU).parallel
        results.append(router.upscale(image).image)
    torch.set_num_threads(3)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_passes_run_side_by_side_where_there_are_as_many_as_threads(monkeypatch):
    calls = []
    monkeypatch.setattr(branches, "side_by_side", lambda f, items: calls.append(len(items)) or [f(x) for x in items])
    router = PatchRouter([nn.Conv2d(3, 3, 3, padding=1)], scale=1, batch=2)
    for patches, passes in ((4, []), (5, [3]), (16, [8])):
        calls.clear()
        router.networks.run(0, torch.rand(patches, 3, 32, 32))
        assert calls == passes
    # A function may have a state.
    PatchRouter([lambda x: x * 1], scale=1, batch=1, channels=3).networks.run(0, torch.rand(8, 3, 32, 32))
    assert calls == [8]


def test_no_thread_stays_and_none_is_asked_for_after_a_fork():
    side_by_side(lambda n: n, range(9))
    before = threading.active_count()
    for _ in range(20):
        side_by_side(lambda n: n, range(9))
    assert threading.active_count() == before
    if not hasattr(os, "fork"):
        return
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, bytes([workers(), *side_by_side(lambda n: n + 1, range(3))]))
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    assert os.read(read, 9) == bytes([1, 1, 2, 3])
    os.close(read)


@pytest.mark.slow
def test_threads_wait_patiently_on_a_busy_machine_only(monkeypatch):
    if "libgomp" not in str(threads.openmp()._name) or sys.platform != "linux":
        pytest.skip("only GNU's OpenMP on Linux is made to")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)

    def sleepers():
        return [t for t in threading.enumerate() if t.name == "fastroute-sleepers"]

    for busy in (True, True, False, True, False):
        monkeypatch.setattr(threads, "is_busy", lambda busy=busy: busy)
        with threads.patiently(CPU):
            if not busy:
                [t.join(20) for t in sleepers()]
            assert len(sleepers()) == busy
    monkeypatch.setattr(threads, "is_busy", lambda: True)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    with threads.patiently(CPU):
        assert not sleepers()
    # With them a process still ends by itself.
    code = (
        "import torch; torch.set_num_threads(2); from fastroute.runtime import threads; threads.is_busy = lambda: True\n"
        "with threads.patiently(torch.device('cpu')): torch.rand(100, 100) @ torch.rand(100, 100)\n"
        "print([t.name for t in threads.threading.enumerate()])"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0 and "fastroute-sleepers" in run.stdout


def test_busy_is_more_to_run_than_there_are_processors(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "processors", lambda: 4)
    for running, busy in ((1, False), (2, False), (3, True), (9, True)):
        (tmp_path / "loadavg").write_text(f"0.1 0.2 0.3 {running}/700 1234\n")
        monkeypatch.setattr(threads, "Path", lambda _: tmp_path / "loadavg")
        assert threads.is_busy() is busy
    monkeypatch.setattr(threads, "Path", lambda _: tmp_path / "none")
    assert threads.is_busy() is False
