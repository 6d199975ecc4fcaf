if LENS_SETTINGS:
    EXPERIMENT_ROWS.append(shown(LENSES, LENS_SETTINGS.lenses))

    rule lens_activations:
        input:
            model=layout.model_json,
            prompts=f"{layout.model_dir}/{{task_dir}}/prompts.h5",
        output:
            rows=f"{layout.model_dir}/{{task_dir}}/activations-all.h5",
        log:
            f"{layout.model_dir}/{{task_dir}}/logs/activations-all.log",
        cache: True
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=mem_mb,
            runtime=minutes(240),
            gpu=GPUS,
        params:
            stage="lens_activations",
            code=code("lens_activations"),
        script:
            "../scripts/stage.py"

    rule lens_fit:
        input:
            model=layout.model_json,
            prompts=task_files("prompts.h5"),
            rows=lens_rows,
            teacher=teacher_file,
        output:
            lens=lenses("{lens}.safetensors"),
        log:
            lenses("logs/fit-{lens}.log"),
        benchmark:
            benchmarked("{task}/lens-fit-{lens}")
        wildcard_constraints:
            lens="|".join(LENS_SETTINGS.fitted_files()) or "none",
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=mem_mb,
            runtime=minutes(720),
            gpu=GPUS,
        params:
            stage="lens_fit",
            row=lambda wildcards: computed(LENSES, [lens_row(wildcards).name]),
            settings=lambda wildcards: LENS_SETTINGS.read_by_fit(wildcards.lens),
            seed=run_config.seed,
            code=lambda wildcards: code("lens_fit", lens_row(wildcards)),
        script:
            "../scripts/stage.py"

    rule lens_evaluation:
        input:
            model=layout.model_json,
            prompts=task_files("prompts.h5"),
            rows=lens_rows,
            lenses=lens_files(LENS_SETTINGS.lenses),
        output:
            loss=told("lenses", lenses("loss.csv")),
            pictures=told("lenses", lenses("pictures.csv")),
            lengths=(
                [told("lenses", lenses("lengths.csv"))]
                if LENS_SETTINGS.lengths
                else []
            ),
            by_prompt=lenses("loss-by-prompt.safetensors"),
        log:
            lenses("logs/evaluation.log"),
        benchmark:
            benchmarked("{task}/lens-evaluation")
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=mem_mb,
            runtime=minutes(240),
            gpu=GPUS,
        params:
            stage="lens_evaluation",
            rows=computed(LENSES, LENS_SETTINGS.lenses),
            settings=LENS_SETTINGS.read_by_evaluation(),
            seed=run_config.seed,
            code=lens_code("lens_evaluation", LENS_SETTINGS.lenses),
        script:
            "../scripts/stage.py"

    for SECTION in LENS_SECTIONS:
        if (section := getattr(LENS_SETTINGS, SECTION)) is None:
            continue

        rule:
            name:
                f"lens_{SECTION}"
            input:
                **(
                    {"datasets": data_sets(section)}
                    if SECTION == "truthfulness"
                    else {}
                ),
                model=layout.model_json,
                prompts=task_files("prompts.h5"),
                rows=lens_rows,
                lenses=lens_files(section.lenses),
            output:
                table=told("lenses", lenses(f"{SECTION}.csv")),
            log:
                lenses(f"logs/{SECTION}.log"),
            benchmark:
                benchmarked(f"{{task}}/lens-{SECTION}")
            conda:
                "../../environment.yml"
            threads: run_config.limits.threads
            resources:
                mem_mb=mem_mb,
                runtime=minutes(720),
                gpu=GPUS,
            params:
                stage=f"lens_{SECTION}",
                rows=computed(LENSES, section.lenses),
                settings=LENS_SETTINGS.read_by_section(SECTION),
                seed=run_config.seed,
                code=lens_code(f"lens_{SECTION}", section.lenses),
            script:
                "../scripts/stage.py"

    rule lens_figures:
        input:
            **{name: lenses(f"{name}.csv") for name in LENS_SETTINGS.tables()},
            model=layout.model_json,
            pictures=lenses("pictures.csv"),
        output:
            figures=drawn(
                "lenses",
                lambda name: lenses(f"figures/{name}"),
                LENS_SETTINGS.figures(),
            ),
            drawings=[
                told("lenses", lenses(f"figures/prompt_{number}.svg"))
                for number in range(LENS_SETTINGS.pictures)
            ],
        log:
            lenses("logs/figures.log"),
        localrule: True
        conda:
            "../../environment.yml"
        params:
            stage="lens_figures",
            rows=shown(LENSES, LENS_SETTINGS.lenses),
            code=code("lens_figures"),
        script:
            "../scripts/stage.py"
