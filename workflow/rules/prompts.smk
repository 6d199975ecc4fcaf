rule prompts:
    input:
        model=layout.model_json,
    output:
        prompts=f"{layout.model_dir}/{{task_dir}}/prompts.h5",
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
            GPUS if task_row(layout.task_of(wildcards.task_dir)).completed else 0
        ),
    params:
        stage="prompts",
        # Two tasks of the user's own may have one file and the same settings.
        task=lambda wildcards: layout.task_of(wildcards.task_dir),
        settings=lambda wildcards: task_settings(
            run_config, layout.task_of(wildcards.task_dir)
        ),
        code=lambda wildcards: code(
            "prompts", task_row(layout.task_of(wildcards.task_dir))
        ),
    script:
        "../scripts/stage.py"
