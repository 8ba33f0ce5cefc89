"""Descriptions to categories: by name, by nearest embedding, and the report of what was done."""

from __future__ import annotations

import numpy as np
import pytest

from coordexp.errors import ConfigError
from coordexp.eval.desc_mapping import DescEmbedder, map_descs

VECTORS = {
    "cat": (1.0, 0.0),
    "dog": (0.0, 1.0),
    "kitten": (0.8, 0.6),
    "bark": (-0.6, 0.8),
    "void": (-1.0, 0.0),
}


def embed(texts):
    return np.array([VECTORS[text] for text in texts])


def test_names_match_whatever_their_case_and_white_space():
    mapping = map_descs(["cat", "Cat", " CAT", "cat", "traffic  Light", "unicorn"], ["cat", "traffic light"])
    assert mapping.desc_map == {"Cat": "cat", " CAT": "cat", "traffic  Light": "traffic light"}
    assert (mapping.num_exact, mapping.num_mapped, mapping.num_dropped) == (2, 3, 1)
    assert mapping.report()["dropped"] == [
        {"desc": "unicorn", "nearest": None, "similarity": None, "count": 1}
    ]


@pytest.mark.parametrize("category", ["caf\u00e9", "cafe\u0301"])
def test_names_match_whatever_their_unicode_form(category):
    """An accented letter of one code point or of two; of Hangul, syllables or their parts."""
    mapping = map_descs(["caf\u00e9", "cafe\u0301", "CAFE\u0301", "\u1100\u1161"], [category, "\uac00"])
    assert mapping.num_dropped == 0
    assert (mapping.num_exact, mapping.num_mapped) == (1, 3)
    assert set(mapping.desc_map.values()) == {category, "\uac00"}


def test_a_name_that_two_categories_share_but_for_case_maps_to_neither():
    mapping = map_descs(["POLO", "Polo"], ["polo", "Polo"])
    assert mapping.desc_map == {}
    assert (mapping.num_exact, mapping.num_dropped) == (1, 1)


def test_the_nearest_category_is_taken_from_the_threshold_on():
    descs = ["kitten", "kitten", "bark", "void", "dog"]
    mapping = map_descs(descs, ["cat", "dog"], embed=embed, threshold=0.8)
    assert mapping.desc_map == {"kitten": "cat", "bark": "dog"}
    report = mapping.report()
    assert (report["method"], report["threshold"]) == ("semantic", 0.8)
    assert report["mapped"] == [
        {"desc": "kitten", "category": "cat", "similarity": 0.8, "count": 2},
        {"desc": "bark", "category": "dog", "similarity": 0.8, "count": 1},
    ]
    assert report["dropped"] == [{"desc": "void", "nearest": "dog", "similarity": 0.0, "count": 1}]
    assert map_descs(descs, ["cat", "dog"], embed=embed, threshold=0.81).desc_map == {}


def test_no_categories_and_no_descriptions():
    assert map_descs(["kitten"], [], embed=embed).num_dropped == 1
    assert map_descs([], ["cat"], embed=embed).matches == ()


@pytest.mark.slow
def test_a_real_model_maps_synonyms_and_embeds_every_text_once():
    embedder = DescEmbedder(batch_size=2)
    mapping = map_descs(["sofa", "automobile", "unicorn"], ["couch", "car", "dog"], embed=embedder)
    assert mapping.desc_map == {"sofa": "couch", "automobile": "car"}
    vectors = embedder(["sofa", "dog"])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1.0, 1.0], abs=1e-6)
    embedder._model = None  # everything below is known already: a new load would fail on this path
    embedder.model_path = "nowhere"
    np.testing.assert_array_equal(embedder(["dog", "sofa"]), vectors[::-1])


def test_misuse_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"semantic threshold is 1\.5"):
        map_descs(["a"], ["b"], threshold=1.5)
    with pytest.raises(ConfigError, match="no folder of a sentence-transformers model"):
        DescEmbedder(tmp_path)
