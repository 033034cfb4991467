"""What else leaves a client: settings that decide no weights, and whose change needs the clients' consent."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from splitfl.config.optional_measures import OF_ANSWERS, OF_LABELS, OptionalMeasure
from splitfl.config.section import Section, SettingClass


class Exposed(Section):
    """A setting that a section of this kind declares decides what leaves a client."""

    decides: ClassVar[SettingClass | None] = SettingClass.EXPOSURE


class FederationExposure(Exposed):
    """When held-out text is measured."""

    evaluate: Literal["ends", "rounds"] = "ends"
    """Evaluate each client's held-out text before and after the run, or after every round as well."""


class EvaluationSection(Exposed):
    """What is measured on held-out text besides loss, perplexity and token accuracy; see docs/evaluation.md."""

    measures: tuple[OptionalMeasure, ...] = ()
    """`exact_match` and `rouge_l` compare greedily generated text with the completions; `accuracy` and `macro_f1`
    classify: the label word that is likeliest as completion is the prediction. All need prompts and completions."""

    max_new_tokens: int = Field(64, ge=1)
    """Tokens that are generated at most in answer to a prompt."""

    num_examples: int = Field(32, ge=0)
    """Prompts that are answered in an evaluation, spread evenly over the held-out examples; 0 answers all. Classifying
    takes all."""

    label_words: tuple[str, ...] = ()
    """The label words, spelt as the completions are, a leading space included; empty takes each client's from its own
    completions."""

    @property
    def generates(self) -> bool:
        """Whether prompts are answered."""
        return not OF_ANSWERS.isdisjoint(self.measures)

    @property
    def classifies(self) -> bool:
        """Whether label words are compared."""
        return not OF_LABELS.isdisjoint(self.measures)

    @model_validator(mode="after")
    def _has_words_to_choose_from(self) -> Self:
        if len(set(self.label_words)) != len(self.label_words) or len(self.label_words) == 1 or "" in self.label_words:
            raise ValueError("label_words must be two or more different words, or [] to take them from the data")
        if self.label_words and not self.classifies:
            raise ValueError('label_words are for classification: add "accuracy" or "macro_f1" to measures')
        return self
