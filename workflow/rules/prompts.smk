rule prompts:
    input:
        layout.model_json,
    output:
        f"{layout.model_dir}/{{task_dir}}/prompts.h5",
    log:
        f"{layout.model_dir}/{{task_dir}}/logs/prompts.log",
    cache: True
    group:
        "prompts-{task_dir}"
    conda:
        "../../environment.yml"
    threads: run_config.limits.threads
    resources:
        mem_mb=mem_mb,
        runtime=minutes(60),
        gpu=lambda wildcards: (
            GPUS if layout.task_of(wildcards.task_dir) == "facts" else 0
        ),
    params:
        settings=lambda wildcards: task_settings(
            run_config, layout.task_of(wildcards.task_dir)
        ),
        code=code("prompts"),
    script:
        "../scripts/stage.py"
