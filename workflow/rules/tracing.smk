if TRACING:

    rule tracing_fit:
        input:
            layout.model_json,
            layout.prompts("facts"),
        output:
            layout.tracing("constants.safetensors"),
        log:
            layout.tracing("logs/fit.log"),
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=mem_mb,
            runtime=minutes(1440),
            gpu=GPUS,
        params:
            settings={
                key: TRACING[key]
                for key in ("sites", "positions", "windows", "answer", "fit")
            }
            | {"own": "oat" in TRACING["corruptions"]},
            seed=run_config.seed,
            code=code("tracing_fit"),
        script:
            "../scripts/stage.py"

    rule tracing:
        input:
            layout.model_json,
            layout.prompts("facts"),
            (
                layout.tracing("constants.safetensors")
                if run_config.tracing.fitted
                else []
            ),
        output:
            [layout.tracing(name) for name in ("aie.csv", "pictures.csv", "facts.json")],
        log:
            layout.tracing("logs/tracing.log"),
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=mem_mb,
            runtime=minutes(720),
            gpu=GPUS,
        params:
            settings={key: TRACING[key] for key in TRACING if key != "fit"},
            seed=run_config.seed,
            code=code("tracing"),
        script:
            "../scripts/stage.py"

    rule tracing_figures:
        input:
            [layout.tracing(name) for name in ("aie.csv", "pictures.csv")],
        output:
            [
                layout.tracing(f"figures/{name}.{format}")
                for name in run_config.tracing.figures()
                for format in ("svg", "png")
            ],
        log:
            layout.tracing("logs/figures.log"),
        localrule: True
        conda:
            "../../environment.yml"
        params:
            code=code("tracing_figures"),
        script:
            "../scripts/stage.py"
