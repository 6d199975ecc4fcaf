"""The estimate of a config, from what is known or measured on this machine."""

from pathlib import Path

from oacore.config.run import Config
from oacore.estimate.case import Case
from oacore.estimate.sizes import Sizes, known_sizes, number_bytes
from oacore.estimate.table import has_gpu, host_memory_bytes, needs, table
from oacore.jobs import jobs


def estimated(
    config: Config,
    *,
    model_config: Path | None = None,
    tflops: float | None = None,
    memory_gb: float | None = None,
    fetch: bool = False,
) -> str:
    """The table of what GPU rules need; of a study, that of each member.

    Args:
        model_config: a config.json to take the sizes from.
        tflops, memory_gb: of the device: without them its name alone is known, unless fetching.
        fetch: ask the hub for sizes, and measure the device; imports torch. Without it an unknown model gets one line.

    Raises:
        UserError: the sizes can't be had, or there is no such device.
    """
    if config.study is not None:
        of_members = [
            f"{name}: {estimated(each, model_config=model_config, tflops=tflops, memory_gb=memory_gb, fetch=fetch)}"
            for name, each in config.members().items()
        ]
        return "\n\n".join(of_members)
    sizes = known_sizes(config, model_config)
    if sizes is None and not fetch:
        unknown = f"estimate: the sizes of {config.model!r} are not on this machine"
        return f"{unknown}; `python -m oacore estimate CONFIG` asks the hub"
    if sizes is None:
        from oacore.models.hub import hugging_face_config

        fetched = hugging_face_config(config.model, revision=config.revision).to_dict()
        sizes = Sizes.of(fetched, number_bytes(config))
    gpu = has_gpu(config)
    memory_bytes, flop_per_second = 0.0 if gpu else host_memory_bytes(), None
    if fetch and (tflops is None or memory_gb is None):
        from oacore.estimate.throughput import measured_device

        device = measured_device(config)
        gpu, memory_bytes, flop_per_second = device.name == "cuda", device.memory_bytes, device.flop_per_second
    memory_bytes = memory_bytes if memory_gb is None else memory_gb * 1e9
    return table(
        needs(Case(config, sizes, gpu, memory_bytes), jobs(config)),
        device="GPU" if gpu else "CPU",
        memory_bytes=memory_bytes,
        flop_per_second=flop_per_second if tflops is None else tflops * 1e12,
    )
