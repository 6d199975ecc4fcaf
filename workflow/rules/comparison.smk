if run_config.compare:

    rule comparison:
        input:
            unpack(lambda wildcards: inputs_of("comparison", other=wildcards.other)),
        output:
            **{
                name: told("comparison", path, task="{other}")
                for name, path in comparison_files(layout, "{other}").items()
            },
        log:
            f"{layout.results_dir}/logs/compared-with-{{other}}.log",
        wildcard_constraints:
            other="|".join(map(re.escape, compared_runs(run_config))),
        localrule: True
        conda:
            "../../environment.yml"
        params:
            stage="comparison",
            config=asked_of_a_run,
            rows=[rows for experiment in EXPERIMENT_ROWS for rows in experiment],
            code=code("comparison"),
        script:
            "../scripts/stage.py"
