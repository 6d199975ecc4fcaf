"""Fixtures shared by all tests: tiny random models of every family, the shared artefacts, one finished run."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # an unreachable hub takes 23-46 s to fail

import signal

import pytest
import torch

# A run that a shell put in the background ignores SIGINT, and so would every process that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

N_THREADS = int(
    os.environ.get("OA_TEST_THREADS", "1")
)  # tiny models: a second thread only waits; for `make test-rounding`
torch.set_num_threads(N_THREADS)

# The longest files go first. The first one makes the tiny run, for three minutes; the eight after it want none, so that
# the other worker need not wait.
LONGEST = (
    "test_pipeline.py",
    "test_notebooks.py",
    "test_planted_discovery.py",
    "test_compile.py",
    "test_stories.py",
    "test_study.py",
    "test_extending.py",
    "test_poison.py",
    "test_emulated.py",
    "test_increments.py",
    "test_staleness.py",
    "test_sharing.py",
    "test_kill.py",
    "test_estimate.py",
    "test_plan.py",
    "test_corrupted_files.py",
    "test_docs.py",
    "test_comparison.py",
)


def pytest_collection_modifyitems(items):
    """The longest files first: two workers share the files, and the last ones should be short."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


SHARED_DATA = Path(os.environ.get("OA_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real artefacts that nobody on this project made; users do not have them."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder of real artefacts is absent (../shared/data or $OA_SHARED_DATA)")
    return SHARED_DATA


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GATED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48}


def _rope(kind: str) -> dict:
    parameters: dict = {"rope_type": kind, "rope_theta": 10000.0}
    extra = {
        "default": {},
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "longrope": {
            "factor": 4.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 16,
        },
    }
    return parameters | extra[kind]


def random_hf(name: str, scale: float = 0.15):
    """A random tiny Hugging Face model. Weights are wide enough that every part of it matters to the logits. Without
    norms, a variant `bare`, nothing keeps what they write small.
    """
    import transformers as tf

    family, _, variant = name.partition("-")
    configs = {
        "gpt2": lambda: tf.GPT2Config(
            vocab_size=97,
            n_positions=64,
            n_embd=32,
            n_layer=3,
            n_head=4,
            scale_attn_by_inverse_layer_idx=variant == "inverse",
        ),
        "neox": lambda: tf.GPTNeoXConfig(
            **SIZES,
            intermediate_size=48,
            rotary_pct=0.25,
            use_parallel_residual=variant == "parallel",
            attention_bias=variant != "unbiased",
        ),
        "llama": lambda: tf.LlamaConfig(
            **GATED, rope_parameters=_rope(variant or "default"), attention_bias=variant == "linear"
        ),
        "mistral": lambda: tf.MistralConfig(**GATED, sliding_window=5 if variant == "window" else None),
        "phi3": lambda: tf.Phi3Config(
            **GATED,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            rope_parameters=_rope("longrope" if variant == "long" else "default"),
            original_max_position_embeddings=16,
        ),
        # Heads that are wider together than the stream, as in the small ones.
        "qwen3": lambda: tf.Qwen3Config(**GATED, head_dim=12),
        "qwen2": lambda: tf.Qwen2Config(
            **GATED,
            **(
                {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1} if variant == "window" else {}
            ),
        ),
        "gemma3": lambda: tf.Gemma3TextConfig(
            **GATED,
            head_dim=8,
            sliding_window=5,
            query_pre_attn_scalar=12,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={"sliding_attention": _rope("default"), "full_attention": _rope("linear")},
        ),
        "gemma2": lambda: tf.Gemma2Config(**GATED, head_dim=8, sliding_window=5, query_pre_attn_scalar=12),
        "olmo2": lambda: tf.Olmo2Config(**GATED),
    }
    torch.manual_seed(1)
    model = tf.AutoModelForCausalLM.from_config(configs[family](), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            wide = scale * (0.6 if variant == "bare" else 1.0)
            parameter.copy_(torch.randn_like(parameter) * (wide if parameter.dim() > 1 else 0.3))
            if parameter.dim() == 1 and not family.startswith("gemma"):
                parameter.add_(0.8)  # norm weights away from zero; Gemmas' are offsets from one
    if variant == "bare":
        for module in list(model.modules()):
            for name, part in module.named_children():
                if isinstance(part, torch.nn.LayerNorm):
                    setattr(module, name, torch.nn.Identity())
    return model


FAMILIES = (
    "gpt2",
    "gpt2-inverse",
    "gpt2-bare",
    "neox-parallel",
    "neox-sequential",
    "llama",
    "llama-linear",
    "llama-dynamic",
    "llama-yarn",
    "llama-llama3",
    "llama-longrope",
    "mistral",
    "mistral-window",
    "phi3",
    "phi3-long",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "gemma2",
    "gemma3",
    "olmo2",
)
# A bridge of TransformerLens computes norms itself, and knows none that is the identity.
BRIDGED = tuple(name for name in FAMILIES if name != "gpt2-bare")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """(config, layout) of the finished pipeline run of tests/configs/tiny.yaml, on the shipped demo model.

    `$OA_TEST_CACHE` keeps it for later runs. Workers of one test run share it: who comes second waits for the first, as
    any pipeline does.
    """
    import subprocess
    import sys

    from oacore.config.read import load_config
    from oacore.store.layout import Layout

    base = tmp_path_factory.getbasetemp()
    root = Path(
        os.environ.get("OA_TEST_CACHE") or (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "pipeline"
    )
    config = load_config(Path(__file__).parent / "configs/tiny.yaml").model_copy(
        update={"cache_dir": root, "results_dir": root / "results"}
    )
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", "tests/configs/tiny.yaml"]
    command += [
        "--config",
        f"cache_dir={config.cache_dir}",
        f"results_dir={config.results_dir}",
        f"limits={{threads: {N_THREADS}}}",
    ]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return config, Layout(config)


def same_gaps(ours, theirs, methods):
    """Whether two files have the same gaps of these methods, to the last digit."""
    import pandas as pd

    # Without a fit in the table its last columns are empty, and of another type.
    tables = [pd.read_csv(path).loc[:, :"n_prompts"] for path in (ours, theirs)]
    chosen = [table[table["method"].isin(methods)].reset_index(drop=True) for table in tables]
    return set(chosen[0]["method"]) == set(methods) and chosen[0].equals(chosen[1])


@pytest.fixture
def own_copy(tiny_run, tmp_path):
    """The config of a copy of the finished tiny run, cache and results, to do anything to."""
    import shutil

    config, layout = tiny_run
    for folder in (*layout.cache_folders, layout.results_dir):
        shutil.copytree(folder, tmp_path / Path(folder).relative_to(config.cache_dir))
    return config.model_copy(update={"cache_dir": tmp_path, "results_dir": tmp_path / "results"})


def stage_of(rule):
    """The stage that a rule runs: each circuit method has a rule of its own."""
    return "circuits" if rule.startswith("circuits_") else rule


def snakemake_dag(values, path, *, forced=False):
    """Snakemake's plan for a config, which is written to `path`, without a process: dozens of questions a minute."""
    import io
    from contextlib import redirect_stderr

    import yaml
    from snakemake.api import SnakemakeApi
    from snakemake.settings.types import ConfigSettings, DAGSettings, OutputSettings, Quietness, ResourceSettings

    path.write_text(yaml.safe_dump(values))
    with redirect_stderr(io.StringIO()), SnakemakeApi(OutputSettings(quiet={Quietness.ALL}, dryrun=True)) as api:
        api = api.workflow(
            resource_settings=ResourceSettings(cores=2),
            config_settings=ConfigSettings(configfiles=[path]),
            snakefile=Path(__file__).parents[1] / "Snakefile",
        )
        api.dag(DAGSettings())
        workflow = api._workflow
        workflow._prepare_dag(forceall=forced, ignore_incomplete=True, lock_warn_only=True)
        workflow._build_dag()
        return workflow.dag
