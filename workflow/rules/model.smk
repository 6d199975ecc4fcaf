rule demo:
    output:
        demo=directory(layout.demo_model),
    log:
        f"{layout.model_dir}/logs/demo.log",
    cache: True
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=minutes(30),
    params:
        stage="demo",
        settings=run_config.demo_model.model_dump(),
        code=code("demo"),
    script:
        "../scripts/stage.py"


rule model:
    input:
        demo=layout.demo_model if run_config.trains_demo else [],
    output:
        # Of several files Snakemake's own cache between workflows takes those of one multiext.
        multiext(
            f"{layout.model_dir}/",
            **{
                name: Path(path).name
                for name, paths in files_of(layout, "model")[1].named().items()
                for path in paths
            },
        ),
    log:
        f"{layout.model_dir}/logs/model.log",
    cache: True
    conda:
        "../../environment.yml"
    threads: run_config.limits.threads
    resources:
        mem_mb=mem_mb,
        runtime=minutes(60),
        gpu=GPUS,
    params:
        stage="model",
        settings=model_settings(run_config),
        code=code("model"),
    script:
        "../scripts/stage.py"
