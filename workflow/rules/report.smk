rule report:
    input:
        **inputs_of("report"),
    output:
        report=told("page", layout.report, task=None),
    log:
        f"{layout.results_dir}/logs/report.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        stage="report",
        config=asked_of_a_run,
        rows=[rows for experiment in EXPERIMENT_ROWS for rows in experiment],
        code=code("report"),
    script:
        "../scripts/stage.py"
