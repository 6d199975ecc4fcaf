"""What this project does on a GPU: is it right there, and how fast. `make gpu`, or

    PYTHONPATH=.:kernels python3 tests/bench/gpu_report.py [--small] [--out FOLDER] [SECTION ...]

It needs Python, torch, triton and what oacore imports (on a bare machine `make gpu` takes the wheels that
`make gpu-wheels` has fetched elsewhere), no network and no Snakemake. Every section is a process with a time limit;
after each the table is written anew, so that a run that is cut off still tells. On a GPU the table is also
docs/gpu/{device}.md; `--small` runs tiny shapes on a CPU, to try the script itself, and its numbers mean nothing.
"""

import argparse
import csv
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "kernels" / "bench")]
SECONDS = {
    "ceilings": 60,
    "tests": 150,
    "exactness": 90,
    "kernels": 120,
    "step": 120,
    "learn": 60,
    "yardstick": 60,
    "pipeline": 300,
}
STEP, SMALL_STEP = (12, 12, 768, 64, 50257, 21, 12, 5), (2, 2, 32, 16, 50, 7, 3, 2)  # L H D DH V T SAMPLES PROMPTS
GOALS = {"tf32": 8.0, "bf16": 5.0}  # ms for a step of 60 x 21 of GPT-2-small
FASTER, BANDWIDTH = 1.5, 0.6  # than PyTorch's products; share of the measured bandwidth that kernels reach
ARITHMETIC = ("ieee", "tf32", "bf16")


class Report:
    """Results of a section, a JSON line each."""

    def __init__(self, folder: Path, section: str, small: bool):
        self.file, self.section, self.small = folder / "rows.jsonl", section, small
        self.sizes = SMALL_STEP if small else STEP

    def row(self, what: str, **values: Any) -> None:
        """Print a result, and keep it."""
        values = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in values.items()}
        print(f"  {what}: {', '.join(f'{name} {value}' for name, value in values.items())}", flush=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"section": self.section, "what": what, **values}) + "\n")


# ---- Sections --------------------------------------------------------------------------------------------------------


def ceilings(report: Report) -> None:
    """What the device does at best: a copy, and a large product in every arithmetic."""
    import torch
    import triton
    from roofline import DEVICE, bandwidth, rate

    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    report.row("device", name=name, torch=torch.__version__, triton=triton.__version__)
    report.row("copy", gb_per_s=bandwidth() / 1e9)
    for arithmetic in ARITHMETIC:
        dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float32
        report.row(arithmetic, tflop_per_s=2 * rate(dtype, "tf32" if arithmetic == "tf32" else "ieee") / 1e12)


def tests(report: Report) -> None:
    """The kernels' own tests, compiled."""
    if importlib.util.find_spec("pytest") is None:
        report.row("tests/kernels", skipped="pytest is not installed here")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/kernels")]
    found = subprocess.run(command + ["-k", "tf32 or runtime"] * report.small, cwd=ROOT, capture_output=True, text=True)
    print(found.stdout[-3000:], found.stderr[-1000:])
    lines = found.stdout.strip().splitlines()
    report.row("tests/kernels", status=found.returncode, said=lines[-1] if lines else "")
    if found.returncode:
        raise SystemExit("tests fail")


def backends() -> tuple[str, ...]:
    """What can run here."""
    from roofline import DEVICE

    return ("eager", "triton") if DEVICE.type == "cuda" else ("eager",)


