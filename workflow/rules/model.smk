rule demo:
    output:
        directory(layout.demo_model),
    params:
        settings=run_config.demo_model.model_dump(),
        code=code("demo"),
    log:
        f"{layout.model_dir}/logs/demo.log",
    threads: 2
    resources:
        mem_mb=4000,
        runtime=30,
    script:
        "../scripts/stage.py"


rule model:
    input:
        layout.demo_model if run_config.model == "demo" else [],
    output:
        layout.model_json,
    params:
        settings=model_settings(run_config),
        code=code("model"),
    log:
        f"{layout.model_dir}/logs/model.log",
    threads: run_config.limits.threads
    resources:
        mem_mb=mem_mb,
        runtime=60,
        gpu=GPUS,
    script:
        "../scripts/stage.py"
