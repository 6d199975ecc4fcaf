rule activations:
    input:
        model=layout.model_json,
        prompts=f"{layout.model_dir}/{{task_dir}}/prompts.h5",
    output:
        activations=f"{layout.model_dir}/{{task_dir}}/activations.h5",
    log:
        f"{layout.model_dir}/{{task_dir}}/logs/activations.log",
    cache: True
    group:
        "prompts-{task_dir}"
    conda:
        "../../environment.yml"
    threads: run_config.limits.threads
    resources:
        mem_mb=mem_mb,
        runtime=minutes(120),
        gpu=GPUS,
    params:
        stage="activations",
        code=code("activations"),
    script:
        "../scripts/stage.py"
