if CIRCUITS:

    rule circuit_search:
        input:
            layout.model_json,
            task_files("prompts.h5"),
            task_files("activations.h5"),
            lambda wildcards: (
                layout.constants(wildcards.task, wildcards.ablation)
                if wildcards.ablation in FITTED
                and wildcards.method in (*RANKED, "acdc")
                else []
            ),
        output:
            circuits("{method}-{ablation}/search.safetensors"),
            circuits("{method}-{ablation}/timing.json"),
        log:
            circuits("logs/search-{method}-{ablation}.log"),
        wildcard_constraints:
            method="|".join(CIRCUITS["methods"]),
            ablation="|".join(CIRCUITS["ablations"]),
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=mem_mb,
            runtime=search_minutes,
            gpu=GPUS,
        params:
            settings=search_settings,
            seed=run_config.seed,
            code=code("circuit_search"),
        script:
            "../scripts/stage.py"

    rule circuit_evaluation:
        input:
            layout.model_json,
            task_files("prompts.h5"),
            task_files("activations.h5"),
            expand(
                circuits("{method}-{ablation}/{file}"),
                method=CIRCUITS["methods"],
                file=("search.safetensors", "timing.json"),
                allow_missing=True,
            ),
        output:
            [name for method in CIRCUITS["methods"] for name in circuit_files(method)],
        log:
            circuits("logs/evaluation-{ablation}.log"),
        wildcard_constraints:
            ablation="|".join(CIRCUITS["ablations"]),
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=mem_mb,
            runtime=minutes(1440),
            gpu=GPUS,
        params:
            refit=lambda wildcards: (
                CIRCUITS["refit"] if wildcards.ablation in FITTED else None
            ),
            seed=run_config.seed,
            code=code("circuit_evaluation"),
        script:
            "../scripts/stage.py"

    rule circuit_figures:
        input:
            layout.model_json,
            lambda wildcards: [
                name.format(task=wildcards.task, ablation=ablation)
                for ablation in CIRCUITS["ablations"]
                for method in CIRCUITS["methods"]
                for name in circuit_files(method)
            ],
        output:
            expand(
                circuits("{name}.csv"),
                name=("pareto", "stability", "edge_frequency"),
                allow_missing=True,
            ),
            expand(
                circuits("figures/{name}.{format}"),
                name=run_config.circuits.figures(),
                format=("svg", "png"),
                allow_missing=True,
            ),
            expand(
                circuits("figures/circuit_{ablation}.svg"),
                ablation=CIRCUITS["ablations"],
                allow_missing=True,
            ),
        log:
            circuits("logs/figures.log"),
        localrule: True
        conda:
            "../../environment.yml"
        params:
            code=code("circuit_figures"),
        script:
            "../scripts/stage.py"
