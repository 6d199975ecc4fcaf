rule report:
    input:
        layout.model_json,
        [layout.prompts(task) for task in TASKS],
        [
            results(task, name)
            for task in run_config.ablation_tasks()
            for name in ("gaps.csv", "summary.csv")
        ],
        [
            results(task, f"{name}.svg")
            for task in run_config.ablation_tasks()
            for name in run_config.ablation.figures()
        ],
        [
            layout.circuits(task, name)
            for task in run_config.circuit_tasks()
            for name in ("pareto.csv", "stability.csv")
        ],
        [
            layout.circuits(task, f"figures/{name}.svg")
            for task in run_config.circuit_tasks()
            for name in (
                *run_config.circuits.figures(),
                *(f"circuit_{name}" for name in run_config.circuits.ablations),
            )
        ],
        (
            [
                layout.tracing(name)
                for name in (
                    "aie.csv",
                    "facts.json",
                    "pictures.csv",
                    *(f"figures/{name}.svg" for name in run_config.tracing.figures()),
                )
            ]
            if TRACING
            else []
        ),
        [
            layout.lens(task, name)
            for task in run_config.lens_tasks()
            for name in (
                *(f"{name}.csv" for name in run_config.lenses.tables()),
                *(f"figures/{name}.svg" for name in run_config.lenses.figures()),
                *(
                    f"figures/prompt_{number}.svg"
                    for number in range(run_config.lenses.pictures)
                ),
            )
        ],
    output:
        layout.report,
    log:
        f"{layout.results_dir}/logs/report.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        config=run_config.model_dump(mode="json", exclude={"limits", "device"}),
        code=code("report"),
    script:
        "../scripts/stage.py"
