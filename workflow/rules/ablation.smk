rule optimal:
    input:
        layout.model_json,
        task_files("prompts.h5"),
        task_files("activations.h5"),
        lambda wildcards: (
            layout.constants(wildcards.task, "optimal")
            if wildcards.method == "optimal_positional"
            else []
        ),
    output:
        results("{task}", "constants-{method}.safetensors"),
    log:
        results("{task}", "logs/optimal-{method}.log"),
    wildcard_constraints:
        method="|".join(run_config.ablation.fitted()) or "none",
    conda:
        "../../environment.yml"
    threads: run_config.limits.threads
    resources:
        mem_mb=mem_mb,
        runtime=minutes(720),
        gpu=GPUS,
    params:
        components=run_config.ablation.components,
        settings=run_config.ablation.optimal.model_dump(),
        seed=run_config.seed,
        code=code("optimal"),
    script:
        "../scripts/stage.py"


rule gaps:
    input:
        layout.model_json,
        task_files("prompts.h5"),
        task_files("activations.h5"),
        lambda wildcards: [
            layout.constants(wildcards.task, method)
            for method in run_config.ablation.fitted()
        ],
    output:
        results("{task}", "gaps.csv"),
        results("{task}", "summary.csv"),
    log:
        results("{task}", "logs/gaps.log"),
    conda:
        "../../environment.yml"
    threads: run_config.limits.threads
    resources:
        mem_mb=mem_mb,
        runtime=minutes(240),
        gpu=GPUS,
    params:
        methods=run_config.ablation.methods,
        components=run_config.ablation.components,
        seed=run_config.seed,
        code=code("gaps"),
    script:
        "../scripts/stage.py"


rule figures:
    input:
        results("{task}", "gaps.csv"),
        lambda wildcards: [
            layout.constants(wildcards.task, method)
            for method in run_config.ablation.fitted()
        ],
    output:
        expand(
            results("{{task}}", "{name}.{format}"),
            name=run_config.ablation.figures(),
            format=("svg", "png"),
        ),
    log:
        results("{task}", "logs/figures.log"),
    localrule: True
    conda:
        "../../environment.yml"
    params:
        code=code("figures"),
    script:
        "../scripts/stage.py"
