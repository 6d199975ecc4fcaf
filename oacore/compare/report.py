"""What the report of a run says of the runs that it is compared with."""

import pandas as pd

from oacore.compare.differences import differ, how_errors_were_added, most_different
from oacore.report.numbers import SIGNIFICANT, Estimate
from oacore.report.parts import Section, Table


def comparison_section(other: str, page: str, numbers: pd.DataFrame) -> Section:
    """A row for each table of both runs.

    Args:
        other: the name of the run that this one is compared with.
        page: the file beside the report that has all of it.
        numbers: as `oacore.compare.numbers.numbers_of_both` gives them.
    """
    rows = []
    for table, of_table in numbers.groupby("table", sort=False):
        most = most_different(of_table, 1).iloc[0]
        rows.append(
            {
                "table": table,
                "numbers of both": len(of_table),
                "same prompts": int(of_table["paired"].sum()),
                "differ": int(differ(of_table).sum()),
                "differs most": most["row"],
                "by": Estimate(most["difference"], most["se"]),
            }
        )
    intro = (
        f"What is other than in the run {other}; {page}, beside this page, has settings, every table, fronts and "
        f"circuits. Numbers differ where they are more than {SIGNIFICANT:g} standard errors of the difference apart. "
        f"{how_errors_were_added(numbers)}"
    )
    caption = f"Numbers of this run less those of {other}; by: the difference that is largest in standard errors."
    return Section(f"Compared with {other}", intro, [Table(pd.DataFrame(rows), caption)])
