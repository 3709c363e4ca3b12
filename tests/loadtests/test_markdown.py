from nestedfp.loadtests.markdown import markdown


def test_each_row_is_a_line_below_the_head_and_its_rule() -> None:
    assert markdown(["load", "share"], [["60 %", "0.7"], ["90 %", ""]]).splitlines() == [
        "| load | share |",
        "| --- | --- |",
        "| 60 % | 0.7 |",
        "| 90 % |  |",
    ]
