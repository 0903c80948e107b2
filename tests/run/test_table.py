"""The console's tables: names in one column, values in the other."""

from finetune.run.table import table


def test_a_table_indents_the_further_lines_of_a_value():
    assert table("Title", {"a": "1", "name": "2\n3"}) == "Title\n  a     1\n  name  2\n        3"
