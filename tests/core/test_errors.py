"""Errors the user can act on, and how their messages quote things."""

import pickle

from finetune.core.errors import UserError, first_few, first_line, printable, short


def test_a_user_error_holds_one_problem_a_line_and_an_exit_code():
    error = UserError("one", "two", exit_code=3)
    assert (error.problems, error.exit_code, str(error)) == (("one", "two"), 3, "one\ntwo")
    assert UserError("one").exit_code == 2


def test_a_user_error_survives_pickling():
    copied = pickle.loads(pickle.dumps(UserError("one", exit_code=1)))  # as it comes out of a data worker
    assert (copied.problems, copied.exit_code) == (("one",), 1)


def test_the_first_line_of_a_message_is_cut_at_200_characters():
    assert first_line(ValueError(f"\n {'x' * 300}\nmore")) == "x" * 197 + "..."
    assert first_line(KeyError()) == "KeyError"


def test_a_value_is_quoted_as_yaml_has_it_and_cut_at_60_characters():
    assert [short(value) for value in (None, True, 0.5, "a b", [1, 2])] == ["null", "true", "0.5", "'a b'", "[1, 2]"]
    assert short("x" * 58) == "'" + "x" * 58 + "'"
    assert short("x" * 59) == "'" + "x" * 56 + "..."


def test_a_name_with_control_characters_is_quoted():
    assert (printable("été 1.png"), printable("a\n\x1b[31m.png")) == ("été 1.png", r"'a\n\x1b[31m.png'")


def test_of_many_names_the_first_are_listed():
    assert first_few(["a", "b", "c"]) == "a, b, c"
    assert first_few(["a", "b", "c", "d"]) == "a, b, c, ..."
    assert (first_few("abc", most=2), first_few([])) == ("a, b, ...", "")
    made = map(str, numbers := iter(range(1000)))  # as names that have to be read from a dataset
    assert (first_few(made), next(numbers)) == ("0, 1, 2, ...", 4)
