if INTERACTIONS:
    EXPERIMENT_ROWS.append(shown(EDGE_ABLATIONS, INTERACTIONS.ablations))

    rule interaction_ranking:
        input:
            model=layout.model_json,
            prompts=task_files("prompts.h5"),
            activations=task_files("activations.h5"),
        output:
            ranking=interactions("ranking.csv"),
        log:
            interactions("logs/ranking.log"),
        benchmark:
            benchmarked("{task}/interaction-ranking")
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=mem_mb,
            runtime=minutes(1440),
            gpu=GPUS,
        params:
            stage="interaction_ranking",
            rows=computed(EDGE_ABLATIONS, INTERACTIONS.ablations[:1]),
            settings=INTERACTIONS.fit(INTERACTIONS.ablations[0]),
            seed=run_config.seed,
            code=code("interaction_ranking", EDGE_ABLATIONS[INTERACTIONS.ablations[0]]),
        script:
            "../scripts/stage.py"

    rule interactions:
        input:
            model=layout.model_json,
            prompts=task_files("prompts.h5"),
            activations=task_files("activations.h5"),
            ranking=interactions("ranking.csv"),
        output:
            **{
                name: interactions(f"{{ablation}}/{name}.csv")
                for name in INTERACTION_TABLES
            },
            by_prompt=interactions("{ablation}/by-prompt.safetensors"),
        log:
            interactions("logs/{ablation}.log"),
        benchmark:
            benchmarked("{task}/interactions-{ablation}")
        wildcard_constraints:
            ablation="|".join(INTERACTIONS.ablations),
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=mem_mb,
            runtime=minutes(1440),
            gpu=GPUS,
        params:
            stage="interactions",
            rows=lambda wildcards: computed(EDGE_ABLATIONS, [wildcards.ablation]),
            settings=lambda wildcards: INTERACTIONS.read_by(wildcards.ablation),
            seed=run_config.seed,
            code=lambda wildcards: code(
                "interactions", EDGE_ABLATIONS[wildcards.ablation]
            ),
        script:
            "../scripts/stage.py"

    rule interaction_figures:
        input:
            **{
                name: [
                    interactions(f"{ablation}/{name}.csv")
                    for ablation in INTERACTIONS.ablations
                ]
                for name in INTERACTION_TABLES
            },
            model=layout.model_json,
        output:
            **{
                name: told("interactions", interactions(f"{name}.csv"))
                for name in INTERACTION_TABLES
            },
            figures=drawn(
                "interactions",
                lambda name: interactions(f"figures/{name}"),
                INTERACTIONS.figures(),
            ),
        log:
            interactions("logs/figures.log"),
        localrule: True
        conda:
            "../../environment.yml"
        params:
            stage="interaction_figures",
            rows=shown(EDGE_ABLATIONS, INTERACTIONS.ablations),
            code=code("interaction_figures"),
        script:
            "../scripts/stage.py"
