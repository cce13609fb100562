"""Our scores against scikit-learn's, on any labels and scores, ties included."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from fl_core.runtime import scores

pairs = st.integers(1, 60).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 1), min_size=n, max_size=n),
        st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.25000001, 1.0, 1e9]), min_size=n, max_size=n),
    )
)
labels = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 4), min_size=n, max_size=n) for _ in range(2)])
)


@given(pairs)
@settings(max_examples=150, deadline=None)
def test_ranking_scores_equal_scikit_learn(pair: tuple[list[int], list[float]]) -> None:
    y, s = pair
    if len(set(y)) < 2:
        assert scores.roc_auc(y, s) is None
        assert scores.average_precision(y, s) is None
        return
    assert scores.roc_auc(y, s) == pytest.approx(reference.roc_auc_score(y, s), abs=1e-12)
    assert scores.average_precision(y, s) == pytest.approx(reference.average_precision_score(y, s), abs=1e-12)


@given(labels)
@settings(max_examples=150, deadline=None)
def test_label_scores_equal_scikit_learn(pair: tuple[list[int], list[int]]) -> None:
    y, p = pair
    assert scores.accuracy(y, p) == pytest.approx(reference.accuracy_score(y, p))
    assert scores.f1_macro(y, p) == pytest.approx(reference.f1_score(y, p, average="macro", zero_division=0))
    with warnings.catch_warnings():  # of a label that occurs in the prediction alone
        warnings.simplefilter("ignore", UserWarning)
        assert scores.balanced_accuracy(y, p) == pytest.approx(reference.balanced_accuracy_score(y, p))
    y1, p1 = [int(v == 1) for v in y], [int(v == 1) for v in p]
    assert scores.f1(y, p) == pytest.approx(reference.f1_score(y1, p1, zero_division=0))
    assert scores.precision(y, p) == pytest.approx(reference.precision_score(y1, p1, zero_division=0))
    assert scores.recall(y, p) == pytest.approx(reference.recall_score(y1, p1, zero_division=0))


def test_text_labels_and_nothing() -> None:
    assert scores.f1_macro(["rust", "blight"], ["rust", "rust"]) == pytest.approx(1 / 3)
    assert (
        scores.defined(accuracy=scores.accuracy([], []), f1_macro=scores.f1_macro([], []), f1=scores.f1([], [])) == {}
    )


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        scores.roc_auc([0, 1], [np.nan, 1.0])
    with pytest.raises(ValueError, match="equally long"):
        scores.roc_auc([0, 1], [1.0])
