"""Asking for some classes only: what the prompt says of them, and answers that name others."""

from __future__ import annotations

from collections.abc import Sequence

from coordexp.codec.descs import folded_desc
from coordexp.config.schema.prompt import CLASSES_PLACE, DEFAULT_PROMPT, Prompt
from coordexp.errors import ConfigError
from coordexp.inference.asking import QWEN_QUESTION

NOT_IN_CLASSES = "not_in_classes"
"""Why a detection of another class is dropped."""

_SENTENCES = {
    DEFAULT_PROMPT: f"Detect all objects in the image that belong to these classes: {CLASSES_PLACE}.",
    QWEN_QUESTION: "Locate every object in the image that belongs to the following categories: "
    f"{CLASSES_PLACE}. Report bbox coordinates in JSON format.",
}


def checked_classes(classes: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names without those that differ in case or blanks alone; None stands for any class.

    Raises ConfigError for a single text, no name at all, and a name of blanks.
    """
    if classes is None:
        return None
    if isinstance(classes, str):
        raise ConfigError(f"classes is the text {classes!r}: expected a list of names, such as [{classes!r}]")
    names: dict[str, str] = {}
    for name in classes:
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"classes holds {name!r}: expected names with something to read")
        names.setdefault(folded_desc(name), name.strip())
    if not names:
        raise ConfigError("classes is empty: expected names of classes, or None for any")
    return tuple(names.values())


def prompt_for(prompt: Prompt, user: str | None, classes: Sequence[str] | None) -> Prompt:
    """The question for these classes.

    user: the caller's own user message; `{classes}` in it is where the names go.
    classes: None asks for any.

    Raises ConfigError for an empty message, and one that wants names where none are given.
    """
    text = prompt.user if user is None else user
    if not text.strip():
        raise ConfigError(
            "prompt is empty: expected a user message, or None for the one the model was trained with"
        )
    if classes is None:
        if CLASSES_PLACE in text:
            raise ConfigError(f"prompt has a place for {CLASSES_PLACE}, but no classes are given")
        return prompt if user is None else prompt.model_copy(update={"user": text, "rendered": None})
    sentence = text if CLASSES_PLACE in text else _SENTENCES.get(text, f"{text} Classes: {CLASSES_PLACE}.")
    return prompt.model_copy(
        update={"user": sentence.replace(CLASSES_PLACE, ", ".join(classes)), "rendered": None}
    )
