"""Measures of held-out text that are taken only where `evaluation.measures` names them."""

from typing import Literal, get_args

MeasureOfAnswers = Literal["exact_match", "rouge_l"]
MeasureOfLabels = Literal["accuracy", "macro_f1"]
OptionalMeasure = Literal[MeasureOfAnswers, MeasureOfLabels]

OF_ANSWERS: frozenset[str] = frozenset(get_args(MeasureOfAnswers))
OF_LABELS: frozenset[str] = frozenset(get_args(MeasureOfLabels))
