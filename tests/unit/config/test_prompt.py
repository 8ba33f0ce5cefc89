"""The prompt of a model: its file, what is given against what was trained, and how a run writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.config import DEFAULT_PROMPT, Prompt
from coordexp.config.prompt import (
    PROMPT_FILE,
    RUN_NAMES,
    SETTINGS,
    describe,
    find_prompt,
    given_by_run,
    read_prompt,
    settle,
    with_prompt,
    write_prompt,
)
from coordexp.config.schema.custom import Custom
from coordexp.errors import ConfigError

TRAINED = Prompt(user="Find every object.", system="You detect.", max_pixels=501_760, rendered="whole text")

prompts = st.builds(
    Prompt,
    user=st.text(min_size=1),
    system=st.none() | st.text(min_size=1),
    media_order=st.sampled_from(["media_first", "text_first"]),
    min_pixels=st.none() | st.integers(1, 1000),
    max_pixels=st.none() | st.integers(1000, 10**9),
    object_field_order=st.sampled_from(["desc_first", "geometry_first"]),
    object_ordering=st.sampled_from(["sorted", "random"]),
    rendered=st.none() | st.text(),
)


@settings(max_examples=50)
@given(prompt=prompts)
def test_what_is_written_is_read(prompt: Prompt, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_prompt(folder, prompt)
    assert read_prompt(folder) == (folder / PROMPT_FILE, prompt)


def test_the_file_is_plain_json_with_a_version(tmp_path: Path):
    write_prompt(tmp_path, Prompt(user="Où ?"))
    assert json.loads((tmp_path / PROMPT_FILE).read_text("utf-8")) == {
        "version": 1,
        "user": "Où ?",
        "system": None,
        "template": "qwen3_vl",
        "media_order": "media_first",
        "min_pixels": None,
        "max_pixels": None,
        "object_field_order": "desc_first",
        "object_ordering": "sorted",
        "rendered": None,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"version": 2}', r"coordexp_prompt\.json: version 2; this release of coordexp reads version 1"),
        ('{"user": "a"}', r"version null; this release"),
        ("[]", r"version \[\]; this release"),
        ('{"version": 1, "usr": "a"}', r"usr in .*coordexp_prompt\.json: unknown key; did you mean user\?"),
        ('{"version": 1, "user": 3}', r"user = 3 in .*coordexp_prompt\.json: expected a valid string"),
        ('{"version": 1', r"coordexp_prompt\.json:1: not valid JSON"),
    ],
)
def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path, content: str, message: str):
    (tmp_path / PROMPT_FILE).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_prompt(tmp_path)


def test_the_first_folder_that_holds_a_prompt_counts(tmp_path: Path):
    resumed, model, empty = (tmp_path / name for name in ("resumed", "model", "empty"))
    for folder in (resumed, model, empty):
        folder.mkdir()
    write_prompt(model, TRAINED)
    write_prompt(resumed, Prompt())
    assert find_prompt([None, empty, str(model)]) == (model / PROMPT_FILE, TRAINED)
    assert find_prompt([resumed, model]) == (resumed / PROMPT_FILE, Prompt())
    assert find_prompt([None, empty, tmp_path / "gone", "owner/model"]) is None


class TestSettle:
    @pytest.fixture
    def found(self, tmp_path: Path):
        write_prompt(tmp_path, TRAINED)
        return read_prompt(tmp_path)

    def test_what_is_not_given_is_as_trained(self, found):
        assert settle(found, {}) == (TRAINED.model_copy(update={"rendered": None}), [])

    def test_without_a_record_the_defaults_hold(self):
        prompt, differences = settle(None, {"system": "Be brief."})
        assert (prompt.user, prompt.system, differences) == (DEFAULT_PROMPT, "Be brief.", [])

    def test_what_is_given_wins_and_what_differs_is_told_in_full(self, found):
        long = "Find " + "very " * 50 + "small cats."
        prompt, differences = settle(
            found, {"user": long, "system": None, "max_pixels": 501_760, "object_ordering": "random"}
        )
        assert (prompt.user, prompt.system, prompt.object_ordering) == (long, None, "random")
        assert differences == [
            ("user", long, "Find every object."),
            ("system", None, "You detect."),
            ("object_ordering", "random", "sorted"),
        ]
        assert describe(differences, {"user": "--prompt"}) == (
            f'\n  --prompt is "{long}", trained with "Find every object."'
            '\n  system is null, trained with "You detect."'
            '\n  object_ordering is "random", trained with "sorted"'
        )

    def test_limits_that_contradict_each_other_are_refused(self, found):
        with pytest.raises(ConfigError, match=r"min_pixels 501761 is more than max_pixels 501760"):
            settle(found, {"min_pixels": 501_761})


class TestRun:
    def test_every_setting_has_a_name_in_run_files(self):
        assert RUN_NAMES.keys() == set(SETTINGS)

    def test_only_what_a_run_states_is_given(self, tmp_path: Path):
        (tmp_path / "system.txt").write_text("From a file.\n")
        swift = {"system": None, "max_pixels": None, "template": None, "max_steps": 3}
        assert given_by_run(Custom(), swift) == {}
        custom = Custom(prompt=DEFAULT_PROMPT, object_field_order="geometry_first", min_pixels=4096)
        assert given_by_run(custom, {**swift, "system": "A\\nB", "max_pixels": 10_000}) == {
            "user": DEFAULT_PROMPT,
            "object_field_order": "geometry_first",
            "min_pixels": 4096,
            "system": "A\nB",
            "max_pixels": 10_000,
        }
        assert given_by_run(Custom(), {"system": str(tmp_path / "system.txt")}) == {
            "system": "From a file.\n"
        }
        assert given_by_run(Custom(), {"system": ""}) == {"system": None}
        with pytest.raises(ConfigError, match=r"system: gone\.txt: cannot be read"):
            given_by_run(Custom(), {"system": "gone.txt"})

    def test_the_section_takes_over_what_was_settled(self):
        prompt = TRAINED.model_copy(update={"object_field_order": "geometry_first"})
        custom = with_prompt(Custom(head="plain"), prompt)
        assert (custom.prompt, custom.object_field_order, custom.head) == (
            "Find every object.",
            "geometry_first",
            "plain",
        )


def test_messages_hold_system_text_and_one_tag_for_each_image():
    assert Prompt(user="Find.").messages(2) == [{"role": "user", "content": "<image><image>Find."}]
    assert Prompt(user="Find.", system="S", media_order="text_first").messages(1) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Find.<image>"},
    ]
