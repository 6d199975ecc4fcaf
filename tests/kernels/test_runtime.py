"""Which backend runs, and in which precision: what can be held without a GPU."""

import pytest
import torch
from oakernels import runtime
from oakernels.runtime import matmul_precision


def flag():
    return torch.backends.cuda.matmul.fp32_precision


@pytest.fixture(autouse=True)
def as_before():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch before 2.9: one flag, that never raises"
)
@pytest.mark.parametrize("outside", ["highest", "high"])
def test_the_precision_holds_inside_and_what_was_set_outside_comes_back(outside):
    torch.set_float32_matmul_precision(outside)
    for inside in ("ieee", "tf32"):
        with matmul_precision(inside):
            assert flag() == inside
        assert flag() == {"highest": "ieee", "high": "tf32"}[outside]
        assert torch.get_float32_matmul_precision() == outside, "the older way to ask goes on working"
    with pytest.raises(RuntimeError), matmul_precision("tf32"):
        raise RuntimeError
    assert flag() == {"highest": "ieee", "high": "tf32"}[outside]


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision 'bf16'; allowed: ieee, tf32"), matmul_precision("bf16"):
        pass


@pytest.fixture
def timed(monkeypatch):
    """`run` where tensors claim to be on a GPU, and calls take the milliseconds that they say."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.at = clock[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(runtime, "_fastest", {})
    monkeypatch.setattr(runtime, "_warned", set())

    def run(**candidates):
        called = []

        def candidate(name, cost):
            def call(target):
                if isinstance(cost, Exception):
                    raise cost
                clock[0] += cost
                called.append(name)

            return call

        calls = {name: candidate(name, cost) for name, cost in candidates.items()}
        runtime.run("auto", ("op",), torch.zeros(2).as_subclass(OnGpu), calls)
        return called[-1]

    return run


def test_the_faster_one_runs(timed):
    assert timed(eager=2.0, triton=1.0) == "triton"


@pytest.mark.parametrize("triton", [1.0, 2.0])
def test_a_kernel_that_is_no_faster_does_not(timed, triton):
    assert timed(eager=1.0, triton=triton) == "eager"


TOO_MUCH = [torch.OutOfMemoryError("out of memory"), runtime.OutOfResources(300, 200, "shared memory")]


@pytest.mark.parametrize("error", TOO_MUCH)
def test_what_does_not_fit_is_not_taken_and_nothing_is_said(timed, capsys, error):
    assert timed(eager=1.0, triton=error) == "eager"
    assert not capsys.readouterr().err


def test_without_a_compiler_eager_goes_on_with_one_line(timed, capsys, monkeypatch):
    broken = RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")
    for _ in range(2):
        monkeypatch.setattr(runtime, "_fastest", {})
        assert timed(eager=1.0, triton=broken) == "eager"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: Triton's kernels can't be compiled here") and line.endswith(
        "environment variable."
    )


def test_an_error_of_eager_is_an_error(timed):
    with pytest.raises(RuntimeError, match="shapes"):
        timed(eager=RuntimeError("shapes"), triton=1.0)