def exactness(report: Report) -> None:
    """Losses and gradients of a pass against float64 on the CPU, and of two runs against one another, to the bit."""
    import torch
    from bench_ledger import forced
    from bench_step import random_model
    from roofline import DEVICE

    from oacore.engine.clean import Batch
    from oacore.engine.masked import Engine
    from oacore.models.weights import _map_tensors

    L, H, D, K, V, T = (2, 2, 32, 16, 50, 7) if report.small else (4, 4, 128, 32, 512, 16)
    torch.manual_seed(0)
    model, tokens = random_model(L, H, D, K, V, T, "cpu"), torch.randint(0, V, (5, T))
    masks = torch.rand(20, model.graph.n_destinations, model.graph.n_sources) * 2 - 0.5  # some edges are ablated
    masks = masks.clamp(0, 1) * torch.tensor(model.graph.valid)
    constants = torch.randn(1, model.graph.n_sources, 1, D) * 0.1

    def computed(device: Any, dtype: Any, precision: Any) -> list[Any]:
        engine = Engine(_map_tensors(model, lambda weight: weight.to(device, dtype)), precision)
        wide = torch.promote_types(dtype, torch.float32)
        own, values = (x.to(device, wide).requires_grad_() for x in (masks, constants))
        prompts = engine.prompts(Batch(tokens.to(device), torch.full((5,), T, device=device)))
        logits = engine.logits(prompts, torch.arange(5, device=device).repeat(4), own, values)
        losses = -logits.log_softmax(-1)[:, 0]
        return [losses.detach(), *torch.autograd.grad(losses.sum(), (own, values))]

    truth = computed("cpu", torch.float64, "ieee")
    for arithmetic in ARITHMETIC:
        dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float32
        for backend in backends():
            with forced(backend):
                once, again = (computed(DEVICE, dtype, "tf32" if arithmetic == "tf32" else "ieee") for _ in range(2))
            names = ("losses", "masks", "constants")
            errors = {
                name: float((x.double().cpu() - y).norm() / y.norm())
                for name, x, y in zip(names, once, truth, strict=True)
            }
            same = all(torch.equal(x, y) for x, y in zip(once, again, strict=True))
            report.row(f"{arithmetic}, {backend}", **errors, same_bits_twice=same)


def kernels(report: Report) -> None:
    """Every op of every backend against its roofline."""
    for script in ("bench_masked_mix.py", "bench_projection.py", "bench_blocks.py"):
        table = report.file.with_name(script + ".csv")
        shape = ["--shape", "5", "9", "4", "3", "32", "16", "--repeats", "2"] if report.small else []
        subprocess.run([sys.executable, str(ROOT / "kernels/bench" / script), "--csv", str(table), *shape], check=True)
        with table.open(newline="") as file:
            for row in csv.DictReader(file):
                what = f"{row['op']}, {row['shape']}, {row['arithmetic']}, {row['backend']}"
                report.row(what, ms=float(row["ms"]), share=float(row["share"]), peak_mib=row["peak_mib"])


def step(report: Report) -> None:
    """Forward and backward of GPT-2-small's shape in every arithmetic, by backend, launched and as a CUDA graph."""
    import torch
    from bench_ledger import forced
    from bench_step import _captured, random_model
    from roofline import DEVICE

    from oacore.engine.clean import Batch
    from oacore.engine.masked import Engine
    from oacore.metrics import kl_divergence
    from oacore.models.load import set_precision
    from oacore.models.weights import _map_tensors

    L, H, D, K, V, T, samples, n_prompts = report.sizes
    for arithmetic in ARITHMETIC:
        dtype, precision = torch.bfloat16 if arithmetic == "bf16" else torch.float32, "tf32" * (arithmetic == "tf32")
        set_precision(precision or "ieee", DEVICE)
        weights = _map_tensors(random_model(L, H, D, K, V, T, DEVICE), lambda weight, to=dtype: weight.to(to))
        engine = Engine(weights, precision or "ieee")
        tokens = torch.randint(0, V, (n_prompts, T), device=DEVICE)
        prompts = engine.prompts(Batch(tokens, torch.full((n_prompts,), T, device=DEVICE)))
        rows = torch.arange(n_prompts, device=DEVICE).repeat(samples)
        target = torch.randn(n_prompts, V, device=DEVICE).log_softmax(-1).repeat(samples, 1)
        masks = torch.rand(len(rows), engine.graph.n_destinations, engine.graph.n_sources, device=DEVICE)
        masks = masks.masked_fill_(engine.no_edge, 0).requires_grad_()
        constants = (torch.randn(1, engine.graph.n_sources, 1, D, device=DEVICE) * 0.1).requires_grad_()

        def once(
            masks: Any, constants: Any, engine: Any = engine, given: Any = (prompts, rows), target: Any = target
        ) -> None:
            kl_divergence(target, engine.logits(*given, masks, constants)).mean().backward()

        for backend in backends():
            with forced(backend):
                call = partial(once, masks, constants)
                ms, peak_gb = timed(call)
                report.row(f"{arithmetic}, {backend}, launches", ms=ms, peak_gb=peak_gb)
                if DEVICE.type == "cuda":
                    ms, peak_gb = timed(_captured(once, (masks, constants)))
                    report.row(f"{arithmetic}, {backend}, graph", ms=ms, peak_gb=peak_gb)
    if DEVICE.type != "cuda":
        report.row("graph", skipped="needs CUDA")


