"""The forms an answer can be written in, behind one interface.

base       AnswerForm: serialise, append, parse, token types
json_form  answers in JSON: CoordJSON, the same with numbers, Qwen3-VL's own
compact    names and coordinate tokens, nothing else
choose     the form of a prompt's `answer_form`
"""

from __future__ import annotations
