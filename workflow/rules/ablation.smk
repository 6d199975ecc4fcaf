rule optimal:
    input:
        model=layout.model_json,
        prompts=task_files("prompts.h5"),
        activations=task_files("activations.h5"),
        start=lambda wildcards: (
            layout.constants(wildcards.task, start)
            if (start := run_config.ablation.starts_from(wildcards.method))
            else []
        ),
    output:
        constants=results("{task}", "constants-{method}.safetensors"),
    log:
        results("{task}", "logs/optimal-{method}.log"),
    benchmark:
        benchmarked("{task}/optimal-{method}")
    wildcard_constraints:
        method="|".join(run_config.ablation.fitted()) or "none",
    priority: 1  # gaps and circuits wait for it
    conda:
        "../../environment.yml"
    threads: run_config.limits.threads
    resources:
        mem_mb=mem_mb,
        runtime=minutes(720),
        gpu=GPUS,
    params:
        stage="optimal",
        type=lambda wildcards: computed(ABLATION_TYPES, [wildcards.method]),
        components=run_config.ablation.components,
        settings=run_config.ablation.optimal.model_dump(),
        seed=run_config.seed,
        code=code("optimal"),
    script:
        "../scripts/stage.py"


rule gaps:
    input:
        model=layout.model_json,
        prompts=task_files("prompts.h5"),
        activations=task_files("activations.h5"),
        constants=constants,
    output:
        gaps=told("ablation", results("{task}", "gaps.csv")),
        summary=told("ablation", results("{task}", "summary.csv")),
        by_prompt=results("{task}", "gaps-by-prompt.safetensors"),
    log:
        results("{task}", "logs/gaps.log"),
    benchmark:
        benchmarked("{task}/gaps")
    conda:
        "../../environment.yml"
    threads: run_config.limits.threads
    resources:
        mem_mb=mem_mb,
        runtime=minutes(240),
        gpu=GPUS,
    params:
        stage="gaps",
        types=computed(ABLATION_TYPES, run_config.ablation.methods),
        components=run_config.ablation.components,
        seed=run_config.seed,
        code=code(
            "gaps", *(ABLATION_TYPES[method] for method in run_config.ablation.methods)
        ),
    script:
        "../scripts/stage.py"


rule figures:
    input:
        model=layout.model_json,
        gaps=results("{task}", "gaps.csv"),
        constants=constants,
    output:
        figures=drawn(
            "ablation",
            lambda name: results("{task}", name),
            run_config.ablation.figures(),
        ),
    log:
        results("{task}", "logs/figures.log"),
    localrule: True
    conda:
        "../../environment.yml"
    params:
        stage="figures",
        rows=shown(ABLATION_TYPES, run_config.ablation.methods),
        code=code("figures"),
    script:
        "../scripts/stage.py"
