if VISION:
    EXPERIMENT_ROWS.append(shown(MEASURES, VISION.measures()))

    rule vision_model:
        output:
            multiext(
                f"{layout.vision_dir}/",
                model="model.json",
                weights="weights.safetensors",
                images="images.safetensors",
            ),
        log:
            f"{layout.vision_dir}/logs/model.log",
        cache: True
        conda:
            "../../environment.yml"
        threads: 1
        resources:
            mem_mb=vision_mem_mb,
            runtime=minutes(30),
        params:
            stage="vision_model",
            settings=vision_settings(run_config),
            code=code("vision_model"),
        script:
            "../scripts/stage.py"

    rule vision:
        input:
            model=layout.vision_model("model.json"),
            weights=layout.vision_model("weights.safetensors"),
            images=layout.vision_model("images.safetensors"),
        output:
            **{name: layout.vision(f"{{units}}/{name}.csv") for name in VISION_TABLES},
            by_image=layout.vision("{units}/by-image.safetensors"),
        log:
            layout.vision("logs/{units}.log"),
        wildcard_constraints:
            units="|".join(VISION.units),
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=vision_mem_mb,
            runtime=minutes(240),
        params:
            stage="vision",
            rows=computed(REPLACEMENTS, VISION.replacements),
            measures=computed(MEASURES, VISION.measures()),
            settings=lambda wildcards: VISION.read_by(wildcards.units),
            seed=run_config.seed,
            code=code("vision"),
        script:
            "../scripts/stage.py"

    rule vision_figures:
        input:
            **{
                name: [layout.vision(f"{units}/{name}.csv") for units in VISION.units]
                for name in VISION_TABLES
            },
            model=layout.vision_model("model.json"),
        output:
            **{
                name: told("vision", layout.vision(f"{name}.csv"), task=None)
                for name in VISION_TABLES
            },
            figures=drawn(
                "vision",
                lambda name: layout.vision(f"figures/{name}"),
                VISION.figures(),
                task=None,
            ),
        log:
            layout.vision("logs/figures.log"),
        localrule: True
        conda:
            "../../environment.yml"
        params:
            stage="vision_figures",
            rows=shown(MEASURES, VISION.measures()),
            reference=VISION.replacements[0],
            code=code("vision_figures"),
        script:
            "../scripts/stage.py"
