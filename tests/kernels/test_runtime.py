"""Which backend runs, and in which precision: what can be held without a GPU."""

import json

import pytest
import torch
from oakernels import runtime
from oakernels.choices import VARIABLE, Choices, choices_file, size_class
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
def timed(monkeypatch, tmp_path):
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
    monkeypatch.setattr(runtime, "choices", Choices(tmp_path / "kept" / "choices.json"))
    monkeypatch.setattr(runtime, "_device_name", lambda device: "some GPU:")
    for seen in ("_warned", "_ran", "_failed"):
        monkeypatch.setattr(runtime, seen, set())

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


def test_without_a_compiler_eager_goes_on_with_one_line(timed, capsys, monkeypatch, tmp_path):
    broken = RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")
    for number in range(2):
        monkeypatch.setattr(runtime, "choices", Choices(tmp_path / f"{number}.json"))
        assert timed(eager=1.0, triton=broken) == "eager"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: Triton's kernels can't be compiled here") and line.endswith(
        "environment variable."
    )


def test_a_kernel_that_was_measured_elsewhere_and_can_not_be_compiled_here_is_left(timed, capsys, monkeypatch):
    assert timed(eager=2.0, triton=1.0) == "triton"
    monkeypatch.setattr(runtime, "_ran", set())  # another process, with the same file
    broken = RuntimeError("Failed to find C compiler.")
    assert [timed(eager=2.0, triton=broken) for _ in range(2)] == ["eager"] * 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setattr(runtime, "_failed", set())
    with pytest.raises(torch.OutOfMemoryError):
        timed(eager=2.0, triton=torch.OutOfMemoryError("out of memory"))
    monkeypatch.setattr(runtime, "_ran", set())
    assert timed(eager=2.0, triton=1.0) == "triton"
    with pytest.raises(RuntimeError, match="later"):  # no fault of the compiler
        timed(eager=2.0, triton=RuntimeError("later"))


def test_an_error_of_eager_is_an_error(timed):
    with pytest.raises(RuntimeError, match="shapes"):
        timed(eager=RuntimeError("shapes"), triton=1.0)


def test_another_process_takes_what_was_measured_and_measures_nothing(timed, monkeypatch):
    """Also where it would find another one the faster: a resumed fit goes on as it began."""
    assert timed(eager=2.0, triton=1.0) == "triton"
    again = Choices(runtime.choices.path)
    monkeypatch.setattr(runtime, "choices", again)
    assert timed(eager=1.0, triton=2.0) == "triton"
    (key,) = again.used
    assert key.startswith("some GPU: torch.float32 op")
    assert json.loads(again.path.read_text())[key] == {"backend": "triton", "ms": {"eager": 2.0, "triton": 1.0}}


def test_what_another_process_kept_meanwhile_stays(tmp_path):
    first, second = (Choices(tmp_path / "choices.json") for _ in range(2))
    assert first.backend("a") is None and second.backend("a") is None
    first.measured("a", {"eager": 1.0, "triton": 2.0})
    second.measured("a", {"eager": 2.0, "triton": 1.0})
    second.measured("b", {"eager": 2.0, "triton": float("inf")})
    assert second.backend("a") == Choices(first.path).backend("a") == "eager"
    assert json.loads(first.path.read_text())["b"]["ms"] == {"eager": 2.0, "triton": None}
    assert [path.name for path in tmp_path.iterdir()] == ["choices.json"]


def test_a_damaged_file_is_measured_anew_with_a_warning(tmp_path, capsys):
    path = tmp_path / "choices.json"
    path.write_text("{")
    choices = Choices(path)
    assert choices.backend("a") is None
    choices.measured("a", {"eager": 1.0})
    assert "choices.json: not readable" in capsys.readouterr().err
    assert Choices(path).backend("a") == "eager"


def test_the_file_s_place_and_its_classes_of_sizes(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choices_file() == tmp_path / "oakernels" / "choices.json"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine.json"))
    assert choices_file() == tmp_path / "mine.json"
    assert [size_class(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