def timed(call: Callable[[], object], repeats: int = 10) -> tuple[float, float]:
    """Median milliseconds, and peak GB allocated on the device (0 on a CPU)."""
    import torch

    on_gpu, times = torch.cuda.is_available(), []
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    call(), call()
    wait()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3, torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0


def learn(report: Report) -> None:
    """A step of `learn`, from drawing masks to Adam, launched and replayed as a CUDA graph, by the clock and by the
    profiler, and whether both come to the same.
    """
    import torch
    from bench_ledger import replayed_steps, sweep_of
    from roofline import DEVICE

    from oacore.fits.replayed import SWITCH

    sweep = sweep_of(DEVICE, report.sizes)
    states = {"launched": sweep.initial_state(), "replayed": sweep.initial_state()}
    for way, state in states.items():
        os.environ[SWITCH] = "0" if way == "launched" else "1"
        taken, steps = replayed_steps(sweep, state), iter(range(1000))
        call = partial(lambda taken, steps: taken(next(steps)), taken, steps)
        ms, peak_gb = timed(call, 3 if report.small else 20)
        report.row(f"a whole step, {way}", ms=ms, peak_gb=peak_gb)
        counts = launches_of(call)
        report.row(f"a whole step, {way}, as the profiler sees it", **counts)
    pairs = [(states["launched"][name], value) for name, value in states["replayed"].items()]
    furthest = max(float((one.double() - other.double()).abs().max()) for one, other in pairs if one.numel())
    same = all(torch.equal(one, other) for one, other in pairs)
    report.row("replayed against launched steps", largest_difference=furthest, same_bits=same)


