if TRACING:
    EXPERIMENT_ROWS.append(shown(CORRUPTIONS, TRACING.corruptions))

    rule tracing_fit:
        input:
            model=layout.model_json,
            prompts=task_files("prompts.h5"),
        output:
            constants=traced("constants.safetensors"),
        log:
            traced("logs/fit.log"),
        benchmark:
            benchmarked("{task}/tracing-fit")
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=mem_mb,
            runtime=minutes(1440),
            gpu=GPUS,
        params:
            stage="tracing_fit",
            settings=TRACING.read_by_fit(),
            seed=run_config.seed,
            code=code("tracing_fit"),
        script:
            "../scripts/stage.py"

    rule tracing:
        input:
            model=layout.model_json,
            prompts=task_files("prompts.h5"),
            constants=place_constants,
        output:
            aie=told("tracing", traced("aie.csv")),
            pictures=told("tracing", traced("pictures.csv")),
            facts=traced("facts.json"),
            by_prompt=traced("aie-by-prompt.safetensors"),
        log:
            traced("logs/tracing.log"),
        benchmark:
            benchmarked("{task}/tracing")
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=mem_mb,
            runtime=minutes(720),
            gpu=GPUS,
        params:
            stage="tracing",
            rows=computed(CORRUPTIONS, TRACING.corruption_kinds()),
            settings=TRACING.read_by_trace(),
            seed=run_config.seed,
            code=code(
                "tracing", *(CORRUPTIONS[kind] for kind in TRACING.corruption_kinds())
            ),
        script:
            "../scripts/stage.py"

    rule tracing_figures:
        input:
            model=layout.model_json,
            aie=traced("aie.csv"),
            pictures=traced("pictures.csv"),
        output:
            figures=drawn(
                "tracing", lambda name: traced(f"figures/{name}"), TRACING.figures()
            ),
        log:
            traced("logs/figures.log"),
        localrule: True
        conda:
            "../../environment.yml"
        params:
            stage="tracing_figures",
            rows=shown(CORRUPTIONS, TRACING.corruption_kinds()),
            code=code("tracing_figures"),
        script:
            "../scripts/stage.py"
