if STUDY:
    EXPERIMENT_ROWS.append(shown(ESTIMATORS, STUDY.methods))

    # One job runs all that is missing of a member, one stage after another: its clock is to be read with nothing beside
    # it, and two members may share a model's folder.
    rule study_member:
        output:
            member=layout.study("{member}/run.json"),
            comparison=layout.study("{member}/comparison.csv"),
        log:
            layout.study("{member}/logs/run.log"),
        benchmark:
            benchmarked("study/{member}/run")
        wildcard_constraints:
            member="|".join(map(re.escape, MEMBERS)),
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=member_mem_mb,
            runtime=minutes(2880),
            gpu=GPUS,
        params:
            stage="study_member",
            # Settings and code of everything that it runs.
            identity=lambda wildcards: identity(MEMBERS[wildcards.member]),
            code=code("study_member"),
        script:
            "../scripts/stage.py"

    rule study_cost:
        input:
            member=layout.study("{member}/run.json"),
        output:
            cost=layout.study("{member}/cost.csv"),
            accuracy=layout.study("{member}/accuracy.csv"),
        log:
            layout.study("{member}/logs/cost.log"),
        benchmark:
            benchmarked("study/{member}/cost")
        wildcard_constraints:
            member="|".join(map(re.escape, MEMBERS)),
        conda:
            "../../environment.yml"
        threads: run_config.limits.threads
        resources:
            mem_mb=member_mem_mb,
            runtime=minutes(1440),
            gpu=GPUS,
        params:
            stage="study_cost",
            rows=computed(ESTIMATORS, STUDY.methods),
            settings=STUDY.read_by(),
            tasks=run_config.study_tasks(),
            code=code("study_cost", *(ESTIMATORS[name] for name in STUDY.methods)),
        script:
            "../scripts/stage.py"

    rule study_figures:
        input:
            **{
                name: [layout.study(f"{member}/{name}.csv") for member in MEMBERS]
                for name in STUDY_PARTS
            },
            member=[layout.study(f"{member}/run.json") for member in MEMBERS],
        output:
            **{
                name: told("study", layout.study(f"{name}.csv"), task=None)
                for name in STUDY_TABLES
            },
            figures=drawn(
                "study",
                lambda name: layout.study(f"figures/{name}"),
                STUDY.figures(run_config.study_tasks()),
                task=None,
            ),
        log:
            layout.study("logs/figures.log"),
        localrule: True
        conda:
            "../../environment.yml"
        params:
            stage="study_figures",
            rows=shown(ESTIMATORS, STUDY.methods),
            code=code("study_figures"),
        script:
            "../scripts/stage.py"
