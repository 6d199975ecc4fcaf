if LENSES:

    rule lens_activations:
        input:
            layout.model_json,
            f"{layout.model_dir}/{{task_dir}}/prompts.h5",
        output:
            f"{layout.model_dir}/{{task_dir}}/activations-all.h5",
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
            code=code("lens_activations"),
        script:
            "../scripts/stage.py"

    rule lens_fit:
        input:
            layout.model_json,
            task_files("prompts.h5"),
            lens_rows,
            lambda wildcards: (
                layout.lens(wildcards.task, "oca.safetensors")
                if wildcards.lens == "linear_oca"
                else []
            ),
        output:
            lenses("{lens}.safetensors"),
        log:
            lenses("logs/fit-{lens}.log"),
        wildcard_constraints:
            lens="|".join(run_config.lenses.fitted_files()) or "none",
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=mem_mb,
            runtime=minutes(720),
            gpu=GPUS,
        params:
            settings=lens_settings,
            seed=run_config.seed,
            code=code("lens_fit"),
        script:
            "../scripts/stage.py"

    rule lens_evaluation:
        input:
            layout.model_json,
            task_files("prompts.h5"),
            lens_rows,
            lens_files(run_config.lenses.lenses),
        output:
            [
                lenses(f"{name}.csv")
                for name in ("loss", "pictures", "lengths")
                if name != "lengths" or LENSES["lengths"]
            ],
        log:
            lenses("logs/evaluation.log"),
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=mem_mb,
            runtime=minutes(240),
            gpu=GPUS,
        params:
            settings={
                key: LENSES[key]
                for key in ("lenses", "init", "positions", "lengths", "pictures")
            },
            seed=run_config.seed,
            code=code("lens_evaluation"),
        script:
            "../scripts/stage.py"

    for SECTION in LENS_SECTIONS:
        if getattr(run_config.lenses, SECTION) is None:
            continue

        rule:
            name:
                f"lens_{SECTION}"
            input:
                layout.model_json,
                task_files("prompts.h5"),
                lens_rows,
                lens_files(getattr(run_config.lenses, SECTION).lenses),
                labelled_files if SECTION == "truthfulness" else [],
            output:
                lenses(f"{SECTION}.csv"),
            log:
                lenses(f"logs/{SECTION}.log"),
            conda:
                "../../environment.yml"
            threads: run_config.limits.threads
            resources:
                mem_mb=mem_mb,
                runtime=minutes(720),
                gpu=GPUS,
            params:
                settings=LENSES[SECTION],
                init=LENSES["init"] if "tuned" in LENSES[SECTION]["lenses"] else None,
                positions=LENSES["positions"],
                seed=run_config.seed,
                code=code(f"lens_{SECTION}"),
            script:
                "../scripts/stage.py"

    rule lens_figures:
        input:
            [
                lenses(f"{name}.csv")
                for name in (*run_config.lenses.tables(), "pictures")
            ],
        output:
            [
                lenses(f"figures/{name}.{format}")
                for name in run_config.lenses.figures()
                for format in ("svg", "png")
            ],
            [
                lenses(f"figures/prompt_{number}.svg")
                for number in range(LENSES["pictures"])
            ],
        log:
            lenses("logs/figures.log"),
        localrule: True
        conda:
            "../../environment.yml"
        params:
            code=code("lens_figures"),
        script:
            "../scripts/stage.py"
