if CIRCUITS:
    EXPERIMENT_ROWS += [
        shown(CIRCUIT_METHODS, CIRCUITS.methods),
        shown(EDGE_ABLATIONS, CIRCUITS.ablations),
    ]
    # Of every method, under one ablation type.
    LOSSES, PARETOS = (
        [circuits(f"{method}-{{ablation}}/{name}") for method in CIRCUITS.methods]
        for name in ("losses.safetensors", "pareto.csv")
    )

    # A rule for each method: its knobs name its circuits.
    for method in CIRCUITS.methods:

        rule:
            name:
                f"circuits_{method}"
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
                losses=circuits("{method}-{ablation}/losses.safetensors"),
                pareto=circuits("{method}-{ablation}/pareto.csv"),
                circuits=circuit_files("{method}", CIRCUITS.knobs(method)),
            log:
                circuits("logs/{method}-{ablation}.log"),
            benchmark:
                benchmarked("{task}/circuits-{method}-{ablation}")
            wildcard_constraints:
                method=method,
                ablation="|".join(CIRCUITS.ablations),
            # The longest jobs first, or one of them would be the last, alone.
            priority: 1
            conda:
                "../../environment.yml"
            threads: run_config.limits.threads
            resources:
                mem_mb=mem_mb,
                runtime=minutes(1440),
                gpu=GPUS,
            params:
                stage="circuits",
                rows=lambda wildcards: [
                    *computed(CIRCUIT_METHODS, [wildcards.method]),
                    *computed(EDGE_ABLATIONS, [wildcards.ablation]),
                ],
                settings=lambda wildcards: CIRCUITS.read_by(
                    wildcards.method, wildcards.ablation
                ),
                refit=lambda wildcards: (
                    CIRCUITS.refit.model_dump()
                    if EDGE_ABLATIONS[wildcards.ablation].fitted
                    else None
                ),
                seed=run_config.seed,
                code=lambda wildcards: code(
                    "circuits",
                    CIRCUIT_METHODS[wildcards.method],
                    EDGE_ABLATIONS[wildcards.ablation],
                ),
            script:
                "../scripts/stage.py"

    rule circuit_figures:
        input:
            model=layout.model_json,
            prompts=task_files("prompts.h5"),
            losses=of_every_ablation(LOSSES),
            paretos=of_every_ablation(PARETOS),
            circuits=of_every_ablation(
                path
                for method in CIRCUITS.methods
                for path in circuit_files(method, CIRCUITS.knobs(method))
            ),
        output:
            pareto=told("circuits", circuits("pareto.csv")),
            fronts=told("circuits", circuits("fronts.csv")),
            stability=told("circuits", circuits("stability.csv")),
            edge_frequency=told("circuits", circuits("edge_frequency.csv")),
            figures=drawn(
                "circuits",
                lambda name: circuits(f"figures/{name}"),
                CIRCUITS.figures(),
            ),
            drawings=[
                told("circuits", circuits(f"figures/circuit_{ablation}.svg"))
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