def launches_of(call: Callable[[], object]) -> dict[str, int]:
    """What the host does in a call: launches of kernels and of graphs, and waits, of which one ends the profile."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    counts = {event.key: event.count for event in profiler.key_averages()}
    named = {
        "kernels": "LaunchKernel|cuLaunchKernel",
        "graphs": "GraphLaunch",
        "waits": "Synchronize",
        "aten": "^aten::",
    }
    return {name: sum(n for key, n in counts.items() if re.search(pattern, key)) for name, pattern in named.items()}


def yardstick(report: Report) -> None:
    """The step written naively in PyTorch."""
    script = ROOT.parent / "shared/bench/naive_step.py"
    script = script if script.is_file() else ROOT / "shared/bench/naive_step.py"
    if not script.is_file():
        report.row("naive_step.py", skipped="shared/bench is not beside this copy")
        return
    # Written for a CPU: on a GPU its tensors are made there, and its clock waits for the device.
    prelude = "import runpy, sys, time, torch; sys.argv = sys.argv[1:]\n"
    if not report.small:
        prelude += "torch.set_default_device('cuda'); clock = time.perf_counter\n"
        prelude += "time.perf_counter = lambda: (torch.cuda.synchronize(), clock())[1]\n"
    command = [sys.executable, "-c", prelude + "runpy.run_path(sys.argv[0], run_name='__main__')", str(script)]
    sizes = [str(size) for size in (*report.sizes, 2 if report.small else 10)]
    said = subprocess.run([*command, *sizes], capture_output=True, text=True, check=True).stdout
    found = re.search(r"median ([\d.]+) ms", said)
    assert found is not None, said
    report.row("naive step", ms=float(found[1]))


def pipeline(report: Report) -> None:
    """All stages that need no file of facts, on random weights of GPT-2-small's shape, with its tokenizer."""
    import yaml
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    data = next((folder / "shared/data" for folder in (ROOT, ROOT.parent) if (folder / "shared/data").is_dir()), None)
    if data is None:
        report.row("all stages", skipped="shared/data, with GPT-2's tokenizer, is not beside this copy")
        return
    folder = report.file.parent / "pipeline"
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2} if report.small else {}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(data / "gpt2_bpe").save_pretrained(folder / "model")
    config = yaml.safe_load((ROOT / "tests/configs/tiny.yaml").read_text())
    config |= {"model": str(folder / "model"), "device": "cpu" if report.small else "cuda", "run": "gpu-report"}
    config |= {"cache_dir": str(folder / "cache"), "results_dir": str(folder / "results")}
    config["tasks"] = {"ioi": config["tasks"]["ioi"], "text": config["tasks"]["text"]}
    config["tasks"]["text"]["path"] = str(data / "text/tinystories_1000.json")
    config["ablation"]["tasks"] = ["ioi"]
    config["circuits"]["methods"] = ["ugs", "eap"]
    config["lenses"]["faithfulness"]["layers"] = [0, 1]
    del config["tracing"], config["lenses"]["truthfulness"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", "oacore", "all", "--config", str(folder / "config.yaml")], check=True)
    report.row("all stages but tracing, which wants a file of facts", seconds=time.monotonic() - begin)


SECTIONS: dict[str, Callable[[Report], None]] = {
    function.__name__: function for function in (ceilings, tests, exactness, kernels, step, learn, yardstick, pipeline)
}

# ---- The table -------------------------------------------------------------------------------------------------------


def table(folder: Path, ends: dict[str, str], small: bool) -> str:
    """All results so far, in Markdown."""
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines() if (folder / "rows.jsonl").exists() else []
    rows = [json.loads(line) for line in lines]
    name = next((row["name"] for row in rows if row["what"] == "device"), "an unknown device")
    text = [f"# On {name}", "", "Tiny shapes on a CPU: these numbers mean nothing." if small else "By `make gpu`."]
    for section, end in ends.items():
        text += ["", f"## {section}: {end}", ""]
        for row in (row for row in rows if row["section"] == section):
            values = {key: value for key, value in row.items() if key not in ("section", "what")}
            text.append(f"* {row['what']}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    if not small:
        text += ["", "## Verdicts", "", *(f"* {line}" for line in verdicts(rows))]
    return "\n".join(text) + "\n"


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """The goals, and what was measured for each."""
    steps = {row["what"]: row for row in rows if row["section"] == "step" and "ms" in row}
    lines = []
    for arithmetic, goal in GOALS.items():
        own = {what: row for what, row in steps.items() if what.startswith(arithmetic)}
        if not own:
            lines.append(f"a step in {arithmetic} in {goal:g} ms: not measured")
            continue
        best = min(own, key=lambda what, own=own: own[what]["ms"])
        ms = own[best]["ms"]
        lines.append(f"a step in {arithmetic} in {goal:g} ms: {_met(ms <= goal)}, {ms:g} ms ({best})")
        plain, ours = (own.get(f"{arithmetic}, {backend}, graph") for backend in ("eager", "triton"))
        if plain and ours:
            met = plain["ms"] >= FASTER * ours["ms"] and ours["peak_gb"] < plain["peak_gb"]
            told = f"{plain['ms'] / ours['ms']:.3g} times, {ours['peak_gb']:g} against {plain['peak_gb']:g} GB"
            lines.append(f"{FASTER} times as fast as plain in less memory, {arithmetic}: {_met(met)}, {told}")
    for row in rows:
        if row["section"] == "kernels" and row["what"].endswith("triton") and row["share"] < BANDWIDTH:
            lines.append(f"{BANDWIDTH:.0%} of the roofline: NOT met, {row['share']:.0%} ({row['what']})")
    return lines


def _met(yes: bool) -> str:
    return "met" if yes else "NOT met"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny shapes on a CPU, to try the script")
    parser.add_argument("--out", type=Path, default=Path("/tmp/gpu_report"))
    parser.add_argument("--one", action="store_true", help="run the one section that is named in this process")
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    given = parser.parse_args()
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; allowed: {', '.join(SECTIONS)}")
    if given.one:
        return SECTIONS[given.sections[0]](Report(given.out, given.sections[0], given.small))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "rows.jsonl").unlink(missing_ok=True)
    places = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if given.small else {}
    ends = {}
    for section in given.sections:
        print(f"== {section}, up to {SECONDS[section]} s", flush=True)
        command = [sys.executable, __file__, "--one", "--out", str(given.out), *["--small"] * given.small, section]
        begin = time.monotonic()
        try:
            status = subprocess.run(command, env=environment, timeout=SECONDS[section]).returncode
            end = "done" if status == 0 else f"FAILED with status {status}"
        except subprocess.TimeoutExpired:
            end = "out of time"
        ends[section] = f"{end} after {time.monotonic() - begin:.0f} s"
        (given.out / "report.md").write_text(text := table(given.out, ends, given.small), encoding="utf-8")
        device = re.match(r"# On (.*)", text)
        assert device is not None
        if not given.small and device[1] not in ("CPU", "an unknown device"):
            target = ROOT / "docs/gpu" / f"{re.sub(r'[^a-z0-9]+', '-', device[1].lower())}.md"
            target.parent.mkdir(exist_ok=True)
            target.write_text(text, encoding="utf-8")
    print(text)
    sys.exit(any(not end.startswith("done") for end in ends.values()))


if __name__ == "__main__":
    main()
