if CIRCUITS:
    EXPERIMENT_ROWS += [
        shown(CIRCUIT_METHODS, CIRCUITS.methods),
        shown(EDGE_ABLATIONS, CIRCUITS.ablations),
    ]
    # Of each method, under one ablation type.
    SEARCHES, TIMINGS, LOSSES, PARETOS = (
        [circuits(f"{method}-{{ablation}}/{name}") for method in CIRCUITS.methods]
        for name in (
            "search.safetensors",
            "timing.json",
            "losses.safetensors",
            "pareto.csv",
        )
    )

    rule circuit_search:
        input:
            model=layout.model_json,
            prompts=task_files("prompts.h5"),
            activations=task_files("activations.h5"),
            constants=lambda wildcards: (
                layout.constants(wildcards.task, wildcards.ablation)
                if CIRCUITS.takes_constants(wildcards.method, wildcards.ablation)
                else []
            ),
        output:
            search=circuits("{method}-{ablation}/search.safetensors"),
            timing=circuits("{method}-{ablation}/timing.json"),
        log:
            circuits("logs/search-{method}-{ablation}.log"),
        wildcard_constraints:
            method="|".join(CIRCUITS.methods),
            ablation="|".join(CIRCUITS.ablations),
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=mem_mb,
            runtime=search_minutes,
            gpu=GPUS,
        params:
            stage="circuit_search",
            rows=lambda wildcards: [
                *computed(CIRCUIT_METHODS, [wildcards.method]),
                *computed(EDGE_ABLATIONS, [wildcards.ablation]),
            ],
            settings=lambda wildcards: CIRCUITS.read_by(
                wildcards.method, wildcards.ablation
            ),
            seed=run_config.seed,
            code=lambda wildcards: code(
                "circuit_search",
                CIRCUIT_METHODS[wildcards.method],
                EDGE_ABLATIONS[wildcards.ablation],
            ),
        script:
            "../scripts/stage.py"

    rule circuit_evaluation:
        input:
            model=layout.model_json,
            prompts=task_files("prompts.h5"),
            activations=task_files("activations.h5"),
            searches=SEARCHES,
            timings=TIMINGS,
        output:
            losses=LOSSES,
            paretos=PARETOS,
            circuits=circuit_files(CIRCUITS.methods),
        log:
            circuits("logs/evaluation-{ablation}.log"),
        wildcard_constraints:
            ablation="|".join(CIRCUITS.ablations),
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=mem_mb,
            runtime=minutes(1440),
            gpu=GPUS,
        params:
            stage="circuit_evaluation",
            rows=lambda wildcards: computed(EDGE_ABLATIONS, [wildcards.ablation]),
            refit=lambda wildcards: (
                CIRCUITS.refit.model_dump()
                if EDGE_ABLATIONS[wildcards.ablation].fitted
                else None
            ),
            seed=run_config.seed,
            code=lambda wildcards: code(
                "circuit_evaluation", EDGE_ABLATIONS[wildcards.ablation]
            ),
        script:
            "../scripts/stage.py"

    rule circuit_figures:
        input:
            model=layout.model_json,
            prompts=task_files("prompts.h5"),
            losses=of_every_ablation(LOSSES),
            paretos=of_every_ablation(PARETOS),
            circuits=of_every_ablation(circuit_files(CIRCUITS.methods)),
        output:
            pareto=circuits("pareto.csv"),
            fronts=circuits("fronts.csv"),
            stability=circuits("stability.csv"),
            edge_frequency=circuits("edge_frequency.csv"),
            figures=drawn(lambda name: circuits(f"figures/{name}"), CIRCUITS.figures()),
            drawings=[
                circuits(f"figures/circuit_{ablation}.svg")
                for ablation in CIRCUITS.ablations
            ],
        log:
            circuits("logs/figures.log"),
        localrule: True
        conda:
            "../../environment.yml"
        params:
            stage="circuit_figures",
            rows=[
                *shown(CIRCUIT_METHODS, CIRCUITS.methods),
                *shown(EDGE_ABLATIONS, CIRCUITS.ablations),
            ],
            code=code("circuit_figures"),
        script:
            "../scripts/stage.py"
