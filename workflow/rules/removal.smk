if REMOVAL:
    EXPERIMENT_ROWS.append(shown(REMOVAL_METHODS, REMOVAL.methods))
    EXPERIMENT_ROWS.append(shown(EDGE_ABLATIONS, REMOVAL.ablations))

    rule removal:
        input:
            model=layout.model_json,
            prompts=[layout.prompts(task) for task in REMOVAL.tasks()],
        output:
            front=layout.removal("{method}-{ablation}/front.csv"),
            ablations=layout.removal("{method}-{ablation}/ablations.safetensors"),
        log:
            layout.removal("logs/{method}-{ablation}.log"),
        benchmark:
            benchmarked("removal/{method}-{ablation}")
        wildcard_constraints:
            method="|".join(REMOVAL.methods),
            ablation="|".join(REMOVAL.ablations),
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=mem_mb,
            runtime=minutes(1440),
            gpu=GPUS,
        params:
            stage="removal",
            rows=lambda wildcards: [
                *computed(REMOVAL_METHODS, [wildcards.method]),
                *computed(EDGE_ABLATIONS, [wildcards.ablation]),
            ],
            settings=lambda wildcards: REMOVAL.read_by(
                wildcards.method, wildcards.ablation
            ),
            seed=run_config.seed,
            code=lambda wildcards: code(
                "removal",
                REMOVAL_METHODS[wildcards.method],
                EDGE_ABLATIONS[wildcards.ablation],
            ),
        script:
            "../scripts/stage.py"

    rule removal_figures:
        input:
            model=layout.model_json,
            fronts=[
                layout.removal(f"{method}-{ablation}/front.csv")
                for ablation in REMOVAL.ablations
                for method in REMOVAL.methods
            ],
        output:
            front=told("removal", layout.removal("front.csv"), task=None),
            figures=drawn(
                "removal",
                lambda name: layout.removal(f"figures/{name}"),
                REMOVAL.figures(),
                task=None,
            ),
        log:
            layout.removal("logs/figures.log"),
        localrule: True
        conda:
            "../../environment.yml"
        params:
            stage="removal_figures",
            rows=[
                *shown(REMOVAL_METHODS, REMOVAL.methods),
                *shown(EDGE_ABLATIONS, REMOVAL.ablations),
            ],
            code=code("removal_figures"),
        script:
            "../scripts/stage.py"
